"""The results of a gain measurement: mean and spread over seeds, gains paired by seed, one HTML page."""

import base64
import html
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.cli import markdown_table
from ldm.data.classes import ClassTable, read_mask
from ldm.data.images import read_image
from ldm.files import atomic_write, write_json
from ldm.sheet import Cell, draw_sheet
from post_processing.gain.plan import LABELS, Plan
from post_processing.run_index import read_mask_at, read_run

BASELINE = "real"
MEASURES = ("OA", "mIoU", "mAcc")
Scores = Mapping[str, Mapping[int, Mapping[str, Any]]]


def write_report(plan: Plan) -> str:
    """Gather the scores and write results.json, table.md and report.html; returns the table."""
    args, stages = plan.args, {stage.name for stage in plan.stages()}  # an earlier plan's may lie in the folder as well
    scores: dict[str, dict[int, Any]] = {arm: {} for arm in args.arms}
    for arm in args.arms:
        for seed in args.seeds:
            path = plan.outdir / f"{arm}/seed_{seed}/test/results.json"
            scores[arm][seed] = json.loads(path.read_text(encoding="utf-8"))
    summary = summarise(scores)
    table = make_table(summary, LABELS)
    settings = {key: value for key, value in vars(args).items() if key not in ("debug", "dry_run", "overwrite")}
    write_json(plan.outdir / "results.json", {"summary": summary, "scores": scores, "settings": settings})
    atomic_write(plan.outdir / "table.md", table)
    tiles = scores["real"][args.seeds[0]]["images"]
    real, resampled = plan.manifests["real"], plan.manifests["resampled"]
    scored = (f"Scored on {tiles} tiles of held-out training scenes, to choose settings: no test tile was looked at."
              if args.held_out else f"Test tiles, unseen: {tiles}.")
    facts = [
        f"Real pairs: {count_lines(real)} ({args.real_fraction:.0%} of the set). {scored}"
        " Scores: mmseg's IoUMetric in percent, macro; mean ± sample standard deviation over the seeds"
        f" {', '.join(map(str, args.seeds))}; gains are paired by seed.",
        f"Every training: {args.steps} steps of {args.batch_size} tiles, {args.config}. Synthesized images for each"
        f" real one in a batch: {args.synthetic_ratio:g}.",
    ]
    if "synthesis" in stages:
        kept = f"{count_lines(resampled)} kept" if "resample" in stages else "not filtered"
        painted = count_lines(plan.outdir / "synthesis/index.jsonl")
        what = "images of mixed masks" if args.mix_masks else "images"
        facts.append(f"Generator {Path(args.ckpt).name}: {painted} {what} generated, {kept}. The labels that it was "
                     "trained with are labels too; --real_fraction does not take those away.")
    folders = {arm: [plan.outdir / f"{arm}/seed_{seed}" for seed in args.seeds] for arm in args.arms}
    drawings = [draw_curves(read_curves(folders, key), title, LABELS)
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


def summarise(scores: Scores) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every number of every arm.

    Args:
        scores: arm -> seed -> results of `evaluate.py segmentor` (OA, mIoU, mAcc, IoU by class; percent).
    Returns:
        arm -> {seeds, OA, mIoU, mAcc: (mean, SD), IoU: class -> (mean, SD), gain: (mean, SD) of mIoU minus that of the
        arm `real` with the same seed}. SD is the sample's (n - 1), None for one seed; a number is None where any seed
        has none, the gain where the arm is `real` or lacks it.
    """
    result = {}
    for arm, seeds in scores.items():
        names = next(iter(seeds.values()))["IoU"]
        pairs = [score["mIoU"] - scores[BASELINE][seed]["mIoU"] for seed, score in seeds.items()
                 if arm != BASELINE and seed in scores.get(BASELINE, {})]  # fmt: skip
        result[arm] = {
            "seeds": sorted(seeds),
            **{key: mean_and_sd([score[key] for score in seeds.values()]) for key in MEASURES},
            "IoU": {name: mean_and_sd([score["IoU"][name] for score in seeds.values()]) for name in names},
            "gain": mean_and_sd(pairs) if pairs else None,
        }
    return result


def mean_and_sd(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation (None for one value); None if a value is None."""
    if any(value is None for value in values):
        return None
    return round(statistics.fmean(values), 2), round(statistics.stdev(values), 2) if len(values) > 1 else None


def make_table(summary: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Markdown table of a summary: an arm a row, `mean ± SD`."""
    classes = list(next(iter(summary.values()))["IoU"])
    heads = ["trained on", "seeds", *MEASURES, "gain in mIoU", *(f"IoU {name}" for name in classes)]
    rows = []
    for arm, row in summary.items():
        values = [*(row[key] for key in MEASURES), row["gain"], *(row["IoU"][name] for name in classes)]
        cells = [show(value, is_signed=place == len(MEASURES)) for place, value in enumerate(values)]
        rows.append([labels[arm], len(row["seeds"]), *cells])
    return markdown_table(heads, rows)


def show(value: tuple[float, float | None] | None, is_signed: bool = False) -> str:
    """One cell: `mean ± SD`, the mean alone, or a dash."""
    if value is None:
        return "-"
    mean = f"{value[0]:+.2f}" if is_signed else f"{value[0]:.2f}"
    return mean if value[1] is None else f"{mean} ± {value[1]:.2f}"


def read_curves(work_dirs: Mapping[str, Sequence[Path]], key: str) -> dict[str, list[tuple[int, float]]]:
    """Curves of `loss` or of the validation's `mIoU` from mmengine's logs: arm -> (step, mean over its trainings).

    Lines that a kill cut off are left out.
    """
    curves = {}
    for arm, folders in work_dirs.items():
        values: dict[int, dict[Path, float]] = {}
        for folder in folders:
            for path in sorted(folder.glob("*/vis_data/scalars.json")):  # a resumed training has several
                for line in path.read_text(encoding="utf-8").splitlines():
                    try:
                        record = json.loads(line)
                        step, value = int(record["step"]), float(record[key])
                    except (ValueError, TypeError, KeyError):  # KeyError: lines of other measures
                        continue
                    values.setdefault(step, {})[folder] = value
        curves[arm] = [(step, statistics.fmean(found.values())) for step, found in sorted(values.items())]
    return {arm: curve for arm, curve in curves.items() if curve}


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, labels: Mapping[str, str]) -> str:
    """Curves as an SVG image with axes and legend; "" if there are none."""
    if not curves:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5))
    axes = figure.add_subplot(title=title, xlabel="steps")
    for arm, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=labels[arm])
    figure.legend(loc="outside right upper")
    content = io.StringIO()
    figure.savefig(content, format="svg", bbox_inches="tight")
    return content.getvalue().partition("<svg")[1] + content.getvalue().partition("<svg")[2]


def draw_examples(run_folder: Path, filtered: Path, count: int, class_table: ClassTable) -> Image.Image:
    """A sheet of samples, one a row: mask, reference, image, filtered mask (dropped pixels in the ignore colour)."""
    samples, run = read_run(run_folder)
    table = ClassTable.load(run["class_table"]) if run.get("class_table") else class_table
    rows = []
    for sample in (samples[int(place)] for place in np.linspace(0, len(samples) - 1, min(count, len(samples)))):
        mask = table.colourise(read_mask_at(sample.mask, table, sample.size))
        kept = table.colourise(read_mask(filtered / f"{sample.image.stem}.png", table))
        reference = read_image(sample.reference, None) if sample.reference else None
        rows.append([Cell(mask, sample.mask.stem, is_mask=True), Cell(reference, "reference"),
                     Cell(read_image(sample.image, None), "synthesized"), Cell(kept, "filtered", is_mask=True)])
    return draw_sheet(rows)


def make_page(table: str, facts: Sequence[str], drawings: Sequence[str], examples: Image.Image | None) -> str:
    """One HTML page that needs no other file: facts, a Markdown table, SVG drawings, a sheet of samples."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[2:])
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    parts = ["<!doctype html><meta charset='utf-8'><title>Gain</title><style>body{font:14px sans-serif;margin:2em}"
             "td,th{padding:.3em .6em;border-bottom:1px solid #ccc;text-align:right}td:first-child{text-align:left}"
             "</style><h1>Gain of synthesized pairs</h1>",
             "".join(f"<p>{html.escape(fact)}</p>" for fact in facts), f"<table><tr>{head}</tr>{body}</table>",
             *drawings]  # fmt: skip
    if examples is not None:
        buffer = io.BytesIO()
        examples.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append("<h2>Examples</h2><p>Mask, reference, synthesized image, filtered mask.</p>"
                     f'<img src="data:image/png;base64,{data}" alt="examples">')  # fmt: skip
    return "\n".join(parts) + "\n"
