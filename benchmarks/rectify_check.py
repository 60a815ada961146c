r"""Does control-rectify sampling make images follow their masks, or does it only please the segmentor that guides it?

    python -m benchmarks.rectify_check --ckpt models/tisynth_mini.safetensors --classes mini --data_root data/dubai \
        --rows data/dubai/inference_items.json --scene_regex '^(t\d+_s\d+)' --outdir outputs/rectify

Halves the labelled scenes: the guides (configs/mmseg/small.py, and one on latents) see the first half, the judge
(another family, from nothing: configs/mmseg/small_resnet.py) the second. Generates the same masks with every setting of
--settings, --copies times with noise of its own, and prints a table: mIoU as judge and guide see it, what is left of
the judge's difference to `none` after four distortions (95 % intervals by a bootstrap over masks), how far the images
are from those of `none`, how different the copies are (LPIPS), the distance to real tiles (KID), and seconds an image.
What is finished is skipped when the command is given again. Choose settings on masks of validation scenes (--rows).
"""

import argparse
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import inference
from ldm.cli import add_classes, markdown_table
from ldm.data.classes import ClassTable
from ldm.data.manifest import read_manifest, write_manifest
from ldm.util import UserError, run_entry_point
from post_processing.evaluation.scores import class_areas, mean_iou
from post_processing.gain.sets import split_groups
from post_processing.run_index import Sample, read_run, run_batches
from post_processing.segmentation.guide import SegmentorGuide
from post_processing.segmentation.segmentor import Segmentor, load_segmentor
from scripts.evaluate import main as evaluate
from scripts.train_segmentor import main as train

HALVES = 4  # number of the random draw that halves the scenes
# name -> (guide, flags of inference.py)
SETTINGS: dict[str, tuple[str | None, list[str]]] = {
    "none": (None, []),
    "wrong sign, high, 0.2": ("opposed", ["0.2", "0.7", "1"]),
    "high, 0.1": ("image", ["0.1", "0.7", "1"]),
    "high, 0.2": ("image", ["0.2", "0.7", "1"]),
    "high, 0.4": ("image", ["0.4", "0.7", "1"]),
    "middle, 0.2": ("image", ["0.2", "0.3", "0.7"]),
    "low, 0.2": ("image", ["0.2", "0", "0.3"]),
    "all, 0.1": ("image", ["0.1", "0", "1"]),
    "all, 0.2": ("image", ["0.2", "0", "1"]),
    "high, 0.2, wrong pixels": ("image", ["0.2", "0.7", "1", "--rectify_loss", "wrong"]),
    "latent, high, 0.2": ("latent", ["0.2", "0.7", "1"]),
    "latent, high, 0.4": ("latent", ["0.4", "0.7", "1"]),
    "latent, all, 0.2": ("latent", ["0.2", "0", "1"]),
}


class OpposedGuide(SegmentorGuide):
    """The same scores with the gradient turned round: the control that tells guidance from any disturbance."""

    def __call__(self, images: Tensor) -> Tensor:
        """See SegmentorGuide."""
        return super().__call__(2 * images.detach() - images)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Saved as JPEG and read again; (H, W, 3) uint8."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def halve(image: np.ndarray) -> np.ndarray:
    """Brought to half of its size and back; (H, W, 3) uint8."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def disturb(image: np.ndarray) -> np.ndarray:
    """Noise of 8 grey levels, the same for every image of a size; (H, W, 3) uint8."""
    noise = np.random.default_rng(0).normal(0, 8, image.shape)
    return (image + noise).round().clip(0, 255).astype(np.uint8)


DISTORTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as generated": lambda image: image,
    "JPEG 75": lambda image: jpeg(image, 75),
    "JPEG 30": lambda image: jpeg(image, 30),
    "half size": halve,
    "noise 8": disturb,
}


def train_segmentors(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Guides on one half of the scenes, the judge on the other; returns the files of each."""
    rows = read_manifest(args.train_txt_file, args.data_root, need=("image",), table=ClassTable.load(args.classes))
    rows = list({(row.image, row.mask): row for row in rows}.values())
    halves = dict(zip("AB", split_groups(rows, 0.5, args.scene_regex, HALVES), strict=True))
    root = Path(args.data_root).absolute()
    for name, half in halves.items():
        write_manifest(folder / f"{name}.json", [{"source": row.mask.absolute().relative_to(root).as_posix(),
                                                  "target": row.image.absolute().relative_to(root).as_posix()}
                                                 for row in half])  # fmt: skip
    files = {}
    for name, half, steps, flags, made in (
        ("guide", "A", args.steps, ["--config", args.config], ["config.json", "segmentor.pth"]),
        ("judge", "B", args.judge_steps, ["--config", args.judge_config], ["config.json", "segmentor.pth"]),
        ("latent", "A", args.latent_steps, ["--on_latents", args.ckpt], ["guide.safetensors"]),
    ):
        files[name] = [str(folder / name / file) for file in made]
        if not Path(files[name][-1]).is_file():
            train([*flags, "--classes", args.classes, "--data_root", args.data_root, "--train_txt_file",
                   str(folder / f"{half}.json"), "--work_dir", str(folder / name), "--max_steps", str(steps),
                   "--batch_size", "8", "--threads", str(args.threads), "--seed", str(1 + (half == "B"))])  # fmt: skip
    return files


def generate(args: argparse.Namespace, name: str, files: dict[str, list[str]], rows: Path) -> Path:
    """Generate all masks with one setting; returns the run folder."""
    guide, values = SETTINGS[name]
    folder = Path(args.outdir).absolute() / "runs" / name.replace(", ", "_").replace(" ", "_")
    flags = {
        None: [],
        "image": ["--guide", *files["guide"]],
        "latent": ["--guide", *files["latent"]],
        "opposed": ["--guide", "benchmarks.rectify_check.OpposedGuide", *files["guide"], "--allow_modules",
                    "benchmarks.rectify_check"],
    }[guide]  # fmt: skip
    if guide:
        flags += ["--rectify_scale", values[0], "--rectify_window", *values[1:]]
    code = inference.main(["--ckpt", args.ckpt, "--data_root", args.data_root, "--txt_file", str(rows), "--outdir",
                           str(folder), "--mode", "fast", "--num_per_mask", str(args.copies), *flags])  # fmt: skip
    if code:
        raise UserError(f"{folder}: inference.py ended with {code}. See what it says above.")
    return folder


def areas_of(samples: list[Sample], segmentor: Segmentor, distortion: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Right, predicted and true pixels of each class in every image (see class_areas): (N, 3, K)."""
    place = {sample.image: number for number, sample in enumerate(samples)}
    areas = np.zeros((len(samples), 3, segmentor.class_table.num_classes))
    for batch in run_batches(samples, segmentor.class_table, 16, 2):
        images = torch.from_numpy(np.stack([distortion(loaded.image) for loaded in batch])).permute(0, 3, 1, 2)
        masks = torch.from_numpy(np.stack([loaded.mask for loaded in batch]))
        with torch.inference_mode():
            found = class_areas(segmentor.predict(images), masks, segmentor.class_table.num_classes)
        areas[[place[loaded.pair.image] for loaded in batch]] = found
    return areas


def interval(areas: np.ndarray, other: np.ndarray, masks: list[Path], draws: int = 2000) -> list[float]:
    """95 % interval of the difference in mIoU of the same images under two settings; whole masks are drawn."""
    names = sorted(set(masks))
    groups = np.zeros((len(names), len(masks)))
    for number, mask in enumerate(masks):
        groups[names.index(mask), number] = 1
    by_mask = [np.einsum("gn,nak->gak", groups, one) for one in (areas, other)]
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    first, second = (mean_iou(np.einsum("dg,gak->dak", counts, one)) for one in by_mask)
    return [round(float(value), 2) for value in np.percentile(first - second, (2.5, 97.5))]


def score(args: argparse.Namespace, folder: Path, segmentors: dict[str, Segmentor]) -> dict[str, Any]:
    """What segmentors see in a run (areas by segmentor and distortion), its images' facts, and what others measure."""
    samples, _ = read_run(folder, args.data_root)
    samples = sorted(samples, key=lambda sample: int(sample.name.rpartition("_")[2]))  # by seed: copy, then row
    shards = [json.loads(path.read_text()) for path in sorted((folder / "shards").glob("*.json"))]
    result: dict[str, Any] = {
        "samples": samples,
        "seconds": sum(shard["seconds"] for shard in shards) / sum(shard["painted"] for shard in shards),
        "areas": {(name, kind): areas_of(samples, segmentor, change)
                  for name, segmentor in segmentors.items()
                  for kind, change in DISTORTIONS.items() if name == "judge" or kind == "as generated"},
    }  # fmt: skip
    common = ["--run", str(folder), "--data_root", args.data_root]
    evaluate(["distribution", *common, "--real", args.test_txt_file, "--real_root", args.data_root, "--outdir",
              str(folder / "distribution")])  # fmt: skip
    result["kid"] = json.loads((folder / "distribution/results.json").read_text())["all"]["kid"]
    result["lpips"] = None
    if args.vgg and args.copies > 1:
        evaluate(["diversity", *common, "--vgg", args.vgg, "--outdir", str(folder / "diversity")])
        result["lpips"] = json.loads((folder / "diversity/results.json").read_text())["lpips"]
    return result


def compare(found: dict[str, Any], none: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The row of a setting: see the head of the file."""
    samples, masks = found["samples"], [sample.mask for sample in found["samples"]]
    copies = copy_numbers(samples)
    row: dict[str, Any] = {"seconds": found["seconds"], "kid": found["kid"], "lpips": found["lpips"]}
    for name in ("judge", "guide"):
        areas = found["areas"][name, "as generated"]
        values = [float(mean_iou(areas[copies == copy].sum(0))) for copy in range(args.copies)]
        row[name] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
    row["difference"] = {}
    for kind in DISTORTIONS:
        one, other = found["areas"]["judge", kind], none["areas"]["judge", kind]
        row["difference"][kind] = [float(mean_iou(one.sum(0)) - mean_iou(other.sum(0))), *interval(one, other, masks)]
    row["grey_levels"] = statistics.fmean(
        float(np.abs(np.asarray(Image.open(one.image), np.float32) - np.asarray(Image.open(other.image))).mean())
        for one, other in zip(samples, none["samples"], strict=True))  # fmt: skip
    return row


def copy_numbers(samples: list[Sample]) -> np.ndarray:
    """Which copy of its mask each sample is, (N,); samples in the order of their seeds."""
    seen: dict[Path, int] = {}
    numbers = []
    for sample in samples:
        numbers.append(seen.get(sample.mask, 0))
        seen[sample.mask] = numbers[-1] + 1
    return np.array(numbers)


def make_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["window, scale", "judge", "guide", *(f"judge - none, {kind}" for kind in DISTORTIONS), "grey levels",
             "LPIPS", "KID x 1000", "s an image"]  # fmt: skip
    lines = []
    for name, row in rows.items():
        lines.append([name, *(f"{row[who][0]:.2f} ± {row[who][1]:.2f}" for who in ("judge", "guide")),
                      *("{:+.2f} ({:+.2f}, {:+.2f})".format(*row["difference"][kind]) for kind in DISTORTIONS),
                      f"{row['grey_levels']:.1f}", "-" if row["lpips"] is None else f"{row['lpips']:.3f}",
                      f"{1000 * row['kid']:.1f}", f"{row['seconds']:.2f}"])  # fmt: skip
    return markdown_table(heads, lines)


def main(argv: list[str] | None = None) -> None:
    """Train, generate, score, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_classes(parser.add_argument, "of the masks", is_required=True)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--rows", required=True, help="manifest of masks to generate, with references")
    parser.add_argument("--num_masks", type=int, default=40, help="of them, evenly spread")
    parser.add_argument("--copies", type=int, default=3, help="draws of noise for each mask")
    parser.add_argument("--train_txt_file", help="labelled pairs; default: train_set_items.json in --data_root")
    parser.add_argument("--test_txt_file", help="real tiles for ceiling and KID; default: test_set_items.json there")
    parser.add_argument("--scene_regex", required=True, help="its first group names the scene of a tile")
    parser.add_argument("--outdir", required=True)
    parser.add_argument("--settings", default=",, ".join(SETTINGS), help="separated by ',, '")
    parser.add_argument("--config", default="configs/mmseg/small.py", help="of the guide")
    parser.add_argument("--judge_config", default="configs/mmseg/small_resnet.py")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--latent_steps", type=int, default=600)
    parser.add_argument("--judge_steps", type=int, default=1500)
    parser.add_argument("--vgg", help="file of demo/make/convert_lpips.py, for LPIPS")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    args.train_txt_file = args.train_txt_file or str(Path(args.data_root) / "train_set_items.json")
    args.test_txt_file = args.test_txt_file or str(Path(args.data_root) / "test_set_items.json")
    chosen = args.settings.split(",, ")
    if unknown := sorted(set(chosen) - set(SETTINGS)):
        raise UserError(f"--settings: {', '.join(unknown)} unknown. Expected some of {', '.join(SETTINGS)}.")
    outdir = Path(args.outdir).absolute()
    outdir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    lines = Path(args.rows).read_text().splitlines()
    rows = outdir / "rows.json"
    rows.write_text("\n".join(lines[:: max(len(lines) // args.num_masks, 1)][: args.num_masks]) + "\n")
    files = train_segmentors(args, outdir)
    segmentors = {name: load_segmentor(*files[name]) for name in ("judge", "guide")}
    table: dict[str, Any] = {}
    for name in files:
        if name != "latent":
            evaluate(["segmentor", "--segmentor", *files[name], "--real", args.test_txt_file, "--real_root",
                      args.data_root, "--outdir", str(outdir / name / "test")])  # fmt: skip
    none = score(args, generate(args, "none", files, rows), segmentors)
    for name in dict.fromkeys(["none", *chosen]):
        found = none if name == "none" else score(args, generate(args, name, files, rows), segmentors)
        table[name] = compare(found, none, args)
        (outdir / "results.json").write_text(json.dumps(table, indent=1))
        text = make_table(table)
        (outdir / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_entry_point(main)
