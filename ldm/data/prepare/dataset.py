"""A prepared data set: tiles, manifests, class table and summary in one folder."""
import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm.data.bands import make_reading
from ldm.data.classes import IGNORE_INDEX, ClassTable, MaskRules
from ldm.data.manifest import DISK_KEYS, write_manifest
from ldm.data.prepare.layouts import LAYOUTS
from ldm.data.prepare.pairing import pair_for_inference, pair_for_training
from ldm.data.prepare.scale import measure_scale
from ldm.data.prepare.sources import (
    SPLITS,
    SourceFolder,
    Sources,
    find_sources,
    raise_problems,
    read_split_files,
    split_by_groups,
    split_by_lists,
    split_by_names,
)
from ldm.data.prepare.tiling import Cut, Tile, TileSettings, cut_images
from ldm.files import atomic_folder, write_json
from ldm.util import UserError

SUMMARY = "summary.json"
MADE_BY = "prepare_dataset"
MUCH_BLACK = 0.02  # share of black labelled pixels that is worth a word
PAIRS = ("random", "nearest_mix", "folder")


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare --out from the source: written beside it, renamed at the end, nothing left behind on an error.

    Returns:
        The summary that summary.json holds.
    """
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


def write_dataset(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Write everything below root (an empty folder); return the summary."""
    layout = LAYOUTS[args.preset]
    source_table = ClassTable.load(args.classes or layout.table or args.root.name)
    table = ClassTable.load(args.map_to) if args.map_to else source_table
    table.map_from(source_table)  # an unmapped class is an error before any work
    found = collect_sources(args)
    for split in {source.split for source in found.images}:
        for folder in ("ref_img",) if split == "ref" else (f"img_{split}", f"label_{split}"):
            (root / folder).mkdir()
    reading = make_reading(args)
    if args.scale_percentiles:
        reading = measure_scale(found.images, reading, len(reading.bands or (0, 0, 0)), *args.scale_percentiles,
                                args.workers)
    eval_stride = args.eval_stride or args.tile
    strides = {"train": args.stride or args.tile, "val": eval_stride, "test": eval_stride, "ref": eval_stride}
    rules = MaskRules(args.mask_kind, layout.rules.nearest_colour if args.nearest_colour is None else
                      args.nearest_colour, args.stray_colours == "ignore")
    settings = TileSettings(root, source_table, table, args.tile, strides, args.max_ignore, args.max_nodata, reading,
                            rules, args.pad, args.ext)
    cut = cut_images(found.images, settings, args.workers)
    notes = found.notes + describe_masks(cut, source_table)
    notes += check_classes(cut.notes, source_table, args.allow_empty_classes)
    if not any(tile.source.split != "ref" for tile in cut.tiles):
        raise UserError(f"no tile left of {len(found.images)} images: in all more than {args.max_ignore:.0%} of the "
                        "pixels are ignored. Raise --max_ignore or check --classes.")
    summary = {"made_by": MADE_BY, "classes": table.name, "class_names": list(table.names), "seed": args.seed,
               "tile": args.tile, "splits": summarise(cut.tiles, found), "reading": reading.to_dict(),
               "left_out": {kind: number for kind, number in (found.left_out + cut.left_out).items() if number},
               "masks": {str(kind): number for kind, number in cut.notes.items() if number}, "notes": notes}
    summary["manifests"], summary["tiles_without_reference"] = write_manifests(args, root, cut.tiles)
    # The masks written hold 0..K-1 already; a table that maps raw ids would map them a second time.
    written = yaml.safe_dump(table.without_source_ids().to_dict(), sort_keys=False)
    (root / "classes.yaml").write_text(written, encoding="utf-8")
    return summary


def collect_sources(args: argparse.Namespace) -> Sources:
    """Find all source images and give each its split; UserError that lists missing partners and doubled names."""
    layout = LAYOUTS[args.preset]
    product = args.product or next(iter(layout.products), None)
    folders = layout.find(argparse.Namespace(**vars(args) | {"product": product}))
    folders += [SourceFolder("train", folder, None) for folder in args.unlabelled_train]
    folders += [SourceFolder("ref", folder, None) for folder in args.ref_dir]
    found = find_sources(folders, args.recursive, args.group_regex or layout.group, args.offset_regex)
    if args.split_file:
        lists = read_split_files(args.split_file)
        split_by_lists(found, lists)
    elif layout.split_of is not None:
        split_by_names(found, layout.split_of)
    raise_problems(found.problems)
    own_test = any(source.split == "test" for source in found.images)
    if own_test and args.test_fraction:
        raise UserError(f"--test_fraction {args.test_fraction}: the source has its own test images. Leave the flag "
                        "away.")
    found.images = split_by_groups(found.images, args.val_fraction, args.test_fraction, args.seed)
    return found


def check_classes(notes: Mapping[Any, int], table: ClassTable, may_be_empty: bool) -> list[str]:
    """A line on classes without one pixel, with what may be wrong; none if all have some, or `may_be_empty`.

    Args:
        notes: counts of classes.decode over the whole set.
        table: class table of the masks on disk.
        may_be_empty: the user knows of it.
    Raises:
        UserError: if the masks hold one class and the number (or colour) of ignored pixels, and nothing says that it
            means ignored: in binary masks of 0 and 255 the second number is a class.
    """
    numbers = {key: count for key, count in notes.items() if isinstance(key, int) and count}
    ids = table.source_ids or {index: index for index in table.ids}
    pixels = Counter({ids.get(number, IGNORE_INDEX): count for number, count in numbers.items()})
    pixels.update({int(key.removeprefix("class ")): count for key, count in notes.items()
                   if str(key).startswith("class ")})
    empty = [name for index, name in zip(table.ids, table.names, strict=True) if not pixels[index]]
    if not empty or not pixels or may_be_empty:
        return []
    text = f"class table {table.name}: not one pixel of {', '.join(empty)} in all masks"
    others = sorted(set(numbers) - {IGNORE_INDEX})
    total = sum(pixels.values())
    if numbers.get(IGNORE_INDEX) and IGNORE_INDEX not in ids and len(others) <= 1:
        guess = dict(zip([*others, IGNORE_INDEX], table.ids, strict=False))
        raise UserError(
            f"{text}. They hold {', '.join(map(str, sorted(numbers)))}; 255 ({numbers[IGNORE_INDEX] / total:.1%} of "
            f"the pixels) is read as no class. If 255 is a class, add this to the table: source_ids: {guess}. If it "
            f"means no class, say so: source_ids: {dict.fromkeys(others, 0) | {255: 255}}, or --allow_empty_classes.")
    if notes.get("class 255") and not numbers and len(pixels) <= 2:
        raise UserError(
            f"{text}. {notes['class 255'] / total:.1%} of the pixels have the colour {list(table.ignore_colour)}, "
            "which is read as no class. If it is the colour of a class, give it to that class and set ignore_colour to "
            "another one. If it means no class, add --allow_empty_classes.")
    if numbers and 0 not in numbers and table.source_ids is None:
        guess = {index + 1: index for index in table.ids}
        return [f"warning: {text}; they hold {', '.join(map(str, others[:12]))}. If the ids count from 1, add this to "
                f"the table: source_ids: {guess}"]
    if not numbers:
        return [f"warning: {text}"]
    if numbers.get(IGNORE_INDEX) and IGNORE_INDEX not in ids:
        guess = {number: ids[number] for number in others if number in ids}
        guess[IGNORE_INDEX] = next(index for index in table.ids if not pixels[index])
        return [f"warning: {text}; 255 ({numbers[IGNORE_INDEX] / total:.1%} of the pixels) is read as no class. If it "
                f"is a class, add source_ids to the table, such as source_ids: {guess}"]
    return [f"warning: {text}; if that is not so, compare the numbers on disk ({', '.join(map(str, others[:12]))}) "
            "with its ids, or add source_ids to it"]


def describe_masks(cut: Cut, table: ClassTable) -> list[str]:
    """Lines on where masks lie and what was decided in reading them; UserError if files were read in two ways."""
    notes = cut.notes
    if notes.get("ids_in_three_channels") and notes.get("grey_by_colour"):
        raise UserError(f"masks of three equal channels: {notes['ids_in_three_channels']} hold ids, "
                        f"{notes['grey_by_colour']} only greys that are colours of the table. Expected one kind. "
                        "Choose it with --mask_kind ids or --mask_kind colours.")
    texts = {
        "palette_by_colour": "palette masks: their colours are the table's in another order, so colours were read",
        "ids_in_three_channels": "masks have their ids in three equal channels",
        "nearest_colour": "pixels were near a colour of the table (--nearest_colour)",
        "stray_colours": "pixels of other colours became 255 (--stray_colours ignore)",
        "nodata": "pixels of masks are called no data by the files and became 255",
        "image_nodata": "pixels without data in the image became 255",
    }
    lines = [f"warning: {len(cut.misplaced)} masks lie elsewhere on Earth than their images, by coordinate system or "
             f"more than half a pixel ({cut.misplaced[0]}). Pixels were paired by their row and column. If they do not "
             "fit, write the masks again on the grid of the images"] if cut.misplaced else []
    lines += [f"{notes[key]:,} {text}" for key, text in texts.items() if notes.get(key)]
    if notes.get("only_0_and_255") and table.num_classes == 2 and IGNORE_INDEX not in (table.source_ids or {}):
        lines.append(f"warning: {notes['only_0_and_255']} masks hold only 0 and 255, others 0 and 1; 255 is read as no "
                     "class. If it is the class that the others call 1, add this to the table: "
                     "source_ids: {0: 0, 1: 1, 255: 1}")
    labelled = sum(count for key, count in notes.items() if isinstance(key, int) or str(key).startswith("class "))
    if notes.get("black", 0) > MUCH_BLACK * labelled:
        lines.append(f"warning: {notes['black'] / labelled:.1%} of the labelled pixels are black (0 in every band). If "
                     "they lie outside of what was recorded, add --nodata 0, which makes them 255 in the masks")
    if notes.get("unlabelled_black", 0) > MUCH_BLACK * notes["unlabelled"]:
        share = notes["unlabelled_black"] / notes["unlabelled"]
        lines.append(f"warning: {share:.1%} of the pixels of images without masks are black (0 in every band). If they "
                     "lie outside of what was recorded, add --nodata 0, which leaves out tiles with holes: as "
                     "references they ask for black ground")
    return lines


def write_manifests(args: argparse.Namespace, root: Path, tiles: Sequence[Tile]) -> tuple[dict[str, int], int]:
    """Write all manifests; return their numbers of rows and the number of tiles left without a reference."""
    by_split = {split: [tile for tile in tiles if tile.source.split == split] for split in (*SPLITS, "ref")}
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
        raise UserError(f"--pair: there are no {args.infer_split} masks to generate. Choose --infer_split, or set "
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


def summarise(tiles: Sequence[Tile], found: Sources) -> dict[str, dict[str, Any]]:
    """{split: images, groups, tiles, unlabelled tiles, pixels (K + 1, ignored last)}."""
    result = {}
    for split in (*SPLITS, "ref"):
        own = [tile for tile in tiles if tile.source.split == split]
        sources = [source for source in found.images if source.split == split]
        if sources:
            result[split] = {
                "images": len(sources),
                "groups": len({source.group for source in sources}),
                "tiles": len(own),
                "unlabelled_tiles": sum(tile.source.pair.mask is None for tile in own),
                "pixels": [int(number) for number in sum(tile.counts for tile in own)] if own else [],
            }
    return result


def print_summary(summary: Mapping[str, Any], out: Path) -> None:
    """Print the table of a summary and what was left out."""
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
    scale = summary["reading"]["scale"] if summary.get("reading") else None
    if scale:
        print("scale to 8 bits: " + ", ".join(f"{low:g} to {high:g}" for low, high in scale))
    if summary.get("left_out"):
        print("left out: " + ", ".join(f"{number} {kind}" for kind, number in summary["left_out"].items()))
    for note in summary.get("notes", []):
        print(note)
    if summary["tiles_without_reference"]:
        print(f"{summary['tiles_without_reference']} tiles are in no train or val manifest: no other tile could be "
              "their reference (--train_ref)")


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
    left_out = sum((Counter(one.get("left_out", {})) for one in summaries), Counter())
    readings = [one.get("reading") for one in summaries]
    summary = {**summaries[0], "manifests": {}, "splits": join_splits(summaries), "merged": [
        folder.relative_to(out).as_posix() for folder in folders], "left_out": dict(left_out), "notes": [],
        "masks": dict(sum((Counter(one.get("masks", {})) for one in summaries), Counter())),
        "reading": readings[0] if all(reading == readings[0] for reading in readings) else None,
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
    write_json(out / SUMMARY, summary)
    return summary


def move_row(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A manifest row with its paths below another folder."""
    return {key: f"{prefix}/{value}" if key in DISK_KEYS.values() and key != "prompt" else value
            for key, value in row.items()}  # fmt: skip


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
