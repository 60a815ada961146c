#!/bin/sh
# Train a segmentor on real image-mask pairs (the judge of mask following, the filter's measure, the gain's baseline).
#   CLASSES=dubai DATA_ROOT=data/dubai WORK_DIR=logs/segmentor sh scripts/train_segmentor.sh
# Further flags go to scripts/train_segmentor.py, for example: sh scripts/train_segmentor.sh --max_steps 4000
set -eu
cd "$(dirname "$0")/.."
PYTHON=$(sh scripts/setup_env.sh seg)
GPUS=${GPUS:-1}
CONFIG=${CONFIG:-configs/mmseg/small.py}
CLASSES=${CLASSES:?name or path of the class table, for example CLASSES=dubai}
DATA_ROOT=${DATA_ROOT:?folder that the paths of the manifest start from}
TRAIN=${TRAIN:-$DATA_ROOT/train_set_items.json}
WORK_DIR=${WORK_DIR:-logs/segmentor}

set -- --config "$CONFIG" --class_table "$CLASSES" --data_root "$DATA_ROOT" --train_txt_file "$TRAIN" \
    --work_dir "$WORK_DIR" "$@"
if [ "$GPUS" -gt 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" scripts/train_segmentor.py "$@"
fi
exec "$PYTHON" -W ignore scripts/train_segmentor.py "$@"
