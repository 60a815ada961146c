#!/bin/sh
# Choose the filtered images worth training on. Settings are environment variables; flags of
# post_processing/resample.py may follow, such as --policy hardness or --max-per-mask 5.
#   FILTERED=outputs/filtered IOU=logs/segmentor/val/results.json sh resample.sh
#   FILTERED=outputs/filtered RARE="agriculture construction, grass" sh resample.sh --valid-ratio 0.7
# RARE names classes, separated by commas.
set -eu
cd "$(dirname "$0")"
PYTHON=$(sh scripts/setup_env.sh seg)
set -- --filtered-mask-path "${FILTERED:-outputs/filtered}" --out-dir "${OUT_DIR:-outputs/resampled}" "$@"
if [ -n "${IOU:-}" ]; then set -- "$@" --iou "$IOU"; fi
if [ -n "${RARE:-}" ]; then
    set -f # a name is no pattern of files
    IFS=,
    # shellcheck disable=SC2086  # several names
    set -- "$@" --rare $RARE
fi
exec "$PYTHON" -m post_processing.resample "$@"
