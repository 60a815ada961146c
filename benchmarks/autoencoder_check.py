"""What does a generator's autoencoder lose? Real tiles that only pass through it, with a segmentor as the judge.

    python -m benchmarks.autoencoder_check --ckpt models/tisynth_mini.safetensors --segmentor CONFIG CKPT --data_root \
        data/dubai --txt_file data/dubai/test_set_items.json --vgg lpips_vgg16.safetensors --outdir outputs/autoencoder

Prints the segmentor's scores of the tiles as they are and passed through, PSNR and LPIPS, and how much stronger the
steps at the borders of latent pixels are than elsewhere (1 = no grid). Writes results.json and a sheet of examples.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.cli import choose_device, markdown_table
from ldm.modules.perceptual import PerceptualLoss
from ldm.util import run_entry_point
from ldm.weights.load import load_method, read_model_config
from post_processing.evaluation.scores import SegmentationScore
from post_processing.segmentation.dataset import list_pairs
from post_processing.segmentation.loading import load_batches, stack_batch
from post_processing.segmentation.segmentor import load_segmentor


def grid_strength(image: Tensor, period: int) -> float:
    """Mean step between neighbours across borders of `period` pixels, over that of all others.

    Args:
        image: (B, C, H, W).
        period: side of a latent pixel.
    """
    crossing, inside = [], []
    for steps in (image.diff(dim=2), image.diff(dim=3).mT):
        steps = steps.abs().mean((0, 1, 3))
        is_border = torch.arange(1, len(steps) + 1) % period == 0
        crossing.append(steps[is_border].mean())
        inside.append(steps[~is_border].mean())
    return float(sum(crossing) / sum(inside))


def main(argv: list[str] | None = None) -> None:
    """Pass all tiles through, score, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--segmentor", nargs=2, required=True, metavar=("CONFIG", "CKPT"))
    parser.add_argument("--data_root", required=True)
    parser.add_argument("--txt_file", required=True, help="manifest of real pairs")
    parser.add_argument("--vgg", required=True, help="file of demo/make/convert_lpips.py")
    parser.add_argument("--outdir", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--examples", type=int, default=8)
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    method = load_method(args.ckpt, read_model_config(args.ckpt), device).eval()
    period = method.first_stage_model.downsampling
    segmentor = load_segmentor(*args.segmentor, device=device)
    lpips = PerceptualLoss(args.vgg).to(device)
    table = segmentor.class_table
    pairs = list_pairs(table, manifest=args.txt_file, data_root=args.data_root)
    scores = {name: SegmentationScore(table.names, table.ignore_index) for name in ("as they are", "passed through")}
    facts: dict[str, list[float]] = {"psnr": [], "lpips": [], "grid before": [], "grid after": []}
    examples: list[np.ndarray] = []
    every = max(len(pairs) // args.examples, 1)
    with torch.inference_mode():
        for number, batch in enumerate(load_batches(pairs, table, args.batch_size, 2)):
            images, masks = stack_batch(batch, device)
            passed = method.decode_latent(method.encode_start(images / 127.5 - 1)).clamp(-1, 1)
            levels = ((passed + 1) * 127.5).round().to(torch.uint8)
            for name, shown in zip(scores, (images, levels), strict=True):
                scores[name].add(segmentor.predict(shown), masks)
            error = (images.float() - levels.float()).square().mean((1, 2, 3)).clamp(min=1e-6)
            facts["psnr"] += (10 * (255**2 / error).log10()).tolist()
            facts["lpips"] += lpips(images / 127.5 - 1, levels / 127.5 - 1).tolist()
            facts["grid before"].append(grid_strength(images.float().cpu(), period))
            facts["grid after"].append(grid_strength(levels.float().cpu(), period))
            examples += [torch.cat([images[i], levels[i]], 1).permute(1, 2, 0).cpu().numpy()
                         for i in range(len(batch)) if (number * args.batch_size + i) % every == 0]  # fmt: skip
    found = {name: score.result() for name, score in scores.items()}
    means = {name: float(np.mean(values)) for name, values in facts.items()}
    share = 100 * found["passed through"]["mIoU"] / found["as they are"]["mIoU"]
    outdir = Path(args.outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(examples, 1)).save(outdir / "examples.png")
    (outdir / "results.json").write_text(json.dumps({**found, **means, "share": share, "tiles": len(pairs)}, indent=1))
    rows = [(name, one["aAcc"], one["mIoU"], *one["IoU"].values()) for name, one in found.items()]
    print(markdown_table(["", "OA", "mIoU", *table.names], rows))
    print(f"{share:.1f} % of the mIoU; " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))


if __name__ == "__main__":
    run_entry_point(main)
