"""The one way from noise to a latent, whatever the solver."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule, q_sample, to_x0
from ldm.sampling.ddim import ddim_sample
from ldm.sampling.ddpm import ddpm_sample
from ldm.sampling.guidance import Denoise
from ldm.sampling.modes import Sampling
from ldm.sampling.multistep import multistep_sample, spaced_timesteps


def sample(
    denoise: Denoise,
    noise: Tensor,
    schedule: Schedule,
    sampling: Sampling,
    prediction_type: str = "epsilon",
    draw: Callable[[Sequence[int]], Tensor] | None = None,
    progress: bool = False,
    clip: float | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Walk from noise to a latent with the chosen solver.

    Args:
        denoise: `denoise(latent (B, C, h, w), timestep (B,) int64 on the CPU) -> prediction (B, C, h, w)`, or
            (B, 2C, h, w) with what ddpm knows as learned variance; guidance and savings are its own affair.
        noise: standard normal to start from, (B, C, h, w) float32.
        schedule: the forward process the network was trained on.
        sampling: solver, steps, spacing, end, eta and strength are used.
        prediction_type: what denoise returns: `epsilon`, `x0` or `v`.
        draw: fresh noise for ddpm and for eta > 0, see ddim_sample.
        progress: show a bar over the steps.
        clip: keep the clean image that each prediction implies within [-clip, clip]; None = leave it, as for latents.
        start: latents to start from, (B, C, h, w), needed with a strength below 1: the walk then begins at the last of
            the timesteps below strength * T, with these latents noised to its level.

    Returns:
        Latent, (B, C, h, w) float32.

    Raises:
        ValueError: if start is missing.
    """
    timesteps = spaced_timesteps(sampling.num_steps, schedule, sampling.spacing)
    if sampling.strength < 1:
        if start is None:
            raise ValueError(f"strength is {sampling.strength}, but there is no image to start from. Give every row a "
                             "target, or strength 1.")
        timesteps = [t for t in timesteps if t < sampling.strength * schedule.num_timesteps] or timesteps[:1]
        level = torch.full((len(noise),), timesteps[-1], device=noise.device)
        noise = q_sample(start.float(), level, noise, schedule)
    if clip is not None:
        denoise, prediction_type = clip_clean(denoise, schedule, prediction_type, clip), "x0"
    if sampling.solver == "ddpm":
        return ddpm_sample(denoise, noise, timesteps, schedule, prediction_type, draw, progress)
    mean = lambda latent, timestep: denoise(latent, timestep)[:, : latent.shape[1]]  # noqa: E731
    if sampling.solver == "ddim":
        return ddim_sample(mean, noise, timesteps, schedule, sampling.eta, prediction_type, draw, progress,
                           sampling.end)  # fmt: skip
    use_corrector = sampling.solver == "unipc"
    return multistep_sample(mean, noise, timesteps, schedule, use_corrector, sampling.end, prediction_type, progress)


def clip_clean(denoise: Denoise, schedule: Schedule, prediction_type: str, limit: float) -> Denoise:
    """A network that predicts clean images within [-limit, limit]; learned variances stay behind them.

    Solvers then also take the noise that goes with the clipped image: the two always fit together.
    """

    def clipped(latent: Tensor, timestep: Tensor) -> Tensor:
        prediction, values = denoise(latent, timestep).float().tensor_split([latent.shape[1]], dim=1)
        clean = to_x0(prediction, latent, timestep, schedule, prediction_type)
        # An infinite prediction must not pass for black or white.
        clean = torch.where(clean.isfinite(), clean, torch.nan).clamp(-limit, limit)
        return torch.cat([clean, values], dim=1)

    return clipped
