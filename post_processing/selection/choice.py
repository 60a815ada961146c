"""Which filtered images are worth training on: the rule, the budget by hardness, the caps. Pure functions."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Candidate:
    """A filtered image.

    Attributes:
        image: the image.
        filtered: its filtered mask.
        mask: the mask that it was generated for; images of one mask form a group.
        area: number of pixels.
        before: (K,) int64, pixels of each class in the mask.
        after: (K,) int64, pixels of each class in the filtered mask.
    """

    image: Path
    filtered: Path
    mask: str
    area: int
    before: np.ndarray
    after: np.ndarray


def shuffled(candidates: Sequence[Candidate], seed: int) -> list[Candidate]:
    """Order that looks random and depends on the seed and each image's name alone, not on what else is there."""

    def place(candidate: Candidate) -> bytes:
        return hashlib.sha256(f"{seed}/{candidate.image.name}".encode()).digest()

    return sorted(candidates, key=place)


def keep_by_rule(candidates: Sequence[Candidate], rare: Sequence[int], min_rare_pixels: int, valid_ratio: float,
                 count_ignored: bool) -> list[Candidate]:
    """Keep images in which a rare class survives, or most of the mask does.

    Args:
        candidates: the images.
        rare: ids of rare classes.
        min_rare_pixels: of one rare class must survive, at least 1.
        valid_ratio: else more than this share of the mask must survive.
        count_ignored: take the share of all pixels; otherwise of those that the mask gives a class.
    Source: TISynth's resample.py, where count_ignored is on and min_rare_pixels is 1.
    """

    def is_kept(candidate: Candidate) -> bool:
        if any(candidate.after[index] >= min_rare_pixels for index in rare):
            return True
        whole = candidate.area if count_ignored else candidate.before.sum()
        return bool(candidate.after.sum() > valid_ratio * whole)

    return [candidate for candidate in candidates if is_kept(candidate)]


def mask_hardness(before: np.ndarray, mean: np.ndarray) -> float:
    """Mean of class losses (K,), weighted by a mask's pixels (K,); NaN losses do not count, and 0 if all are."""
    known = ~np.isnan(mean)
    pixels = before[known].sum()
    return float((before[known] * mean[known]).sum() / pixels) if pixels else 0.0


def keep_by_hardness(candidates: Sequence[Candidate], mean: np.ndarray, seed: int) -> list[Candidate]:
    """Keep more images of harder masks: of the i-th of M masks (i from 1, easiest first) min(1 + round(n i / M), n).

    n is the number of images of one mask, among which `seed` chooses. Source: FreeMask (Yang et al. 2023), section 3.3.
    """
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in shuffled(candidates, seed):
        groups[candidate.mask].append(candidate)
    ordered = sorted(groups, key=lambda mask: (mask_hardness(groups[mask][0].before, mean), mask))
    kept: list[Candidate] = []
    for place, mask in enumerate(ordered, start=1):
        members = groups[mask]
        kept += members[: min(1 + round(len(members) * place / len(ordered)), len(members))]
    return kept


def cap(candidates: Sequence[Candidate], max_per_mask: int | None, max_per_class: int | None,
        seed: int) -> list[Candidate]:
    """Leave out images at random until no mask and no class has too many.

    An image counts for the class that the fewest of the images show, of those that survive in it, so that a common
    class does not cost it a rare one.
    """
    shown = np.sum([candidate.after > 0 for candidate in candidates], axis=0) if candidates else np.zeros(0)
    of_mask: dict[str, int] = defaultdict(int)
    of_class: dict[int, int] = defaultdict(int)
    kept = []
    for candidate in shuffled(candidates, seed):
        present = np.flatnonzero(candidate.after)
        rarest = int(present[np.argmin(shown[present])]) if len(present) else -1
        is_full = max_per_mask is not None and of_mask[candidate.mask] >= max_per_mask
        if is_full or (max_per_class is not None and of_class[rarest] >= max_per_class):
            continue
        of_mask[candidate.mask] += 1
        of_class[rarest] += 1
        kept.append(candidate)
    return kept
