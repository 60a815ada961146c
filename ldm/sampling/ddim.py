"""DDIM sampling as a function of a denoiser; eta = 1 gives the random steps of DDPM."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.schedule import Schedule, to_epsilon, to_x0
from ldm.sampling.guidance import Denoise


def ddim_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Choose equally spaced timesteps.

    Args:
        num_steps: how many, from 1 to num_timesteps - 1.
        num_timesteps: T of the schedule.

    Returns:
        Exactly num_steps timesteps, ascending, the first always 1: 1, 21, ..., 981 for 50 of 1000.

    Raises:
        ValueError: if there cannot be so many.
    """
    if not 1 <= num_steps < num_timesteps:
        raise ValueError(
            f"ddim_timesteps: {num_steps} steps are not possible. Expected 1 to {num_timesteps - 1} for a schedule of"
            f" {num_timesteps} timesteps. 50 is a good choice."
        )
    return [index * num_timesteps // num_steps + 1 for index in range(num_steps)]


def ddim_sample(
    denoise: Denoise,
    noise: Tensor,
    timesteps: Sequence[int],
    schedule: Schedule,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    draw: Callable[[Sequence[int]], Tensor] | None = None,
    progress: bool = False,
    end: str = "first",
) -> Tensor:
    """Walk from noise to a latent.

    By default the walk ends at the variance of timestep 0, not at zero, as latent diffusion has always done it.

    Args:
        denoise: `denoise(latent (B, C, h, w), timestep (B,) int64 on the CPU) -> prediction (B, C, h, w)`.
        noise: standard normal to start from, (B, C, h, w) float32.
        timesteps: ascending, from ddim_timesteps; 0 only with end `clean`.
        schedule: the forward process the network was trained on.
        eta: share of fresh noise in each step, [0, 1]: 0 is deterministic, 1 has the variance of DDPM.
        prediction_type: what denoise returns: `epsilon`, `x0` or `v`.
        draw: gives fresh noise (B, C, h, w) for the shape (C, h, w), as SampleNoise does; needed if eta > 0.
        progress: show a bar over the steps.
        end: `first` or `clean`, which walks to zero noise.

    Returns:
        Latent, (B, C, h, w) float32.

    Raises:
        ValueError: if timesteps are empty, unordered or out of range, eta is outside [0, 1], or draw is missing.
    Source: Song et al. 2021 (DDIM), Eq. 12 and 16.
    """
    _check_arguments(timesteps, schedule, eta, draw, end)
    alphas = schedule.alphas_cumprod[list(timesteps)]
    previous = [1.0 if end == "clean" else schedule.alphas_cumprod[0], *alphas[:-1]]
    latent = noise.float()
    for index in tqdm(range(len(timesteps) - 1, -1, -1), desc="DDIM", leave=False, disable=not progress):
        alpha, alpha_prev = float(alphas[index]), float(previous[index])
        # On the CPU, so that guidance can look at it without waiting for the GPU.
        timestep = torch.full((len(latent),), timesteps[index], dtype=torch.int64)
        # Under autocast the network may answer in 16 bits; the walk itself needs 32.
        prediction = denoise(latent, timestep).float()
        epsilon = to_epsilon(prediction, latent, timestep, schedule, prediction_type)
        clean = to_x0(prediction, latent, timestep, schedule, prediction_type)
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)) ** 0.5
        latent = alpha_prev**0.5 * clean + (1 - alpha_prev - sigma**2) ** 0.5 * epsilon
        if draw is not None and sigma > 0:
            latent = latent + sigma * draw(latent.shape[1:])
    return latent


def check_timesteps(where: str, timesteps: Sequence[int], schedule: Schedule, end: str) -> None:
    """ValueError unless a sampler can walk these timesteps; from 0 only if it ends beyond that, at zero noise."""
    least = 0 if end == "clean" else 1
    ordered = all(first < second for first, second in zip(timesteps, timesteps[1:], strict=False))
    if not timesteps or not ordered or timesteps[0] < least or timesteps[-1] >= schedule.num_timesteps:
        raise ValueError(
            f"{where}: timesteps {list(timesteps)} cannot be walked. Expected ascending values in"
            f" [{least}, {schedule.num_timesteps}). Use spaced_timesteps."
        )


def _check_arguments(timesteps: Sequence[int], schedule: Schedule, eta: float, draw: object, end: str) -> None:
    check_timesteps("ddim_sample", timesteps, schedule, end)
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim_sample: eta is {eta}. Expected a value in [0, 1]. 0 is deterministic.")
    if eta > 0 and draw is None:
        raise ValueError(
            f"ddim_sample: eta is {eta} but draw is missing. Expected a source of fresh noise per sample."
            " Pass SampleNoise(seeds, device)."
        )
