"""What the network is trained to predict, and how much each timestep counts."""
import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule, velocity


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
