"""Samplers: from noise to a clean latent, over the levels of any path.

All they know of a network is `denoise(x, level) -> x0`; guidance, clipping and corrections are closures round it. On a
flow path the step of `ddim` is the Euler step. The second-order solvers are written out here, for order two, which is
all that guided sampling uses, because sampling must run without diffusers (the demo environment has none) and because
its schedulers cannot end where upstream's DDIM ends; the tests hold them against diffusers' schedulers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.objective import learned_log_variance
from ldm.diffusion.path import Level

# denoise(x (B, C, h, w), level) -> x0 (B, C, h, w); for ddpm also (B, 2C, h, w), with the learned variance behind.
Denoise = Callable[[Tensor, Level], Tensor]
Draw = Callable[[Sequence[int]], Tensor]  # fresh noise (B, C, h, w) for the shape (C, h, w), as SampleNoise gives it


def sample(denoise: Denoise, noise: Tensor, levels: Sequence[Level], solver: str = "ddim", eta: float = 0.0,
           draw: Draw | None = None, start: Tensor | None = None) -> Tensor:
    """Go from noise to a latent with the chosen solver.

    Args:
        denoise: see Denoise.
        noise: standard normal to start from, (B, C, h, w); at least float32, in which everything is computed.
        levels: to visit, from path.levels; the last one is where it ends and is not evaluated.
        solver: of SAMPLERS.
        eta: share of fresh noise in each step of ddim, [0, 1]: 0 is deterministic, 1 has the variance of DDPM.
        draw: fresh noise, needed by ddpm and with eta > 0.
        start: clean latents to start from, (B, C, h, w), noised to the first level; None = pure noise.
    Returns:
        Latent, (B, C, h, w) of the dtype of the noise.
    Raises:
        ValueError: if the levels do not fall, eta is out of range, or draw is missing.
    """
    if len(levels) < 2 or not all(a.noise > b.noise for a, b in zip(levels, levels[1:], strict=False)):
        raise ValueError(f"sample: levels {[level.time for level in levels]} are not possible. Expected two or more of "
                         "falling noise. Use path.levels.")
    if not 0 <= eta <= 1:
        raise ValueError(f"sample: eta is {eta}. Expected a value in [0, 1]. 0 is deterministic.")
    if draw is None and (eta > 0 or solver == "ddpm"):
        raise ValueError(f"sample: draw is missing, but {solver} with eta {eta} needs fresh noise. Expected a source. "
                         "Pass SampleNoise(seeds, device), or choose a solver without noise such as ddim.")
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    if start is not None:
        x = levels[0].signal * start.to(x.dtype) + levels[0].noise * x
    return SAMPLERS[solver](denoise, x, levels, eta, draw)


def ddim(denoise: Denoise, x: Tensor, levels: Sequence[Level], eta: float, draw: Draw | None) -> Tensor:
    """DDIM; eta = 1 gives the random steps of DDPM. Source: Song et al. 2021, Eq. 12 and 16."""
    for here, there in zip(levels, levels[1:], strict=False):
        clean = denoise(x, here)
        fresh = eta * posterior(here, there)[1] ** 0.5
        kept = max(there.noise**2 - fresh**2, 0.0) ** 0.5 / here.noise  # of the noise that is in x
        x = kept * x + (there.signal - kept * here.signal) * clean
        if fresh > 0:
            x = x + fresh * draw(x.shape[1:])
    return x


def posterior(here: Level, there: Level) -> tuple[float, float]:
    """Variance that noising from `there` to `here` adds, and that of the way back when the clean latent is known."""
    ratio = here.signal / there.signal
    added = here.noise**2 - (ratio * there.noise) ** 2
    return added, added * there.noise**2 / here.noise**2


def ddpm(denoise: Denoise, x: Tensor, levels: Sequence[Level], eta: float, draw: Draw | None) -> Tensor:
    """Ancestral sampling: fresh noise in every step but the last, of the posterior's variance or of a learned one.

    Any levels make a process of their own, whose variances follow from them.
    Source: Ho et al. 2020, Algorithm 2; Nichol and Dhariwal 2021, section 4.
    """
    for here, there in zip(levels, levels[1:], strict=False):
        clean, values = denoise(x, here).tensor_split([x.shape[1]], dim=1)
        added, variance = posterior(here, there)
        far = here.signal / there.signal * there.noise**2 / here.noise**2
        x = there.signal * added / here.noise**2 * clean + far * x
        if variance > 0:
            log_variance = math.log(variance)
            spread = ((0.5 * learned_log_variance(values, log_variance, math.log(added))).exp() if values.shape[1]
                      else variance**0.5)
            x = x + spread * draw(x.shape[1:])
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Sequence[Level], eta: float, draw: Draw | None) -> Tensor:
    """DPM-Solver++(2M); the first and the last step are of order one. Source: Lu et al. 2022, Algorithm 2."""
    return multistep(denoise, x, levels, use_corrector=False)


def unipc(denoise: Denoise, x: Tensor, levels: Sequence[Level], eta: float, draw: Draw | None) -> Tensor:
    """UniPC of order two, B(h) = e^h - 1. Source: Zhao et al. 2023, Algorithms 5 and 6."""
    return multistep(denoise, x, levels, use_corrector=True)


def multistep(denoise: Denoise, x: Tensor, levels: Sequence[Level], use_corrector: bool) -> Tensor:
    """Both second-order solvers.

    UniPC predicts with the same formula as DPM-Solver++, and then corrects each predicted latent with the network's
    prediction for it, which the next step needs anyway: one evaluation a step, as without.
    """
    start = None
    clean: list[Tensor] = []  # latents that the network implied, the newest last
    for index, here in enumerate(levels[:-1]):
        clean = [*clean[-2:], denoise(x, here)]
        if use_corrector and start is not None:
            x = _correct(start, clean, levels[max(index - 2, 0) : index + 1])
        start = x
        is_last = index == len(levels) - 2
        x = _predict(start, clean[-1:] if is_last else clean[-2:], levels[max(index - 1, 0) : index + 2])
    return x


def _predict(start: Tensor, clean: Sequence[Tensor], levels: Sequence[Level]) -> Tensor:
    """Step from levels[-2] to levels[-1]; with two clean latents, the older one from levels[-3], of order two."""
    here, there = levels[-2:]
    estimate = clean[-1]
    if len(clean) == 2:
        ratio = (there.rate - here.rate) / (here.rate - levels[-3].rate)  # 0 behind the noisy end of a flow
        estimate = estimate + 0.5 * ratio * (clean[-1] - clean[0])
    factor = math.expm1(here.rate - there.rate)  # -1 from the noisy end of a flow, and to the clean end
    return there.noise / here.noise * start - there.signal * factor * estimate


def _correct(start: Tensor, clean: Sequence[Tensor], levels: Sequence[Level]) -> Tensor:
    """Repeat the step from levels[-2] to levels[-1] knowing the clean latent at its end, clean[-1]."""
    here, there = levels[-2:]
    step = there.rate - here.rate
    factor = math.expm1(-step)
    change = clean[-1] - clean[-2]
    if len(clean) == 3:
        ratio = (levels[-3].rate - here.rate) / step  # negative
        first = (1 - factor / -step) / -factor
        second = 2 * ((factor / -step - 1) / -step - 0.5) / factor
        older = (first - second) / (1 - ratio)
        change = older / ratio * (clean[-3] - clean[-2]) + (first - older) * change
    else:
        change = 0.5 * change
    return there.noise / here.noise * start - there.signal * factor * (clean[-2] + change)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpmpp_2m": dpmpp_2m, "unipc": unipc}
