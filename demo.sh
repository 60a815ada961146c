#!/bin/sh
# Generate images for the masks of demo/ in the look of its references with the shipped model, and make a contact sheet.
#   sh demo.sh                                  everything by default; needs no network once the packages are installed
#   sh demo.sh --ckpt other.safetensors --outdir outputs/other     any flag of inference.py; the last one given wins
#   DATA_ROOT=GID_demo sh demo.sh --ckpt tisynth.ckpt --config configs/model/tisynth_sd15_upstream.yaml
#   sh demo.sh --page [--port 7861]             draw the masks yourself, in the browser (any flag of scripts/page.py)
set -eu
cd "$(dirname "$0")"
if [ "${1-}" = --page ]; then
    shift
    PYTHON=$(sh scripts/setup_env.sh demo page)
    exec "$PYTHON" scripts/page.py "$@"
fi
DATA_ROOT=${DATA_ROOT:-demo}
OUTDIR=${OUTDIR:-outputs/demo}
PYTHON=$(sh scripts/setup_env.sh demo)

"$PYTHON" inference.py --ckpt "${CKPT:-models/tisynth_mini.safetensors}" --data_root "$DATA_ROOT" \
    --txt_file "${TXT_FILE:-$DATA_ROOT/demo.json}" --outdir "$OUTDIR" --seed "${SEED:-42}" \
    --num_per_mask "${NUM_PER_MASK:-2}" "$@"

# The contact sheet shows the folder that inference.py really wrote to.
flag=
for argument; do
    case $flag in --outdir) OUTDIR=$argument ;; esac
    case $argument in --outdir=*) OUTDIR=${argument#*=} ;; esac
    flag=$argument
done
"$PYTHON" -m scripts.preview "$OUTDIR"
