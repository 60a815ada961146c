"""Second-order multistep solvers: about 20 network evaluations where DDIM wants 50.

Written out here for order two, which is all that guided sampling uses, because sampling must run without diffusers (the
demo environment has none) and because its schedulers cannot end where upstream's DDIM ends. The tests hold both solvers
against diffusers' schedulers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.diffusion.schedule import Schedule, to_x0
from ldm.sampling.ddim import check_timesteps, ddim_timesteps
from ldm.sampling.guidance import Denoise
from ldm.sampling.modes import ENDS, FROM_ZERO, SPACINGS


def spaced_timesteps(num_steps: int, schedule: Schedule, spacing: str = "leading") -> list[int]:
    """Choose the timesteps that the network is asked at.

    Args:
        num_steps: how many, from 1 to T - 1, or to T with a spacing from 0.
        schedule: the forward process the network was trained on.
        spacing: `leading` (upstream's, 1, 51, ...), `trailing` (equally spaced and starting at T - 1),
            `uniform_lambda` (equally spaced in the log of the signal-to-noise ratio, from T - 1 to 1), `uniform`
            (equally spaced from T - 1 to 0) or `leading0` (diffusers' default, 0, 50, ...).

    Returns:
        Exactly num_steps ascending timesteps, all at least 1 but for the last two spacings.

    Raises:
        ValueError: for an unknown spacing, or a count that is not possible.
    Source: Lin et al. 2024, Table 2 (leading, trailing); Lu et al. 2022, section 3.4 (uniform_lambda).
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing: {spacing!r} is unknown. Expected one of {', '.join(SPACINGS)}.")
    total = schedule.num_timesteps
    if spacing in FROM_ZERO and num_steps == total:
        return list(range(total))
    leading = ddim_timesteps(num_steps, total)  # refuses impossible counts
    if spacing == "leading":
        return leading
    if spacing == "leading0":
        return [timestep - 1 for timestep in leading]
    if spacing == "uniform":
        return [round(index * (total - 1) / (num_steps - 1)) for index in range(num_steps)] if num_steps > 1 else [
            total - 1]
    if spacing == "trailing":
        chosen = [max(round(total - index * total / num_steps) - 1, 1) for index in reversed(range(num_steps))]
    else:
        rates = np.array([_Level.at(schedule, timestep).rate for timestep in range(1, total)])  # falling
        wanted = np.linspace(rates[0], rates[-1], num_steps) if num_steps > 1 else rates[-1:]
        chosen = [1 + int(np.abs(rates - rate).argmin()) for rate in wanted]
    # Neighbours can round to the same timestep: move them apart, upwards, then back below T.
    for index in range(1, num_steps):
        chosen[index] = max(chosen[index], chosen[index - 1] + 1)
    for index in range(num_steps):
        chosen[-1 - index] = min(chosen[-1 - index], total - 1 - index)
    return chosen


class _Level(NamedTuple):
    """Noise level: signal and noise factor, and rate = log(signal / noise), usually called lambda."""

    signal: float
    noise: float
    rate: float

    @classmethod
    def at(cls, schedule: Schedule, timestep: int) -> "_Level":
        variance = float(schedule.alphas_cumprod[timestep])
        return cls(variance**0.5, (1 - variance) ** 0.5, 0.5 * math.log(variance / (1 - variance)))


CLEAN = _Level(1.0, 0.0, math.inf)


def multistep_sample(
    denoise: Denoise,
    noise: Tensor,
    timesteps: Sequence[int],
    schedule: Schedule,
    use_corrector: bool = False,
    end: str = "clean",
    prediction_type: str = "epsilon",
    progress: bool = False,
) -> Tensor:
    """Walk from noise to a latent with DPM-Solver++(2M), or with UniPC of order two.

    UniPC (B(h) = e^h - 1) predicts with the same formula, and then corrects each predicted latent with the network's
    answer to it, which the next step needs anyway: one evaluation a step, as without. First and last step are of order
    one.

    Args:
        denoise: `denoise(latent (B, C, h, w), timestep (B,) int64 on the CPU) -> prediction (B, C, h, w)`.
        noise: standard normal to start from, (B, C, h, w) float32.
        timesteps: ascending, from spaced_timesteps.
        schedule: the forward process the network was trained on.
        use_corrector: UniPC instead of DPM-Solver++.
        end: `clean` walks to zero noise; `first` to the variance of timestep 0, as upstream's DDIM.
        prediction_type: what denoise returns: `epsilon`, `x0` or `v`.
        progress: show a bar over the steps.

    Returns:
        Latent, (B, C, h, w) float32.

    Raises:
        ValueError: if timesteps are empty, unordered or out of range, or end is unknown.
    Source: Lu et al. 2022 (DPM-Solver++), Algorithm 2; Zhao et al. 2023 (UniPC), Algorithms 5 and 6.
    """
    check_timesteps("multistep_sample", timesteps, schedule, end)
    if end not in ENDS:
        raise ValueError(f"end: {end!r} is unknown. Expected one of {', '.join(ENDS)}.")
    levels = [_Level.at(schedule, timestep) for timestep in reversed(timesteps)]
    levels.append(CLEAN if end == "clean" else _Level.at(schedule, 0))
    latent, start = noise.float(), None
    answers: list[Tensor] = []  # clean latents that the network implied, the newest last
    for index in tqdm(range(len(timesteps)), desc="multistep", leave=False, disable=not progress):
        timestep = torch.full((len(latent),), timesteps[-1 - index], dtype=torch.int64)
        prediction = denoise(latent, timestep).float()
        answers = [*answers[-2:], to_x0(prediction, latent, timestep, schedule, prediction_type)]
        if use_corrector and start is not None:
            latent = _correct(start, answers, levels[max(index - 2, 0) : index + 1])
        start = latent
        is_last = index == len(timesteps) - 1
        latent = _predict(start, answers[-1:] if is_last else answers[-2:], levels[max(index - 1, 0) : index + 2])
    return latent


def _predict(start: Tensor, answers: Sequence[Tensor], levels: Sequence[_Level]) -> Tensor:
    """Step from levels[-2] to levels[-1]; with two answers, the older one made at levels[-3], of order two."""
    here, there = levels[-2:]
    estimate = answers[-1]
    if len(answers) == 2:
        ratio = (there.rate - here.rate) / (here.rate - levels[-3].rate)
        estimate = estimate + 0.5 * ratio * (answers[-1] - answers[0])
    factor = math.expm1(here.rate - there.rate)  # -1 at the clean end
    return there.noise / here.noise * start - there.signal * factor * estimate


def _correct(start: Tensor, answers: Sequence[Tensor], levels: Sequence[_Level]) -> Tensor:
    """Repeat the step from levels[-2] to levels[-1] knowing the answer at its end, answers[-1]."""
    here, there = levels[-2:]
    step = there.rate - here.rate
    factor = math.expm1(-step)
    change = answers[-1] - answers[-2]
    if len(answers) == 3:
        ratio = (levels[-3].rate - here.rate) / step  # negative
        first = (1 - factor / -step) / -factor
        second = 2 * ((factor / -step - 1) / -step - 0.5) / factor
        older = (first - second) / (1 - ratio)
        change = older / ratio * (answers[-3] - answers[-2]) + (first - older) * change
    else:
        change = 0.5 * change
    return there.noise / here.noise * start - there.signal * factor * (answers[-2] + change)
