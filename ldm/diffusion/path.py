"""Paths from clean latents to noise: how much of each a latent holds at a time, and at which times samplers look.

On every path x = signal * clean + noise * normal noise. A discrete path has the variances of DDPM's forward process, a
flow path goes straight from the one to the other. Samplers only see levels of a path.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.diffusion.spacing import ENDS, check_spacing, spaced_timesteps

SCHEDULE_KINDS = ("scaled_linear", "linear", "cosine")
BUFFER_NAMES = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
)  # fmt: skip
TRAINING_TIMES = ("uniform", "logit_normal")


class Level(NamedTuple):
    """A noise level that a sampler visits.

    Attributes:
        time: what the network is told: a timestep (int) of a discrete path, num_timesteps * s (float) of a flow.
        signal, noise: factors of the clean latent and of the noise.
        share: of the way from clean (0) to noise (1), comparable between paths.
    """

    time: float
    signal: float
    noise: float
    share: float

    @property
    def rate(self) -> float:
        """log(signal / noise), half the log of the signal-to-noise ratio (lambda); infinite at both ends of a flow."""
        if self.signal <= 0 or self.noise <= 0:
            return -math.inf if self.signal <= 0 else math.inf
        return math.log(self.signal / self.noise)


CLEAN = Level(0, 1.0, 0.0, 0.0)


class Path(nn.Module):
    """What every path has; times are numbers that the network is told, one a sample.

    A module without parameters, so that the config inside a checkpoint may name it.

    Attributes:
        num_timesteps: the time at which only noise is left.
        predictions: what a network on this path can predict (see ldm.diffusion.prediction).
        sampling: fields of Sampling that a method on this path starts from where they differ from the mode `exact`.
    """

    num_timesteps: int
    predictions: tuple[str, ...]
    sampling: Mapping[str, Any] = {}

    def vectors(self) -> dict[str, Tensor]:
        """Vectors that checkpoints of a method on this path carry, float32 by name."""
        return {}

    def draw_times(self, count: int, device: torch.device | str) -> Tensor:
        """Random times to train at, (count,), from torch's global generator."""
        raise NotImplementedError

    def factors(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise factor of each sample, both (B, 1, ..., 1) float32 on the device of `like` (B, ...)."""
        raise NotImplementedError

    def velocity(self, x: Tensor, clean: Tensor, level: Level) -> Tensor:
        """Direction of the path at x, scaled as a network on it would predict it, of the clean latent at its end."""
        raise NotImplementedError

    def levels(self, num_steps: int, spacing: str, end: str, strength: float = 1.0) -> list[Level]:
        """Levels that a sampler visits, from noisy to clean.

        Args:
            num_steps: evaluations of the network on the whole path.
            spacing: where on the path they lie, see Sampling.
            end: `clean` or, on a discrete path, `first`, the variance of timestep 0.
            strength: share of the path, (0, 1]; below 1 only its last levels are there, one at least.
        Returns:
            One level an evaluation, and behind them the one that the last step leads to.
        Raises:
            ValueError: for a spacing, an end or a number of steps that this path does not have.
        """
        raise NotImplementedError


class DiscretePath(Path):
    """The forward process of DDPM, variance preserving, over T timesteps; all in float64.

    Args:
        num_timesteps: T, at least 1.
        kind: `scaled_linear` (square roots of the betas equally spaced: Stable Diffusion), `linear` (betas equally
            spaced: DDPM) or `cosine` (which has no start and end and does not look at them).
        start, end: first and last beta, in (0, 1).

    Attributes:
        betas: variance added at each timestep, (T,) float64 in (0, 1).
        alphas_cumprod: share of signal variance left at each timestep, (T,) float64, falling from nearly 1 to nearly 0.
    Raises:
        ValueError: for an unknown kind, or values that give betas outside (0, 1).
    Source: Ho et al. 2020, Eq. 2, 4 and 7 (linear); Rombach et al. 2022 (scaled_linear); Nichol and Dhariwal 2021,
        Eq. 17 (cosine).
    """

    predictions = ("epsilon", "x0", "v")

    def __init__(self, num_timesteps: int = 1000, kind: str = "scaled_linear", start: float = 0.00085,
                 end: float = 0.012) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps
        self._values = derive_vectors(make_betas(num_timesteps, kind, start, end))
        self._tensors: dict[tuple[str, str], Tensor] = {}
        self.betas, self.alphas_cumprod = self._values["betas"], self._values["alphas_cumprod"]

    def vectors(self) -> dict[str, Tensor]:
        """The twelve vectors that checkpoints of latent diffusion carry, each (T,) float32."""
        return {name: torch.from_numpy(self._values[name]).float() for name in BUFFER_NAMES}

    def draw_times(self, count: int, device: torch.device | str) -> Tensor:
        """Timesteps, each as likely, (count,) int64."""
        return torch.randint(self.num_timesteps, (count,), device=device)

    def factors(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Square roots of the signal's and of the noise's variance (see Path and gather)."""
        return (self.gather("sqrt_alphas_cumprod", time, like),
                self.gather("sqrt_one_minus_alphas_cumprod", time, like))

    def velocity(self, x: Tensor, clean: Tensor, level: Level) -> Tensor:
        """V = signal * epsilon - noise * clean (see Path)."""
        return (level.signal * x - clean) / level.noise

    def gather(self, name: str, timestep: Tensor, like: Tensor) -> Tensor:
        """Look up one value per sample, shaped to multiply a batch.

        Args:
            name: one of BUFFER_NAMES, `log_betas` or `log_least_variance` (see objective.learned_log_variance).
            timestep: (B,) int64 in [0, T).
            like: the batch, (B, ...); gives device and number of axes.
        Returns:
            (B, 1, ..., 1) float32 on the device of `like`.
        Raises:
            ValueError: if the shape or (on the CPU, where looking costs nothing) a value of timestep is wrong.
        """
        if timestep.shape != like.shape[:1]:
            raise ValueError(f"timestep: shape {tuple(timestep.shape)} for a batch of {like.shape[0]}. Expected one "
                             "timestep per sample. Pass a vector of that length.")
        if timestep.device.type == "cpu" and ((timestep < 0) | (timestep >= self.num_timesteps)).any():
            raise ValueError(f"timestep: {timestep.tolist()} is out of range. Expected values in [0, "
                             f"{self.num_timesteps}). Draw timesteps below path.num_timesteps.")
        key = (name, str(like.device))
        if key not in self._tensors:
            # A first look-up in inference mode must not leave an inference tensor behind for the training step.
            with torch.inference_mode(False):
                self._tensors[key] = torch.from_numpy(self._values[name]).float().to(like.device)
        values = self._tensors[key][timestep.to(like.device)]
        return values.reshape(-1, *[1] * (like.ndim - 1))

    def level(self, timestep: int) -> Level:
        """The level of a timestep."""
        variance = float(self.alphas_cumprod[timestep])
        return Level(timestep, variance**0.5, (1 - variance) ** 0.5, timestep / self.num_timesteps)

    def levels(self, num_steps: int, spacing: str = "leading", end: str = "first",
               strength: float = 1.0) -> list[Level]:
        """Levels that a sampler visits (see Path and spaced_timesteps); only timesteps below strength * T."""
        timesteps = spaced_timesteps(num_steps, self.alphas_cumprod, spacing)
        return self.levels_at([t for t in timesteps if t < strength * self.num_timesteps] or timesteps[:1], end)

    def levels_at(self, timesteps: Sequence[int], end: str = "first") -> list[Level]:
        """Levels of given timesteps, ascending in [0, T), and the end.

        The end is `first` (variance of timestep 0) or `clean`, which alone allows timestep 0; else ValueError.
        """
        if end not in ENDS:
            raise ValueError(f"end: {end!r} is unknown. Expected one of {', '.join(ENDS)}.")
        least = 0 if end == "clean" else 1
        ordered = all(first < second for first, second in zip(timesteps, timesteps[1:], strict=False))
        if not timesteps or not ordered or timesteps[0] < least or timesteps[-1] >= self.num_timesteps:
            raise ValueError(f"levels: timesteps {list(timesteps)} are not possible. Expected ascending values in "
                             f"[{least}, {self.num_timesteps}). Use path.levels.")
        return [*(self.level(t) for t in reversed(timesteps)), CLEAN if end == "clean" else self.level(0)]


class FlowPath(Path):
    """The straight path of rectified flow: signal 1 - s, noise s, s from 0 (clean) to 1 (noise).

    The network is told num_timesteps * s.

    Args:
        shift: moves times towards noise, s = shift * u / (1 + (shift - 1) * u) for u in [0, 1]; larger for larger
            images (SD3.5: 3). It applies to training and sampling.
        times: distribution of u in training: `uniform` over (1, ..., T) / T, or `logit_normal`.
        mean, deviation: of the normal whose logistic function is u, with `logit_normal`.
        num_timesteps: T, what the network is told at s = 1.
    Raises:
        ValueError: for values out of range.
    Source: Liu et al. 2023 (rectified flow); Esser et al. 2024 (SD3), Eq. 19 and 23.
    """

    predictions = ("velocity", "x0")
    sampling = {"num_steps": 28, "spacing": "uniform", "end": "clean"}
    SPACINGS = ("uniform", "trailing")

    def __init__(self, shift: float = 1.0, times: str = "uniform", mean: float = 0.0, deviation: float = 1.0,
                 num_timesteps: int = 1000) -> None:
        super().__init__()
        if times not in TRAINING_TIMES:
            raise ValueError(f"FlowPath: times {times!r} is unknown. Expected one of {', '.join(TRAINING_TIMES)}.")
        if not (shift > 0 and deviation > 0 and num_timesteps >= 1):
            raise ValueError(f"FlowPath: shift {shift}, deviation {deviation}, num_timesteps {num_timesteps}. Expected "
                             "all above 0. SD3.5 has a shift of 3.")
        self.shift, self.times, self.mean, self.deviation = shift, times, mean, deviation
        self.num_timesteps = num_timesteps

    def shifted(self, u: Any) -> Any:
        """Noise factor s of unshifted times u in [0, 1], numbers or tensors."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def draw_times(self, count: int, device: torch.device | str) -> Tensor:
        """Times, (count,) float32 in (0, T] (see the class)."""
        if self.times == "uniform":
            u = (torch.randint(self.num_timesteps, (count,), device=device) + 1) / self.num_timesteps
        else:
            u = torch.sigmoid(self.mean + self.deviation * torch.randn(count, device=device))
        return self.num_timesteps * self.shifted(u)

    def factors(self, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """1 - s and s (see Path)."""
        noise = (time.to(like.device).float() / self.num_timesteps).reshape(-1, *[1] * (like.ndim - 1))
        return 1 - noise, noise

    def velocity(self, x: Tensor, clean: Tensor, level: Level) -> Tensor:
        """Epsilon - clean (see Path)."""
        return (x - clean) / level.noise

    def levels(self, num_steps: int, spacing: str = "uniform", end: str = "clean",
               strength: float = 1.0) -> list[Level]:
        """Levels from s = 1 to 0 (see Path).

        `uniform`: u equally spaced from 1 to 1 / T, as pipelines of SD3 have it; `trailing`: from 1 to 1 / num_steps.
        Strength keeps the levels with u up to it.
        """
        check_spacing(spacing, self.SPACINGS)
        if end != "clean":
            raise ValueError(f"end: {end!r} is not possible on a flow path. Expected clean. Add --end clean.")
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"num_steps: {num_steps} steps are not possible. Expected 1 to {self.num_timesteps}.")
        last = 1 / (num_steps if spacing == "trailing" else self.num_timesteps)
        times = np.linspace(1.0, last, num_steps).tolist()
        kept = [self.shifted(u) for u in times if u <= strength + 1e-9] or [self.shifted(times[-1])]
        return [*(Level(self.num_timesteps * s, 1 - s, s, s) for s in kept), CLEAN]


def make_betas(num_timesteps: int, kind: str, start: float, end: float) -> np.ndarray:
    """Variances of a forward process, (T,) float64 in (0, 1); arguments and errors as for DiscretePath."""
    if num_timesteps < 1:
        raise ValueError(f"schedule: num_timesteps is {num_timesteps}. Expected at least 1. Use 1000 if unsure.")
    if kind not in SCHEDULE_KINDS:
        raise ValueError(f"schedule: unknown kind {kind!r}. Expected one of {', '.join(SCHEDULE_KINDS)}. Correct the "
                         "config.")
    if kind != "cosine" and not (0 < start < 1 and 0 < end < 1):
        raise ValueError(f"schedule: start {start} or end {end} is not a variance. Expected values in (0, 1). Stable "
                         "Diffusion uses 0.00085 and 0.012.")
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, num_timesteps, dtype=np.float64) ** 2
    if kind == "linear":
        return np.linspace(start, end, num_timesteps, dtype=np.float64)
    offset = 0.008
    time = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    signal = np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.clip(1.0 - signal[1:] / signal[:-1], 1e-8, 0.999)


def derive_vectors(betas: np.ndarray) -> dict[str, np.ndarray]:
    """BUFFER_NAMES, `log_betas` and `log_least_variance` of a forward process, each (T,) float64."""
    alphas = 1.0 - betas
    cumprod = np.cumprod(alphas)
    previous = np.append(1.0, cumprod[:-1])
    posterior_variance = betas * (1.0 - previous) / (1.0 - cumprod)
    return {
        "betas": betas,
        "alphas_cumprod": cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - cumprod),
        "log_one_minus_alphas_cumprod": np.log(1.0 - cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / cumprod - 1.0),
        "posterior_variance": posterior_variance,
        # The first posterior variance is exactly 0: checkpoints have a floor for it, learned variances the next one.
        "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
        "log_betas": np.log(betas),
        "log_least_variance": np.log(np.append(posterior_variance[1:2], posterior_variance[1:]) if len(betas) > 1
                                     else betas),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - cumprod),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - cumprod),
    }
