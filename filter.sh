#!/bin/sh
# Drop the pixels of synthesized images that do not look like their class. Settings are environment variables; flags
# of post_processing/filter.py may follow, such as --overlays 20 or --tolerance-margin 1.5.
#   SEGMENTOR=logs/segmentor RUN=outputs/inference REAL_TXT_FILE=data/fusu/train_set_items.json sh filter.sh
#   CONFIG=base.py CKPT=base.pth SYN_IMG=DIR SYN_MASK=DIR REAL_IMG=DIR REAL_MASK=DIR CLASSES=fusu sh filter.sh
set -eu
cd "$(dirname "$0")"
PYTHON=$(sh scripts/setup_env.sh seg)
SEGMENTOR=${SEGMENTOR:-logs/segmentor}
set -- "${CONFIG:-$SEGMENTOR/config.json}" "${CKPT:-$SEGMENTOR/segmentor.pth}" \
    --filtered-mask-path "${FILTERED:-outputs/filtered}" "$@"
if [ -n "${SYN_IMG:-}" ]; then
    set -- "$@" --syn-img-path "$SYN_IMG" --syn-mask-path "${SYN_MASK:?give the folder of the masks, SYN_MASK=DIR}"
else
    set -- "$@" --run "${RUN:-outputs/inference}"
fi
if [ -n "${REAL_IMG:-}" ]; then
    set -- "$@" --real-img-path "$REAL_IMG" --real-mask-path "${REAL_MASK:?give the folder of the masks, REAL_MASK=DIR}"
elif [ -n "${REAL_TXT_FILE:-}" ]; then # none with --hardness_txt_file or --fold; filter.py says where it is missing
    set -- "$@" --real_txt_file "$REAL_TXT_FILE"
fi
if [ -n "${DATA_ROOT:-}" ]; then set -- "$@" --data_root "$DATA_ROOT"; fi
if [ -n "${CLASSES:-}" ]; then set -- "$@" --classes "$CLASSES"; fi
exec "$PYTHON" -m post_processing.filter "$@"
