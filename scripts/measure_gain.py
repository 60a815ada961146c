"""Measure what synthesized pairs add to a segmentor on unseen real tiles.

Trains a base segmentor on the real pairs, paints masks of the real set in the look of unlabelled references, filters
and resamples the pictures, and trains on real and synthesized pairs (and on the comparisons of --arms) for the same
number of optimizer steps, with several seeds. Writes results.json, table.md and report.html to --outdir. Finished
stages are skipped when the command is given again; arms and seeds can be added.
"""

import argparse
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.data.classes import ClassTable  # noqa: E402
from ldm.data.manifest import Row, read_manifest, write_manifest  # noqa: E402
from ldm.data.prepare.sources import choose_groups  # noqa: E402
from ldm.files import atomic_write, link_or_copy, write_json  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402
from post_processing.gain.report import (  # noqa: E402
    draw_curves,
    draw_examples,
    make_page,
    make_table,
    read_curves,
    summarise,
)
from post_processing.gain.sets import (  # noqa: E402
    SPLIT_SEED,
    find_references,
    list_items,
    relative,
    write_mixtures,
    write_real,
)
from post_processing.gain.stages import Stage, StageRunner, make_slots  # noqa: E402
from post_processing.run_index import read_run  # noqa: E402
from post_processing.segmentation.loading import Item, load_item  # noqa: E402
from post_processing.selection.rules import encode_mask  # noqa: E402

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
TILE_OFFSET = re.compile(r"_\d{4,}_\d{4,}$")  # what prepare_dataset.py adds to the name of a picture
ARMS = {
    "real": "real",
    "joint": "real + synthesized, filtered and resampled",
    "synthetic": "synthesized only, filtered and resampled",
    "unfiltered": "real + synthesized, neither filtered nor resampled",
    "copy_paste": "real, with copy-paste",
    "cutmix": "real, with CutMix",
    "mixed": "real + the mixtures themselves, not painted",
    "pretrain": "half the steps on synthesized, then half on real",
}
DEFAULT_ARMS = "real,joint,synthetic,unfiltered,copy_paste,cutmix"
PASSED_ON = ("--inference_args", "--filter_args", "--resample_args", "--train_args")  # flags whose values are flags


def build_parser() -> argparse.ArgumentParser:
    """Command line of measure_gain.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("data").add_argument
    add("--class_table", required=True, help="name in configs/classes or path of a class table")
    add("--data_root", required=True, help="where the paths of all manifests start")
    add("--real_txt_file", help="manifest of real training pairs; default: train_set_items.json in --data_root")
    add("--test_txt_file", help="manifest of unseen real pairs; default: test_set_items.json in --data_root")
    add("--val_txt_file", help="manifest of validation pairs, for the curves of the report")
    add("--references", nargs="+", default=[], help="unlabelled images of the target: folders below --data_root, or "
        "manifests, of which only the images (target) are used; none where the generator takes none")  # fmt: skip
    add("--real_fraction", type=float, default=1.0, help="share of the real pairs that is labelled, in whole pictures; "
        "the images of the others become references")  # fmt: skip
    add = parser.add_argument_group("synthesis").add_argument
    add("--ckpt", required=True, help="generator, for inference.py")
    add("--num_masks", type=int, help="real masks to paint; default: all")
    add("--balance", type=float, default=0.5, help="prefer masks of many and of rare classes: the chance of a "
        "mask is the sum over its classes of (share of the class in the set) ** -balance")  # fmt: skip
    add("--mix_masks", action="store_true", help="paint new layouts: a box of another mask of the draw pasted into "
        "each (CutMix), anew for each row; `--inference_args '--strength 0.5'` starts from the images, mixed alike")
    add("--num_per_mask", type=int, default=4, help="pictures of each mask, each with its own reference")
    add("--inference_args", default="", help="further flags of inference.py, in one string: '--mode fast --scale 2'")
    add("--filter_args", default="", help="further flags of filter.py")
    add("--resample_args", default="", help="further flags of resample.py")
    add = parser.add_argument_group("segmentors").add_argument
    add("--config", default="configs/mmseg/small.py", help="mmseg config; a .py file is code and is run")
    add("--arms", type=names, default=DEFAULT_ARMS, help=f"what to train on, of: {', '.join(ARMS)}")
    add("--seeds", type=numbers, default="1,2,3", help="of the trainings; the first is the base segmentor's")
    add("--steps", type=int, default=2000, help="optimizer steps of every training")
    add("--batch_size", type=int, default=16, help="tiles a step")
    add("--synthetic_ratio", type=float, default=1.0, help="synthesized pictures for each real one in a batch")
    add("--train_args", default="", help="further flags of train_segmentor.py")
    add = parser.add_argument_group("running").add_argument
    add("--outdir", required=True, help="output folder")
    add("--parallel", type=int, default=1, help="processes at once; each gets its share of the CPU cores")
    add("--gpus", type=lambda text: text.split(","), default=[], help="0,1,...: one process for each of these GPUs")
    add("--python", default=sys.executable, help="interpreter with the packages of requirements/demo.txt")
    add("--python_seg", default=sys.executable, help="interpreter with the packages of requirements/seg.txt")
    add("--dry_run", action="store_true", help="print the stages with their commands, and stop")
    add("--overwrite", action="store_true", help="run stages of other settings in --outdir again")
    add("-d", "--debug", action="store_true", help="show the traceback of an error")
    return parser


def join_values(argv: Sequence[str]) -> list[str]:
    """Write `--train_args VALUE` as one word: argparse would take a value such as --threads=1 for a flag of its own."""
    joined, words = [], iter(argv)
    for word in words:
        value = next(words, None) if word in PASSED_ON else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def names(text: str) -> list[str]:
    """Argument type: arms, comma-separated, `real` always among them and first."""
    given = text.split(",")
    unknown = sorted(set(given) - set(ARMS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: unknown. Expected some of {', '.join(ARMS)}.")
    return [arm for arm in ARMS if arm in given or arm == "real"]


def numbers(text: str) -> list[int]:
    """Argument type: distinct whole numbers, comma-separated."""
    values = [int(part) for part in text.split(",")]
    if len(set(values)) < len(values) or min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected distinct numbers from 0, such as 1,2,3.")
    return values


class Plan:
    """The stages of a measurement and where their results lie.

    Args:
        args: parsed command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.outdir = Path(args.outdir).absolute()
        root = Path(args.data_root).absolute()
        self.root = str(root)
        self.real = args.real_txt_file or str(root / "train_set_items.json")
        self.test = os.path.abspath(args.test_txt_file or root / "test_set_items.json")
        self.val = args.val_txt_file and os.path.abspath(args.val_txt_file)
        is_file = Path(args.class_table).is_file()
        self.table = os.path.abspath(args.class_table) if is_file else args.class_table
        self.config = os.path.abspath(args.config if Path(args.config).is_file() else ROOT / args.config)
        self.paint_root = str(self.outdir / "masks") if args.mix_masks else self.root
        self.has_references = bool(args.references) or args.real_fraction < 1
        self.real_set = str(self.outdir / "sets/real.json")
        self.paint_set = str(self.outdir / "masks/synthesis.json")
        first = self.outdir / f"real/seed_{args.seeds[0]}"
        self.base = [str(first / name) for name in ("config.json", "segmentor.pth")]
        self.resampled = str(self.outdir / "resample/set/train_set_items.json")
        self.unfiltered = str(self.outdir / "unfiltered/train_set_items.json")

    def stages(self) -> list[Stage]:
        """All stages, each after what it needs."""
        args, first = self.args, f"real/seed_{self.args.seeds[0]}"
        keys = ("references", "num_masks", "balance", "num_per_mask", "mix_masks")
        manifests = [os.path.abspath(path) for path in args.references if Path(path).is_file()]
        stages = [
            Stage("sets", action=lambda: write_real_set(self), inputs=(self.real,),
                  settings={key: getattr(args, key) for key in ("real_fraction", "class_table")}),
            self.training("real", args.seeds[0]),
        ]  # fmt: skip
        if set(args.arms) & {"joint", "synthetic", "unfiltered", "mixed", "pretrain"}:
            stages.append(Stage("masks", (), ("sets",), tuple(manifests), action=lambda: write_masks(self),
                                settings={key: getattr(args, key) for key in keys}))  # fmt: skip
        if set(args.arms) & {"joint", "synthetic", "unfiltered", "pretrain"}:
            paint = (args.python, "inference.py", "--ckpt", os.path.abspath(args.ckpt), "--data_root", self.paint_root,
                     "--txt_file", self.paint_set, "--outdir", str(self.outdir / "synthesis"),
                     *(() if self.has_references else ("--num_per_mask", str(args.num_per_mask))),
                     *shlex.split(args.inference_args))  # fmt: skip
            stages.append(Stage("synthesis", (paint,), ("masks",), (args.ckpt,), is_sharded=True))
        if set(args.arms) & {"joint", "synthetic", "pretrain"}:
            run, masks, iou = (str(self.outdir / name) for name in ("synthesis", "filter/masks", "resample/iou"))
            sift = (args.python_seg, "-W", "ignore", "-m", "post_processing.filter", *self.base, "--run", run,
                    "--real_txt_file", self.real_set, "--data_root", self.root, "--filtered-mask-path", masks,
                    "--classes", self.table, *shlex.split(args.filter_args))  # fmt: skip
            keep = (args.python_seg, "-W", "ignore", "-m", "post_processing.resample", "--filtered-mask-path", masks,
                    "--iou", f"{iou}/results.json", "--out-dir", str(self.outdir / "resample/set"), "--overwrite",
                    *shlex.split(args.resample_args))  # fmt: skip
            # Which classes are poor must not be read off the test tiles.
            score = self.scoring(self.base, self.val or self.real_set, iou)
            stages += [Stage("filter", (sift,), ("synthesis", first)), Stage("resample", (score, keep), ("filter",))]
        if "unfiltered" in args.arms:
            stages.append(Stage("unfiltered", needs=("synthesis",), action=lambda: write_unfiltered(self)))
        return stages + [self.training(arm, seed) for seed in args.seeds for arm in args.arms
                         if (arm, seed) != ("real", args.seeds[0])]  # fmt: skip

    def scoring(self, segmentor: Sequence[str], manifest: str, outdir: str) -> tuple[str, ...]:
        """Command that scores a segmentor on real pairs."""
        return (self.args.python_seg, "-W", "ignore", "scripts/evaluate.py", "segmentor", "--segmentor", *segmentor,
                "--real", manifest, "--real_root", self.root, "--outdir", outdir)  # fmt: skip

    def training(self, arm: str, seed: int) -> Stage:
        """Training of one segmentor, and its scores on the test tiles."""
        args, name = self.args, f"{arm}/seed_{seed}"
        folder = self.outdir / name
        real = ["--train_txt_file", self.real_set]
        resampled = ["--synthetic_txt_file", self.resampled]
        ratio = ["--synthetic_ratio", str(args.synthetic_ratio)]
        half = folder / "first_half"
        trainings = {
            "real": [(folder, args.steps, real)],
            "joint": [(folder, args.steps, real + resampled + ratio)],
            "synthetic": [(folder, args.steps, resampled)],
            "unfiltered": [(folder, args.steps, [*real, "--synthetic_txt_file", self.unfiltered, *ratio])],
            "mixed": [(folder, args.steps, [*real, "--synthetic_txt_file", self.paint_set, *ratio])],
            "copy_paste": [(folder, args.steps, [*real, "--augment", "copy_paste"])],
            "cutmix": [(folder, args.steps, [*real, "--augment", "cutmix"])],
            "pretrain": [
                (half, args.steps // 2, resampled),
                (folder, args.steps - args.steps // 2, [*real, "--init_from", str(half / "segmentor.pth")]),
            ],
        }[arm]
        validate = ["--val_txt_file", self.val, "--val_interval", str(max(1, args.steps // 4))] if self.val else []
        commands = [
            (args.python_seg, "-W", "ignore", "scripts/train_segmentor.py", "--config", self.config, "--class_table",
             self.table, "--data_root", self.root, *data, *validate, "--work_dir", str(place), "--max_steps",
             str(steps), "--batch_size", str(args.batch_size), "--seed", str(seed), "--resume",
             *shlex.split(args.train_args))
            for place, steps, data in trainings
        ]  # fmt: skip
        segmentor = [str(folder / name) for name in ("config.json", "segmentor.pth")]
        commands.append(self.scoring(segmentor, self.test, str(folder / "test")))
        needs = {"joint": ("resample",), "synthetic": ("resample",), "pretrain": ("resample",),
                 "unfiltered": ("unfiltered",), "mixed": ("masks",)}.get(arm, ())  # fmt: skip
        inputs = [self.config, self.test] + ([self.val] if self.val else [])
        inputs += [self.table] if Path(self.table).is_file() else []
        return Stage(name, tuple(commands), ("sets", *needs), tuple(inputs))


def split_real(manifest: str, root: str, table: ClassTable, fraction: float) -> tuple[list[Row], list[Row]]:
    """Real pairs that keep their labels, and those that do not, in whole pictures; each pair once."""
    rows = read_manifest(manifest, root, need=("image",), table=table)
    rows = list({(row.image, row.mask): row for row in rows}.values())  # rows may differ in the reference only
    if fraction == 1:
        return rows, []
    tiles = [SimpleNamespace(group=TILE_OFFSET.sub("", Path(row.mask_name).stem)) for row in rows]
    groups = choose_groups(tiles, fraction, np.random.default_rng([SPLIT_SEED, 0]))
    is_labelled = [tile.group in groups for tile in tiles]
    return ([row for row, is_kept in zip(rows, is_labelled, strict=True) if is_kept],
            [row for row, is_kept in zip(rows, is_labelled, strict=True) if not is_kept])  # fmt: skip


def write_real_set(plan: Plan) -> None:
    """Write the manifest of the labelled real pairs."""
    real, others = split_real(plan.real, plan.root, ClassTable.load(plan.table), plan.args.real_fraction)
    write_real(plan.real_set, real, plan.root)
    logger.info("%d of %d real pairs are labelled", len(real), len(real) + len(others))


def write_masks(plan: Plan) -> None:
    """Write the manifest of the masks to paint with their references; with --mix_masks also the masks themselves."""
    args, table = plan.args, ClassTable.load(plan.table)
    real, others = split_real(plan.real, plan.root, table, args.real_fraction)
    pool = find_references(args.references, Path(plan.root))
    pool += [str(relative(row.image, plan.root)) for row in others]
    if plan.has_references and len(pool) < args.num_per_mask:
        raise UserError(f"--references: {len(pool)} images. Expected at least --num_per_mask {args.num_per_mask}.")
    items, pairs = list_items(real, plan.root, pool, table, args.num_masks, args.balance, args.num_per_mask)
    if args.mix_masks:
        items = write_mixtures(Path(plan.paint_root), items, pairs, plan.root, table)
    write_manifest(plan.paint_set, items)
    logger.info("%d rows to paint, %d references", len(items), len(pool))


def write_unfiltered(plan: Plan) -> None:
    """Write all synthesized pictures with their whole masks as a training set; pictures are linked, not copied."""
    folder = plan.outdir / "unfiltered"
    samples, run = read_run(plan.outdir / "synthesis")
    table = ClassTable.load(run["class_table"]) if run.get("class_table") else ClassTable.load(plan.table)
    for name in ("images", "masks"):
        (folder / name).mkdir(exist_ok=True)
    rows = []
    for sample in samples:
        loaded = load_item(Item(sample.image, sample.mask, is_resized=True), table)
        image, mask = f"images/{sample.image.name}", f"masks/{sample.image.stem}.png"
        atomic_write(folder / mask, encode_mask(loaded.raw, np.zeros(loaded.mask.shape, bool), table))
        (folder / image).unlink(missing_ok=True)
        link_or_copy(sample.image, folder / image)
        rows.append({"source": mask, "target": image})
    write_manifest(plan.unfiltered, rows)


def report(plan: Plan) -> str:
    """Gather the scores and write results.json, table.md and report.html; returns the table."""
    args, stages = plan.args, {stage.name for stage in plan.stages()}  # an earlier plan's may lie in the folder as well
    scores: dict[str, dict[int, Any]] = {arm: {} for arm in args.arms}
    for arm in args.arms:
        for seed in args.seeds:
            path = plan.outdir / f"{arm}/seed_{seed}/test/results.json"
            scores[arm][seed] = json.loads(path.read_text(encoding="utf-8"))
    summary = summarise(scores)
    table = make_table(summary, ARMS)
    settings = {key: value for key, value in vars(args).items() if key not in ("debug", "dry_run", "overwrite")}
    write_json(plan.outdir / "results.json", {"summary": summary, "scores": scores, "settings": settings})
    atomic_write(plan.outdir / "table.md", table)
    tiles = scores["real"][args.seeds[0]]["images"]
    facts = [
        f"Real pairs: {count_lines(plan.real_set)} ({args.real_fraction:.0%} of the set). Test tiles, unseen: {tiles}."
        " Scores: mmseg's IoUMetric in percent, macro; mean ± sample standard deviation over the seeds"
        f" {', '.join(map(str, args.seeds))}; gains are paired by seed.",
        f"Every training: {args.steps} steps of {args.batch_size} tiles, {args.config}. Synthesized pictures for each"
        f" real one in a batch: {args.synthetic_ratio:g}.",
    ]
    if "synthesis" in stages:
        kept = f"{count_lines(plan.resampled)} kept" if "resample" in stages else "not filtered"
        painted = count_lines(plan.outdir / "synthesis/index.jsonl")
        what = "pictures of mixed masks" if args.mix_masks else "pictures"
        facts.append(f"Generator {Path(args.ckpt).name}: {painted} {what} painted, {kept}. The labels that it was "
                     "trained with are labels too; --real_fraction does not take those away.")
    folders = {arm: [plan.outdir / f"{arm}/seed_{seed}" for seed in args.seeds] for arm in args.arms}
    drawings = [draw_curves(read_curves(folders, key), title, ARMS)
                for key, title in (("mIoU", "validation mIoU, mean of the seeds"), ("loss", "loss"))]  # fmt: skip
    examples = None
    if "filter" in stages:
        filtered = plan.outdir / "filter/masks"
        examples = draw_examples(plan.outdir / "synthesis", filtered, 8, ClassTable.load(plan.table))
    atomic_write(plan.outdir / "report.html", make_page(table, facts, drawings, examples))
    return table


def count_lines(path: str | Path) -> int:
    """Number of rows of a manifest or an index."""
    return len(Path(path).read_text(encoding="utf-8").splitlines())


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for flags out of range and files that are not there."""
    rules = [
        (not 0 < args.real_fraction <= 1, f"--real_fraction {args.real_fraction}: expected above 0, at most 1"),
        (min(args.steps, args.batch_size, args.num_per_mask, args.parallel, args.num_masks or 1) < 1,
         "--steps, --batch_size, --num_masks, --num_per_mask, --parallel: expected 1 or more"),
        ("mixed" in args.arms and not args.mix_masks, "--arms mixed: expected --mix_masks with it"),
        ("pretrain" in args.arms and args.steps < 2, f"--steps {args.steps}: expected 2 or more for --arms pretrain"),
        (args.synthetic_ratio <= 0, f"--synthetic_ratio {args.synthetic_ratio}: expected above 0"),
        (not Path(args.data_root).is_dir(), f"--data_root {args.data_root}: folder not found"),
        *((not Path(path).is_file(), f"file not found: {path}") for path in (
            args.ckpt, args.real_txt_file or Path(args.data_root) / "train_set_items.json",
            args.test_txt_file or Path(args.data_root) / "test_set_items.json", *filter(None, [args.val_txt_file]),
        )),
        *((not Path(path).exists(), f"--references {path}: not found") for path in args.references),
    ]  # fmt: skip
    wrong = [text for is_wrong, text in rules if is_wrong]
    if wrong:
        raise UserError("; ".join(wrong) + ". See --help.")


def stop(*_: Any) -> None:
    """Turn SIGTERM into an exit that ends the running processes."""
    sys.exit(143)


def main(argv: list[str] | None = None) -> None:
    """Run the stages that are not finished, then write the report."""
    args = build_parser().parse_args(join_values(sys.argv[1:] if argv is None else argv))
    check_arguments(args)
    plan = Plan(args)
    runner = StageRunner(plan.stages(), plan.outdir, make_slots(len(args.gpus) or args.parallel, args.gpus))
    if args.dry_run:
        print(runner.describe())
        return
    signal.signal(signal.SIGTERM, stop)
    runner.run(args.overwrite)
    logger.info("%s\nwritten to %s", report(plan), plan.outdir / "report.html")


if __name__ == "__main__":
    run_entry_point(main)
