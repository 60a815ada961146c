#!/bin/sh
# Prepares the training data of the small model (scripts/train_mini.sh) and the masks it is tested on.
#   sh scripts/prepare_mini_data.sh DATA_DIR OUT          # given again, it goes on where it was stopped
# DATA_DIR holds dubai/ and oam_kampala/ (img_train label_train img_test label_test), and images without masks:
# usgs_monterey/ (img_train img_unlabeled img_test), oam_banepa/ (img_train img_unlabeled), and in img_unlabeled each
# unlabeled_naip/ drone_chia/ drone_brighton/ ucmerced/ (sources: models/README.md; a file of Dubai is t7_s1_....png,
# one of Kampala 12_34_....png, one of UC Merced kind00.jpg to kind99.jpg). OUT becomes the data_root:
#   OUT/train_set_items.json     128-pixel tiles, classes of the table `mini`: masks of Dubai and Kampala alone
#   OUT/ground_set_items.json    Kampala again, other ground as land: for the last training
#   OUT/val_set_items.json
#   OUT/inference_items.json             Dubai test masks, references from Dubai train (nearest class mix)
#   OUT/inference_items_folder.json      the same masks, references from Monterey's test images
#   OUT/inference_items_ucmerced.json    the same masks, references from those images of UC Merced that do not train
set -eu
if [ $# -ne 2 ]; then
    echo "usage: sh scripts/prepare_mini_data.sh DATA_DIR OUT" >&2
    exit 2
fi
data=$(cd "$1" && pwd)
mkdir -p "$2"
out=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$(sh "$here/setup_env.sh" train)}
sources="DATA_DIR=$data SEED=${SEED:-23}"
if [ -f "$out/made_of" ] && [ "$(cat "$out/made_of")" != "$sources" ]; then
    echo "prepare_mini_data.sh: $out holds tiles of $(cat "$out/made_of"), not of $sources. Choose another OUT." >&2
    exit 2
fi
echo "$sources" >"$out/made_of"

# prepare NAME ARGUMENT...: OUT/NAME, which appears whole or not at all; what is there already stays
prepare() {
    name=$1
    shift
    [ -f "$out/$name/summary.json" ] && return
    "$python" "$here/prepare_dataset.py" --map_to mini --tile 128 --train_ref same_group --seed "${SEED:-23}" \
        --out "$out/$name" "$@"
}

# Some sets have the same names. Neighbouring numbers of UC Merced often show one place: the last of each kind are
# references of the test alone.
links=$out/links
rm -rf "$links"
mkdir -p "$links/train" "$links/test"
for set in usgs_monterey oam_banepa unlabeled_naip drone_chia drone_brighton ucmerced; do
    for image in "$data/$set"/img_unlabeled/* "$data/$set"/img_train/*; do
        case $image in
        *'/*') ;; # not every set has both folders
        */ucmerced/*8[6-9].jpg | */ucmerced/*9[0-9].jpg) ln -s "$image" "$links/test/" ;;
        *) ln -s "$image" "$links/train/${set}_${image##*/}" ;;
        esac
    done
done

# A Dubai name begins with its scene, t<tile>_s<scene>. The scene that seed 23 makes val (t8_s3) is in no other scene;
# t7_s1, t7_s2 and t8_s8, t8_s9 show the same ground, so look at the val scenes when you change SEED.
prepare dubai --preset shared --root "$data/dubai" --stride 64 --val_fraction 0.05 \
    --group_regex '^(t\d+_s\d+)' --pair nearest_mix folder --ref_dir "$data/usgs_monterey/img_test"
# Building outlines only: all other ground is ignored in the table `mini`, so more ignored pixels are let through.
prepare oam_kampala --preset shared --root "$data/oam_kampala" --classes oam_building --stride 64 \
    --val_fraction 0.05 --max_ignore 0.95 --group_regex '^(\d+_\d+)_' --pair none
# The same with all other ground as land, as a segmentor of buildings wants it.
prepare kampala_ground --preset shared --root "$data/oam_kampala" --classes oam_building --stride 64 \
    --val_fraction 0.05 --group_regex '^(\d+_\d+)_' --pair none --map_to "$here/../configs/classes/mini_ground.yaml"
sed -E 's#"(source|target|ref_image)": "#&kampala_ground/#g' "$out/kampala_ground/train_set_items.json" \
    >"$out/ground.part"
mv "$out/ground.part" "$out/ground_set_items.json"
prepare unlabelled --classes mini --pair none --unlabelled_train "$links/train"
prepare ucmerced --preset folders --images "$data/dubai/img_test" --masks "$data/dubai/label_test" --classes dubai \
    --val_fraction 0 --infer_split train --pair folder --ref_dir "$links/test"
"$python" "$here/prepare_dataset.py" --out "$out" --overwrite --merge "$out/dubai" "$out/oam_kampala" "$out/unlabelled"
# The same tiles as in dubai/, which the comparison of references needs.
sed 's|"source": "label_train/|"source": "dubai/label_test/|; s|"target": "img_train/|"target": "dubai/img_test/|
    s|"ref_image": "|"ref_image": "ucmerced/|' "$out/ucmerced/inference_items.json" >"$out/ucmerced.part"
mv "$out/ucmerced.part" "$out/inference_items_ucmerced.json"
