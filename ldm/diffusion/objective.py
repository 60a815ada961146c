"""How much each time counts in training, and the bound that teaches a network the variance of its steps."""
import math

import torch
from torch import Tensor

from ldm.diffusion.path import DiscretePath
from ldm.diffusion.prediction import to_x0

BIN = 1 / 255  # half the width of an 8-bit level in images of [-1, 1]


def loss_weight(signal: Tensor, noise: Tensor, prediction_type: str, min_snr_gamma: float | None) -> Tensor:
    """Weight of each sample's squared error.

    Args:
        signal, noise: factors of the mixture, (B, 1, ..., 1).
        prediction_type: of ldm.diffusion.prediction.KINDS.
        min_snr_gamma: None = all weights are 1.
    Returns:
        (B,) float32: min(snr, gamma), which is a weight of the clean latent's error, expressed for the predicted
        quantity; snr = (signal / noise)^2.
    Source: Hang et al. 2023 (min-SNR), Eq. 11 and its v-prediction form.
    """
    if min_snr_gamma is None:
        return torch.ones(len(signal), device=signal.device)
    signal, noise = signal.flatten(), noise.flatten()
    snr = (signal / noise).square()
    # How far the clean latent moves with the prediction, squared.
    gain = {"epsilon": 1 / snr, "x0": torch.ones_like(snr), "v": noise.square(), "velocity": noise.square()}
    return snr.clamp(max=min_snr_gamma) * gain[prediction_type]


def variational_bound(epsilon: Tensor, values: Tensor, image: Tensor, noisy: Tensor, timestep: Tensor,
                      path: DiscretePath) -> Tensor:
    """One term of the variational bound, which teaches a network the variance of its steps.

    Args:
        epsilon: predicted noise, (B, C, H, W); gradients do not reach it from here.
        values: the network's outputs for the variance, same shape (see learned_log_variance).
        image: clean, same shape, float32 in [-1, 1] with 8-bit levels.
        noisy: the image at the timestep.
        timestep: (B,) int64.
        path: the forward process.
    Returns:
        (B,) in bits per dimension: the KL divergence from the true step back, or at timestep 0 the negative log
        likelihood of the image's levels.
    Source: Nichol and Dhariwal 2021, Eq. 4-7 and 16; Ho et al. 2020, Eq. 13.
    """
    near = path.gather("posterior_mean_coef1", timestep, image)
    far = path.gather("posterior_mean_coef2", timestep, image)
    mean = near * to_x0(epsilon.detach(), noisy, *path.factors(timestep, image), "epsilon") + far * noisy
    log_least, log_beta = (path.gather(name, timestep, image) for name in ("log_least_variance", "log_betas"))
    log_variance = learned_log_variance(values, log_least, log_beta)
    true_mean = near * image + far * noisy
    divergence = 0.5 * (log_variance - log_least - 1 + (log_least - log_variance).exp()
                        + (true_mean - mean).square() * (-log_variance).exp())
    bits = torch.where((timestep == 0).reshape(-1, 1, 1, 1), level_surprise(image, mean, log_variance), divergence)
    return bits.flatten(1).mean(1) / math.log(2)


def learned_log_variance(values: Tensor, log_least: Tensor | float, log_beta: Tensor | float) -> Tensor:
    """Logarithm of the variance of a step back, (B, C, h, w), where the network learns it.

    Args:
        values: outputs of the network, (B, C, h, w): 1 = the largest sensible variance (beta), -1 = the least (the
            posterior's when the clean latent is known).
        log_least, log_beta: logarithms of these two.
    Source: Nichol and Dhariwal 2021, Eq. 15.
    """
    share = (values + 1) / 2
    return share * log_beta + (1 - share) * log_least


def level_surprise(image: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log likelihood (nats) of 8-bit levels under normals whose mass is summed within each level's bin.

    The image is in [-1, 1], its outermost bins reach to infinity; all shapes are the same.
    """
    scale = (-0.5 * log_variance).exp()
    upper, lower = (image - mean + BIN) * scale, (image - mean - BIN) * scale
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
    ends = torch.where(image < -0.999, torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower))
    return -torch.where(image.abs() > 0.999, ends, inside)
