"""Does noise correction work on real images and a real network? Labels flipped by a known T, no generator involved.

    python -m benchmarks.noise_check --classes dubai --data_root data/dubai --outdir outputs/noise_check

Flips the labels of the training pairs, and trains with true labels (clean), flipped ones (noisy), label smoothing on
flipped ones (smooth) and noise correction (dlc), for equal steps, and scores all on real test pairs. What is finished
is skipped when the command is given again. `recovered` is (arm - noisy) / (clean - noisy), in mIoU.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.noise_toy import flip_labels
from ldm.cli import add_classes, markdown_table
from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask
from ldm.data.manifest import read_manifest, write_manifest
from ldm.files import link_or_copy
from ldm.util import UserError
from post_processing.gain.report import mean_and_sd, show
from post_processing.segmentation.noise import read_noise
from scripts.evaluate import main as evaluate
from scripts.train_segmentor import main as train

# building, land, road, vegetation, water of the table `dubai`; made by hand before the first run
DUBAI = [[0.55, 0.40, 0.05, 0, 0], [0.10, 0.73, 0.10, 0.07, 0], [0.05, 0.42, 0.53, 0, 0], [0, 0.42, 0, 0.58, 0],
         [0, 0.25, 0, 0.05, 0.70]]  # fmt: skip
ARMS = {"clean": [], "noisy": [], "smooth": ["--label_smoothing", "0.1"], "dlc": ["--noise_correction", "hoc"],
        "true_t": ["--noise_matrix"]}  # fmt: skip


def write_sets(args: argparse.Namespace, table: ClassTable, folder: Path) -> float:
    """Write the true and the flipped pairs as training sets; returns the share of labels that were flipped."""
    counts = np.zeros(2, np.int64)
    rows: dict[str, list] = {"clean": [], "noisy": []}
    for name in ("images", "clean", "noisy"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(read_manifest(args.train_txt_file, args.data_root, table=table)):
        mask = read_mask(row.mask, table)
        random = np.random.default_rng([args.noise_seed, number])
        flipped = flip_labels(mask[None], DUBAI, args.block, random)[0].astype(np.uint8)
        counts += (flipped != mask).sum(), (mask != IGNORE_INDEX).sum()
        name = f"{number:06d}"
        image = folder / "images" / (name + row.image.suffix)
        if not image.exists():
            link_or_copy(row.image, image)
        for kind, content in (("clean", mask), ("noisy", flipped)):
            Image.fromarray(content).save(folder / kind / f"{name}.png")
            rows[kind].append({"source": f"{kind}/{name}.png", "target": f"images/{image.name}"})
    for kind, items in rows.items():
        write_manifest(folder / f"{kind}.json", items)
    return float(counts[0] / counts[1])


def train_and_score(args: argparse.Namespace, arm: str, seed: int, sets: Path, matrix: Path) -> dict:
    """Train one arm with one seed, and score it on the test pairs; finished ones are read."""
    folder = Path(args.outdir).absolute() / f"{arm}/seed_{seed}"
    results = folder / "test/results.json"
    if not results.is_file():
        kind = "clean" if arm == "clean" else "noisy"
        flags = [*ARMS[arm], str(matrix)] if arm == "true_t" else ARMS[arm]
        train(["--config", args.config, "--classes", str(sets / "table.json"), "--synthetic_txt_file",
               str(sets / f"{kind}.json"), "--max_steps", str(args.steps), "--batch_size", str(args.batch_size),
               "--threads", str(args.threads), "--seed", str(seed), "--work_dir", str(folder), "--resume", *flags])
        segmentor = [str(folder / name) for name in ("config.json", "segmentor.pth")]
        evaluate(["segmentor", "--segmentor", *segmentor, "--real", args.test_txt_file, "--real_root", args.data_root,
                  "--outdir", str(folder / "test")])  # fmt: skip
    return json.loads(results.read_text())


def make_table(scores: dict[str, dict[int, dict]]) -> str:
    """Markdown: mean and SD over the seeds, the share recovered, and the difference to `noisy` paired by seed."""
    names = list(next(iter(scores["noisy"].values()))["IoU"])
    mean = {arm: statistics.fmean(found["mIoU"] for found in seeds.values()) for arm, seeds in scores.items()}
    rows = []
    for arm, seeds in scores.items():
        gains = [seeds[seed]["mIoU"] - scores["noisy"][seed]["mIoU"] for seed in seeds]
        recovered = None if arm == "noisy" else f"{statistics.fmean(gains) / (mean['clean'] - mean['noisy']):.0%}"
        columns = [[found[key] for found in seeds.values()] for key in ("OA", "mIoU")]
        columns += [gains, *([found["IoU"][name] for found in seeds.values()] for name in names)]
        cells = [show(mean_and_sd(values)) for values in columns]
        rows.append([arm, *cells[:2], recovered, *cells[2:]])
    return markdown_table(["arm", "OA", "mIoU", "recovered", "mIoU - noisy, paired", *names], rows)


def main() -> None:
    """Make the sets, train all arms, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_classes(parser.add_argument, "of the masks", is_required=True)
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--train_txt_file", help="default: train_set_items.json in --data_root")
    parser.add_argument("--test_txt_file", help="default: test_set_items.json in --data_root")
    parser.add_argument("--outdir", required=True)
    parser.add_argument("--config", default="configs/mmseg/small.py")
    parser.add_argument("--arms", default="clean,noisy,smooth,dlc", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--block", type=int, default=1, help="side of the squares whose labels are flipped together")
    parser.add_argument("--noise_seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.train_txt_file = args.train_txt_file or str(Path(args.data_root) / "train_set_items.json")
    args.test_txt_file = args.test_txt_file or str(Path(args.data_root) / "test_set_items.json")
    table = ClassTable.load(args.classes).without_source_ids()
    if table.num_classes != len(DUBAI):
        raise UserError(f"--classes {args.classes}: {table.num_classes} classes. Expected {len(DUBAI)}, T's.")
    sets = Path(args.outdir).absolute() / "sets"
    if not (sets / "facts.json").is_file():
        share = write_sets(args, table, sets)
        (sets / "table.json").write_text(json.dumps(table.to_dict()))
        domains = {"1": {"transition": DUBAI}}
        (sets / "noise.json").write_text(json.dumps({"classes": table.names, "domains": domains}))
        (sets / "facts.json").write_text(json.dumps({"flipped": share, "block": args.block}))
    scores: dict[str, dict[int, dict]] = {}
    for seed in map(int, args.seeds.split(",")):  # seed by seed: a table of one is soon there
        for arm in args.arms.split(","):
            scores.setdefault(arm, {})[seed] = train_and_score(args, arm, seed, sets, sets / "noise.json")
            print(f"{arm} {seed}: mIoU {scores[arm][seed]['mIoU']}", flush=True)
        print(f"flipped: {json.loads((sets / 'facts.json').read_text())['flipped']:.1%}", flush=True)
        if {"clean", "noisy"} <= set(scores):
            print(make_table(scores), flush=True)
    truth = torch.tensor(DUBAI, dtype=torch.float64)
    for seed in scores.get("dlc", {}):
        found = read_noise(Path(args.outdir) / f"dlc/seed_{seed}/noise.json", table.names)[1]
        distance = float((found - truth).abs().sum(1).mean()) / 2
        print(f"seed {seed}: total-variation distance of the estimated T from the true one {distance:.3f}, "
              f"of the identity {float((1 - truth.diagonal()).mean()):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
