#!/bin/sh
# Train a segmentor (the judge of mask following, the filter's measure, the gain's baseline).
#   CLASSES=dubai DATA_ROOT=data/dubai WORK_DIR=logs/segmentor sh scripts/train_segmentor.sh
#   GPUS=0,1 ... sh scripts/train_segmentor.sh      numbers of GPUS, as for train.sh; default: the first one
#   CONFIG=demo/mmseg/fusu_joint.py WORK_DIR=logs/fusu_joint sh scripts/train_segmentor.sh       a config with its own data
# SYNTHETIC=outputs/resampled/train_set_items.json adds synthesized pairs. Further flags go to scripts/train_segmentor.py,
# for example: sh scripts/train_segmentor.sh --max_steps 4000
set -eu
cd "$(dirname "$0")/.."
PYTHON=$(sh scripts/setup_env.sh seg)
count=$(echo "${GPUS:-0}" | tr ',' '\n' | grep -c .)
if [ -n "${SYNTHETIC:-}" ]; then set -- --synthetic_txt_file "$SYNTHETIC" "$@"; fi
if [ -n "${CLASSES:-}" ]; then
    DATA_ROOT=${DATA_ROOT:?folder that the paths of the manifest start from}
    set -- --classes "$CLASSES" --data_root "$DATA_ROOT" \
        --train_txt_file "${TRAIN:-$DATA_ROOT/train_set_items.json}" "$@"
fi

set -- --config "${CONFIG:-configs/mmseg/small.py}" --work_dir "${WORK_DIR:-logs/segmentor}" "$@"
if [ -n "${GPUS:-}" ]; then export CUDA_VISIBLE_DEVICES="$GPUS"; fi
if [ "$count" -gt 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$count" scripts/train_segmentor.py "$@"
fi
exec "$PYTHON" -W ignore scripts/train_segmentor.py "$@"
