"""The one way from noise to a latent, whatever the solver."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.sampling.ddim import ddim_sample
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
) -> Tensor:
    """Walk from noise to a latent with the chosen solver.

    Args:
        denoise: `denoise(latent (B, C, h, w), timestep (B,) int64 on the CPU) -> prediction (B, C, h, w)`; guidance and
            savings are its own affair.
        noise: standard normal to start from, (B, C, h, w) float32.
        schedule: the forward process the network was trained on.
        sampling: solver, steps, spacing, end and eta are used.
        prediction_type: what denoise returns: `epsilon`, `x0` or `v`.
        draw: fresh noise for eta > 0, see ddim_sample.
        progress: show a bar over the steps.

    Returns:
        Latent, (B, C, h, w) float32.
    """
    timesteps = spaced_timesteps(sampling.num_steps, schedule, sampling.spacing)
    if sampling.solver == "ddim":
        return ddim_sample(denoise, noise, timesteps, schedule, sampling.eta, prediction_type, draw, progress)
    use_corrector = sampling.solver == "unipc"
    return multistep_sample(
        denoise, noise, timesteps, schedule, use_corrector, sampling.end, prediction_type, progress
    )
