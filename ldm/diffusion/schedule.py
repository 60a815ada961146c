"""Noise schedules of a discrete-time diffusion process, and conversions between what a network can predict."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "x0", "v")
SCHEDULE_KINDS = ("scaled_linear", "linear", "cosine")

BUFFER_NAMES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Everything that follows from the variances of the forward process, computed in float64.

    Args:
        betas: variance added at each timestep, (T,) float64 in (0, 1).
        cumprod: products of 1 - betas where they are known exactly (see respace); None = computed.

    Raises:
        ValueError: if betas is not a non-empty vector with all values in (0, 1).
    Source: Ho et al. 2020, Eq. 2, 4 and 7.
    """

    betas: np.ndarray
    cumprod: np.ndarray | None = None
    _values: dict[str, np.ndarray] = field(init=False, repr=False)
    _tensors: dict[tuple[str, str], Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        betas = np.asarray(self.betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0 or not (betas > 0).all() or not (betas < 1).all():
            raise ValueError(
                f"Schedule: betas of shape {betas.shape} are not usable. Expected a vector with all values in (0, 1)."
                " Check start, end and num_timesteps."
            )
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "_values", _derive(betas, self.cumprod))

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of signal variance left at each timestep, (T,) float64, falling from nearly 1 to nearly 0."""
        return self._values["alphas_cumprod"]

    def buffers(self) -> dict[str, Tensor]:
        """The twelve vectors that checkpoints of latent diffusion carry, each (T,) float32."""
        return {name: torch.from_numpy(self._values[name]).float() for name in BUFFER_NAMES}

    def gather(self, name: str, timestep: Tensor, like: Tensor) -> Tensor:
        """Look up one value per sample, shaped to multiply a batch.

        Args:
            name: one of BUFFER_NAMES, `log_betas` or `log_least_variance` (see learned_log_variance).
            timestep: (B,) int64 in [0, T).
            like: the batch, (B, ...); gives device and number of axes.

        Returns:
            (B, 1, ..., 1) float32 on the device of `like`.

        Raises:
            ValueError: if the shape or (on the CPU, where looking costs nothing) a value of timestep is wrong.
        """
        if timestep.shape != like.shape[:1]:
            raise ValueError(
                f"timestep: shape {tuple(timestep.shape)} for a batch of {like.shape[0]}."
                " Expected one timestep per sample. Pass a vector of that length."
            )
        if timestep.device.type == "cpu" and ((timestep < 0) | (timestep >= self.num_timesteps)).any():
            raise ValueError(
                f"timestep: {timestep.tolist()} is out of range. Expected values in [0, {self.num_timesteps})."
                " Draw timesteps below schedule.num_timesteps."
            )
        key = (name, str(like.device))
        if key not in self._tensors:
            # A first look-up during a preview must not leave an inference tensor behind for the training step.
            with torch.inference_mode(False):
                self._tensors[key] = torch.from_numpy(self._values[name]).float().to(like.device)
        values = self._tensors[key][timestep.to(like.device)]
        return values.reshape(-1, *[1] * (like.ndim - 1))


def _derive(betas: np.ndarray, cumprod: np.ndarray | None = None) -> dict[str, np.ndarray]:
    alphas = 1.0 - betas
    cumprod = np.cumprod(alphas) if cumprod is None else cumprod
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
        # The first posterior variance is exactly 0, its logarithm is not a number one can store.
        "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
        "log_betas": np.log(betas),
        # The first posterior variance is 0; a network that learns variances takes the next one's place for it.
        "log_least_variance": np.log(np.append(posterior_variance[1:2], posterior_variance[1:]) if len(betas) > 1
                                     else betas),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - cumprod),
        "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - cumprod),
    }


def make_schedule(
    num_timesteps: int = 1000, kind: str = "scaled_linear", start: float = 0.00085, end: float = 0.012
) -> Schedule:
    """Build a noise schedule.

    Args:
        num_timesteps: T, at least 1.
        kind: `scaled_linear` (square roots of the betas equally spaced: Stable Diffusion), `linear` (betas equally
            spaced: DDPM) or `cosine` (which has no start and end and does not look at them).
        start: first beta, in (0, 1).
        end: last beta, in (0, 1).

    Returns:
        The schedule.

    Raises:
        ValueError: for an unknown kind, or values that give betas outside (0, 1).
    Source: Rombach et al. 2022 (scaled_linear); Ho et al. 2020 (linear); Nichol and Dhariwal 2021, Eq. 17 (cosine).
    """
    if num_timesteps < 1:
        raise ValueError(f"make_schedule: num_timesteps is {num_timesteps}. Expected at least 1. Use 1000 if unsure.")
    if kind not in SCHEDULE_KINDS:
        raise ValueError(
            f"make_schedule: unknown kind {kind!r}. Expected one of {', '.join(SCHEDULE_KINDS)}. Correct the config."
        )
    if kind != "cosine" and not (0 < start < 1 and 0 < end < 1):
        raise ValueError(
            f"make_schedule: start {start} or end {end} is not a variance. Expected values in (0, 1)."
            " Stable Diffusion uses 0.00085 and 0.012."
        )
    if kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, num_timesteps, dtype=np.float64) ** 2
    elif kind == "linear":
        betas = np.linspace(start, end, num_timesteps, dtype=np.float64)
    else:
        offset = 0.008
        time = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        signal = np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2
        betas = np.clip(1.0 - signal[1:] / signal[:-1], 1e-8, 0.999)
    return Schedule(betas)


def respace(schedule: Schedule, timesteps: Sequence[int]) -> Schedule:
    """The process that only knows some of the timesteps; at these its noise levels are those of the whole process.

    Args:
        schedule: the process that the network was trained on.
        timesteps: ascending, in [0, T).

    Returns:
        A schedule of len(timesteps) steps; the very same object when these are all.
    Source: Nichol and Dhariwal 2021, section 4.
    """
    if len(timesteps) == schedule.num_timesteps:
        return schedule
    cumprod = schedule.alphas_cumprod[list(timesteps)]
    return Schedule(1.0 - cumprod / np.append(1.0, cumprod[:-1]), cumprod)


def learned_log_variance(values: Tensor, timestep: Tensor, schedule: Schedule) -> Tensor:
    """Logarithm of the variance of a step back, where the network learns it.

    Args:
        values: outputs of the network, (B, C, h, w): 1 = the largest sensible variance (beta), -1 = the least (the
            posterior's when the clean latent is known).
        timestep: (B,) int64 in [0, schedule.num_timesteps).
        schedule: the process that is walked back, respaced or not.

    Returns:
        (B, C, h, w).
    Source: Nichol and Dhariwal 2021, Eq. 15.
    """
    share = (values + 1) / 2
    least = schedule.gather("log_least_variance", timestep, values)
    return share * schedule.gather("log_betas", timestep, values) + (1 - share) * least


def q_sample(latent: Tensor, timestep: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """Noise a clean latent to the given timestep.

    Args:
        latent: clean latent, (B, C, h, w) float32, unit variance.
        timestep: (B,) int64 in [0, schedule.num_timesteps).
        noise: standard normal, same shape as latent.
        schedule: the forward process.

    Returns:
        Noised latent, (B, C, h, w).

    Raises:
        ValueError: if a timestep is out of range (checked on the CPU) or the shapes differ.
    Source: Ho et al. 2020, Eq. 4.
    """
    _require_same_shape("q_sample: noise", noise, latent)
    signal = schedule.gather("sqrt_alphas_cumprod", timestep, latent)
    sigma = schedule.gather("sqrt_one_minus_alphas_cumprod", timestep, latent)
    return signal * latent + sigma * noise


def velocity(latent: Tensor, noise: Tensor, timestep: Tensor, schedule: Schedule) -> Tensor:
    """Training target of a network with prediction type `v`.

    Args:
        latent: clean latent, (B, C, h, w) float32, unit variance.
        noise: the noise it was mixed with, same shape.
        timestep: (B,) int64 in [0, schedule.num_timesteps).
        schedule: the forward process.

    Returns:
        v = sqrt(abar) noise - sqrt(1 - abar) latent, (B, C, h, w).

    Raises:
        ValueError: if a timestep is out of range (checked on the CPU) or the shapes differ.
    Source: Salimans and Ho 2022, appendix D.
    """
    _require_same_shape("velocity: noise", noise, latent)
    signal = schedule.gather("sqrt_alphas_cumprod", timestep, latent)
    sigma = schedule.gather("sqrt_one_minus_alphas_cumprod", timestep, latent)
    return signal * noise - sigma * latent


def to_epsilon(
    prediction: Tensor, noisy_latent: Tensor, timestep: Tensor, schedule: Schedule, prediction_type: str
) -> Tensor:
    """Turn a network output into the noise it implies.

    Args:
        prediction: network output, (B, C, h, w).
        noisy_latent: what the network looked at, same shape.
        timestep: (B,) int64 in [0, schedule.num_timesteps).
        schedule: the forward process.
        prediction_type: `epsilon`, `x0` or `v`.

    Returns:
        Predicted noise, (B, C, h, w).

    Raises:
        ValueError: for an unknown prediction type, a timestep out of range (checked on the CPU) or shapes that differ.
    """
    _require_known_type(prediction_type)
    _require_same_shape("to_epsilon: prediction", prediction, noisy_latent)
    if prediction_type == "epsilon":
        return prediction
    signal = schedule.gather("sqrt_alphas_cumprod", timestep, noisy_latent)
    sigma = schedule.gather("sqrt_one_minus_alphas_cumprod", timestep, noisy_latent)
    if prediction_type == "x0":
        return (noisy_latent - signal * prediction) / sigma
    return signal * prediction + sigma * noisy_latent


def to_x0(
    prediction: Tensor, noisy_latent: Tensor, timestep: Tensor, schedule: Schedule, prediction_type: str
) -> Tensor:
    """Turn a network output into the clean latent it implies.

    Args:
        prediction: network output, (B, C, h, w).
        noisy_latent: what the network looked at, same shape.
        timestep: (B,) int64 in [0, schedule.num_timesteps).
        schedule: the forward process.
        prediction_type: `epsilon`, `x0` or `v`.

    Returns:
        Predicted clean latent, (B, C, h, w).

    Raises:
        ValueError: for an unknown prediction type, a timestep out of range (checked on the CPU) or shapes that differ.
    """
    _require_known_type(prediction_type)
    _require_same_shape("to_x0: prediction", prediction, noisy_latent)
    if prediction_type == "x0":
        return prediction
    signal = schedule.gather("sqrt_alphas_cumprod", timestep, noisy_latent)
    sigma = schedule.gather("sqrt_one_minus_alphas_cumprod", timestep, noisy_latent)
    if prediction_type == "epsilon":
        return (noisy_latent - sigma * prediction) / signal
    return signal * noisy_latent - sigma * prediction


def _require_known_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type: unknown value {prediction_type!r}. Expected one of {', '.join(PREDICTION_TYPES)}."
            " Correct the config."
        )


def _require_same_shape(where: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{where} has shape {tuple(tensor.shape)}. Expected {tuple(other.shape)}, the shape of the latent."
        )
