"""Does a faster way of sampling follow the masks as well as the exact one? Paired, with a bootstrap interval."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch


def class_areas(prediction: torch.Tensor, mask: torch.Tensor, num_classes: int, ignore_index: int = 255) -> np.ndarray:
    """Pixels of each class in every image, as needed for its IoU.

    Args:
        prediction: class ids, (B, H, W) integer.
        mask: true class ids, (B, H, W) integer; ignore_index where there is none.
        num_classes: K.
        ignore_index: marks pixels that do not count.

    Returns:
        (B, 3, K) float64: right pixels, predicted pixels, true pixels.
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


def paired_drops(
    exact: np.ndarray, other: np.ndarray, groups: Sequence[Hashable], draws: int = 2000, seed: int = 0
) -> dict[str, np.ndarray]:
    """How much lower the IoUs of other pictures of the same masks and noise are.

    The bootstrap draws groups (all pictures of one mask) with replacement, for both sides the same ones, so that what
    makes a mask easy or hard cancels out.

    Args:
        exact, other: class_areas of the pairs, (N, 3, K).
        groups: group of each pair; those of a group are not independent.
        draws: number of bootstrap draws.
        seed: seed of the draws.

    Returns:
        `mIoU` (3,) and `IoU` (K, 3): drop in points, lower and upper end of its 95 % interval; NaN for classes that no
        mask has.

    Raises:
        ValueError: if there are fewer than two groups.
    Source: Efron and Tibshirani 1993, chapter 13 (percentile interval).
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    if len(names) < 2:
        raise ValueError("consistency: all pictures have one mask. Expected two or more, to tell drop from chance.")
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


def judge(
    exact: np.ndarray, other: np.ndarray, groups: Sequence[Hashable], class_names: Sequence[str],
    max_drop: float, rare: int, max_rare_drop: float, draws: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
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
