"""Closures round a network: classifier-free guidance, and the clean latent that a prediction implies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.path import Level, Path
from ldm.diffusion.prediction import to_x0
from ldm.sampling.modes import Sampling
from ldm.sampling.samplers import Denoise

Predict = Callable[[Tensor, Level], Tensor]
# predict(x (n * B, C, h, w), time (n * B,), n): predictions of the last n branches; the last has all conditions.
PredictBranches = Callable[[Tensor, Tensor, int], Tensor]


class Run(NamedTuple):
    """What a correction may know of one run of a sampler.

    Attributes:
        batch: what is sampled for, after normalize_batch.
        sampling: settings.
        path: of the method.
        levels: that the sampler is going to visit, and the end.
        decode: clean latents (B, C, h, w) to images in about [-1, 1], differentiable.
    """

    batch: Mapping[str, Any]
    sampling: Sampling
    path: Path
    levels: Sequence[Level]
    decode: Callable[[Tensor], Tensor]


# correct(denoise, run) -> denoise: a closure round the denoiser that changes clean latents.
Correct = Callable[[Denoise, Run], Denoise]


def guide(predict: PredictBranches, scales: Sequence[float], interval: tuple[float, float] = (0.0, 1.0),
          rescale: float = 0.0) -> Predict:
    """Steer a network away from what it predicts without some of its conditions.

    All branches run as one batch. Each scale moves the prediction by (scale - 1) times what the condition changes, so
    that several conditions have each their own strength, and one with scale 1 needs no branch. With one scale this is
    plain classifier-free guidance.

    Args:
        predict: see PredictBranches; branch i does without condition i. Channels beyond those of x, a learned variance,
            are taken from the last branch as they are.
        scales: one for every branch but the last.
        interval: guide only at levels whose share is within it; elsewhere the conditional branch runs alone.
        rescale: share in [0, 1] of bringing each sample's standard deviation back to that of the conditional
            prediction.
    Returns:
        `predict(x (B, C, h, w), level)`, its prediction like x, with learned variance twice its channels.
    Raises:
        ValueError: if interval or rescale is out of range.
    Source: Ho and Salimans 2022, Eq. 6; Kynkaanniemi et al. 2024 (interval); Lin et al. 2024, Eq. 15 and 16 (rescale).
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance interval: {low} to {high} is not possible. Expected 0 <= low <= high <= 1.")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale: {rescale} is not possible. Expected a value in [0, 1].")

    def guided(x: Tensor, level: Level) -> Tensor:
        count = len(scales) + 1 if low <= level.share <= high else 1
        time = torch.full((count * len(x),), level.time, device=x.device)  # int64 or float32, as level.time is
        predictions = predict(x.repeat(count, 1, 1, 1) if count > 1 else x, time, count)
        if count == 1:
            return predictions
        predictions, variance = predictions.tensor_split([x.shape[1]], dim=1)
        *without, full = predictions.chunk(count)
        result = without[0] + scales[0] * (full - without[0])
        for scale, branch in zip(scales[1:], without[1:], strict=True):
            result = result + (scale - 1) * (full - branch)
        if rescale:
            spread = full.float().std((1, 2, 3), keepdim=True) / result.float().std((1, 2, 3), keepdim=True)
            result = result * (rescale * spread + 1 - rescale)
        return torch.cat([result, variance.chunk(count)[-1]], dim=1) if variance.shape[1] else result

    return guided


def make_denoiser(predict: Predict, kind: str, clip: float | None = None, keep_variance: bool = False) -> Denoise:
    """What samplers take, from a network.

    Args:
        predict: prediction (B, C, h, w), or (B, 2C, h, w) with a learned variance behind.
        kind: of the prediction (see ldm.diffusion.prediction).
        clip: keep clean latents within [-clip, clip]; None = leave them. The noise that a sampler takes to go with a
            clean latent follows from it, so that the two always fit together.
        keep_variance: hand on a learned variance, for ddpm.
    """

    def denoise(x: Tensor, level: Level) -> Tensor:
        # Under autocast the network may predict in 16 bits; the sampler itself needs 32.
        prediction, variance = predict(x, level).to(x.dtype).tensor_split([x.shape[1]], dim=1)
        clean = to_x0(prediction, x, level.signal, level.noise, kind)
        if clip is not None:  # an infinite prediction must not pass for black or white
            clean = torch.where(clean.isfinite(), clean, torch.nan).clamp(-clip, clip)
        return torch.cat([clean, variance], dim=1) if keep_variance and variance.shape[1] else clean

    return denoise


def join_branches(branches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of several branches of B samples as one batch.

    Args:
        branches: tensors (B, ...), the same keys and shapes in all.
    Returns:
        Tensors (n * B, ...).
    Raises:
        ValueError: if keys or shapes differ.
    """
    forms = [{name: tuple(value.shape) for name, value in branch.items()} for branch in branches]
    if any(form != forms[-1] for form in forms):
        raise ValueError(f"join_branches: conditions are {' and '.join(map(str, forms))}. Expected the same names and "
                         "shapes in all branches. Give each a stand-in, expanded to the batch.")
    return {name: torch.cat([branch[name] for branch in branches]) for name in branches[-1]}
