"""Does a faster way of sampling follow the masks as well as the exact one? Paired, with a bootstrap interval."""

import argparse
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.cli import markdown_table
from ldm.util import UserError
from post_processing.evaluation.scores import class_areas, iou_of, mean_iou
from post_processing.run_index import Sample, read_run, run_batches
from post_processing.segmentation.loading import predict_batches
from post_processing.segmentation.segmentor import Segmentor, segmentor_of


def paired_drops(exact: np.ndarray, other: np.ndarray, groups: Sequence[Hashable], draws: int = 2000,
                 seed: int = 0) -> dict[str, np.ndarray]:
    """How much lower the IoUs of other images of the same masks and noise are.

    The bootstrap draws groups (all images of one mask) with replacement, for both sides the same ones, so that what
    makes a mask easy or hard cancels out.

    Args:
        exact, other: class_areas of the pairs, (N, 3, K).
        groups: group of each pair; those of a group are not independent.
        draws, seed: of the bootstrap.

    Returns:
        `mIoU` (3,) and `IoU` (K, 3): drop in points, lower and upper end of its 95 % interval; NaN for classes that no
        mask has.

    Raises:
        ValueError: if there are fewer than two groups.
    Source: Efron and Tibshirani 1993, chapter 13 (percentile interval).
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    if len(names) < 2:
        raise ValueError("consistency: all images have one mask. Expected two or more, to tell drop from chance.")
    member = np.array([names[name] for name in groups])
    sums = []
    for areas in (exact, other):
        total = np.zeros((len(names), *areas.shape[1:]))
        np.add.at(total, member, areas)
        sums.append(total)
    weights = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    drawn = [np.einsum("dg,gak->dak", weights.astype(np.float64), total, optimize=True) for total in sums]
    total = [value.sum(axis=0) for value in sums]

    def summarise(drop: np.ndarray, draws_of_drop: np.ndarray) -> np.ndarray:
        ends = [np.nanpercentile(draws_of_drop, share, axis=0) for share in (2.5, 97.5)]
        return np.stack([drop, *ends], axis=-1)

    per_class = summarise(iou_of(total[0]) - iou_of(total[1]), iou_of(drawn[0]) - iou_of(drawn[1]))
    return {"mIoU": summarise(mean_iou(total[0]) - mean_iou(total[1]), mean_iou(drawn[0]) - mean_iou(drawn[1])),
            "IoU": per_class}  # fmt: skip


def verdict(drop: Sequence[float], limit: float) -> str:
    """`pass` if the whole interval (drop, lower, upper) is below the limit, `fail` if the drop is not, else `open`."""
    return "pass" if drop[2] < limit else "open" if drop[0] < limit else "fail"


def judge(exact: np.ndarray, other: np.ndarray, groups: Sequence[Hashable], class_names: Sequence[str], max_drop: float,
          rare: int, max_rare_drop: float, draws: int, seed: int) -> dict[str, Any]:
    """One line of the gate's table.

    Args:
        exact, other, groups, draws, seed: see paired_drops.
        class_names: K names.
        max_drop: most that mIoU may drop, in points.
        rare: how many of the rarest classes are looked at on their own.
        max_rare_drop: most that the IoU of each of those may drop.

    Returns:
        mIoU_exact, mIoU, drop, interval, verdict; `rare`: the same for each of the rarest classes, by pixels of the
        masks; `gate`: `pass` if all verdicts are, `fail` if one is, else `open`.
    """
    drops = paired_drops(exact, other, groups, draws, seed)
    true = exact[:, 2].sum(axis=0)
    present = [int(index) for index in np.argsort(true, kind="stable") if true[index] > 0]

    def line(values: np.ndarray, limit: float) -> dict[str, Any]:
        values = [float(value) for value in values]
        return {"drop": round(values[0], 3), "interval": [round(value, 3) for value in values[1:]],
                "verdict": verdict(values, limit)}  # fmt: skip

    result = line(drops["mIoU"], max_drop)
    result |= {"mIoU_exact": round(float(mean_iou(exact.sum(axis=0))), 3),
               "mIoU": round(float(mean_iou(other.sum(axis=0))), 3)}  # fmt: skip
    result["rare"] = {
        class_names[index]: {"share": round(100 * float(true[index] / true.sum()), 3)}
        | line(drops["IoU"][index], max_rare_drop)
        for index in present[:rare]
    }
    verdicts = {result["verdict"], *(one["verdict"] for one in result["rare"].values())}
    return result | {"gate": next(word for word in ("fail", "open", "pass") if word in verdicts)}


def measure_consistency(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Judge runs against an exact one, on the same masks and noise; returns results and a table."""
    samples, exact_run = read_run(args.exact, args.data_root)
    segmentor = segmentor_of(args, exact_run.get("class_table"))
    exact = order_pairs(samples)
    exact_areas = measure_areas(exact.values(), segmentor, args)
    metric = "paired drop of IoU in points, 95 % bootstrap interval"
    fingerprint = exact_run.get("settings", {})
    results: dict[str, Any] = {"metric": metric, "exact": fingerprint, "runs": {}}
    for folder in args.run:
        others, run = read_run(folder, args.data_root)
        check_same_conditions(folder, run, exact_run)
        other = order_pairs(others)
        if other.keys() != exact.keys():
            raise UserError(f"--run: {folder} and --exact {args.exact} differ in {len(other.keys() ^ exact.keys())} "
                            "images. Expected the same rows, copies and seed in both. Finish both runs.")
        areas = measure_areas(other.values(), segmentor, args)
        groups = [sample.mask for sample in exact.values()]
        line = judge(exact_areas, areas, groups, segmentor.class_table.names, args.max_drop, args.rare,
                     args.max_rare_drop, args.draws, args.seed)  # fmt: skip
        results["runs"][folder] = line | {"fingerprint": run.get("settings", {})}
    results |= {"pictures": len(exact), "masks": len({sample.mask for sample in exact.values()})}
    return results, consistency_table(results, args)


def order_pairs(samples: Sequence[Sample]) -> dict[Any, Sample]:
    """Samples by what two runs have in common, in one order: mask and name of the image, which holds its seed."""
    return {key: sample for key, sample in sorted(((s.mask, s.image.stem), s) for s in samples)}


def check_same_conditions(folder: str, run: dict[str, Any], exact: dict[str, Any]) -> None:
    """UserError if a run differs from the exact one in anything but how it sampled."""
    one, other = exact.get("settings", {}), run.get("settings", {})
    names = ("checkpoint_sha256", "config_sha256", "inputs_sha256", "dataset", "H", "W", "seed", "fixed_code")
    different = [name for name in names if one.get(name) != other.get(name)]
    if different:
        raise UserError(f"--run: {folder} was generated with another {', '.join(different)} than --exact. Expected "
                        "other sampling settings only. Generate it again.")


def measure_areas(samples: Iterable[Sample], segmentor: Segmentor, args: argparse.Namespace) -> np.ndarray:
    """Areas of right, predicted and true pixels a class of every sample, (N, 3, K); see class_areas."""
    samples, table, areas = list(samples), segmentor.class_table, {}
    batches = run_batches(samples, table, args.batch_size, args.num_threads)
    for batch, prediction, masks in predict_batches(segmentor, batches):
        found = class_areas(prediction, masks, table.num_classes, table.ignore_index)
        areas.update(zip((loaded.pair.image for loaded in batch), found, strict=True))
    return np.stack([areas[sample.image] for sample in samples])


def consistency_table(results: dict[str, Any], args: argparse.Namespace) -> str:
    """Markdown text of the gate."""
    rare = list(next(iter(results["runs"].values()))["rare"])
    rows = []
    for folder, row in results["runs"].items():
        drops = [f"{one['drop']:+.2f} ({one['interval'][0]:+.2f} to {one['interval'][1]:+.2f})"
                 for one in (row, *row["rare"].values())]  # fmt: skip
        rows.append([Path(folder).name, row["mIoU_exact"], row["mIoU"], *drops, row["gate"]])
    heads = ["run", "mIoU exact", "mIoU", "drop (95 %)", *(f"drop {name}" for name in rare), "gate"]
    return markdown_table(heads, rows) + (
        f"\n{results['pictures']} images of {results['masks']} masks. Gate: mIoU loses less than {args.max_drop},"
        f" each of the {args.rare} rarest classes less than {args.max_rare_drop} points. pass: the whole interval is\n"
        "below; open: the drop is, the interval is not.\n"
    )
