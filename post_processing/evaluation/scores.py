"""How well synthesized images follow their masks and their references, as numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ldm.data.images import Pair
from ldm.util import UserError
from post_processing.segmentation.loading import load_batches, predict_batches
from post_processing.segmentation.segmentor import Segmentor

SRGB_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
WHITE_D65 = (0.95047, 1.0, 1.08883)


def class_areas(prediction: torch.Tensor, mask: torch.Tensor, num_classes: int, ignore_index: int = 255) -> np.ndarray:
    """Right, predicted and true pixels of each class in every image: twice (B, H, W) integer -> (B, 3, K) float64.

    Pixels where the mask is ignore_index do not count.
    """
    mask, prediction = mask.to(prediction.device).long(), prediction.long()
    counted = mask != ignore_index
    offset = torch.arange(len(mask), device=mask.device)[:, None, None] * num_classes

    def count(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.bincount((ids + offset)[where], minlength=len(mask) * num_classes).reshape(-1, num_classes)

    areas = [count(mask, counted & (prediction == mask)), count(prediction, counted), count(mask, counted)]
    return torch.stack(areas, dim=1).double().cpu().numpy()


def iou_of(areas: np.ndarray) -> np.ndarray:
    """IoU in percent of summed areas: (..., 3, K) -> (..., K); NaN for a class that no mask has."""
    right, predicted, true = np.moveaxis(areas, -2, 0)
    return 100 * np.divide(right, predicted + true - right, out=np.full_like(true, np.nan), where=true > 0)


def mean_iou(areas: np.ndarray) -> np.ndarray:
    """Mean of the IoUs over the classes of the masks, the same ones on both sides of a pair: (..., 3, K) -> (...)."""
    return np.nanmean(iou_of(areas), axis=-1)


class SegmentationScore:
    """IoU, accuracy and their means over batches, as mmseg's IoUMetric takes them.

    Example: `score.add(prediction, mask)` for every batch, then `score.result()`.
    """

    def __init__(self, class_names: Sequence[str], ignore_index: int = 255) -> None:
        """Start with nothing counted."""
        self.class_names = list(class_names)
        self.ignore_index = ignore_index
        self.areas = np.zeros((3, len(self.class_names)))

    def add(self, prediction: torch.Tensor, mask: torch.Tensor) -> None:
        """Count a batch of class ids, both (B, H, W) integer; ValueError if the shapes differ."""
        if prediction.shape != mask.shape:
            raise ValueError(f"score: prediction {tuple(prediction.shape)}, mask {tuple(mask.shape)}. Expected equal "
                             "shapes.")
        self.areas += class_areas(prediction, mask, len(self.class_names), self.ignore_index).sum(axis=0)

    def result(self) -> dict[str, Any]:
        """All numbers in percent.

        Returns:
            aAcc (share of right pixels), mIoU and mAcc (means over the classes, as mmseg takes them: a class that
            neither the masks nor the predictions contain is left out), IoU and Acc (class name -> value or None),
            pixels (counted ones).
        Raises:
            ValueError: if no pixel was counted.
        """
        right, predicted, true = self.areas
        if not true.sum():
            raise ValueError("score: no pixel has a class (all are ignored, or nothing was given). Check the masks.")
        shares = {
            key: np.divide(100 * right, whole, out=np.full_like(right, np.nan), where=whole > 0)
            for key, whole in (("IoU", predicted + true - right), ("Acc", true))
        }
        per_class = {
            key: {name: None if np.isnan(value) else round(float(value), 2)
                  for name, value in zip(self.class_names, values, strict=True)}
            for key, values in shares.items()
        }  # fmt: skip
        return {
            "aAcc": round(float(100 * right.sum() / true.sum()), 2),
            **{f"m{key}": round(float(np.nanmean(values)), 2) for key, values in shares.items()},
            **per_class,
            "pixels": int(true.sum()),
        }


def score_pairs(segmentor: Segmentor, pairs: Sequence[Pair], batch_size: int, workers: int) -> dict[str, Any]:
    """Score a segmentor on real pairs (see SegmentationScore.result); UserError naming those that cannot be read.

    Masks are read with the segmentor's class table and brought to the size of their images.
    """
    table, problems = segmentor.class_table, []
    score = SegmentationScore(table.names, table.ignore_index)
    batches = load_batches(pairs, table, batch_size, workers, lambda _, error: problems.append(str(error)),
                           is_resized=True)  # fmt: skip
    for _, prediction, masks in predict_batches(segmentor, batches):
        score.add(prediction, masks)
    if problems:
        raise UserError(f"{len(problems)} of {len(pairs)} real pairs cannot be used: {'; '.join(problems[:5])}")
    return score.result()


def derange(groups: Sequence[Any], seed: int) -> list[int]:
    """Permute so that nothing stays in place and everything moves within its group.

    Args:
        groups: one hashable value per item (the size of a mask); items swap only with items of the same value.
        seed: of the permutation.
    Returns:
        For each item the index of the item that takes its place.
    Raises:
        ValueError: if a group has one item, which cannot move.
    """
    generator = np.random.default_rng(seed)
    result = [0] * len(groups)
    members: dict[Any, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    for group, indices in members.items():
        if len(indices) < 2:
            raise ValueError(f"shuffled masks: only one mask of size {group}. Expected two or more different masks a "
                             "size.")
        order = np.arange(len(indices))
        for last in range(len(order) - 1, 0, -1):  # Sattolo: swapping only with earlier places gives one long cycle
            other = int(generator.integers(0, last))
            order[last], order[other] = order[other], order[last]
        for place, taken in zip(indices, order, strict=True):
            result[place] = indices[taken]
    return result


def position(value: float, floor: float, ceiling: float) -> float | None:
    """Where a value lies between floor (0) and ceiling (100), in percent; None if the ceiling is not above it."""
    return round(100 * (value - floor) / (ceiling - floor), 2) if ceiling > floor else None


def rgb_to_lab(images: torch.Tensor) -> torch.Tensor:
    """Convert sRGB to CIE L*a*b* (white D65), where distances are about as large as they look.

    (B, 3, H, W) uint8 -> float32: L* in [0, 100], a* and b* about [-110, 110]. IEC 61966-2-1 (sRGB), CIE 15 (L*a*b*).
    """
    value = images.float() / 255
    linear = torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(SRGB_TO_XYZ, device=images.device)
    white = torch.tensor(WHITE_D65, device=images.device).view(1, 3, 1, 1)
    ratio = torch.einsum("ij,bjhw->bihw", matrix, linear) / white
    x, y, z = torch.where(
        ratio > (6 / 29) ** 3, ratio.clamp(min=1e-9) ** (1 / 3), ratio * (29 / 6) ** 2 / 3 + 4 / 29
    ).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: torch.Tensor) -> torch.Tensor:
    """The way back of rgb_to_lab: (B, 3, H, W) float32 -> uint8, clipped to what sRGB has."""
    level = (lab[:, 0] + 16) / 116
    ratio = torch.stack([level + lab[:, 1] / 500, level, level - lab[:, 2] / 200], dim=1)
    ratio = torch.where(ratio > 6 / 29, ratio**3, (ratio - 4 / 29) * 3 * (6 / 29) ** 2)
    matrix = torch.linalg.inv(torch.tensor(SRGB_TO_XYZ, dtype=torch.float64)).float().to(lab.device)
    white = torch.tensor(WHITE_D65, device=lab.device).view(1, 3, 1, 1)
    linear = torch.einsum("ij,bjhw->bihw", matrix, ratio * white).clamp(0, 1)
    value = torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (value * 255).round().to(torch.uint8)


def colour_statistics(images: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of L*, a* and b* over an image: (B, 3, H, W) uint8 RGB -> (B, 6) float32."""
    lab = rgb_to_lab(images).flatten(2)
    return torch.cat([lab.mean(dim=2), lab.std(dim=2, correction=0)], dim=1)


def compare_references(result: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    """Is each result nearer in its statistics to its own reference than to the other one?

    Args:
        result, own, other: statistics (N, D) of synthesized images, of their references, and of references of the other
            set.
    Returns:
        pairs (N), nearer (count), share (percent; a tie is not nearer), distance_own, distance_other and
        distance_references (means of the Euclidean distances; the last is between the two references).
    """
    to_own = (result - own).norm(dim=1)
    to_other = (result - other).norm(dim=1)
    nearer = int((to_own < to_other).sum())
    return {
        "pairs": len(result),
        "nearer": nearer,
        "share": round(100 * nearer / max(1, len(result)), 2),
        "distance_own": round(float(to_own.mean()), 3),
        "distance_other": round(float(to_other.mean()), 3),
        "distance_references": round(float((own - other).norm(dim=1).mean()), 3),
    }
