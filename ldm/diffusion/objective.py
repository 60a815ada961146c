"""What the network is trained to predict, and how much each timestep counts."""
import math

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule, learned_log_variance, to_x0, velocity

BIN = 1 / 255  # half the width of an 8-bit level in images of [-1, 1]


def training_target(latent: Tensor, noise: Tensor, timestep: Tensor, schedule: Schedule,
                    prediction_type: str) -> Tensor:
    """Target of the squared error.

    Args:
        latent, noise: (B, C, h, w).
        timestep: (B,) int64.
        schedule: the forward process.
        prediction_type: `epsilon`, `v` or `x0`.
    Returns:
        (B, C, h, w).
    Raises:
        ValueError: for another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "x0":
        return latent
    if prediction_type == "v":
        return velocity(latent, noise, timestep, schedule)
    raise ValueError(f"prediction_type: {prediction_type!r} is unknown. Expected epsilon, v or x0.")


def loss_weight(timestep: Tensor, schedule: Schedule, prediction_type: str, min_snr_gamma: float | None) -> Tensor:
    """Weight of each sample's squared error.

    Args:
        timestep: (B,) int64.
        schedule: the forward process.
        prediction_type: `epsilon`, `v` or `x0`.
        min_snr_gamma: None = all weights are 1.
    Returns:
        (B,) float32: min(snr, gamma) expressed for the predicted quantity, where snr = abar / (1 - abar).
    Source: Hang et al. 2023 (min-SNR), Eq. 11 and its v-prediction form.
    """
    if min_snr_gamma is None:
        return torch.ones(timestep.shape, device=timestep.device)
    signal = schedule.gather("alphas_cumprod", timestep, timestep)
    snr = signal / (1.0 - signal)
    clamped = snr.clamp(max=min_snr_gamma)
    return clamped / {"epsilon": snr, "v": snr + 1.0, "x0": torch.ones_like(snr)}[prediction_type]


def variational_bound(epsilon: Tensor, values: Tensor, image: Tensor, noisy: Tensor, timestep: Tensor,
                      schedule: Schedule) -> Tensor:
    """One term of the variational bound, which teaches a network the variance of its steps.

    Args:
        epsilon: predicted noise, (B, C, H, W); gradients do not reach it from here.
        values: the network's outputs for the variance, same shape (see learned_log_variance).
        image: clean, same shape, float32 in [-1, 1] with 8-bit levels.
        noisy: the image at the timestep.
        timestep: (B,) int64.
        schedule: the forward process.
    Returns:
        (B,) in bits per dimension: the KL divergence from the true step back, or at timestep 0 the negative log
        likelihood of the image's levels.
    Source: Nichol and Dhariwal 2021, Eq. 4-7 and 16; Ho et al. 2020, Eq. 13.
    """
    near = schedule.gather("posterior_mean_coef1", timestep, image)
    far = schedule.gather("posterior_mean_coef2", timestep, image)
    mean = near * to_x0(epsilon.detach(), noisy, timestep, schedule, "epsilon") + far * noisy
    log_variance = learned_log_variance(values, timestep, schedule)
    true_mean = near * image + far * noisy
    true_log_variance = schedule.gather("log_least_variance", timestep, image)
    divergence = 0.5 * (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp()
                        + (true_mean - mean).square() * (-log_variance).exp())
    bits = torch.where((timestep == 0).reshape(-1, 1, 1, 1), level_surprise(image, mean, log_variance), divergence)
    return bits.flatten(1).mean(1) / math.log(2)


def level_surprise(image: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log likelihood (nats) of 8-bit levels under normals whose mass is summed within each level's bin.

    Args:
        image: in [-1, 1] with 8-bit levels; the outermost bins reach to infinity.
        mean, log_variance: of the normals, same shape.
    Returns:
        Same shape.
    """
    scale = (-0.5 * log_variance).exp()
    upper, lower = (image - mean + BIN) * scale, (image - mean - BIN) * scale
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
    ends = torch.where(image < -0.999, torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower))
    return -torch.where(image.abs() > 0.999, ends, inside)
