"""Drop the pixels of synthesized pictures that do not look like their class.

A segmentor trained on real tiles says how well every pixel shows the class of its mask. Its mean loss on real tiles,
class by class, is the measure (better on tiles that it was not trained on, see --hardness_txt_file). Where the loss in
a synthesized picture exceeds --tolerance-margin times that mean, the mask becomes 255 (ignored). The result is one mask
a picture in --filtered-mask-path, with reports beside them. An interrupted run, started again, goes on where it ended.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.cli import add_classes, choose_device
from ldm.data.classes import ClassTable, same_names
from ldm.data.manifest import read_manifest
from ldm.files import (
    Record,
    atomic_write,
    find_changes,
    lock,
    read_lines,
    read_settings,
    take_lock,
    write_json,
    write_lines,
)
from ldm.util import UserError, run_entry_point
from post_processing.run_index import read_run
from post_processing.segmentation.dataset import match_folders
from post_processing.segmentation.loading import Item, find_items
from post_processing.segmentation.segmentor import Segmentor, load_segmentor
from post_processing.selection.hardness import Hardness, fingerprint_of, get_hardness
from post_processing.selection.rules import PixelFilter, draw_overlay, is_finished

logger = logging.getLogger(__name__)

EXIT_FAILED = 3


def build_parser() -> argparse.ArgumentParser:
    """Command line of filter.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("config", help="segmentor: config.json of train_segmentor.py, or another mmseg config")
    add("checkpoint", help="segmentor: its segmentor.pth; nothing in it is run")
    add_classes(add, "default: the run's, else the segmentor's")
    add("--real-img-path", help="folder of the real images that the segmentor was trained on")
    add("--real-mask-path", "--real-label-path", help="folder of their masks, with the stems of the images")
    add("--real_txt_file", help="manifest of real pairs (source, target), instead of the two folders")
    add("--data_root", help="where the paths of --real_txt_file start; default: its folder")
    add("--hardness_txt_file", help="manifest of real pairs that the segmentor was not trained on: the class means are "
        "taken on these, which are not as low as on its training pairs. Paths start at --data_root")
    add("--fold", nargs=3, action="append", default=[], metavar=("CONFIG", "CKPT", "TXT_FILE"),
        help="another segmentor and pairs that it was not trained on: the class means are those of all folds. Give it "
        "once for each")
    add("--syn-img-path", help="folder of synthesized pictures, {mask stem}_seed_{N}.png or .jpg")
    add("--syn-mask-path", help="folder of the masks that they were painted for")
    add("--run", help="--outdir of inference.py, instead of the two folders")
    add("--run_root", help="where the masks of --run are; default: as noted by inference.py")
    add("--filtered-mask-path", required=True, help="output folder")
    add("--hardness", help="file that keeps the class means; default: hardness.json in the output folder")
    add("--tolerance-margin", type=float, default=1.25, help="drop pixels above this many class means")
    add("--batch_size", type=int, default=16, help="pictures at once; halved where memory ends")
    add("--num_workers", type=int, default=4, help="threads that read, and as many that write")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    add("--shard", default="0/1", help="i/n: filter pictures i, i+n, ... (i from 0), for n processes on one folder")
    add("--engine", choices=["local", "ray"], default="local", help="ray: actors on a Ray cluster")
    add("--ray_workers", type=int, default=2, help="number of actors, each with a GPU where there are any")
    add("--overlays", type=int, default=0, help="draw this many pictures with their dropped pixels")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure or read the hardness, then filter.

    Returns:
        0 if all pictures of the shard have their filtered mask; 3 if some could not be judged (see failures.jsonl);
        130 after Ctrl-C. The same command goes on where this one ended.
    """
    args = build_parser().parse_args(argv)
    if args.debug:
        logging.getLogger().setLevel(logging.DEBUG)
    try:
        return run_filter(args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def run_filter(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    shard, shards = check_arguments(args)
    items, run, images = find_synthesized(args)
    parts = find_judged(args)
    run_table = ClassTable.load(run["class_table"]) if run.get("class_table") else None
    given = ClassTable.load(args.classes) if args.classes else run_table
    segmentor = load_segmentor(args.config, args.checkpoint, choose_device(args.device), given)
    table = run_table or segmentor.class_table  # of the painted masks; the real ones may have other numbers on disk
    if not same_names(table.names, segmentor.class_table.names):
        raise UserError(
            f"--classes: {segmentor.class_table.name} has other classes than the run, {', '.join(table.names)}. "
            "Expected the same ones. Leave --classes out."
        )
    folder = Path(args.filtered_mask_path)
    folder.mkdir(parents=True, exist_ok=True)
    own = segmentor.class_table
    fingerprint = fingerprint_of(args.config, args.checkpoint, own, [pair for *_, pairs in parts for pair in pairs])
    if args.fold:
        fingerprint["folds"] = [fingerprint_of(config, checkpoint, own, pairs) for config, checkpoint, pairs in parts]
    settings = {
        "images": str(images.absolute()),
        "class_table": table.to_dict(),
        "tolerance_margin": args.tolerance_margin,
        **fingerprint,
    }
    claim_folder(folder, settings, len(items))
    with claim_shard(folder, shard, shards) as work:
        hardness = get_hardness(
            Path(args.hardness or folder / "hardness.json"), fingerprint, load_parts(parts, args, segmentor),
            args.batch_size, args.num_workers,
        )  # fmt: skip
        warn_of_unknown(hardness, args.tolerance_margin)
        records = read_lines(folder / "items.jsonl", "image")
        own = items[shard::shards]
        todo = [item for item in own if not is_finished(records.get(item.image.name, {}), item, folder)]
        logger.info("%d pictures, %d of them finished", len(own), len(own) - len(todo))
        limits = hardness.limits(args.tolerance_margin)
        if args.engine == "ray":
            failures = filter_on_ray(args, todo, limits, segmentor.class_table, table, folder, work)
        else:
            worker = PixelFilter(segmentor, limits, table, folder, work, args.batch_size, args.num_workers)
            failures = worker.run(todo)
    failed = settle(folder, items, failures)
    records = read_lines(folder / "items.jsonl", "image")
    write_report(folder, records, failed, hardness, args.tolerance_margin)
    draw_overlays(folder, items[: args.overlays], records, table)
    return EXIT_FAILED if failures else 0


def filter_on_ray(
    args: argparse.Namespace, items: Sequence[Item], limits: torch.Tensor, own: ClassTable, table: ClassTable,
    folder: Path, work: Path,
) -> list[Record]:  # fmt: skip
    """Let actors filter pictures, each with a segmentor of its own; returns the failures."""
    from post_processing.filter_ray import run_on_ray

    config, checkpoint, device = os.path.abspath(args.config), os.path.abspath(args.checkpoint), args.device
    size, workers, folder = args.batch_size, args.num_workers, folder.absolute()
    items = [Item(item.image.absolute(), item.mask.absolute(), item.is_resized) for item in items]

    def build(place: Path) -> PixelFilter:
        segmentor = load_segmentor(config, checkpoint, choose_device(device), own)
        return PixelFilter(segmentor, limits, table, folder, place, size, workers)

    is_cuda = choose_device(device).type == "cuda"
    return run_on_ray(build, work.absolute(), items, size, args.ray_workers, is_cuda) if items else []


def check_arguments(args: argparse.Namespace) -> tuple[int, int]:
    """Check what argparse cannot; returns the shard and the number of shards."""
    first, _, count = args.shard.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f"--shard: {args.shard} is not possible. Expected i/n with 0 <= i < n, such as 0/4.")
    if args.fold and args.hardness_txt_file:
        raise UserError("--fold, --hardness_txt_file: expected one of the two. The class means are taken on either.")
    for flag, least in (("batch_size", 1), ("num_workers", 1), ("ray_workers", 1), ("overlays", 0)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag}: {getattr(args, flag)} is not possible. Expected at least {least}.")
    if not args.tolerance_margin > 0 or not np.isfinite(args.tolerance_margin):
        raise UserError(f"--tolerance-margin: {args.tolerance_margin} is not possible. Expected a number above 0.")
    for one, (first_folder, second_folder) in (
        ("real_txt_file", ("real_img_path", "real_mask_path")),
        ("run", ("syn_img_path", "syn_mask_path")),
    ):
        folders = [getattr(args, first_folder), getattr(args, second_folder)]
        if one == "real_txt_file" and (args.fold or args.hardness_txt_file) and not any(folders):
            continue  # the pairs of the training are not looked at
        if (getattr(args, one) is None) != all(folders) or (getattr(args, one) and any(folders)):
            names = f"--{first_folder.replace('_', '-')} and --{second_folder.replace('_', '-')}"
            raise UserError(f"--{one}: expected it, or both {names}. Give one of the two.")
    return int(first), int(count)


def find_synthesized(args: argparse.Namespace) -> tuple[list[Item], dict[str, Any], Path]:
    """Pictures with their masks in the order of their names, what run.json says, and the folder of the pictures.

    Raises:
        ValueError: if two pictures would share an output file.
    """
    run: dict[str, Any] = {}
    if args.run:
        samples, run = read_run(args.run, args.run_root, check_files=False)
        settings = run.get("fingerprint", {})
        is_resized = settings.get("H") is not None or settings.get("W") is not None
        items = sorted((Item(sample.image, sample.mask, is_resized) for sample in samples), key=lambda i: i.image.name)
        if not any(item.mask.is_file() for item in items):
            raise FileNotFoundError(
                f"--run: none of the masks of {args.run} is there (the first is {items[0].mask}). Expected them where "
                "the run found them. Say where they are now with --run_root."
            )
        images = Path(args.run) / "images"
    else:
        images = Path(args.syn_img_path)
        items = find_items(images, Path(args.syn_mask_path))
    stems = [item.image.stem for item in items]
    if len(set(stems)) < len(stems):
        doubled = sorted({stem for stem in stems if stems.count(stem) > 1})
        raise ValueError(
            f"{images}: {len(doubled)} names are used by two pictures ({', '.join(doubled[:3])}). Expected one picture "
            "a name, since its mask is called {name}.png. Rename or remove one."
        )
    return items, run, images


def find_judged(args: argparse.Namespace) -> list[tuple[str, str, list[Item]]]:
    """Config, checkpoint and real pairs of every segmentor whose losses make the class means."""
    if args.fold:
        return [(*fold, read_pairs(manifest, args.data_root)) for *fold, manifest in args.fold]
    manifest = args.hardness_txt_file or args.real_txt_file
    if manifest:
        return [(args.config, args.checkpoint, read_pairs(manifest, args.data_root))]
    pairs = [Item(*pair) for pair in match_folders(Path(args.real_img_path), Path(args.real_mask_path))]
    if not pairs:
        raise UserError(f"--real-img-path: no pictures in {args.real_img_path}. Expected the real training images.")
    return [(args.config, args.checkpoint, pairs)]


def read_pairs(manifest: str, root: str | None) -> list[Item]:
    """Real pairs of a manifest, each once; which files are sound shows when they are read."""
    rows = read_manifest(manifest, root or Path(manifest).parent, need=("image",), check_files=False)
    pairs = dict.fromkeys((row.image, row.mask) for row in rows)  # rows may differ in the reference only
    return [Item(image, mask) for image, mask in pairs]


def load_parts(parts: Sequence[tuple[str, str, list[Item]]], args: argparse.Namespace,
               segmentor: Segmentor) -> Iterator[tuple[Segmentor, list[Item]]]:
    """The segmentors of find_judged, one at a time, with their pairs; the one that filters is there already."""
    for config, checkpoint, pairs in parts:
        is_own = (config, checkpoint) == (args.config, args.checkpoint)
        yield segmentor if is_own else load_segmentor(
            config, checkpoint, choose_device(args.device), segmentor.class_table), pairs


def claim_folder(folder: Path, settings: dict[str, Any], pictures: int) -> None:
    """Note the settings in an output folder, and how many pictures the run has, by which resample.py sees an end.

    Raises:
        FileExistsError: if it holds masks that were made with other settings.
    """
    path = folder / "filter.json"
    with lock(folder / ".lock"):
        old = read_settings(path)
        changes = find_changes(old, settings) if old else ""
        if changes:
            raise FileExistsError(
                f"--filtered-mask-path: {folder} holds masks of other settings ({changes}). Expected the "
                "same settings to go on. Choose another folder."
            )
        if not old and any(folder.glob("*.png")):
            raise FileExistsError(
                f"--filtered-mask-path: {folder} has masks but no filter.json. Expected a new folder or one of an "
                "earlier run. Choose another folder."
            )
        write_json(path, {"settings": settings, "pictures": pictures})


@contextmanager
def claim_shard(folder: Path, shard: int, shards: int) -> Iterator[Path]:
    """Keep a shard for this process; gives a folder for unfinished files, which a killed process may have left some in.

    Raises:
        FileExistsError: if a living process works on the same shard.
    """
    work = folder / f".work-{shard}-of-{shards}"
    work.mkdir(exist_ok=True)
    held = take_lock(work / "lock")
    if held is None:
        raise FileExistsError(
            f"--shard: another process filters {shard}/{shards} of {folder}. Expected one a shard. Wait for it, or "
            "give every process its own --shard."
        )
    with held:
        for stale in work.iterdir():
            if stale.name != "lock":
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        yield work
        shutil.rmtree(work)


def warn_of_unknown(hardness: Hardness, margin: float) -> None:
    """Say which classes have no statistics, and the limits of the others."""
    unknown = [name for name, pixels in zip(hardness.names, hardness.pixels, strict=True) if not pixels]
    if unknown:
        logger.warning("no real pixel of %s: left as they are in the synthesized masks", ", ".join(unknown))
    known = zip(hardness.names, hardness.mean, hardness.pixels, strict=True)
    limits = (f"{name} {margin * mean:.4f}" for name, mean, pixels in known if pixels)
    logger.info("loss above which a pixel is dropped: %s", ", ".join(limits))


def settle(folder: Path, items: Sequence[Item], failures: Sequence[Record]) -> list[Record]:
    """Leave items.jsonl and failures.jsonl with one line for each picture of the run, in order, and no others.

    Returns:
        All failures of all shards.
    """
    append_failures = {record["image"]: record for record in failures}
    names = {item.image.name for item in items}
    path, records_path = folder / "failures.jsonl", folder / "items.jsonl"
    with lock(folder / ".lock"):
        records = read_lines(records_path, "image")
        old = read_lines(path, "image")
        old = {name: record for name, record in old.items() if name in names and name not in records}
        failed = dict(sorted({**old, **append_failures}.items()))
        finished = [record for name, record in records.items() if name in names and name not in append_failures]
        write_lines(records_path, finished)
        write_lines(path, failed.values())
    return list(failed.values())


def write_report(
    folder: Path, records: dict[str, Record], failed: Sequence[Record], hardness: Hardness, margin: float
) -> None:
    """Write report.json and report.md: what was dropped, class by class, and how many pictures failed."""
    totals = {name: np.zeros(3, np.int64) for name in hardness.names}
    for record in records.values():
        for name, (pixels, dropped) in record["classes"].items():
            totals[name] += pixels, dropped, 1
    classes = {}
    for name, mean, real in zip(hardness.names, hardness.mean, hardness.pixels, strict=True):
        pixels, dropped, pictures = map(int, totals[name])
        classes[name] = {
            "real_pixels": int(real), "mean_loss": round(float(mean), 6) if real else None,
            "limit": round(margin * float(mean), 6) if real else None, "pictures": pictures, "pixels": pixels,
            "dropped": dropped, "share": round(dropped / pixels, 6) if pixels else None,
        }  # fmt: skip
    everything, dropped = (sum(int(total[k]) for total in totals.values()) for k in (0, 1))
    report = {"pictures": len(records), "failed": len(failed), "tolerance_margin": margin, "pixels": everything,
              "dropped": dropped, "share": round(dropped / max(1, everything), 6), "classes": classes}  # fmt: skip
    lines = [
        "| class | real pixels | mean loss | limit | pictures | pixels | dropped |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in classes.items():
        loss = f"{row['mean_loss']:.4f} | {row['limit']:.4f}" if row["real_pixels"] else "none | left alone"
        share = "-" if row["share"] is None else f"{row['share']:.1%}"
        lines.append(f"| {name} | {row['real_pixels']:,} | {loss} | {row['pictures']} | {row['pixels']:,} | {share} |")
    lines.append(f"| all | | | | {len(records)} | {everything:,} | {report['share']:.1%} |")
    where = " (failures.jsonl)" if failed else ""
    text = "\n".join(lines) + f"\n\n{len(records)} pictures filtered, {len(failed)} failed{where}.\n"
    with lock(folder / ".lock"):
        write_json(folder / "report.json", report)
        atomic_write(folder / "report.md", text)
    logger.info("%s\nwritten to %s", text, folder)


def draw_overlays(folder: Path, items: Sequence[Item], records: dict[str, Record], table: ClassTable) -> None:
    """Draw overlays/{stem}.png for pictures that are finished."""
    for item in items:
        if item.image.name in records:
            (folder / "overlays").mkdir(exist_ok=True)
            draw_overlay(records[item.image.name], item, folder, table).save(
                folder / "overlays" / f"{item.image.stem}.png"
            )


if __name__ == "__main__":
    run_entry_point(main)
