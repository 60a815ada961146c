r"""Turn images and masks on disk into tiles, prompts and manifests for training and inference.

    python scripts/prepare_dataset.py --images IMG --masks MASK --classes my.yaml --tile 512 --out data/mine
    python scripts/prepare_dataset.py --preset loveda --root LoveDA --domains Rural --tile 512 --out data/loveda \
        --pair folder --ref_dir LoveDA/Train/Urban/images_png --infer_split train
    python scripts/prepare_dataset.py --preset gid --root GID --classes gid24 --mask_suffix _24label --out data/gid
    python scripts/prepare_dataset.py --merge data/mine data/gid --out data

The output folder is the --data_root of train.py and inference.py: ref_img/ img_train/ label_train/ img_val/ label_val/
img_test/ label_test/, train_set_items.json val_set_items.json test_set_items.json inference_items.json (JSON lines with
source, target, prompt, ref_image), classes.yaml (the class table of the masks) and summary.json.
"""
import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.data.classes import ClassTable  # noqa: E402
from ldm.data.manifest import write_manifest  # noqa: E402
from ldm.data.prepare.pairing import choose_groups, pair_for_inference, pair_for_training  # noqa: E402
from ldm.data.prepare.tiling import (  # noqa: E402
    OFFSET_PATTERN,
    Picture,
    Tile,
    TileSettings,
    cut_pictures,
    find_pictures,
    raise_problems,
)
from ldm.files import atomic_folder, write_json  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402

SPLITS = ("train", "val", "test")
SUMMARY = "summary.json"
MADE_BY = "prepare_dataset"
PAIRS = ("random", "nearest_mix", "folder")


def build_parser() -> argparse.ArgumentParser:
    """All flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument_group("source").add_argument
    add("--preset", choices=("folders", "loveda", "gid", "shared", "images_masks", "data_mask"), default="folders",
        help="how the source lies on disk: folders = --images and --masks; loveda = "
        "ROOT/{Train,Val}/{Rural,Urban}/{images_png,masks_png}; gid = large images in ROOT/image*, masks named *_label "
        "in ROOT/label* or ROOT/annotation*; shared = ROOT/{img,label}_{train,val,test}; images_masks = ROOT/images "
        "and ROOT/masks, or both in ROOT/{train,val,test}; data_mask = IMAGES/{train,val,test} and "
        "MASKS/all/{train,val,test} (default: %(default)s)")
    add("--root", type=Path, help="folder of the source, for loveda, gid, shared and images_masks")
    add("--images", type=Path, help="folder of images (folders, data_mask; gid: when ROOT has several)")
    add("--masks", type=Path, help="folder of masks with the stems of the images (as --images)")
    add("--image_suffix", default="", help="ending of image stems that mask stems do not have, as _RGB (default: none)")
    add("--mask_suffix", help="ending of mask stems that image stems do not have (default: none; gid: _label)")
    add("--domains", nargs="+", default=["Rural", "Urban"], help="loveda: domains to take (default: %(default)s)")
    add("--bands", type=int, nargs=3, help="three 0-based channels to use as red, green, blue (default: RGB as stored)")
    add("--unlabelled_train", type=Path, nargs="+", default=[], help="folders of images that train without a mask: "
        "every pixel ignored, the prompt names no class")
    add = parser.add_argument_group("classes").add_argument
    add("--classes", help="class table of the masks on disk: a name in configs/classes/ or a file (default: loveda: "
        "loveda; shared: the name of ROOT)")
    add("--map_to", help="class table to write, when it is another one; its `mappings` say how (default: --classes)")
    add = parser.add_argument_group("tiles and splits").add_argument
    add("--tile", type=int, default=512, help="edge of a tile in pixels; 0 keeps whole images (default: %(default)s)")
    add("--stride", type=int, help="pixels between training tiles; a last tile ends at the border (default: --tile)")
    add("--eval_stride", type=int, help="the same for val, test and references (default: --tile)")
    add("--max_ignore", type=float, default=0.5, help="leave out labelled tiles with a larger share of ignored pixels "
        "(default: %(default)s)")
    add("--val_fraction", type=float, help="share of the training images that becomes val, in whole groups (default: "
        "0.05; 0 where the source has its own val)")
    add("--test_fraction", type=float, default=0.0, help="share of the training images that becomes test, in whole "
        "groups (default: %(default)s)")
    add("--group_regex", help="regular expression searched in the names: its first group names the group of an image "
        "(default: the name without --offset_regex)")
    add("--offset_regex", default=OFFSET_PATTERN, help="where the name of a crop tells its offset, with groups y and "
        "x; crops of one scene that overlap are never each other's reference (default: %(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads (default: %(default)s)")
    add("--ext", choices=("png", "jpg"), default="png", help="format of image tiles: png = lossless, jpg = quality 95 "
        "4:4:4 (default: %(default)s)")
    add = parser.add_argument_group("references").add_argument
    add("--train_ref", choices=("none", "same_group", "random"), default="none", help="reference in the train and val "
        "manifests: none (training moves the image itself), another tile of the group, or any other tile of the split "
        "(default: %(default)s)")
    add("--train_refs_per_mask", type=int, default=1, help="rows, each with its own reference, a tile in the train and "
        "val manifests (default: %(default)s)")
    add("--pair", choices=(*PAIRS, "none"), nargs="+", help="references of the inference manifest: random and "
        "nearest_mix (nearest class mix) from the training tiles, folder from --ref_dir; of several the first is "
        "inference_items.json, the others inference_items_<pair>.json (default: random, when there are masks to paint)")
    add("--refs_per_mask", type=int, default=1, help="references a mask in the inference manifests (default: "
        "%(default)s)")
    add("--ref_dir", type=Path, nargs="+", default=[], help="folders of images without masks that become ref_img/")
    add("--infer_split", choices=SPLITS, default="test", help="split whose masks are painted (default: %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, help="output folder; must not exist or be empty")
    add("--merge", type=Path, nargs="+", help="instead of all the above: join the manifests of these output folders, "
        "which lie below --out, in --out")
    add("--overwrite", action="store_true", help="replace what an earlier run of this script left in --out")
    add("--seed", type=int, default=23, help="seed of splits and references (default: %(default)s)")
    add("-d", "--debug", action="store_true", help="show the traceback of an error")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other or are out of range."""
    pairs = args.pair or []
    is_pair = args.preset in ("folders", "data_mask")
    rules = [
        (args.tile < 0, f"--tile {args.tile}: expected 0 or more"),
        ((args.stride or 1) < 1 or (args.eval_stride or 1) < 1, "--stride, --eval_stride: expected 1 or more"),
        (args.tile == 0 and (args.stride or args.eval_stride), "--stride: needs --tile greater than 0"),
        (not 0 <= args.max_ignore <= 1, f"--max_ignore {args.max_ignore}: expected 0..1"),
        (not 0 <= (args.val_fraction or 0) < 1, f"--val_fraction {args.val_fraction}: expected 0 or more, below 1"),
        (not 0 <= args.test_fraction < 1, f"--test_fraction {args.test_fraction}: expected 0 or more, below 1"),
        (min(args.refs_per_mask, args.train_refs_per_mask, args.workers) < 1,
         "--refs_per_mask, --train_refs_per_mask, --workers: expected 1 or more"),
        (args.train_ref == "none" and args.train_refs_per_mask > 1, "--train_refs_per_mask: needs --train_ref"),
        ("folder" in pairs and not args.ref_dir, "--pair folder: needs --ref_dir, a folder of images"),
        (args.ref_dir and "folder" not in pairs, "--ref_dir: is used by --pair folder only. Add that"),
        (len(set(pairs)) < len(pairs), f"--pair {' '.join(pairs)}: expected each kind once"),
        ("none" in pairs and len(pairs) > 1, f"--pair {' '.join(pairs)}: none goes with no other kind"),
        (is_pair and not (args.images and args.masks) and not is_unlabelled(args),
         f"--preset {args.preset}: needs --images and --masks, or for unlabelled images alone --unlabelled_train"),
        (is_pair and args.root, f"--root: is not used by --preset {args.preset}"),
        (not is_pair and not args.root, f"--preset {args.preset}: needs --root"),
        (args.preset in ("loveda", "shared", "images_masks") and (args.images or args.masks),
         f"--images, --masks: are not used by --preset {args.preset}"),
        (args.bands and min(args.bands) < 0, f"--bands {args.bands}: expected three numbers from 0"),
        (args.preset not in ("loveda", "shared") and not args.classes, "--classes: expected the table of the masks"),
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


def is_unlabelled(args: argparse.Namespace) -> bool:
    """Whether the source has no masks at all: images that train the look alone."""
    return args.preset == "folders" and bool(args.unlabelled_train) and not (args.images or args.masks)


def find_one_folder(root: Path, starts: Sequence[str], flag: str) -> Path:
    """The one folder in root whose name starts (in any case) with one of the words; UserError for none or several."""
    if not root.is_dir():
        raise FileNotFoundError(f"--root: folder not found: {root}. Check the path.")
    found = sorted(path for path in root.iterdir() if path.is_dir() and path.name.lower().startswith(tuple(starts)))
    if len(found) != 1:
        raise UserError(f"--root {root}: {len(found)} folders named {'/'.join(starts)}* "
                        f"({', '.join(path.name for path in found)}). Expected one. Choose it with {flag}.")
    return found[0]


def list_folders(args: argparse.Namespace) -> list[tuple[str, Path, Path]]:
    """(split, images, masks) folders of the source, as its preset lays them out."""
    root = args.root
    if is_unlabelled(args):
        return []
    if args.preset == "folders":
        return [("train", args.images, args.masks)]
    if args.preset == "gid":
        images = args.images or find_one_folder(root, ("image",), "--images")
        return [("train", images, args.masks or find_one_folder(root, ("label", "annotation"), "--masks"))]
    if args.preset == "loveda":
        return [(split, root / part / domain / "images_png", root / part / domain / "masks_png")
                for split, part in (("train", "Train"), ("val", "Val")) for domain in args.domains]
    if args.preset == "images_masks" and (root / "images").is_dir():
        return [("train", root / "images", root / "masks")]
    layout = {"shared": ("img_{}", "label_{}"), "images_masks": ("{}/images", "{}/masks"),
              "data_mask": ("{}", "all/{}")}[args.preset]
    roots = (args.images, args.masks) if args.preset == "data_mask" else (root, root)
    found = [(split, *(folder / name.format(split) for folder, name in zip(roots, layout, strict=True)))
             for split in SPLITS]
    if args.preset == "data_mask":  # masks alone, to sample from, are common there
        for _, images, masks in found:
            if masks.exists() and not images.exists():
                print(f"{masks}: left out, there are no images in {images}")
        found = [row for row in found if row[1].exists()]
    found = [row for row in found if row[1].exists() or row[2].exists()]
    if not found:
        names = " and ".join(str(folder / name.format("train")) for folder, name in zip(roots, layout, strict=True))
        raise UserError(f"--preset {args.preset}: neither train nor val nor test is there. Expected {names}. Check the "
                        "path.")
    return found


def collect_pictures(args: argparse.Namespace) -> list[Picture]:
    """Find all source pictures and give each its split; UserError that lists missing partners and doubled names."""
    mask_suffix = args.mask_suffix if args.mask_suffix is not None else "_label" if args.preset == "gid" else ""
    folders: list[tuple[str, Path, Path | None]] = [*list_folders(args)]
    folders += [("train", folder, None) for folder in args.unlabelled_train]
    folders += [("ref", folder, None) for folder in args.ref_dir]
    pictures: list[Picture] = []
    problems: list[str] = []
    for split, images, masks in folders:
        suffixes = (args.image_suffix, mask_suffix) if masks is not None else ("", "")
        pattern = args.group_regex if split != "ref" else None
        found, wrong = find_pictures(split, images, masks, suffixes, pattern, args.offset_regex)
        pictures += found
        problems += wrong
    seen: dict[tuple[str, str], Picture] = {}
    for picture in pictures:
        first = seen.setdefault((picture.split, picture.name), picture)
        if first is not picture:
            problems.append(f"{picture.image}: the same stem as {first.image}, which goes to the same folder")
    raise_problems(problems)
    return split_pictures(pictures, args)


def split_pictures(pictures: list[Picture], args: argparse.Namespace) -> list[Picture]:
    """Move whole groups from train to test and val; unlabelled pictures of those groups are left out."""
    has_val = any(picture.split == "val" for picture in pictures)
    if has_val and args.val_fraction:
        raise UserError(f"--val_fraction {args.val_fraction}: the source has its own val images. Leave the flag away.")
    labelled = [picture for picture in pictures if picture.split == "train" and picture.mask is not None]
    val_fraction = 0.05 if args.val_fraction is None and not has_val and labelled else args.val_fraction or 0.0
    rng = np.random.default_rng([args.seed, 0])
    moved = dict.fromkeys(choose_groups(labelled, args.test_fraction, rng), "test")
    rest = [picture for picture in labelled if picture.group not in moved]
    share = val_fraction * len(labelled) / max(len(rest), 1)
    moved.update(dict.fromkeys(choose_groups(rest, min(share, 1.0), rng), "val"))
    result = []
    for picture in pictures:
        if picture.split != "train" or picture.group not in moved:
            result.append(picture)
        elif picture.mask is not None:
            result.append(Picture(**{**vars(picture), "split": moved[picture.group]}))
    return result


def write_dataset(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Write everything below root (an empty folder); return the summary."""
    source_table = ClassTable.load(args.classes or ("loveda" if args.preset == "loveda" else args.root.name))
    table = ClassTable.load(args.map_to) if args.map_to else source_table
    table.map_from(source_table)  # an unmapped class is an error before any work
    pictures = collect_pictures(args)
    for split in {picture.split for picture in pictures}:
        for folder in ("ref_img",) if split == "ref" else (f"img_{split}", f"label_{split}"):
            (root / folder).mkdir()
    eval_stride = args.eval_stride or args.tile
    strides = {"train": args.stride or args.tile, "val": eval_stride, "test": eval_stride, "ref": eval_stride}
    settings = TileSettings(root, source_table, table, args.tile, strides, args.max_ignore,
                            tuple(args.bands) if args.bands else None, args.ext)
    tiles = cut_pictures(pictures, settings, args.workers)
    if not any(tile.picture.split != "ref" for tile in tiles):
        raise UserError(f"no tile left of {len(pictures)} images: in all more than {args.max_ignore:.0%} of the "
                        "pixels are ignored. Raise --max_ignore or check --classes.")
    summary = {"made_by": MADE_BY, "classes": table.name, "class_names": list(table.names), "seed": args.seed,
               "tile": args.tile, "splits": summarise(tiles, pictures)}
    summary["manifests"], summary["tiles_without_reference"] = write_manifests(args, root, tiles)
    # The masks written hold 0..K-1 already; a table that maps raw ids would map them a second time.
    written = yaml.safe_dump(table.without_source_ids().to_dict(), sort_keys=False)
    (root / "classes.yaml").write_text(written, encoding="utf-8")
    return summary


def write_manifests(args: argparse.Namespace, root: Path, tiles: Sequence[Tile]) -> tuple[dict[str, int], int]:
    """Write all manifests; return their numbers of rows and the number of tiles left without a reference."""
    by_split = {split: [tile for tile in tiles if tile.picture.split == split] for split in (*SPLITS, "ref")}
    rows: dict[str, list[dict]] = {}
    total_left_out = 0
    for number, split in enumerate(SPLITS):
        if by_split[split]:
            kind, count = ("none", 1) if split == "test" else (args.train_ref, args.train_refs_per_mask)
            rng = np.random.default_rng([args.seed, 1, number])
            rows[f"{split}_set_items.json"], left_out = pair_for_training(by_split[split], kind, count, rng)
            total_left_out += left_out
    targets = [tile for tile in by_split[args.infer_split] if tile.is_labelled]
    kinds = [kind for kind in args.pair or [] if kind != "none"]
    if kinds and not targets:
        raise UserError(f"--pair: there are no {args.infer_split} masks to paint. Choose --infer_split, or set "
                        "--test_fraction.")
    if args.pair is None and targets and by_split["train"]:
        kinds = ["random"]
    for place, kind in enumerate(kinds):
        name = "inference_items.json" if place == 0 else f"inference_items_{kind}.json"
        pool = by_split["ref" if kind == "folder" else "train"]
        rng = np.random.default_rng([args.seed, 2, PAIRS.index(kind)])
        rows[name] = pair_for_inference(targets, kind, pool, args.refs_per_mask, rng)
    for name, items in rows.items():
        write_manifest(root / name, items)
    return {name: len(items) for name, items in rows.items()}, total_left_out


def summarise(tiles: Sequence[Tile], pictures: Sequence[Picture]) -> dict[str, dict[str, Any]]:
    """{split: images, groups, tiles, unlabelled tiles, pixels (K + 1, ignored last)}."""
    result = {}
    for split in (*SPLITS, "ref"):
        own = [tile for tile in tiles if tile.picture.split == split]
        sources = [picture for picture in pictures if picture.split == split]
        if sources:
            result[split] = {
                "images": len(sources),
                "groups": len({picture.group for picture in sources}),
                "tiles": len(own),
                "unlabelled_tiles": sum(tile.picture.mask is None for tile in own),
                "pixels": [int(number) for number in sum(tile.counts for tile in own)] if own else [],
            }
    return result


def print_summary(summary: dict[str, Any], out: Path) -> None:
    """Print the table of a summary."""
    names = [*summary["class_names"], "ignore"]
    widths = [max(len(name), 6) for name in names]
    print(f"{out} (class table {summary['classes']}; class shares in % of pixels)")
    heads = [name.rjust(width) for name, width in zip(names, widths, strict=True)]
    print("split  images groups   tiles unlabelled  " + "  ".join(heads))
    for split, row in summary["splits"].items():
        total = max(sum(row["pixels"]), 1)
        shares = [] if split == "ref" else [100 * pixels / total for pixels in row["pixels"]]
        line = "  ".join(f"{share:{width}.1f}" for share, width in zip(shares, widths, strict=bool(shares)))
        numbers = f"{row['images']:6} {row['groups']:6} {row['tiles']:7} {row['unlabelled_tiles']:10}"
        print(f"{split:6} {numbers}  {line}".rstrip())
    for name, rows in summary["manifests"].items():
        print(f"{name}: {rows} rows")
    if summary["tiles_without_reference"]:
        print(f"{summary['tiles_without_reference']} tiles are in no train or val manifest: no other tile could be "
              "their reference (--train_ref)")


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare --out from the source: written beside it, renamed at the end, nothing left behind on an error."""
    check_arguments(args)
    out = args.out
    is_used = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if is_used and not args.overwrite:
        raise FileExistsError(f"--out {out}: exists and is not empty. Choose a new folder, or --overwrite.")
    if is_used and not is_own_output(out):
        raise FileExistsError(f"--out {out}: has no {SUMMARY} of this script, so --overwrite leaves it alone.")
    with atomic_folder(out) as work:
        summary = write_dataset(args, work)
        write_json(work / SUMMARY, summary)
    return summary


def is_own_output(folder: Path) -> bool:
    """True when the folder was written by this script."""
    return read_summary(folder).get("made_by") == MADE_BY


def read_summary(folder: Path) -> dict[str, Any]:
    """Summary that this script left in a folder; empty when there is none."""
    try:
        content = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Join the manifests of output folders below --out: paths are rewritten, files stay where they are."""
    out = args.out.resolve()
    folders = [folder.resolve() for folder in args.merge]
    for folder in folders:
        if not is_own_output(folder):
            raise UserError(f"--merge {folder}: no {SUMMARY} of this script in it. Expected a folder that it prepared.")
        if out not in folder.parents:
            raise UserError(f"--merge {folder}: does not lie below --out {out}, the data_root of the joined manifests.")
    tables = {(folder / "classes.yaml").read_text(encoding="utf-8") for folder in folders}
    if len(tables) > 1:
        raise UserError("--merge: the folders have different classes.yaml. Prepare them with the same --map_to.")
    if (out / SUMMARY).exists() and not (args.overwrite and is_own_output(out)):
        raise FileExistsError(f"--out {out}: has a {SUMMARY} already. Choose another folder, or --overwrite.")
    summaries = [read_summary(folder) for folder in folders]
    summary = {**summaries[0], "manifests": {}, "splits": join_splits(summaries), "merged": [
        folder.relative_to(out).as_posix() for folder in folders],
        "tiles_without_reference": sum(one["tiles_without_reference"] for one in summaries)}
    for name in sorted({name for one in summaries for name in one["manifests"]}):
        rows = []
        for folder in folders:
            if (folder / name).is_file():
                lines = (folder / name).read_text(encoding="utf-8").splitlines()
                rows += [move_row(json.loads(line), folder.relative_to(out).as_posix()) for line in lines]
        write_manifest(out / name, rows)
        summary["manifests"][name] = len(rows)
    (out / "classes.yaml").write_text(tables.pop(), encoding="utf-8")
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def move_row(row: dict[str, str], prefix: str) -> dict[str, str]:
    """A manifest row with its paths below another folder."""
    return {key: value if key == "prompt" else f"{prefix}/{value}" for key, value in row.items()}


def join_splits(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add up the counts of several summaries, split by split."""
    result: dict[str, dict[str, Any]] = {}
    for split in (*SPLITS, "ref"):
        rows = [one["splits"][split] for one in summaries if split in one["splits"]]
        if rows:
            pixels = [row["pixels"] for row in rows if row["pixels"]]
            result[split] = {key: sum(row[key] for row in rows) for key in rows[0] if key != "pixels"}
            result[split]["pixels"] = [sum(column) for column in zip(*pixels, strict=True)]
    return result


def main(argv: list[str] | None = None) -> None:
    """Prepare or merge, then print the summary."""
    args = build_parser().parse_args(argv)
    summary = merge(args) if args.merge else prepare(args)
    print_summary(summary, args.out)


if __name__ == "__main__":
    run_entry_point(main)
