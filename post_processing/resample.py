"""Choose the filtered images that are worth training on, and lay them out as a training set.

Reads what filter.py left in --filtered-mask-path. Writes --out-dir: images/ and masks/ (hard links where the file
system allows, else copies), train_set_items.json (a manifest whose paths start there), and the class balance before and
after as summary.json, summary.md and summary.png. The folder appears complete or not at all.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ldm.cli import add_classes, fraction, positive_int
from ldm.data.classes import ClassTable, name_key, read_mask, same_names
from ldm.data.manifest import write_manifest
from ldm.files import atomic_folder, digest_of, link_or_copy, write_json
from ldm.run_folder import RunFolder
from ldm.util import UserError, nearest, run_entry_point
from post_processing.segmentation.loading import find_generated
from post_processing.selection.balance import balance_of, describe_balance, draw_balance
from post_processing.selection.choice import Candidate, cap, keep_by_hardness, keep_by_rule
from post_processing.selection.hardness import read_hardness

logger = logging.getLogger(__name__)

MANIFEST = "train_set_items.json"
OWN_FILES = {"images", "masks", MANIFEST, "resample.json", "summary.json", "summary.md", "summary.png"}


def build_parser() -> argparse.ArgumentParser:
    """Command line of resample.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--filtered-mask-path", required=True, help="output folder of filter.py")
    add("--out-dir", required=True, help="output folder, one for each choice")
    add("--syn-img-path", help="folder of the images; default: as noted by filter.py")
    add("--syn-mask-path", help="folder of the masks before filtering; only for masks that filter.py did not write")
    add_classes(add, "default: the one that filter.py used")
    add("--policy", choices=["rule", "hardness"], default="rule",
        help="rule: a rare class survives or most of the mask does; hardness: the harder a mask, the more images")
    add("--rare", nargs="+", type=str.strip, default=["auto"], metavar="CLASS",
        help="rule: names of rare classes; none; auto = the worst of the segmentor's classes (see --iou)")
    add("--num-rare", type=positive_int, default=3, help="how many classes --rare auto takes")
    add("--iou", help="JSON with the IoU of every class, such as results.json of evaluate.py; for --rare auto")
    add("--segmentor", nargs=2, metavar=("CONFIG", "CKPT"), help="measure the IoU of this one instead; needs:")
    add("--iou_txt_file", help="manifest of real validation pairs to measure the IoU on; paths start at its folder")
    add("--device", default="auto", help="where --segmentor runs")
    add("--min-rare-pixels", type=positive_int, default=1, help="rule: pixels of a rare class that must survive")
    add("--valid-ratio", type=fraction, default=0.8, help="rule: or more than this share of the mask must survive")
    add("--count-ignored", action="store_true", help="rule: pixels that never had a class count as dropped")
    add("--hardness", help="hardness.json for --policy hardness; default: the one beside the filtered masks")
    add("--max-per-mask", type=positive_int, help="most images of one mask")
    add("--max-per-class", type=positive_int,
        help="most images kept for one class, each counting for its rarest class")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--overwrite", action="store_true", help="replace another choice in --out-dir")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Choose and write; returns 0. Mistakes of the user raise ValueError, FileNotFoundError or FileExistsError."""
    args = build_parser().parse_args(argv)
    filtered = Path(args.filtered_mask_path)
    settings = RunFolder(filtered, record="filter.json").read().get("settings", {})
    if not settings and not args.classes:
        raise UserError(f"--filtered-mask-path: {filtered} has no filter.json. Expected the output of filter.py. For "
                        "other masks give --classes, --syn-img-path and --syn-mask-path.")
    table = ClassTable.load(args.classes or settings["class_table"])
    candidates = find_candidates(args, settings, table)
    kept, choice = choose(args, candidates, table)
    write_out(Path(args.out_dir), choice, candidates, kept, table, args.overwrite)
    return 0


def choose(args: argparse.Namespace, candidates: Sequence[Candidate],
           table: ClassTable) -> tuple[list[Candidate], dict[str, Any]]:
    """The images to keep, in the order of their names, and all that this choice depends on.

    Raises:
        UserError: if none is worth keeping.
    """
    choice: dict[str, Any] = {
        "policy": args.policy, "seed": args.seed, "max_per_mask": args.max_per_mask,
        "max_per_class": args.max_per_class, "class_table": table.to_dict(),
        "pictures": len(candidates), "pictures_sha256": digest_of([
            [one.image.name, one.mask, one.before.tolist(), one.after.tolist()] for one in candidates]),
    }  # fmt: skip
    usable = [candidate for candidate in candidates if candidate.after.any()]
    if len(usable) < len(candidates):
        logger.info("%d images have no labelled pixel left: not chosen", len(candidates) - len(usable))
    if args.policy == "rule":
        rare = find_rare(args, table)
        kept = keep_by_rule(usable, rare, args.min_rare_pixels, args.valid_ratio, args.count_ignored)
        choice |= {"rare": [table.names[index] for index in rare], "min_rare_pixels": args.min_rare_pixels,
                   "valid_ratio": args.valid_ratio, "count_ignored": args.count_ignored}  # fmt: skip
    else:
        hardness = read_hardness(Path(args.hardness or Path(args.filtered_mask_path) / "hardness.json"))
        if not same_names(hardness.names, table.names):
            raise UserError(f"--hardness: of classes {', '.join(hardness.names)}. Expected {', '.join(table.names)}.")
        kept = keep_by_hardness(usable, hardness.mean, args.seed)
        choice["hardness_sha256"] = digest_of(hardness.to_json())
    chosen = len(kept)
    kept = sorted(cap(kept, args.max_per_mask, args.max_per_class, args.seed), key=lambda one: one.image.name)
    if not kept:
        raise UserError(f"--policy {args.policy}: none of {len(candidates)} images is worth keeping. Expected some. "
                        "Lower --valid-ratio, name other --rare classes, or filter with a larger --tolerance-margin.")
    logger.info("%d of %d images chosen, %d after the caps", chosen, len(candidates), len(kept))
    return kept, choice


def find_candidates(args: argparse.Namespace, settings: Mapping[str, Any], table: ClassTable) -> list[Candidate]:
    """All filtered images with their pixels of each class, in the order of their names.

    Raises:
        FileNotFoundError: if images or masks are missing.
        UserError: if there are none, or the filter has not finished.
    """
    folder = Path(args.filtered_mask_path)
    records = RunFolder(folder).done()
    if records and not args.syn_mask_path:
        check_finished(folder, records)
        images = Path(args.syn_img_path or settings["images"])
        candidates = [from_record(record, images, folder, table) for record in records.values()]
    elif args.syn_img_path and args.syn_mask_path:
        items = find_generated(Path(args.syn_img_path), Path(args.syn_mask_path))
        filtered = {item: folder / f"{item.image.stem}.png" for item in items}
        items = [item for item in items if filtered[item].is_file()]

        def count(path: Path) -> np.ndarray:
            return np.bincount(read_mask(path, table).ravel(), minlength=256)

        with ThreadPoolExecutor() as pool:
            masks = sorted({item.mask for item in items})
            before = dict(zip(masks, pool.map(count, masks), strict=True))
            after = pool.map(lambda item: count(filtered[item]), items)
            candidates = [Candidate(item.image, filtered[item], str(item.mask), int(counts.sum()),
                                    before[item.mask][: table.num_classes], counts[: table.num_classes])
                          for item, counts in zip(items, after, strict=True)]  # fmt: skip
    else:
        raise UserError(f"--filtered-mask-path: {folder} has no items.jsonl. Expected the output of filter.py. For "
                        "other masks give both --syn-img-path and --syn-mask-path.")
    if not candidates:
        raise UserError(f"--filtered-mask-path: no image has a mask in {folder}. Check the folders.")
    missing = [path for one in candidates for path in (one.image, one.filtered) if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} files of {len(candidates)} images are missing (the first: "
                                f"{missing[0]}). Expected the images where filter.py found them. Say where they are "
                                "now with --syn-img-path, or filter again.")
    return candidates


def check_finished(folder: Path, records: Mapping[str, Any]) -> None:
    """Raise UserError if the filter has not judged all images of its run; folders that do not say how many pass."""
    filtered = RunFolder(folder, record="filter.json")
    images, judged = filtered.read().get("pictures", 0), len({*records, *filtered.failed()})
    if judged < images:
        raise UserError(f"--filtered-mask-path: {folder} is not finished ({judged} of {images} images are judged). "
                        "Expected all of them. Give the command of filter.py again, with every --shard if there are "
                        "several.")


def from_record(record: Mapping[str, Any], images: Path, folder: Path, table: ClassTable) -> Candidate:
    """Candidate of a line of the filter's items.jsonl."""
    before, after = np.zeros((2, table.num_classes), np.int64)
    for name, (pixels, dropped) in record["classes"].items():
        if name not in table.names:
            raise UserError(f"--classes: no class {name}, which the filtered masks have. Expected the filter's table.")
        before[table.names.index(name)], after[table.names.index(name)] = pixels, pixels - dropped
    area = record["height"] * record["width"]
    return Candidate(images / record["image"], folder / record["file"], record["mask"], area, before, after)


def find_rare(args: argparse.Namespace, table: ClassTable) -> list[int]:
    """Ids of the rare classes that the command line names or has measured."""
    if args.rare == ["none"]:
        return []
    if args.rare != ["auto"]:
        for name in args.rare:
            if table.find(name) is None:
                raise UserError(f"--rare: no class {name!r} in {table.name}.{nearest(name, table.names)} "
                                f"Expected some of {', '.join(table.names)}.")  # fmt: skip
        return sorted({table.find(name) for name in args.rare})
    iou = measure_iou(args, table) if args.segmentor else read_iou(args.iou, table)
    known = sorted((value, name) for name, value in iou.items() if value is not None)
    worst = [name for _, name in known[: args.num_rare]]
    logger.info("rare classes: %s", ", ".join(f"{name} (IoU {iou[name]:.2f})" for name in worst))
    return sorted(table.names.index(name) for name in worst)


def read_iou(path: str | None, table: ClassTable) -> dict[str, float | None]:
    """IoU of every class from a JSON: {class: IoU}, or such an object under `IoU` or under `real` and `IoU`."""
    if path is None:
        raise UserError("--rare auto: needs the IoU of every class. Expected --iou FILE, or --segmentor CONFIG CKPT "
                        "with --iou_txt_file. Or name the classes, or say --rare none.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--iou: file not found: {path}. Give results.json of evaluate.py.")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        found = found.get("real", found)
        found = {name_key(name): value for name, value in found.get("IoU", found).items()}
        values = {name: found[name_key(name)] for name in table.names}
        return {name: None if value is None else float(value) for name, value in values.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--iou: {path} has no IoU of every class ({type(error).__name__} {error}). Expected an object "
                        f"IoU with {', '.join(table.names)}. Give results.json of evaluate.py.") from error


def measure_iou(args: argparse.Namespace, table: ClassTable) -> dict[str, float | None]:
    """IoU of every class on a manifest of real pairs, by the metric of mmseg."""
    from post_processing.evaluation.scores import score_pairs
    from post_processing.segmentation.dataset import list_pairs
    from post_processing.segmentation.segmentor import segmentor_of

    if not args.iou_txt_file:
        raise UserError("--segmentor: needs real pairs to measure its IoU on. Expected --iou_txt_file MANIFEST.")
    pairs = list_pairs(table, manifest=args.iou_txt_file, data_root=Path(args.iou_txt_file).parent)
    return score_pairs(segmentor_of(args, table), pairs, 16, 4)["IoU"]


def write_out(out: Path, choice: dict[str, Any], candidates: Sequence[Candidate], kept: Sequence[Candidate],
              table: ClassTable, is_overwritten: bool) -> None:
    """Lay out the kept images; the folder is put together beside its place and then moved there.

    Raises:
        FileExistsError: if the folder holds another choice (unless overwritten) or files of somebody else.
    """
    check_folder(out, choice, is_overwritten)
    with atomic_folder(out) as partial:
        for name in ("images", "masks"):
            (partial / name).mkdir()
        for one in kept:
            link_or_copy(one.image, partial / "images" / one.image.name)
            link_or_copy(one.filtered, partial / "masks" / one.filtered.name)
        write_manifest(
            partial / MANIFEST,
            ({"source": f"masks/{one.filtered.name}", "target": f"images/{one.image.name}"} for one in kept),
        )
        summary = balance_of(candidates, kept, table)
        write_json(partial / "summary.json", summary)
        (partial / "summary.md").write_text(describe_balance(summary), encoding="utf-8")
        draw_balance(summary, table).save(partial / "summary.png")
        RunFolder(partial, choice, record="resample.json").write()
    logger.info("%s\nwritten to %s", describe_balance(summary), out)


def check_folder(out: Path, choice: dict[str, Any], is_overwritten: bool) -> None:
    """Raise FileExistsError if an output folder holds what must not be replaced (see write_out)."""
    if not out.exists():
        return
    foreign = sorted(path.name for path in out.iterdir() if path.name not in OWN_FILES) if out.is_dir() else [out.name]
    if foreign:
        raise FileExistsError(f"--out-dir: {out} holds files that this command did not write "
                              f"({', '.join(foreign[:3])}). Expected a new folder or an earlier choice. Choose another "
                              "folder.")
    earlier = RunFolder(out, choice, "--out-dir", "resample.json")
    record = earlier.read() or {"settings": {}}
    if (changes := earlier.changes(record)) and any(out.iterdir()) and not is_overwritten:
        raise FileExistsError(f"--out-dir: {out} holds another choice ({changes}). Expected the same one. Choose "
                              "another folder, or replace it with --overwrite.")


if __name__ == "__main__":
    run_entry_point(main)
