"""Denoisers for tests of samplers."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.path import DiscretePath, Level
from ldm.sampling.guidance import make_denoiser

MEAN, DEVIATION = 1.5, 0.4
STABLE, LINEAR = DiscretePath(), DiscretePath(kind="linear", start=1e-4, end=0.02)


def of_time(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Level], Tensor]:
    """`predict(x, level)` of a function of x and timesteps (B,)."""
    return lambda x, level: function(x, torch.full((len(x),), level.time))


def wavy(latent: Tensor, timestep: Tensor) -> Tensor:
    """No model of anything, but smooth and never the same at two timesteps."""
    return torch.tanh(latent) * torch.cos(timestep.reshape(-1, 1, 1, 1) / 300)


def wavy_denoiser(kind: str = "epsilon") -> Callable[[Tensor, Level], Tensor]:
    """What samplers take, of `wavy` as a prediction of this kind."""
    return make_denoiser(of_time(wavy), kind)


def gaussian_denoiser(deviation: float = DEVIATION) -> Callable[[Tensor, Level], Tensor]:
    """Exact clean latent on any path when the data are N(MEAN, deviation^2)."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        gain = level.signal * deviation**2 / ((level.signal * deviation) ** 2 + level.noise**2)
        return MEAN + gain * (x - level.signal * MEAN)

    return denoise


def flow_of_gaussian(noise: Tensor, first: Level, last: Level) -> Tensor:
    """Where the probability flow of these data takes noise from one level to another."""
    spread = [((level.signal * DEVIATION) ** 2 + level.noise**2) ** 0.5 for level in (first, last)]
    return last.signal * MEAN + (noise - first.signal * MEAN) * spread[1] / spread[0]
