"""Ancestral sampling: the random walk back of DDPM, over any of the timesteps, with fixed or learned variance."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.schedule import Schedule, learned_log_variance, respace, to_x0
from ldm.sampling.ddim import check_timesteps
from ldm.sampling.guidance import Denoise


def ddpm_sample(
    denoise: Denoise,
    noise: Tensor,
    timesteps: Sequence[int],
    schedule: Schedule,
    prediction_type: str = "epsilon",
    draw: Callable[[Sequence[int]], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk from noise to a clean latent with fresh noise in every step but the last.

    Args:
        denoise: `denoise(latent (B, C, h, w), timestep (B,) int64 on the CPU)`; returns (B, C, h, w), the steps then
            have the posterior's variance, or (B, 2C, h, w) with the learned variance behind (see learned_log_variance).
        noise: standard normal to start from, (B, C, h, w) float32.
        timesteps: ascending, from spaced_timesteps; the schedule is respaced to them exactly.
        schedule: the forward process the network was trained on.
        prediction_type: what the first C channels are: `epsilon`, `x0` or `v`.
        draw: gives fresh noise (B, C, h, w) for the shape (C, h, w), as SampleNoise does.
        progress: show a bar over the steps.

    Returns:
        Latent, (B, C, h, w) float32.

    Raises:
        ValueError: if timesteps are empty, unordered or out of range, or draw is missing.
    Source: Ho et al. 2020, Algorithm 2; Nichol and Dhariwal 2021, section 4 (respacing).
    """
    check_timesteps("ddpm_sample", timesteps, schedule, "clean")
    if draw is None:
        raise ValueError("ddpm_sample: draw is missing. Expected a source of fresh noise per sample. Pass "
                         "SampleNoise(seeds, device), or choose a solver without noise such as ddim.")
    steps = respace(schedule, timesteps)
    latent = noise.float()
    for index in tqdm(range(len(timesteps) - 1, -1, -1), desc="DDPM", leave=False, disable=not progress):
        timestep = torch.full((len(latent),), timesteps[index], dtype=torch.int64)
        position = torch.full_like(timestep, index)
        prediction, values = denoise(latent, timestep).float().tensor_split([latent.shape[1]], dim=1)
        clean = to_x0(prediction, latent, timestep, schedule, prediction_type)
        near = steps.gather("posterior_mean_coef1", position, latent)
        far = steps.gather("posterior_mean_coef2", position, latent)
        log_variance = (learned_log_variance(values, position, steps) if values.shape[1]
                        else steps.gather("posterior_log_variance_clipped", position, latent))
        latent = near * clean + far * latent
        if index:
            latent = latent + (0.5 * log_variance).exp() * draw(latent.shape[1:])
    return latent
