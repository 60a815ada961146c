#!/bin/sh
# Measure what synthesized pairs add to a segmentor: synthesis, filter, resample, trainings and a report, in one command.
#   CLASSES=data/mine/classes.yaml DATA_ROOT=data/mine REFERENCES=data/mine/ref_img sh gain.sh --parallel 2
# REFERENCES are unlabelled images, folders below DATA_ROOT or manifests; generators that take no reference need none.
# PYTHON and PYTHON_SEG are the interpreters of the generator and of the segmentors. Further flags go to
# scripts/measure_gain.py: --dry_run prints the stages. The same command goes on where the last one was stopped.
set -eu
cd "$(dirname "$0")"
PYTHON_SEG=$(PYTHON=${PYTHON_SEG:-${PYTHON:-}} sh scripts/setup_env.sh seg)
PYTHON=$(sh scripts/setup_env.sh demo)
DATA_ROOT=${DATA_ROOT:?folder that the paths of the manifests start from}

# shellcheck disable=SC2086 # several folders or manifests
exec "$PYTHON_SEG" scripts/measure_gain.py --python "$PYTHON" --python_seg "$PYTHON_SEG" --data_root "$DATA_ROOT" \
    --classes "${CLASSES:?name or path of the class table}" --ckpt "${CKPT:-models/tisynth_mini.safetensors}" \
    ${REFERENCES:+--references $REFERENCES} --outdir "${OUTDIR:-outputs/gain}" "$@"
