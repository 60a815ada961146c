"""Do synthesized images follow their masks and their references? And how good is a segmentor on real tiles?

Each measure takes the parsed command line of scripts/evaluate.py and returns results and a Markdown table.
"""

import argparse
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.cli import choose_device, markdown_table
from ldm.data.classes import ClassTable, same_names
from ldm.util import UserError
from post_processing.evaluation.images import mobilenet_maps
from post_processing.evaluation.scores import (
    SegmentationScore,
    colour_statistics,
    compare_references,
    derange,
    position,
    score_pairs,
)
from post_processing.run_index import Sample, read_mask_at, read_run, run_batches
from post_processing.segmentation.dataset import list_pairs
from post_processing.segmentation.loading import map_images, predict_batches
from post_processing.segmentation.segmentor import Segmentor, segmentor_of

LOOK_STAGES = (0, 1, 2, 4)  # of MobileNetV2: what is seen in 1/2 to 1/16 of the resolution, texture before content
FEATURE_METRIC = ("Euclidean distance of (mean, standard deviation) of the channels of ImageNet's MobileNetV2, stages "
                  "0, 1, 2 and 4, 336 numbers an image, each in standard deviations over the references")


def measure_mask_following(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Score real tiles, images against their masks and against shuffled masks; returns results and a table."""
    samples, run = read_run(args.run, args.data_root)
    segmentor = segmentor_of(args)
    table = segmentor.class_table
    run_table = ClassTable.load(run["class_table"]) if run.get("class_table") else table
    if not same_names(run_table.names, table.names):
        raise UserError(f"--segmentor: it knows the classes {', '.join(table.names)}. Expected those of the run, "
                        f"{', '.join(run_table.names)}. Train a segmentor with the run's class table {run_table.name}.")
    pairs = list_pairs(table, manifest=args.real, data_root=args.real_root or Path(args.real).parent)
    real = score_pairs(segmentor, pairs, args.batch_size, args.num_threads)
    synthesized, shuffled = score_run(samples, run_table, segmentor, args)
    floors = [score.result() for score in shuffled]
    floor = mean_of(floors)
    synthesized_result = synthesized.result()
    results = {
        "metric": "mmseg IoUMetric, percent, 255 ignored",
        "class_table": table.name,
        "real": real,
        "synthesized": synthesized_result,
        "shuffled": floor,
        "shuffled_mIoU": [one["mIoU"] for one in floors],
        "position": position(synthesized_result["mIoU"], floor["mIoU"], real["mIoU"]),
        "images": {"real": len(pairs), "synthesized": len(samples), "masks": len({(s.mask, s.size) for s in samples})},
        "sizes": sorted({sample.size for sample in samples}),
        "checkpoint": run.get("settings", {}),
    }
    return results, mask_table(results)


def measure_segmentor(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Score a segmentor on real tiles; returns results (OA is mmseg's aAcc) and a table."""
    segmentor = segmentor_of(args)
    pairs = list_pairs(segmentor.class_table, manifest=args.real, data_root=args.real_root or Path(args.real).parent)
    score = score_pairs(segmentor, pairs, args.batch_size, args.num_threads)
    score = {"OA": score["aAcc"], **score}
    rows = [(key, score[key]) for key in ("OA", "mIoU", "mAcc")] + [(f"IoU {k}", v) for k, v in score["IoU"].items()]
    results = {"metric": "mmseg IoUMetric, percent, 255 ignored", "images": len(pairs), **score}
    return results, markdown_table(["", "%"], rows)


def score_run(samples: Sequence[Sample], table: ClassTable, segmentor: Segmentor,
              args: argparse.Namespace) -> tuple[SegmentationScore, list[SegmentationScore]]:
    """Score images against their own masks and, in the same pass, against each shuffling of the masks.

    Masks are shuffled as wholes: all images of one mask are held against the same other mask.
    """
    keys = sorted({(sample.mask, sample.size) for sample in samples})
    orders = [derange([size for _, size in keys], args.seed + number) for number in range(args.shuffles)]
    place = {key: number for number, key in enumerate(keys)}
    own = SegmentationScore(table.names, table.ignore_index)
    shuffled = [SegmentationScore(table.names, table.ignore_index) for _ in orders]

    @lru_cache(maxsize=2048)
    def mask_of(number: int) -> torch.Tensor:
        path, size = keys[number]
        return torch.from_numpy(read_mask_at(path, table, size))

    batches = run_batches(samples, table, args.batch_size, args.num_threads)
    for batch, prediction, masks in predict_batches(segmentor, batches):
        own.add(prediction, masks)
        numbers = [place[loaded.pair.mask, loaded.mask.shape] for loaded in batch]
        for score, order in zip(shuffled, orders, strict=True):
            score.add(prediction, torch.stack([mask_of(order[number]) for number in numbers]))
    return own, shuffled


def mean_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of several scores; a class that is absent from one of them has no mean."""
    mean: dict[str, Any] = {
        key: round(float(np.mean([one[key] for one in results])), 2) for key in ("aAcc", "mIoU", "mAcc")
    }
    for key in ("IoU", "Acc"):
        mean[key] = {}
        for name in results[0][key]:
            values = [one[key][name] for one in results]
            mean[key][name] = None if None in values else round(float(np.mean(values)), 2)
    mean["mIoU_sd"] = round(float(np.std([one["mIoU"] for one in results], ddof=1)), 3) if len(results) > 1 else None
    return mean


def mask_table(results: dict[str, Any]) -> str:
    """Markdown text of mask following."""
    names, counts = list(results["real"]["IoU"]), results["images"]
    floor = f"synthesized, shuffled masks (floor, mean of {len(results['shuffled_mIoU'])})"
    rows = []
    for key, label, count in (("real", "real test tiles (ceiling)", counts["real"]),
                              ("synthesized", "synthesized, own masks", counts["synthesized"]),
                              ("shuffled", floor, counts["synthesized"])):  # fmt: skip
        row = results[key]
        rows.append([label, count, row["mIoU"], row["aAcc"], row["mAcc"], *(row["IoU"][name] for name in names)])
    table = markdown_table(["scored on", "images", "mIoU", "aAcc", "mAcc", *(f"IoU {name}" for name in names)], rows)
    place = results["position"]
    sentence = (
        f"The synthesized mIoU lies at {place:.1f} % of the way from floor to ceiling."
        if place is not None
        else "The ceiling is not above the floor: the segmentor cannot judge these masks."
    )
    return f"{table}\n{sentence} ({results['metric']}; {counts['masks']} masks)\n"


def measure_reference_following(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compare statistics of images of the same masks generated with two sets of references; results and a table."""
    set_a, set_b = select_sets(args)
    pairs = pair_by_mask(set_a, set_b)
    device = choose_device(args.device)
    files = sorted({path for pair in pairs for s in pair for path in (s.image, s.reference)})
    statistics = map_images(files, lambda images: colour_statistics(images.to(device)), args.batch_size,
                            args.num_threads)
    metric = "Euclidean distance of (mean, standard deviation) of CIE L*, a*, b* (D65), 6 numbers an image"
    results = {"metric": metric, **compare_pairs(pairs, statistics),
               "masks": len({(a.mask, a.size) for a, _ in pairs}),
               "images": {"A": len({a.image for a, _ in pairs}), "B": len({b.image for _, b in pairs})},
               "references": {"A": len({a.reference for a, _ in pairs}), "B": len({b.reference for _, b in pairs})}}
    table = reference_table(results)
    if args.features:
        maps = mobilenet_maps(device, LOOK_STAGES)
        statistics = map_images(files, lambda images: map_statistics(maps(images)), args.batch_size, args.num_threads)
        references = torch.stack([statistics[path] for path in sorted({s.reference for pair in pairs for s in pair})])
        deviation = references.std(0, correction=0)
        is_alike = deviation < 1e-6 * deviation.max()  # what no reference is known by
        statistics = {path: torch.where(is_alike, 0, one / deviation) for path, one in statistics.items()}
        results["features"] = {"metric": FEATURE_METRIC, **compare_pairs(pairs, statistics), "masks": results["masks"]}
        table += "\n" + reference_table(results["features"])
    return results, table


def compare_pairs(pairs: Sequence[tuple[Sample, Sample]], statistics: Mapping[Path, torch.Tensor]) -> dict[str, Any]:
    """Both directions of all pairs (see compare_references), and both together; from statistics of their files."""
    image_a, image_b, reference_a, reference_b = (
        torch.stack([statistics[path] for path in paths])
        for paths in zip(*((a.image, b.image, a.reference, b.reference) for a, b in pairs), strict=True))
    result_a = compare_references(image_a, reference_a, reference_b)
    result_b = compare_references(image_b, reference_b, reference_a)
    count, nearer = (result_a[key] + result_b[key] for key in ("pairs", "nearer"))
    return {"A": result_a, "B": result_b, "pairs": count, "nearer": nearer, "share": round(100 * nearer / count, 2)}


def map_statistics(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean and standard deviation of every channel of maps (B, C, h, w), over their positions: (B, 2 x all C)."""
    return torch.cat([part for one in maps for part in (one.mean((2, 3)), one.std((2, 3), correction=0))], dim=1)


def select_sets(args: argparse.Namespace) -> tuple[list[Sample], list[Sample]]:
    """Samples generated with references of set A and of set B.

    Raises:
        UserError: if the flags do not define two sets, a set is empty, or a sample lies in both.
    """
    if len(args.run) > 2 or (len(args.run) == 1 and not (args.set_a and args.set_b)):
        raise UserError("--run: expected two runs, or one run with both --set_a and --set_b (patterns of reference "
                        "paths).")
    runs = [read_run(folder, args.data_root)[0] for folder in args.run]

    def select(samples: list[Sample], pattern: str | None) -> list[Sample]:
        wide = f"*{pattern}" if pattern else "*"
        return [s for s in samples if s.reference is not None and fnmatch(s.reference.as_posix(), wide)]

    set_a, set_b = select(runs[0], args.set_a), select(runs[-1], args.set_b)
    for flag, chosen in (("--set_a", set_a), ("--set_b", set_b)):
        if not chosen:
            raise UserError(f"{flag} {getattr(args, flag[2:])}: no sample with such a reference. Check the pattern.")
    both = {s.image for s in set_a} & {s.image for s in set_b}
    if both:
        raise UserError(f"--set_a, --set_b: {len(both)} samples lie in both sets. Expected separate sets. Narrow a "
                        "pattern.")
    return set_a, set_b


def pair_by_mask(set_a: Sequence[Sample], set_b: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """All (a, b) of one mask at one size; UserError if no mask has images of both sets."""
    by_mask: dict[Any, list[Sample]] = {}
    for sample in set_b:
        by_mask.setdefault((sample.mask, sample.size), []).append(sample)
    pairs = [(a, b) for a in set_a for b in by_mask.get((a.mask, a.size), ())]
    if not pairs:
        raise UserError("--run: no mask has images with references of both sets. Expected the same masks in both.")
    return pairs


def reference_table(results: dict[str, Any]) -> str:
    """Markdown text of reference following."""
    keys = ("distance_own", "distance_other", "distance_references")
    parts = {"set A": results["A"], "set B": results["B"], "both": results}
    rows = [[name, part["pairs"], part["nearer"], f"{part['share']:.1f}", *(part.get(key, "") for key in keys)]
            for name, part in parts.items()]  # fmt: skip
    heads = ["generated with", "pairs", "nearer to own", "share %", "distance to own", "to the other",
             "between references"]  # fmt: skip
    return f"{markdown_table(heads, rows)}\n{results['metric']}; {results['masks']} masks.\n"
