#!/bin/sh
# Does this machine's GPU train and sample, and how fast? One command for a new machine; 4 minutes unless told otherwise.
#   sh scripts/gpu_check.sh [MINUTES] [--out DIR] [--find-links DIR_OF_WHEELS] [--device cpu --tiny]
# Works with torch 2.11 to 2.13. Packages that are missing are installed from the wheels, into OUT/packages only.
# OUT (gpu_check/) gets gpu_check.json (everything), log.txt (what the steps printed) and what they made.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
