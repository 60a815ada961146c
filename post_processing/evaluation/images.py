"""Are images like real ones, as sets (FID, KID), in contrast and texture? And how different are samples of a mask?

Features are (N, D) arrays, one row an image; which network they are from decides about the numbers. Only those of the
Inception network on the same real images may be held against published ones: see pytorch-fid in docs/evaluation.md.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.cli import choose_device, markdown_table
from ldm.data.images import find_images
from ldm.data.manifest import read_manifest
from ldm.modules.perceptual import PerceptualLoss
from ldm.util import UserError
from post_processing.evaluation.scores import colour_statistics, rgb_to_lab
from post_processing.run_index import read_run
from post_processing.segmentation.backbone import find_imagenet_weights, load_backbone
from post_processing.segmentation.loading import map_images
from post_processing.segmentation.segmentor import Segmentor, require_mmseg, segmentor_of

logger = logging.getLogger(__name__)

Extract = Callable[[torch.Tensor], torch.Tensor]

# Of ImageNet's pixels 0..255 by channel, RGB, as torchvision's weights were trained.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_DEVIATION = (58.395, 57.12, 57.375)


class Given(torch.nn.Identity):
    """Stands for a network where features are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(features: np.ndarray, other: np.ndarray) -> float:
    """FID: distance of the Gaussians that have the means and covariances of two sets of features.

    Args:
        features, other: (N, D) and (M, D), N and M at least 2. With fewer rows than columns the distance is still
            defined, but far above that of large sets.
    Raises:
        ValueError: for sets of fewer than two rows.
    Source: Heusel et al. 2017, Eq. 6, as torchmetrics computes it.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(features), len(other)) < 2:
        raise ValueError(f"FID: sets of {len(features)} and {len(other)} images. Expected two or more in each.")
    metric = FrechetInceptionDistance(feature=Given(features.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(features), real=True)
    metric.update(torch.from_numpy(other), real=False)
    return max(float(metric.compute()), 0.0)


def kernel_distance(features: np.ndarray, other: np.ndarray, subsets: int = 100, subset_size: int = 1000,
                    seed: int = 0) -> tuple[float, float]:
    """KID: mean and standard deviation of the unbiased squared maximum mean discrepancy over random subsets.

    Args:
        features, other: (N, D) and (M, D).
        subsets, seed: number and seed of the draws.
        subset_size: rows drawn from each set without replacement; at most half of the smaller set, for draws of all
            of its rows would have no spread.
    Raises:
        ValueError: for sets of fewer than two rows.
    Source: Binkowski et al. 2018, as torchmetrics computes it.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    smaller = min(len(features), len(other))
    if smaller < 2:
        raise ValueError(f"KID: a set of {smaller} images. Expected two or more.")
    size = min(subset_size, max(smaller // 2, 2))
    metric = KernelInceptionDistance(feature=Given(features.shape[1]), subsets=subsets, subset_size=size)
    metric.update(torch.from_numpy(features.astype(np.float64)), real=True)
    metric.update(torch.from_numpy(other.astype(np.float64)), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def compare_sets(real: np.ndarray, synthesized: np.ndarray, seed: int = 0, **draws: int) -> dict[str, Any]:
    """FID and KID between real and synthesized images, with the distance of two halves of the real ones as floor.

    FID grows as sets get smaller, so the floor has a partner at its own size: a part of the real images against as many
    synthesized ones, and against as many other real ones.

    Args:
        real, synthesized: features, (N, D) and (M, D).
        seed, draws: of the parts and the subsets (see kernel_distance).

    Returns:
        `all`, `same_size`, `floor`, each with fid, kid (mean), kid_sd, and the numbers of images.

    Raises:
        ValueError: for fewer than four real or two synthesized images.
    """
    if len(real) < 4 or len(synthesized) < 2:
        raise ValueError(f"FID: {len(real)} real and {len(synthesized)} synthesized images. Expected 4 and 2 or more.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(real))
    size = min(len(real) // 2, len(synthesized))
    part, rest = real[order[:size]], real[order[size : 2 * size]]
    drawn = synthesized[rng.permutation(len(synthesized))[:size]]

    def compare(one: np.ndarray, two: np.ndarray) -> dict[str, Any]:
        kid, deviation = kernel_distance(one, two, seed=seed, **draws)
        return {"fid": frechet_distance(one, two), "kid": kid, "kid_sd": deviation, "images": [len(one), len(two)]}

    return {"all": compare(real, synthesized), "same_size": compare(part, drawn), "floor": compare(part, rest)}


def segmentor_features(segmentor: Segmentor, images: torch.Tensor) -> torch.Tensor:
    """What the last layer, `conv_seg`, decides from, averaged: (B, 3, H, W) uint8 RGB -> (B, C) float32."""
    kept: list[torch.Tensor] = []
    last = segmentor.head.conv_seg
    hook = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].float().mean(dim=(2, 3))))
    try:
        segmentor.logits(images)
    finally:
        hook.remove()
    return kept[0]


def mobilenet_maps(device: torch.device, stages: Sequence[int]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """Function from images (B, 3, H, W) uint8 to maps of ImageNet's MobileNetV2, (B, C, h, w) float32 each.

    Args:
        device: where it computes.
        stages: of 0..6 (16, 24, 32, 64, 96, 160, 320 channels at 1/2, 1/4, 1/8, 1/16, 1/16, 1/32, 1/32).
    Raises:
        FileNotFoundError: without the package of its weights (see find_imagenet_weights).
    """
    require_mmseg()
    from mmseg.models.backbones import MobileNetV2

    network = MobileNetV2(out_indices=tuple(stages)).to(device)
    load_backbone(network, find_imagenet_weights())
    network.eval()  # mmseg's returns nothing
    mean, deviation = torch.tensor([IMAGENET_MEAN, IMAGENET_DEVIATION], device=device)[..., None, None]

    @torch.no_grad()
    def maps(images: torch.Tensor) -> Sequence[torch.Tensor]:
        found = network((images.to(device) - mean) / deviation)
        return found if isinstance(found, tuple) else (found,)  # mmseg's gives a single one bare

    return maps


def load_extractor(args: argparse.Namespace) -> tuple[str, Extract]:
    """Name of the feature network and the function from uint8 images (B, 3, H, W) to features (B, D)."""
    device = choose_device(args.device)
    if args.segmentor:
        segmentor = segmentor_of(args)
        return f"segmentor {Path(args.segmentor[1]).name}", lambda images: segmentor_features(segmentor, images)
    if not args.vgg:
        maps = mobilenet_maps(device, (6,))
        return "MobileNetV2 (320)", lambda images: maps(images)[0].mean(dim=(2, 3))
    vgg = PerceptualLoss(args.vgg).to(device)
    return "VGG16 relu5_3 (512)", torch.no_grad()(
        lambda images: vgg.features(images.to(device) / 127.5 - 1)[-1].mean(dim=(2, 3)))


def read_features(paths: Sequence[Path], extract: Extract,
                  args: argparse.Namespace) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Features of image files, (N, D) float32, in the order of the files, and the (height, width) that occur."""
    sizes = set()

    def look(images: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(images.shape[-2:]))
        return extract(images).float()

    found = map_images(paths, look, args.batch_size, args.num_threads)
    return np.stack([found[path].numpy() for path in paths]), sorted(sizes)


def real_images(args: argparse.Namespace) -> list[Path]:
    """Images of --real, each once: all of a folder, or those that a manifest names as target."""
    place = Path(args.real)
    if not place.exists():
        raise FileNotFoundError(f"--real: {place} not found. Expected a manifest or a folder of images.")
    if place.is_file():
        rows = read_manifest(place, args.real_root or place.parent, need=("image",), check_files=False)
        return sorted({row.image for row in rows})
    if args.real_root:
        raise UserError(f"--real_root: --real {place} is a folder, whose images are found there. Leave the flag out.")
    found = find_images(place)
    if left_out := found.describe(place):
        logger.warning("%s", left_out)
    if found.problems or not found.files:
        raise UserError("; ".join(found.problems[:5]) or f"--real {place}: no images. Expected some. Check the path.")
    return list(found.files.values())


def measure_distribution(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """FID and KID of a run to real images; returns results and a table."""
    samples, run = read_run(args.run, args.data_root)
    name, extract = load_extractor(args)
    real, real_sizes = read_features(real_images(args), extract, args)
    synthesized, sizes = read_features([sample.image for sample in samples], extract, args)
    results = compare_sets(real, synthesized, args.seed, subsets=args.subsets, subset_size=args.subset_size)
    note = "These are not the published FID and KID: another network. Compare them with each other only."
    results = {"features": name, "columns": real.shape[1], "note": note, **results,
               "sizes": {"real": real_sizes, "synthesized": sizes}, "checkpoint": run.get("settings", {})}
    return results, distribution_table(results)


def distribution_table(results: dict[str, Any]) -> str:
    """Markdown text of distribution."""
    rows = [
        (label, f"{row['images'][0]}, {row['images'][1]}", f"{row['fid']:.3f}",
         f"{1000 * row['kid']:.3f} ({1000 * row['kid_sd']:.3f})")
        for label, row in (("real, synthesized", results["all"]),
                           ("part of the real, as many synthesized", results["same_size"]),
                           ("part of the real, as many other real (floor)", results["floor"]))
    ]  # fmt: skip
    table = markdown_table(["sets", "images", "FID", "KID x 1000 (sd of subsets)"], rows)
    text = f"{table}\nFeatures: {results['features']}. {results['note']}\n"
    smallest = min(results["all"]["images"])
    if smallest < results["columns"]:
        text += f"FID of {smallest} images in {results['columns']} features is far above that of large sets: use KID.\n"
    if results["sizes"]["real"] != results["sizes"]["synthesized"]:
        text += f"Sizes differ ({results['sizes']}): part of the distance is that of resolution.\n"
    return text


def measure_diversity(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Mean LPIPS between samples generated from the same mask and reference; returns results and a table."""
    samples, run = read_run(args.run, args.data_root)
    device = choose_device(args.device)
    lpips = PerceptualLoss(args.vgg).to(device)
    groups: dict[Any, list[Path]] = {}
    for sample in samples:
        groups.setdefault((sample.mask, sample.reference, sample.size), []).append(sample.image)
    means = []
    for paths in (paths for paths in groups.values() if len(paths) > 1):
        found = map_images(paths, lambda images: images, len(paths), 4)
        images = [found[path][None].to(device) / 127.5 - 1 for path in paths]
        with torch.no_grad():
            means.append(float(np.mean([lpips(one, two).item() for one, two in combinations(images, 2)])))
    if not means:
        raise UserError(f"--run {args.run}: one sample a mask and reference. Expected two or more. Generate with "
                        "--num_per_mask 4.")  # fmt: skip
    pairs = sum(len(one) * (len(one) - 1) // 2 for one in groups.values())
    error = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    results = {"metric": "LPIPS (VGG16, version 0.1)", "lpips": float(np.mean(means)),
               "standard_error": error, "groups": len(means), "pairs": pairs, "checkpoint": run.get("settings", {})}
    plus = "" if error is None else f" ± {error:.4f} (standard error over masks)"
    return results, (f"LPIPS diversity {results['lpips']:.4f}{plus}: {pairs} pairs of samples of {len(means)} masks "
                     "with one reference each. 0 = all samples are the same; VGG16, not AlexNet.\n")  # fmt: skip


def appearance(images: torch.Tensor) -> torch.Tensor:
    """What guidance that is too strong gives away: (B, 3, H, W) uint8 RGB -> (B, 3) float32.

    Percent of the values that are 0 or 255, standard deviation of L*, and its mean step between neighbours.
    """
    clipped = ((images == 0) | (images == 255)).float().mean((1, 2, 3))
    level = rgb_to_lab(images)[:, 0]
    step = (level.diff(dim=1).abs().mean((1, 2)) + level.diff(dim=2).abs().mean((1, 2))) / 2
    return torch.stack([100 * clipped, level.flatten(1).std(1, correction=0), step], dim=1)


def measure_appearance(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Contrast and texture of a run and of real images; returns results and a table."""
    samples, run = read_run(args.run, args.data_root)
    device = choose_device(args.device)

    seen: set[tuple[int, ...]] = set()

    def look(images: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(images.shape[-2:]))
        if min(images.shape[-2:]) < 2:
            raise UserError(f"--run, --real: an image of {images.shape[-2]}x{images.shape[-1]} pixels has no texture. "
                            "Expected 2x2 or more.")
        return torch.cat([appearance(images.to(device)), colour_statistics(images.to(device))], dim=1)

    sets = {"synthesized": [sample.image for sample in samples], "real": real_images(args),
            "references": sorted({sample.reference for sample in samples if sample.reference})}  # fmt: skip
    found, sizes = {}, {}
    for name, paths in sets.items():
        if paths:
            seen.clear()
            found[name] = map_images(sorted(set(paths)), look, args.batch_size, args.num_threads)
            sizes[name] = sorted(seen)
    keys = ("clipped", "deviation", "step")
    results: dict[str, Any] = {
        name: {"images": len(values),
               **dict(zip(keys, torch.stack(list(values.values()))[:, :3].mean(0).tolist(), strict=True))}
        for name, values in found.items()
    }  # fmt: skip
    apart = [float((found["synthesized"][sample.image] - found["references"][sample.reference])[3:].norm())
             for sample in samples if sample.reference]  # fmt: skip
    if apart:
        results["synthesized"]["distance_own"] = float(np.mean(apart))
    keys = (*keys, "distance_own")
    table = [(name, one["images"], *(f"{one[key]:.2f}" if key in one else "" for key in keys))
             for name, one in results.items()]  # fmt: skip
    heads = ["", "images", "clipped %", "deviation of L*", "step of L*", "Lab distance to own reference"]
    text = markdown_table(heads, table)
    if len(set(map(str, sizes.values()))) > 1:
        text += f"\nSizes differ ({sizes}): steps of L* are smaller in an image that shows the same ground larger.\n"
    return {**results, "sizes": sizes, "checkpoint": run.get("settings", {})}, text
