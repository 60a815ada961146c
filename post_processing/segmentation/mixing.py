"""Training sets made of others: real and synthesized pairs drawn at a ratio, and pairs mixed from two tiles."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ldm.data.classes import IGNORE_INDEX
from post_processing.segmentation.dataset import note_origin

# mmengine imports these classes by their dotted paths.
JOINT_DATASET = "post_processing.segmentation.mixing.JointSegDataset"
RATIO_SAMPLER = "post_processing.segmentation.mixing.RatioSampler"
MIX_DATASET = "post_processing.segmentation.mixing.MixSegDataset"
MIXED_SHARE = 0.5  # of the pairs
MIXES = ("copy_paste", "cutmix")


class JointSegDataset(torch.utils.data.ConcatDataset):
    """Two datasets, real pairs and synthesized pairs, one behind the other; RatioSampler draws from it."""

    def __init__(self, datasets: Sequence[Mapping[str, Any]]) -> None:
        """Build both from their config nodes, real first; ValueError if they are not two with the same classes."""
        from mmengine.registry import DATASETS

        super().__init__([DATASETS.build(dict(node)) for node in datasets])
        classes = [part.metainfo["classes"] for part in self.datasets]
        if len(classes) != 2 or classes[0] != classes[1]:
            raise ValueError(f"joint dataset: {len(classes)} parts with classes {classes}. Expected two, real and "
                             "synthetic, of one class table.")

    @property
    def metainfo(self) -> dict[str, Any]:
        """Class names and colours, as mmengine stores them in checkpoints."""
        return self.datasets[0].metainfo


class RatioSampler(torch.utils.data.Sampler):
    """Endless draws from a JointSegDataset at a fixed ratio, whatever the sizes of the two parts.

    The two kinds alternate evenly, so that every batch has its share to within one image; each part is shuffled
    anew whenever it is used up. Every process of a distributed training draws at the ratio, from its own images.
    """

    def __init__(self, dataset: JointSegDataset, ratio: float, seed: int | None = None) -> None:
        """Prepare the draws.

        Args:
            dataset: real and synthesized pairs.
            ratio: synthesized images drawn for each real one, above 0.
            seed: of the shuffling; None = one that mmengine agrees on between the processes.
        Raises:
            ValueError: if the ratio is not above 0.
        """
        from mmengine.dist import get_dist_info, sync_random_seed

        if not 0 < ratio < float("inf"):
            raise ValueError(f"ratio: {ratio}. Expected synthesized images for each real one, above 0.")
        exact = Fraction(ratio).limit_denominator(1000)
        self.share = exact / (1 + exact)
        self.sizes = [len(part) for part in dataset.datasets]
        self.seed = sync_random_seed() if seed is None else seed
        self.rank, self.world_size = get_dist_info()

    def __len__(self) -> int:
        """Pairs of both parts; the draws are endless."""
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        """Yield indices into the dataset without end."""
        real, synthetic = self.draw(0), self.draw(1)
        for place in itertools.count():
            is_synthetic = (place + 1) * self.share // 1 > place * self.share // 1
            yield next(synthetic if is_synthetic else real)

    def draw(self, part: int) -> Iterator[int]:
        """Yield the indices that this process draws from one part, shuffled, without end."""
        generator = torch.Generator().manual_seed(2 * self.seed + part)
        rounds = (torch.randperm(self.sizes[part], generator=generator) for _ in itertools.count())
        start = sum(self.sizes[:part])
        own = itertools.islice(itertools.chain.from_iterable(rounds), self.rank, None, self.world_size)
        return (start + int(index) for index in own)


class MixSegDataset(torch.utils.data.Dataset):
    """Pairs of which a part of the pixels, image and mask alike, comes from a second pair of the same dataset.

    Draws come from numpy's global generator, as those of mmseg's transforms do: the training's seed decides.

    Source: Ghiasi et al. 2021 (copy-paste), in the form of Olsson et al. 2021 for masks without instances: half of the
    classes of the second tile are pasted; Yun et al. 2019 (CutMix): a box is pasted, its area share uniform in [0, 1].
    """

    def __init__(self, dataset: Mapping[str, Any], kind: str, pipeline: Sequence[Mapping[str, Any]]) -> None:
        """Build the dataset to mix.

        Args:
            dataset: config node whose pipeline ends before PackSegInputs.
            kind: `copy_paste` or `cutmix`.
            pipeline: transforms after mixing, usually PackSegInputs alone.
        Raises:
            ValueError: for another kind.
        """
        from mmengine.dataset import Compose
        from mmengine.registry import DATASETS

        if kind not in MIXES:
            raise ValueError(f"mixing: {kind!r} is unknown. Expected one of {', '.join(MIXES)}.")
        self.dataset = DATASETS.build(dict(dataset))
        self.kind, self.pipeline = kind, Compose(list(pipeline))

    @property
    def metainfo(self) -> dict[str, Any]:
        """Class names and colours, as mmengine stores them in checkpoints."""
        return self.dataset.metainfo

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load one pair, mix another one into it, and run the rest of the pipeline."""
        pair = self.dataset[index]
        if np.random.rand() < MIXED_SHARE:
            paste(pair, self.dataset[np.random.randint(len(self.dataset))], self.kind)
        return note_origin(self.pipeline(pair), pair.get("is_synthetic", False))


def paste(pair: dict[str, Any], other: Mapping[str, Any], kind: str) -> None:
    """Replace pixels of `img` (h, w, 3) and `gt_seg_map` (h, w) in place by those of another pair, at equal places.

    Where the two differ in size, the upper left part that they share takes part.
    """
    height, width = np.minimum(pair["gt_seg_map"].shape, other["gt_seg_map"].shape)
    mask = other["gt_seg_map"][:height, :width]
    chosen = choose_classes(mask) if kind == "copy_paste" else choose_box(height, width)
    for key in ("img", "gt_seg_map"):
        pair[key] = pair[key].copy()
        pair[key][:height, :width][chosen] = other[key][:height, :width][chosen]


def choose_classes(mask: np.ndarray) -> np.ndarray:
    """Pixels of a random half (rounded up) of the classes in a mask, (h, w) bool; ignored pixels never."""
    present = np.unique(mask[mask != IGNORE_INDEX])
    return np.isin(mask, np.random.choice(present, (len(present) + 1) // 2, replace=False) if len(present) else [])


def choose_box(height: int, width: int, random: Any = np.random) -> np.ndarray:
    """Pixels of a random box of the image's proportions, (h, w) bool; drawn by numpy's global state or another."""
    side = random.rand() ** 0.5
    box = round(height * side), round(width * side)
    top, left = random.randint(height - box[0] + 1), random.randint(width - box[1] + 1)
    chosen = np.zeros((height, width), bool)
    chosen[top : top + box[0], left : left + box[1]] = True
    return chosen
