#!/bin/sh
# Generate the rows of a manifest. Settings are environment variables; flags of inference.py may follow.
#   CKPT=logs/RUN/checkpoints/last.safetensors DATA_ROOT=data/gid TXT_FILE=data/gid/test_set_items.json sh inference.sh
#   GPUS=0,1,2,3 CKPT=... sh inference.sh       one process for each GPU, each generates its share of the rows
set -eu
cd "$(dirname "$0")"
DATA_ROOT=${DATA_ROOT:-demo}
PYTHON=$(sh scripts/setup_env.sh demo)
set -- --ckpt "${CKPT:-models/tisynth_mini.safetensors}" --data_root "$DATA_ROOT" \
    --txt_file "${TXT_FILE:-$DATA_ROOT/demo.json}" --outdir "${OUTDIR:-outputs/inference}" "$@"
if [ -n "${CONFIG:-}" ]; then set -- --config "$CONFIG" "$@"; fi

case ${GPUS:-} in
*,*)
    gpus=$(echo "$GPUS" | tr ',' ' ')
    count=$(echo "$GPUS" | tr ',' '\n' | grep -c .)
    index=0 processes=
    for gpu in $gpus; do
        CUDA_VISIBLE_DEVICES=$gpu "$PYTHON" inference.py --shard "$index/$count" "$@" &
        processes="$processes $!"
        index=$((index + 1))
    done
    trap 'kill $processes 2>/dev/null || true' TERM USR1 # they stop and leave whole files
    status=0
    for process in $processes; do wait "$process" || status=$?; done
    wait # for what a signal interrupted
    exit "$status" ;;
"") exec "$PYTHON" inference.py "$@" ;;
*) CUDA_VISIBLE_DEVICES=$GPUS exec "$PYTHON" inference.py "$@" ;;
esac
