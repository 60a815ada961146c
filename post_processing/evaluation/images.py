"""Distances between sets of images in the features of a network (FID, KID), and how different samples of a mask are.

Features are (N, D) arrays, one row an image; which network they are from decides about the numbers. Only those of the
Inception network on the same real images may be held against published ones.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from post_processing.segmentation.backbone import find_imagenet_weights, load_imagenet_backbone
from post_processing.segmentation.segmentor import Segmentor, require_mmseg

# Of ImageNet's pixels 0..255 by channel, RGB, as torchvision's weights were trained.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_DEVIATION = (58.395, 57.12, 57.375)


def frechet_distance(features: np.ndarray, other: np.ndarray) -> float:
    """Distance of the Gaussians that have the means and covariances of two sets of features.

    The trace of the root of the product of both covariances is the sum of the singular values of A B^T, when they are
    A^T A and B^T B; so no root of a matrix, which is inexact for singular ones, has to be taken.

    Args:
        features, other: (N, D) and (M, D), N and M at least 2. With fewer rows than columns the distance is still
            defined, but far above that of large sets.

    Returns:
        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), 0 or more.

    Raises:
        ValueError: for sets of fewer than two rows.
    Source: Heusel et al. 2017, Eq. 6.
    """
    if min(len(features), len(other)) < 2:
        raise ValueError(f"FID: sets of {len(features)} and {len(other)} images. Expected two or more in each.")

    def factor(rows: np.ndarray) -> np.ndarray:
        centred = (rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1)
        return np.linalg.qr(centred, mode="r") if len(rows) > rows.shape[1] else centred

    features, other = features.astype(np.float64), other.astype(np.float64)
    one, two = factor(features), factor(other)
    root = np.linalg.svd(one @ two.T, compute_uv=False).sum()
    means = np.square(features.mean(axis=0) - other.mean(axis=0)).sum()
    return float(max(means + np.square(one).sum() + np.square(two).sum() - 2 * root, 0.0))


def squared_discrepancy(features: np.ndarray, other: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy with the kernel (x y / D + 1)^3; may be below 0.

    Args:
        features, other: (N, D) and (M, D).
    Source: Gretton et al. 2012, Eq. 3; Binkowski et al. 2018.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_of_pairs(rows: np.ndarray) -> float:
        values = kernel(rows, rows)
        return (values.sum() - np.trace(values)) / (len(rows) * (len(rows) - 1))

    features, other = features.astype(np.float64), other.astype(np.float64)
    return float(mean_of_pairs(features) + mean_of_pairs(other) - 2 * kernel(features, other).mean())


def kernel_distance(
    features: np.ndarray, other: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: mean and standard deviation of squared_discrepancy over random subsets of both sets.

    Args:
        features, other: (N, D) and (M, D).
        subsets: number of draws.
        subset_size: rows drawn from each set without replacement; at most half of the smaller set, for draws of all
            of its rows would have no spread.
        seed: seed of the draws.

    Raises:
        ValueError: for sets of fewer than two rows.
    """
    smaller = min(len(features), len(other))
    if smaller < 2:
        raise ValueError(f"KID: a set of {smaller} images. Expected two or more.")
    size = min(subset_size, max(smaller // 2, 2))
    rng = np.random.default_rng(seed)
    values = [
        squared_discrepancy(*(rows[rng.choice(len(rows), size, replace=False)] for rows in (features, other)))
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def compare_sets(real: np.ndarray, synthesized: np.ndarray, seed: int = 0, **draws: int) -> dict[str, Any]:
    """FID and KID between real and synthesized images, with the distance of two halves of the real ones as floor.

    FID grows as sets get smaller, so the floor has a partner at its own size: a part of the real images against as many
    synthesized ones, and against as many other real ones.

    Args:
        real, synthesized: features, (N, D) and (M, D).
        seed: seed of the parts and the draws.
        draws: subsets and subset_size, see kernel_distance.

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
    """What the last layer of a segmentor decides from, averaged over the image.

    Args:
        segmentor: the segmentor; its (last) head ends in mmseg's `conv_seg`.
        images: (B, 3, H, W) uint8 RGB.

    Returns:
        (B, C) float32.
    """
    head = segmentor.model.decode_head
    head = head[-1] if isinstance(head, torch.nn.ModuleList) else head
    kept: list[torch.Tensor] = []
    hook = head.conv_seg.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].float().mean(dim=(2, 3))))
    try:
        segmentor.logits(images)
    finally:
        hook.remove()
    return kept[0]


def load_mobilenet() -> torch.nn.Module:
    """MobileNetV2 with ImageNet's weights from the installed package, in evaluation mode.

    Raises:
        FileNotFoundError: if the package of the weights is not installed.
        UserError: if MMSegmentation is not.
    """
    require_mmseg()
    from mmseg.models.backbones import MobileNetV2

    network = MobileNetV2(out_indices=(6,))
    load_imagenet_backbone(network, find_imagenet_weights())
    network.eval()  # mmseg's returns nothing
    return network


@torch.no_grad()
def mobilenet_features(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Last stage of MobileNetV2, averaged over the image.

    Args:
        network: from load_mobilenet.
        images: (B, 3, H, W) uint8 RGB on its device.

    Returns:
        (B, 320) float32.
    """
    mean, deviation = images.new_tensor([IMAGENET_MEAN, IMAGENET_DEVIATION], dtype=torch.float32)[..., None, None]
    return network((images - mean) / deviation).mean(dim=(2, 3))


def mean_pair_distances(
    groups: Mapping[Hashable, Sequence[int]],
    load: Callable[[Sequence[int]], torch.Tensor],
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> dict[Hashable, float]:
    """Mean distance over all pairs of samples in each group of two or more; the others are left out.

    Args:
        groups: group -> numbers of its samples.
        load: numbers of samples -> images (B, 3, H, W) in [-1, 1].
        distance: two batches of images -> (B,).
    """
    means = {}
    for group, members in groups.items():
        if len(members) > 1:
            images = load(members)
            pairs = combinations(range(len(members)), 2)
            values = [distance(images[a : a + 1], images[b : b + 1]).item() for a, b in pairs]
            means[group] = float(np.mean(values))
    return means
