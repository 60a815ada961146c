#!/bin/sh
# Lint and test. Arguments go to pytest: sh test.sh -k demo
# The segmentors are tested too, hence the group seg.
set -eu
cd "$(dirname "$0")"
PYTHON=$(sh scripts/setup_env.sh test seg)
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -q "$@"
