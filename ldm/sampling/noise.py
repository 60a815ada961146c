"""Noise that belongs to a sample: the same whatever the batch, the shard, the restart or the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

COPY_STRIDE = 10_000_000


def sample_seed(seed: int, row: int, copy: int) -> int:
    """Number that seeds one sample of a run, and stands in its file name (`{stem}_seed_{number}`).

    It is different for every (row, copy) of a run, both counted from 0; ValueError for a negative number, a row that is
    too large, or a sum beyond 63 bits.
    """
    number = seed + row + copy * COPY_STRIDE
    if seed < 0 or copy < 0 or not 0 <= row < COPY_STRIDE or number >= 2**63:
        raise ValueError(
            f"sample_seed: seed {seed}, row {row}, copy {copy} is not possible. Expected seed and copy of at least 0, "
            f"row below {COPY_STRIDE} and a sum below 2**63. Choose a smaller --seed or split the manifest.")
    return number


class SampleNoise:
    """One random stream per sample; the first draw is the sampler's start, later draws serve its random steps.

    Numbers are drawn on the CPU, so that every device starts from the same ones.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next noise of every sample, for the shape (C, h, w): standard normal, (B, C, h, w) float32."""
        draws = [torch.randn(tuple(shape), generator=generator) for generator in self.generators]
        return torch.stack(draws).to(self.device)


def sample_noise(shape: Sequence[int], seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The noise that a sampler starts from: the first draw of SampleNoise, (B, C, h, w) float32."""
    return SampleNoise(seeds, device)(shape)
