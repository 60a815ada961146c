r"""Turn images and masks on disk into tiles, prompts and manifests for training and inference.

    python scripts/prepare_dataset.py --images IMG --masks MASK --classes my.yaml --tile 512 --out data/mine
    python scripts/prepare_dataset.py --preset loveda --root LoveDA --domains Rural --tile 512 --out data/loveda \
        --pair folder --ref_dir LoveDA/Train/Urban/images_png --infer_split train
    python scripts/prepare_dataset.py --preset gid --root GID --classes gid24 --mask_suffix _24label --out data/gid
    python scripts/prepare_dataset.py --merge data/mine data/gid --out data

The output folder is the --data_root of train.py and inference.py: ref_img/ img_train/ label_train/ img_val/ label_val/
img_test/ label_test/, train_set_items.json val_set_items.json test_set_items.json inference_items.json (JSON lines with
source, target, prompt, ref_image, scene, window, crs, transform), classes.yaml (the class table of the masks) and
summary.json.
"""
import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import add_classes, fraction, natural, positive_int  # noqa: E402
from ldm.data.bands import add_reading_flags, make_reading  # noqa: E402
from ldm.data.prepare.dataset import PAIRS, merge, prepare, print_summary  # noqa: E402
from ldm.data.prepare.layouts import LAYOUTS  # noqa: E402
from ldm.data.prepare.sources import OFFSET_PATTERN, SPLITS  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """All flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument_group("source").add_argument
    add("--preset", choices=tuple(LAYOUTS), default="folders", metavar="PRESET", help="how the source lies on disk "
        "(default: %(default)s): " + "; ".join(f"{name} = {layout.about}" for name, layout in LAYOUTS.items()))
    add("--root", type=Path, help="folder of the source, for every preset but folders and data_mask")
    add("--images", type=Path, help="folder of images (folders, data_mask; other presets: when ROOT has several)")
    add("--masks", type=Path, help="folder of masks with the stems of the images (as --images)")
    add("--recursive", action="store_true", help="read subfolders as well; names keep the folder, city/a.png is city_a")
    add("--image_suffix", default="", help="ending of image stems that mask stems do not have, as _RGB (default: none)")
    add("--mask_suffix", help="ending of mask stems that image stems do not have (default: none; gid, potsdam: _label)")
    add("--domains", nargs="+", default=["Rural", "Urban"], help="loveda: domains to take (default: %(default)s)")
    add("--product", help="kind of images: " + "; ".join(
        f"{name}: {', '.join(layout.products)}" for name, layout in LAYOUTS.items() if layout.products)
        + " (default: the first)")
    add("--unlabelled_train", type=Path, nargs="+", default=[], help="folders of images that train without a mask: "
        "every pixel ignored, the prompt names no class")
    add_reading_flags(parser.add_argument_group("images that are not 8-bit RGB or grey").add_argument)
    add = parser.add_argument_group("classes").add_argument
    add_classes(add, "that of the masks on disk (default: that of the preset; shared: the name of ROOT)")
    add("--map_to", help="class table to write, when it is another one; its `mappings` say how (default: --classes)")
    add("--mask_kind", choices=("auto", "ids", "colours"), default="auto", help="what palette masks and masks of three "
        "channels hold; auto = colours where all of them are the table's (default: %(default)s)")
    add("--nearest_colour", type=float, metavar="N", help="take colours of RGB masks that are at most N (0..441) from "
        "one of the table as that one (default: 0; deepglobe: 220)")
    add("--stray_colours", choices=("refuse", "ignore"), default="refuse", help="other colours are an error, or become "
        "255 and are counted (default: %(default)s)")
    add("--allow_empty_classes", action="store_true", help="the table may have classes without one pixel")
    add = parser.add_argument_group("tiles and splits").add_argument
    add("--tile", type=natural, default=512, help="edge of a tile in pixels; 0 keeps whole images (default: "
        "%(default)s)")
    add("--stride", type=positive_int, help="pixels between training tiles; a last tile ends at the border (default: "
        "--tile)")
    add("--eval_stride", type=positive_int, help="the same for val, test and references (default: --tile)")
    add("--pad", action="store_true", help="fill images that are smaller than a tile: black, 255 in masks")
    add("--max_ignore", type=fraction, default=0.5, help="leave out labelled tiles with a larger share of ignored "
        "pixels (default: %(default)s)")
    add("--max_nodata", type=fraction, default=0.05, help="leave out tiles without labels, references too, with a "
        "larger share of pixels without data (default: %(default)s)")
    add("--split_file", nargs="+", metavar="SPLIT=FILE", help="train=FILE val=FILE test=FILE, lists of names as "
        "benchmarks publish them; images in no list are left out")
    add("--val_fraction", type=fraction, help="share of the training images that becomes val, in whole groups "
        "(default: 0.05; 0 where the source has its own val or one group)")
    add("--test_fraction", type=fraction, default=0.0, help="share of the training images that becomes test, in whole "
        "groups (default: %(default)s)")
    add("--group_regex", help="regular expression searched in the names: its first group names the group of an image "
        "(default: the name without --offset_regex)")
    add("--offset_regex", default=OFFSET_PATTERN, help="where the name of a crop tells its offset, with groups y and "
        "x; crops of one scene that overlap are never each other's reference (default: %(default)s)")
    add("--workers", type=positive_int, default=min(8, os.cpu_count() or 1), help="threads (default: %(default)s)")
    add("--ext", choices=("png", "jpg"), default="png", help="format of image tiles: png = lossless, jpg = quality 95 "
        "4:4:4; tiles of other numbers of bands than 1 and 3 are .npy (default: %(default)s)")
    add = parser.add_argument_group("references").add_argument
    add("--train_ref", choices=("none", "same_group", "random"), default="none", help="reference in the train and val "
        "manifests: none (training moves the image itself), another tile of the group, or any other tile of the split "
        "(default: %(default)s)")
    add("--train_refs_per_mask", type=positive_int, default=1, help="rows, each with its own reference, a tile in the "
        "train and val manifests (default: %(default)s)")
    add("--pair", choices=(*PAIRS, "none"), nargs="+", help="references of the inference manifest: random and "
        "nearest_mix (nearest class mix) from the training tiles, folder from --ref_dir; of several the first is "
        "inference_items.json, the others inference_items_<pair>.json (default: random, when there are masks for it)")
    add("--refs_per_mask", type=positive_int, default=1, help="references a mask in the inference manifests (default: "
        "%(default)s)")
    add("--ref_dir", type=Path, nargs="+", default=[], help="folders of images of any size without masks that become "
        "ref_img/")
    add("--infer_split", choices=SPLITS, default="test", help="split of inference.py's masks "
        "(default: %(default)s, which is for judging the generator; pairs to train on: train)")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, help="output folder; must not exist or be empty")
    add("--merge", type=Path, nargs="+", help="instead of all the above: join the manifests of these output folders, "
        "which lie below --out, in --out")
    add("--overwrite", action="store_true", help="replace what an earlier run of this script left in --out")
    add("--seed", type=int, default=23, help="seed of splits and references (default: %(default)s)")
    add("-d", "--debug", action="store_true", help="show the traceback of an error")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    pairs, layout = args.pair or [], LAYOUTS[args.preset]
    places = {name: getattr(args, name) for name in ("root", "images", "masks")}
    lacking = any(places[name] is None for name in layout.takes)
    unused = [f"--{name}" for name in places if places[name] is not None and name not in layout.takes + layout.may_take]
    is_unlabelled = args.preset == "folders" and args.unlabelled_train and not (args.images or args.masks)
    alone = ", or for unlabelled images alone --unlabelled_train" if args.preset == "folders" else ""
    rules = [
        (lacking and not is_unlabelled,
         f"--preset {args.preset}: needs {' and '.join(f'--{name}' for name in layout.takes)}{alone}"),
        (bool(unused), f"{', '.join(unused)}: not used by --preset {args.preset}"),
        (args.product is not None and args.product not in layout.products,
         f"--product {args.product}: --preset {args.preset} has {', '.join(layout.products) or 'none to choose from'}"),
        (args.tile == 0 and (args.stride or args.eval_stride), "--stride: needs --tile greater than 0"),
        (args.tile == 0 and args.pad, "--pad: needs --tile greater than 0"),
        (args.val_fraction == 1 or args.test_fraction == 1, "--val_fraction, --test_fraction: expected less than 1"),
        (args.train_ref == "none" and args.train_refs_per_mask > 1, "--train_refs_per_mask: needs --train_ref"),
        ("folder" in pairs and not args.ref_dir, "--pair folder: needs --ref_dir, a folder of images"),
        (args.ref_dir and "folder" not in pairs, "--ref_dir: is used by --pair folder only. Add that"),
        (len(set(pairs)) < len(pairs), f"--pair {' '.join(pairs)}: expected each kind once"),
        ("none" in pairs and len(pairs) > 1, f"--pair {' '.join(pairs)}: none goes with no other kind"),
        (args.nearest_colour is not None and not 0 <= args.nearest_colour <= 442,
         f"--nearest_colour {args.nearest_colour}: expected 0..442"),
        (layout.table is None and args.preset != "shared" and not args.classes,
         "--classes: expected the table of the masks"),
    ]
    wrong = [text for is_wrong, text in rules if is_wrong]
    for flag, pattern in (("--group_regex", args.group_regex), ("--offset_regex", args.offset_regex)):
        try:
            groups = re.compile(pattern or "").groupindex
        except re.error as error:
            wrong.append(f"{flag} {pattern}: not a regular expression ({error})")
            continue
        if flag == "--offset_regex" and not {"y", "x"} <= set(groups):
            wrong.append(f"{flag} {pattern}: expected the named groups (?P<y>..) and (?P<x>..)")
    if wrong:
        raise UserError("; ".join(wrong) + ". See --help.")
    make_reading(args)


def main(argv: list[str] | None = None) -> None:
    """Prepare or merge, then print the summary."""
    args = build_parser().parse_args(argv)
    if args.merge:
        summary = merge(args)
    else:
        check_arguments(args)
        summary = prepare(args)
    print_summary(summary, args.out)


if __name__ == "__main__":
    run_entry_point(main)
