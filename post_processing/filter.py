"""Drop the pixels of synthesized images that do not look like their class.

A segmentor trained on real tiles says how well every pixel shows the class of its mask. Its mean loss on real tiles,
class by class, is the measure (better on tiles that it was not trained on, see --hardness_txt_file). Where the loss in
a synthesized image exceeds --tolerance-margin times that mean, the mask becomes 255 (ignored). The result is one mask
an image in --filtered-mask-path, with reports beside them. An interrupted run, started again, goes on where it ended.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm import ray_pool
from ldm.cli import add_classes, choose_device, markdown_table, natural, positive_float, positive_int, shard
from ldm.data.classes import ClassTable, same_names
from ldm.data.images import Pair
from ldm.files import Record, atomic_write, lock, write_json
from ldm.run_folder import RunFolder
from ldm.util import UserError, run_entry_point
from post_processing.run_index import read_run
from post_processing.segmentation.dataset import list_pairs
from post_processing.segmentation.loading import find_generated
from post_processing.segmentation.segmentor import Segmentor, load_segmentor
from post_processing.selection.hardness import Hardness, fingerprint_of, get_hardness
from post_processing.selection.rules import PixelFilter, draw_overlay, failure_of, is_finished

logger = logging.getLogger(__name__)

EXIT_FAILED = 3
BATCHES_A_TASK = 8  # of an actor: enough to read ahead, few enough to share the work evenly


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
    add("--syn-img-path", help="folder of synthesized images, {mask stem}_seed_{N}.png or .jpg")
    add("--syn-mask-path", help="folder of the masks that they were generated for")
    add("--run", help="--outdir of inference.py, instead of the two folders")
    add("--run_root", help="where the masks of --run are; default: as noted by inference.py")
    add("--filtered-mask-path", required=True, help="output folder")
    add("--hardness", help="file that keeps the class means; default: hardness.json in the output folder")
    add("--tolerance-margin", type=positive_float, default=1.25, help="drop pixels above this many class means")
    add("--batch_size", type=positive_int, default=16, help="images at once; halved where memory ends")
    add("--num_workers", type=positive_int, default=4, help="threads that read, and as many that write")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    add("--shard", type=shard, default="0/1",
        help="i/n: filter images i, i+n, ... (i from 0), for n processes on one folder")
    add("--engine", choices=["local", "ray"], default="local", help="ray: actors on a Ray cluster")
    add("--ray_workers", type=positive_int, help="number of actors; default: one a GPU, else 1")
    add("--overlays", type=natural, default=0, help="draw this many images with their dropped pixels")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure or read the hardness, then filter.

    Returns:
        0 if all images of the shard have their filtered mask; 3 if some could not be judged (see failures.jsonl);
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
    """Read all inputs, open the folder that belongs to them, filter, report; returns the exit code."""
    check_arguments(args)
    items, run, images = find_synthesized(args)
    judges = find_judges(args)
    run_table = ClassTable.load(run["class_table"]) if run.get("class_table") else None
    given = ClassTable.load(args.classes) if args.classes else run_table
    segmentor = load_segmentor(args.config, args.checkpoint, choose_device(args.device), given)
    own_table = segmentor.class_table
    table = run_table or own_table  # of the synthetic masks; the real ones may have other numbers on disk
    if not same_names(table.names, own_table.names):
        raise UserError(f"--classes: {own_table.name} has other classes than the run, {', '.join(table.names)}. "
                        "Expected the same ones. Leave --classes out.")
    real = [pair for *_, pairs in judges for pair in pairs]
    fingerprint = fingerprint_of(args.config, args.checkpoint, own_table, real)
    if args.fold:
        fingerprint["folds"] = [fingerprint_of(*files, own_table, pairs) for *files, pairs in judges]
    folder = RunFolder(Path(args.filtered_mask_path), {
        "images": str(images.absolute()), "class_table": table.to_dict(), "tolerance_margin": args.tolerance_margin,
        **fingerprint}, "--filtered-mask-path", "filter.json")  # fmt: skip
    folder.open(lambda _: {"pictures": len(items)})  # by which resample.py sees an end
    number, count = args.shard
    part = f".shard-{number}-of-{count}"
    with folder.claim(part) as held:
        if held is None:
            raise FileExistsError(f"--shard: another process filters {number}/{count} of {folder.folder}. Expected one "
                                  "a shard. Wait for it, or give every process its own --shard.")
        means = Path(args.hardness or folder.folder / "hardness.json")
        hardness = get_hardness(means, fingerprint, load_judges(judges, args, segmentor), args.batch_size,
                                args.num_workers)
        say_limits(hardness, args.tolerance_margin)
        is_resized = any(run.get("settings", {}).get(key) is not None for key in ("H", "W"))
        pixel_filter = PixelFilter(hardness.limits(args.tolerance_margin), table, folder.folder.absolute(),
                                   args.batch_size, args.num_workers, is_resized)
        records, own = folder.done(), items[number::count]
        todo = [item for item in own if not is_finished(records.get(item.image.name, {}), item, folder.folder)]
        logger.info("%d images, %d of them finished", len(own), len(own) - len(todo))
        work = folder.work(part).absolute()
        if args.engine == "ray":
            files = os.path.abspath(args.config), os.path.abspath(args.checkpoint)
            failures = filter_on_ray(
                args, pixel_filter, lambda: load_segmentor(*files, choose_device(args.device), own_table), work, todo)
        else:
            failures = pixel_filter.run(segmentor, work, todo)
    failed = folder.finish([item.image.name for item in items], failures)
    records = folder.done()
    write_report(folder.folder, records, failed, hardness, args.tolerance_margin)
    for item in items[: args.overlays]:
        if item.image.name in records:
            draw_overlay(records[item.image.name], item, folder.folder, table)
    return EXIT_FAILED if failures else 0


def filter_on_ray(args: argparse.Namespace, pixel_filter: PixelFilter, load: Callable[[], Segmentor], work: Path,
                  pairs: Sequence[Pair]) -> list[Record]:  # fmt: skip
    """Let actors filter images, each with a segmentor from `load` and a folder of its own in `work`; the failures."""
    if not pairs:
        return []
    ray = ray_pool.connect()
    failures: list[Record] = []

    def build() -> Callable[[Sequence[Pair]], list[Record]]:
        own = work / f"{os.uname().nodename}-{os.getpid()}"
        own.mkdir(exist_ok=True)
        return partial(pixel_filter.run, load(), own)

    def give_up(unit: Sequence[Pair], reason: str) -> None:
        failures.extend(failure_of(pair, reason) for pair in unit)

    try:
        gpus = ray_pool.count_gpus(args.device, ray.cluster_resources())
        size = args.batch_size * BATCHES_A_TASK
        pairs = [replace(pair, image=pair.image.absolute(), mask=pair.mask.absolute()) for pair in pairs]
        units = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        actors = min(ray_pool.count_actors(args.ray_workers, gpus), len(units))
        return sum(ray_pool.ActorPool(ray, build, actors, gpus > 0).run(units, give_up), failures)
    finally:
        ray.shutdown()


def check_arguments(args: argparse.Namespace) -> None:
    """UserError where neither or both of two sources are given."""
    if args.fold and args.hardness_txt_file:
        raise UserError("--fold, --hardness_txt_file: expected one of the two. The class means are taken on either.")
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


def find_synthesized(args: argparse.Namespace) -> tuple[list[Pair], dict[str, Any], Path]:
    """Images with their masks in the order of their names, what run.json says, and the folder of the images."""
    run: dict[str, Any] = {}
    if args.run:
        samples, run = read_run(args.run, args.run_root, check_files=False)
        items = sorted(samples, key=lambda sample: sample.image.name)
        if not any(item.mask.is_file() for item in items):
            raise FileNotFoundError(f"--run: none of the masks of {args.run} is there (the first is {items[0].mask}). "
                                    "Expected them where the run found them. Say where they are now with --run_root.")
        images = Path(args.run) / "images"
    else:
        images = Path(args.syn_img_path)
        items = find_generated(images, Path(args.syn_mask_path))
    return items, run, images


def find_judges(args: argparse.Namespace) -> list[tuple[str, str, list[Pair]]]:
    """Config, checkpoint and real pairs of every segmentor whose losses make the class means."""

    def read(manifest: str) -> list[Pair]:  # which files are sound shows when they are read
        return list_pairs(None, manifest=manifest, data_root=args.data_root or Path(manifest).parent, check_files=False)

    if args.fold:
        return [(*files, read(manifest)) for *files, manifest in args.fold]
    manifest = args.hardness_txt_file or args.real_txt_file
    pairs = read(manifest) if manifest else list_pairs(
        None, image_folder=args.real_img_path, mask_folder=args.real_mask_path)  # fmt: skip
    return [(args.config, args.checkpoint, pairs)]


def load_judges(judges: Sequence[tuple[str, str, list[Pair]]], args: argparse.Namespace,
                segmentor: Segmentor) -> Iterator[tuple[Segmentor, list[Pair]]]:
    """The segmentors of find_judges, one at a time, with their pairs; the one that filters is there already."""
    for config, checkpoint, pairs in judges:
        is_own = (config, checkpoint) == (args.config, args.checkpoint)
        yield segmentor if is_own else load_segmentor(
            config, checkpoint, segmentor.device, segmentor.class_table), pairs


def say_limits(hardness: Hardness, margin: float) -> None:
    """Say which classes have no statistics, and the limits of the others."""
    unknown = [name for name, pixels in zip(hardness.names, hardness.pixels, strict=True) if not pixels]
    if unknown:
        logger.warning("no real pixel of %s: left as they are in the synthesized masks", ", ".join(unknown))
    known = zip(hardness.names, hardness.mean, hardness.pixels, strict=True)
    limits = (f"{name} {margin * mean:.4f}" for name, mean, pixels in known if pixels)
    logger.info("loss above which a pixel is dropped: %s", ", ".join(limits))


def write_report(folder: Path, records: dict[str, Record], failed: Sequence[Record], hardness: Hardness,
                 margin: float) -> None:
    """Write report.json and report.md: what was dropped, class by class, and how many images failed."""
    totals = {name: np.zeros(3, np.int64) for name in hardness.names}
    for record in records.values():
        for name, (pixels, dropped) in record["classes"].items():
            totals[name] += pixels, dropped, 1
    classes, rows = {}, []
    for name, mean, real in zip(hardness.names, hardness.mean.tolist(), hardness.pixels.tolist(), strict=True):
        pixels, dropped, images = totals[name].tolist()
        loss, limit = (round(mean, 6), round(margin * mean, 6)) if real else (None, None)
        share = round(dropped / pixels, 6) if pixels else None
        classes[name] = {"real_pixels": real, "mean_loss": loss, "limit": limit, "pictures": images, "pixels": pixels,
                         "dropped": dropped, "share": share}  # fmt: skip
        rows.append([name, f"{real:,}", f"{loss:.4f}" if real else "none", f"{limit:.4f}" if real else "left alone",
                     images, f"{pixels:,}", None if share is None else f"{share:.1%}"])  # fmt: skip
    everything, dropped, _ = sum(totals.values()).tolist()
    report = {"pictures": len(records), "failed": len(failed), "tolerance_margin": margin, "pixels": everything,
              "dropped": dropped, "share": round(dropped / max(1, everything), 6), "classes": classes}  # fmt: skip
    rows.append(["all", "", "", "", len(records), f"{everything:,}", f"{report['share']:.1%}"])
    table = markdown_table(["class", "real pixels", "mean loss", "limit", "images", "pixels", "dropped"], rows)
    where = " (failures.jsonl)" if failed else ""
    text = f"{table}\n{len(records)} images filtered, {len(failed)} failed{where}.\n"
    with lock(folder / ".lock"):
        write_json(folder / "report.json", report)
        atomic_write(folder / "report.md", text)
    logger.info("%s\nwritten to %s", text, folder)


if __name__ == "__main__":
    run_entry_point(main)
