#!/bin/sh
# The gate's table: do faster ways of sampling follow the masks as well as 50 steps of DDIM? The same masks, references
# and noise in all of them. Settings are environment variables; a stopped run goes on when started again.
#   CKPT=models/tisynth_mini.safetensors DATA_ROOT=data/dubai TXT_FILE=data/dubai/test.json SEGMENTOR=runs/seg \
#   PYTHON=... PYTHON_SEG=... sh benchmarks/gate.sh
# ROWS=64 takes the first rows only, evenly spaced ones with EVERY=4 (every fourth).
set -eu
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/gate}
CKPT=${CKPT:-models/tisynth_mini.safetensors}
DATA_ROOT=${DATA_ROOT:?folder that the paths of TXT_FILE start from}
TXT_FILE=${TXT_FILE:?manifest: mask, prompt and ref_image a line}
SEGMENTOR=${SEGMENTOR:?folder with config.json and segmentor.pth of scripts/train_segmentor.py}
PYTHON=${PYTHON:-$(sh scripts/setup_env.sh demo)}
PYTHON_SEG=${PYTHON_SEG:-$(sh scripts/setup_env.sh seg)}
mkdir -p "$OUT"
awk -v every="${EVERY:-1}" 'NR % every == 1 % every' "$TXT_FILE" | head -n "${ROWS:-1000000}" > "$OUT/rows.json"

# Name and flags of inference.py, a line each; the first is what the others are compared with. MODES sets another list.
modes=${MODES:-"exact --mode exact
ddim_20 --mode exact --num_steps 20
dpmpp_20 --mode fast --solver dpmpp_2m
dpmpp_15 --mode fast --solver dpmpp_2m --num_steps 15
dpmpp_10 --mode fast --solver dpmpp_2m --num_steps 10
unipc_20 --mode fast
unipc_15 --mode fast --num_steps 15
unipc_10 --mode fast --num_steps 10
interval_0_0.8 --mode fast --guidance_interval 0 0.8
interval_0.2_1 --mode fast --guidance_interval 0.2 1
interval_0.2_0.8 --mode fast --guidance_interval 0.2 0.8
share_control --mode fast --share_control
reuse_2 --mode fast --reuse_every 2
reuse_3 --mode fast --reuse_every 3
turbo --mode turbo"}

first= others=
while read -r name flags; do
    # shellcheck disable=SC2086 -- flags are words
    "$PYTHON" inference.py --ckpt "$CKPT" --data_root "$DATA_ROOT" --txt_file "$OUT/rows.json" --outdir "$OUT/$name" \
        --seed "${SEED:-42}" $flags < /dev/null
    first=${first:-$OUT/$name}
    [ "$first" = "$OUT/$name" ] || others="$others $OUT/$name"
done <<LIST
$modes
LIST
# shellcheck disable=SC2086
"$PYTHON_SEG" -W ignore scripts/evaluate.py consistency --segmentor "$SEGMENTOR/config.json" "$SEGMENTOR/segmentor.pth" \
    --exact "$first" --run $others --outdir "$OUT"
cat "$OUT/results.md"
