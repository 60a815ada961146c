"""Measure what inference.py painted (does it follow the masks, the references?), and segmentors on real tiles.

`mask_following` judges the pictures with a segmentor trained on real tiles, between a ceiling (the same segmentor on
real test tiles) and a floor (the pictures against masks that are not theirs). `reference_following` compares colour
statistics of pictures painted for the same masks in the look of two sets of references. `consistency` is the gate for
faster sampling: it compares the mask following of runs with that of an exact run, picture by picture. `segmentor`
scores a segmentor on real test tiles. `distribution` (FID, KID) and `diversity` (LPIPS) are in evaluate_images.py. All
write results.json and results.md.
"""

import argparse
import functools
import logging
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.files import atomic_write, write_json  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402
from scripts.evaluate_images import add_commands  # noqa: E402

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.data.classes import ClassTable
    from post_processing.evaluation.scores import SegmentationScore
    from post_processing.run_index import Sample
    from post_processing.segmentation.segmentor import Segmentor

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Command line of evaluate.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--data_root", help="where paths of masks and references start; default: as noted by inference.py"
    )
    common.add_argument("--outdir", help="folder for results.json and results.md; default: below the run")
    common.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    common.add_argument("--batch_size", type=int, default=32, help="pictures at once")
    common.add_argument("--num_threads", type=int, default=4, help="threads that read files")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    style = {"parents": [common], "formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    masks = commands.add_parser("mask_following", help="mIoU of the pictures between floor and ceiling", **style)
    masks.add_argument(
        "--segmentor", nargs=2, required=True, metavar=("CONFIG", "CKPT"), help="as train_segmentor.py wrote"
    )
    masks.add_argument("--run", required=True, help="--outdir of inference.py")
    masks.add_argument("--real", required=True, help="manifest of real test tiles: source (mask) and target (image)")
    masks.add_argument("--real_root", help="where the paths of --real start; default: its folder")
    masks.add_argument("--class_table", help="class table, name or path; default: the one stored with the segmentor")
    masks.add_argument("--shuffles", type=int, default=5, help="number of shufflings that the floor is the mean of")
    masks.add_argument("--seed", type=int, default=0, help="seed of the shufflings")
    masks.set_defaults(measure=measure_mask_following)

    gate = commands.add_parser("consistency", help="does faster sampling follow the masks as well?", **style)
    gate.add_argument(
        "--segmentor", nargs=2, required=True, metavar=("CONFIG", "CKPT"), help="as train_segmentor.py wrote"
    )
    gate.add_argument("--exact", required=True, help="--outdir of inference.py --mode exact")
    gate.add_argument("--run", nargs="+", required=True, help="--outdirs of the same rows, seed and checkpoint")
    gate.add_argument("--max_drop", type=float, default=0.5, help="points of mIoU that a mode may lose")
    gate.add_argument("--max_rare_drop", type=float, default=1.5, help="points of IoU that a rare class may lose")
    gate.add_argument("--rare", type=int, default=3, help="number of rarest classes to look at on their own")
    gate.add_argument("--draws", type=int, default=2000, help="bootstrap draws for the intervals")
    gate.add_argument("--seed", type=int, default=0, help="seed of the draws")
    gate.set_defaults(measure=measure_consistency)

    references = commands.add_parser(
        "reference_following", help="share of pictures nearer to their own reference", **style
    )
    references.add_argument(
        "--run", nargs="+", required=True, help="one --outdir of inference.py, or two (set A, set B)"
    )
    references.add_argument(
        "--set_a", help="pattern of reference paths in set A, such as 'dubai/*' (needed with one run)"
    )
    references.add_argument("--set_b", help="pattern of reference paths in set B, such as 'monterey/*'")
    references.set_defaults(measure=measure_reference_following)

    segmentor = commands.add_parser("segmentor", help="OA, mIoU, mAcc and IoU of every class on real tiles", **style)
    segmentor.add_argument("--segmentor", nargs=2, required=True, metavar=("CONFIG", "CKPT"), help="which one")
    segmentor.add_argument("--real", required=True, help="manifest of real test tiles")
    segmentor.add_argument("--real_root", help="where the paths of --real start; default: its folder")
    segmentor.set_defaults(measure=measure_segmentor, run=None)
    add_commands(commands, style)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and write results.json and results.md."""
    args = build_parser().parse_args(argv)
    for flag in ("batch_size", "num_threads", "shuffles", "draws", "subsets"):
        if getattr(args, flag, 1) < 1:
            raise UserError(f"--{flag}: {getattr(args, flag)} is not possible. Expected at least 1.")
    results, table = args.measure(args)
    folder = Path(args.segmentor[1]).parent if args.run is None else args.run if type(args.run) is str else args.run[0]
    outdir = Path(args.outdir or Path(folder) / args.command)
    outdir.mkdir(parents=True, exist_ok=True)
    write_json(outdir / "results.json", results)
    atomic_write(outdir / "results.md", table)
    logger.info("%s\nwritten to %s", table, outdir)


def measure_mask_following(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Score real tiles, pictures against their masks and against shuffled masks; returns results and a table."""
    from ldm.cli import choose_device
    from ldm.data.classes import ClassTable, same_names
    from ldm.data.manifest import read_manifest
    from post_processing.evaluation.scores import position
    from post_processing.run_index import read_run
    from post_processing.segmentation.segmentor import load_segmentor

    samples, run = read_run(args.run, args.data_root)
    given = ClassTable.load(args.class_table) if args.class_table else None
    segmentor = load_segmentor(*args.segmentor, device=choose_device(args.device), class_table=given)
    table = segmentor.class_table
    run_table = ClassTable.load(run["class_table"]) if run.get("class_table") else table
    if not same_names(run_table.names, table.names):
        raise UserError(
            f"--segmentor: it knows the classes {', '.join(table.names)}. Expected those of the run, "
            f"{', '.join(run_table.names)}. Train a segmentor with the run's class table {run_table.name}."
        )
    rows = read_manifest(args.real, args.real_root or Path(args.real).parent, need=("image",), table=table)
    real = score_real([(row.image, row.mask) for row in rows], segmentor, args)
    synthesized, shuffled = score_run(samples, run_table, segmentor, args)
    floors = [score.result() for score in shuffled]
    floor = mean_of(floors)
    synthesized_result = synthesized.result()
    results = {
        "measure": "mask_following",
        "metric": "mmseg IoUMetric, percent, 255 ignored",
        "class_table": table.name,
        "real": real,
        "synthesized": synthesized_result,
        "shuffled": floor,
        "shuffled_mIoU": [one["mIoU"] for one in floors],
        "position": position(synthesized_result["mIoU"], floor["mIoU"], real["mIoU"]),
        "images": {"real": len(rows), "synthesized": len(samples), "masks": len({(s.mask, s.size) for s in samples})},
        "sizes": sorted({sample.size for sample in samples}),
        "arguments": plain_arguments(args),
        "checkpoint": run.get("settings", {}),
    }
    return results, mask_table(results)


def measure_segmentor(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Score a segmentor on real tiles; returns results (OA is mmseg's aAcc) and a table."""
    from ldm.cli import choose_device
    from post_processing.segmentation.dataset import list_pairs
    from post_processing.segmentation.segmentor import load_segmentor

    segmentor = load_segmentor(*args.segmentor, device=choose_device(args.device))
    pairs = list_pairs(segmentor.class_table, manifest=args.real, data_root=args.real_root or Path(args.real).parent)
    score = score_real(pairs, segmentor, args)
    score = {"OA": score["aAcc"], **score}
    rows = [(key, score[key]) for key in ("OA", "mIoU", "mAcc")] + [(f"IoU {k}", v) for k, v in score["IoU"].items()]
    results = {"measure": "segmentor", "metric": "mmseg IoUMetric, percent, 255 ignored", "images": len(pairs), **score}
    table = "| | % |\n|---|---|\n" + "".join(f"| {k} | {'-' if v is None else f'{v:.2f}'} |\n" for k, v in rows)
    return results | {"arguments": plain_arguments(args)}, table


def score_real(pairs: Sequence[tuple[Path, Path]], segmentor: "Segmentor", args: argparse.Namespace) -> dict[str, Any]:
    """Score the segmentor on real (image, mask) files, each at its own size."""
    import torch

    from ldm.data.images import image_size
    from post_processing.evaluation.scores import SegmentationScore
    from post_processing.run_index import group_batches, read_image_batch, read_mask_at

    table = segmentor.class_table
    score = SegmentationScore(table.names, table.ignore_index)
    sizes = [image_size(image) for image, _ in pairs]
    with ThreadPoolExecutor(args.num_threads) as pool:
        for size, batch in group_batches(pairs, sizes, args.batch_size):
            images = read_image_batch([image for image, _ in batch], size, pool)
            masks = torch.stack([torch.from_numpy(read_mask_at(mask, table, size).copy()) for _, mask in batch])
            score.add(segmentor.predict(images), masks)
    return score.result()


def score_run(
    samples: Sequence["Sample"], table: "ClassTable", segmentor: "Segmentor", args: argparse.Namespace
) -> tuple["SegmentationScore", list["SegmentationScore"]]:
    """Score pictures against their own masks and, in the same pass, against each shuffling of the masks.

    Masks are shuffled as wholes: all pictures of one mask are held against the same other mask.
    """
    import torch

    from post_processing.evaluation.scores import SegmentationScore, derange
    from post_processing.run_index import group_batches, read_image_batch, read_mask_at

    keys = sorted({(sample.mask, sample.size) for sample in samples})
    orders = [derange([size for _, size in keys], args.seed + number) for number in range(args.shuffles)]
    place = {key: number for number, key in enumerate(keys)}
    own = SegmentationScore(table.names, table.ignore_index)
    shuffled = [SegmentationScore(table.names, table.ignore_index) for _ in orders]

    @functools.lru_cache(maxsize=2048)
    def mask_of(number: int) -> torch.Tensor:
        path, size = keys[number]
        return torch.from_numpy(read_mask_at(path, table, size).copy())

    with ThreadPoolExecutor(args.num_threads) as pool:
        for size, batch in group_batches(samples, [sample.size for sample in samples], args.batch_size):
            prediction = segmentor.predict(read_image_batch([sample.image for sample in batch], size, pool))
            numbers = [place[sample.mask, sample.size] for sample in batch]
            own.add(prediction, torch.stack([mask_of(number) for number in numbers]))
            for score, order in zip(shuffled, orders, strict=True):
                score.add(prediction, torch.stack([mask_of(order[number]) for number in numbers]))
    return own, shuffled


def mean_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of several scores; a class that is absent from one of them has no mean."""
    import numpy as np

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
    names = list(results["real"]["IoU"])
    lines = [
        "| scored on | images | mIoU | aAcc | mAcc | " + " | ".join(f"IoU {name}" for name in names) + " |",
        "|---|" + "---|" * (4 + len(names)),
    ]
    counts = results["images"]
    for key, label, count in (
        ("real", "real test tiles (ceiling)", counts["real"]),
        ("synthesized", "synthesized, own masks", counts["synthesized"]),
        (
            "shuffled",
            f"synthesized, shuffled masks (floor, mean of {len(results['shuffled_mIoU'])})",
            counts["synthesized"],
        ),
    ):
        row = results[key]
        values = [row["mIoU"], row["aAcc"], row["mAcc"], *(row["IoU"][name] for name in names)]
        cells = " | ".join("-" if value is None else f"{value:.2f}" for value in values)
        lines.append(f"| {label} | {count} | {cells} |")
    place = results["position"]
    sentence = (
        f"The synthesized mIoU lies at {place:.1f} % of the way from floor to ceiling."
        if place is not None
        else "The ceiling is not above the floor: the segmentor cannot judge these masks."
    )
    return "\n".join(lines) + f"\n\n{sentence} ({results['metric']}; {counts['masks']} masks)\n"


def measure_consistency(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Judge runs against an exact one, on the same masks and noise; returns results and a table."""
    from ldm.cli import choose_device
    from ldm.data.classes import ClassTable
    from post_processing.evaluation.gate import judge
    from post_processing.run_index import read_run
    from post_processing.segmentation.segmentor import load_segmentor

    samples, exact_run = read_run(args.exact, args.data_root)
    table = ClassTable.load(exact_run["class_table"]) if exact_run.get("class_table") else None
    segmentor = load_segmentor(*args.segmentor, device=choose_device(args.device), class_table=table)
    exact = order_pairs(samples)
    exact_areas = measure_areas(exact.values(), segmentor, args)
    metric = "paired drop of IoU in points, 95 % bootstrap interval"
    fingerprint = exact_run.get("settings", {})
    results: dict[str, Any] = {"measure": "consistency", "metric": metric, "exact": fingerprint, "runs": {}}
    for folder in args.run:
        others, run = read_run(folder, args.data_root)
        check_same_conditions(folder, run, exact_run)
        other = order_pairs(others)
        if other.keys() != exact.keys():
            raise UserError(
                f"--run: {folder} and --exact {args.exact} differ in {len(other.keys() ^ exact.keys())} pictures."
                " Expected the same rows, copies and seed in both. Finish both runs."
            )
        areas = measure_areas(other.values(), segmentor, args)
        groups = [sample.mask for sample in exact.values()]
        line = judge(exact_areas, areas, groups, segmentor.class_table.names, args.max_drop, args.rare,
                     args.max_rare_drop, args.draws, args.seed)  # fmt: skip
        results["runs"][folder] = line | {"fingerprint": run.get("settings", {})}
    results |= {"pictures": len(exact), "masks": len({sample.mask for sample in exact.values()}),
                "arguments": plain_arguments(args)}  # fmt: skip
    return results, consistency_table(results, args)


def order_pairs(samples: Sequence["Sample"]) -> dict[Any, "Sample"]:
    """Samples by what two runs have in common, in one order: mask and name of the picture, which holds its seed."""
    return {key: sample for key, sample in sorted(((s.mask, s.image.stem), s) for s in samples)}


def check_same_conditions(folder: str, run: dict[str, Any], exact: dict[str, Any]) -> None:
    """UserError if a run differs from the exact one in anything but how it sampled."""
    one, other = exact.get("settings", {}), run.get("settings", {})
    names = ("checkpoint_sha256", "config_sha256", "inputs_sha256", "dataset", "H", "W", "seed", "fixed_code")
    different = [name for name in names if one.get(name) != other.get(name)]
    if different:
        raise UserError(
            f"--run: {folder} was painted with another {', '.join(different)} than --exact. Expected other"
            " sampling settings only. Paint it again."
        )


def measure_areas(samples: Iterable["Sample"], segmentor: "Segmentor", args: argparse.Namespace) -> "np.ndarray":
    """Areas of right, predicted and true pixels a class of every sample, (N, 3, K); see class_areas."""
    import numpy as np
    import torch

    from post_processing.evaluation.gate import class_areas
    from post_processing.run_index import group_batches, read_image_batch, read_mask_at

    samples, table = list(samples), segmentor.class_table
    areas = np.zeros((len(samples), 3, table.num_classes))
    with ThreadPoolExecutor(args.num_threads) as pool:
        for size, batch in group_batches(range(len(samples)), [sample.size for sample in samples], args.batch_size):
            images = read_image_batch([samples[index].image for index in batch], size, pool)
            masks = [torch.from_numpy(read_mask_at(samples[index].mask, table, size).copy()) for index in batch]
            prediction = segmentor.predict(images)
            areas[batch] = class_areas(prediction, torch.stack(masks), table.num_classes, table.ignore_index)
    return areas


def consistency_table(results: dict[str, Any], args: argparse.Namespace) -> str:
    """Markdown text of the gate."""
    rare = list(next(iter(results["runs"].values()))["rare"])
    lines = ["| run | mIoU exact | mIoU | drop (95 %) | " + " | ".join(f"drop {name}" for name in rare) + " | gate |",
             "|---|" + "---|" * (4 + len(rare))]  # fmt: skip
    for folder, row in results["runs"].items():
        cells = [f"{one['drop']:+.2f} ({one['interval'][0]:+.2f} to {one['interval'][1]:+.2f})"
                 for one in (row, *row["rare"].values())]  # fmt: skip
        cells = [Path(folder).name, f"{row['mIoU_exact']:.2f}", f"{row['mIoU']:.2f}", *cells, row["gate"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + (
        f"\n\n{results['pictures']} pictures of {results['masks']} masks. Gate: mIoU loses less than {args.max_drop},"
        f" each of the {args.rare} rarest classes less than {args.max_rare_drop} points. pass: the whole interval is\n"
        "below; open: the drop is, the interval is not.\n"
    )


def measure_reference_following(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compare colour statistics of pictures of the same masks painted with two sets of references."""
    from post_processing.evaluation.scores import compare_references

    set_a, set_b = select_sets(args)
    pairs = pair_by_mask(set_a, set_b)
    statistics = make_statistics({path for pair in pairs for s in pair for path in (s.image, s.reference)}, args)

    def stack(paths: list[Path]) -> "torch.Tensor":
        import torch

        return torch.stack([statistics[path] for path in paths])

    image_a, image_b = stack([a.image for a, _ in pairs]), stack([b.image for _, b in pairs])
    reference_a, reference_b = stack([a.reference for a, _ in pairs]), stack([b.reference for _, b in pairs])
    result_a = compare_references(image_a, reference_a, reference_b)
    result_b = compare_references(image_b, reference_b, reference_a)
    count = result_a["pairs"] + result_b["pairs"]
    results = {
        "measure": "reference_following",
        "metric": "Euclidean distance of (mean, standard deviation) of CIE L*, a*, b* (D65), 6 numbers an image",
        "A": result_a,
        "B": result_b,
        "pairs": count,
        "nearer": result_a["nearer"] + result_b["nearer"],
        "share": round(100 * (result_a["nearer"] + result_b["nearer"]) / count, 2),
        "masks": len({(a.mask, a.size) for a, _ in pairs}),
        "images": {"A": len({a.image for a, _ in pairs}), "B": len({b.image for _, b in pairs})},
        "references": {"A": len({a.reference for a, _ in pairs}), "B": len({b.reference for _, b in pairs})},
        "arguments": plain_arguments(args),
    }
    return results, reference_table(results)


def select_sets(args: argparse.Namespace) -> tuple[list["Sample"], list["Sample"]]:
    """Samples painted with references of set A and of set B.

    Raises:
        UserError: if the flags do not define two sets, a set is empty, or a sample lies in both.
    """
    from post_processing.run_index import read_run

    if len(args.run) > 2 or (len(args.run) == 1 and not (args.set_a and args.set_b)):
        raise UserError(
            "--run: expected two runs, or one run with both --set_a and --set_b (patterns of reference paths)."
        )
    runs = [read_run(folder, args.data_root)[0] for folder in args.run]

    def select(samples: list["Sample"], pattern: str | None) -> list["Sample"]:
        wide = f"*{pattern}" if pattern else "*"
        return [s for s in samples if s.reference is not None and fnmatch(s.reference.as_posix(), wide)]

    set_a, set_b = select(runs[0], args.set_a), select(runs[-1], args.set_b)
    for flag, chosen in (("--set_a", set_a), ("--set_b", set_b)):
        if not chosen:
            raise UserError(f"{flag} {getattr(args, flag[2:])}: no sample with such a reference. Check the pattern.")
    both = {s.image for s in set_a} & {s.image for s in set_b}
    if both:
        raise UserError(
            f"--set_a, --set_b: {len(both)} samples lie in both sets. Expected separate sets. Narrow a pattern."
        )
    return set_a, set_b


def pair_by_mask(set_a: Sequence["Sample"], set_b: Sequence["Sample"]) -> list[tuple["Sample", "Sample"]]:
    """All (a, b) of one mask at one size; UserError if no mask was painted with both sets."""
    by_mask: dict[Any, list[Sample]] = {}
    for sample in set_b:
        by_mask.setdefault((sample.mask, sample.size), []).append(sample)
    pairs = [(a, b) for a in set_a for b in by_mask.get((a.mask, a.size), ())]
    if not pairs:
        raise UserError("--run: no mask was painted with references of both sets. Expected the same masks in both.")
    return pairs


def make_statistics(paths: set[Path], args: argparse.Namespace) -> dict[Path, "torch.Tensor"]:
    """Colour statistics of every file, batched over files of one size."""
    from ldm.cli import choose_device
    from ldm.data.images import image_size
    from post_processing.evaluation.scores import colour_statistics
    from post_processing.run_index import group_batches, read_image_batch

    device = choose_device(args.device)
    ordered = sorted(paths)
    sizes = [image_size(path) for path in ordered]
    result: dict[Path, torch.Tensor] = {}
    with ThreadPoolExecutor(args.num_threads) as pool:
        for size, batch in group_batches(ordered, sizes, args.batch_size):
            rows = colour_statistics(read_image_batch(batch, size, pool).to(device)).cpu()
            result.update(zip(batch, rows, strict=True))
    return result


def reference_table(results: dict[str, Any]) -> str:
    """Markdown text of reference following."""
    lines = [
        "| painted with | pairs | nearer to own | share % | distance to own | to the other | between references |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in ("A", "B"):
        row = results[key]
        lines.append(
            f"| set {key} | {row['pairs']} | {row['nearer']} | {row['share']:.1f} | {row['distance_own']:.2f} "
            f"| {row['distance_other']:.2f} | {row['distance_references']:.2f} |"
        )
    lines.append(f"| both | {results['pairs']} | {results['nearer']} | {results['share']:.1f} | | | |")
    return "\n".join(lines) + f"\n\n{results['metric']}; {results['masks']} masks.\n"


def plain_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The command line as JSON values."""
    return {key: value for key, value in vars(args).items() if key != "measure"}


if __name__ == "__main__":
    run_entry_point(main)
