#!/bin/sh
# Prepares the training data of the small model (configs/model/tisynth_mini.yaml) and the masks it is tested on.
#   sh scripts/prepare_mini_data.sh DATA_DIR OUT
# DATA_DIR holds dubai/ usgs_monterey/ oam_banepa/ oam_kampala/ (img_train label_train img_test label_test, the first also
# img_unlabeled) and unlabeled_naip/img_unlabeled. OUT becomes the data_root:
#   OUT/train_set_items.json, OUT/val_set_items.json     128-pixel tiles of all sets, classes of the table `mini`
#   OUT/inference_items.json                             Dubai test masks, references from Dubai train (nearest class mix)
#   OUT/inference_items_folder.json                      Dubai test masks, references from unlabelled Monterey images
set -eu
if [ $# -ne 2 ]; then
    echo "usage: sh scripts/prepare_mini_data.sh DATA_DIR OUT" >&2
    exit 2
fi
data=$1
out=$2
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

prepare() {
    "$python" "$here/prepare_dataset.py" --preset shared --map_to mini --tile 128 --stride 64 --val_fraction 0.05 \
        --train_ref same_group --train_refs_per_mask 2 --seed "${SEED:-23}" "$@"
}

mkdir -p "$out"
# A Dubai name begins with its scene, t<tile>_s<scene>. The scene that seed 23 makes val (t8_s3) is in no other scene;
# t7_s1, t7_s2 and t8_s8, t8_s9 show the same ground, so look at the val scenes when you change SEED.
prepare --root "$data/dubai" --out "$out/dubai" --group_regex '^(t\d+_s\d+)' \
    --pair nearest_mix folder --ref_dir "$data/usgs_monterey/img_unlabeled"
prepare --root "$data/usgs_monterey" --out "$out/usgs_monterey" --group_regex '^(ortho_\d+_\d+|m_.*_\d{8})' \
    --pair none --unlabelled_train "$data/usgs_monterey/img_unlabeled" "$data/unlabeled_naip/img_unlabeled"
# Building outlines only: all other ground is ignored in the table `mini`, so more ignored pixels are let through.
prepare --root "$data/oam_banepa" --classes oam_building --out "$out/oam_banepa" --max_ignore 0.95 \
    --group_regex '^(\d+_\d+_\d+|OAM-\d+-\d+)' --unlabelled_train "$data/oam_banepa/img_unlabeled" --pair none
prepare --root "$data/oam_kampala" --classes oam_building --out "$out/oam_kampala" --max_ignore 0.95 \
    --group_regex '^(\d+_\d+)_' --pair none
"$python" "$here/prepare_dataset.py" --out "$out" \
    --merge "$out/dubai" "$out/usgs_monterey" "$out/oam_banepa" "$out/oam_kampala"
