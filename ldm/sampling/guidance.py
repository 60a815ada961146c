"""Classifier-free guidance as a wrapper of a network, so that no sampler knows about it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
# predict(latent (n * B, C, h, w), timestep (n * B,), n): answers of the last n branches; the last is the conditional.
PredictBranches = Callable[[Tensor, Tensor, int], Tensor]


def guide(
    predict: PredictBranches,
    scales: Sequence[float],
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
    num_timesteps: int = 1000,
) -> Denoise:
    """Steer a network away from what it answers without some of its conditions.

    All branches run as one batch. Each scale moves the answer by (scale - 1) times what the condition changes, so that
    several conditions have each their own strength, and one with scale 1 needs no branch. With one scale this is plain
    classifier-free guidance.

    Args:
        predict: answers for the last n branches (see PredictBranches); branch i does without condition i, the last one
            has all. Channels beyond those of the latent, a learned variance, are taken from the last one as they are.
        scales: one for every branch but the last.
        interval: guide only at timesteps in [low, high] * num_timesteps; elsewhere the conditional branch runs alone.
        rescale: share in [0, 1] of bringing each sample's standard deviation back to that of the conditional answer.
        num_timesteps: T of the schedule.

    Returns:
        `denoise(latent (B, C, h, w), timestep (B,), the same for all) -> prediction (B, C, h, w)`.

    Raises:
        ValueError: if interval or rescale is out of range.
    Source: Ho and Salimans 2022, Eq. 6; Kynkaanniemi et al. 2024 (interval); Lin et al. 2024, Eq. 15 and 16 (rescale).
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance interval: {low} to {high} is not possible. Expected 0 <= low <= high <= 1.")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale: {rescale} is not possible. Expected a value in [0, 1].")

    def denoise(latent: Tensor, timestep: Tensor) -> Tensor:
        # Samplers hand over timesteps on the CPU: looking at one does not wait for the GPU.
        is_guided = bool(scales) and low * num_timesteps <= timestep[0].item() <= high * num_timesteps
        timestep = timestep.to(latent.device)
        if not is_guided:
            return predict(latent, timestep, 1)
        count = len(scales) + 1
        answers = predict(latent.repeat(count, 1, 1, 1), timestep.repeat(count), count)
        answers, variance = answers.tensor_split([latent.shape[1]], dim=1)
        *without, full = answers.chunk(count)
        result = without[0] + scales[0] * (full - without[0])
        for scale, branch in zip(scales[1:], without[1:], strict=True):
            result = result + (scale - 1) * (full - branch)
        if rescale:
            spread = full.float().std((1, 2, 3), keepdim=True) / result.float().std((1, 2, 3), keepdim=True)
            result = result * (rescale * spread + 1 - rescale)
        return torch.cat([result, variance.chunk(count)[-1]], dim=1) if variance.shape[1] else result

    return denoise


def with_guidance(
    predict: Callable[..., Tensor],
    conditions: Mapping[str, Any],
    null_conditions: Mapping[str, Any],
    guidance_scale: float,
) -> Denoise:
    """Bind conditions to a network and guide it with one scale; nothing is computed in advance.

    Args:
        predict: `predict(latent, timestep, **conditions)`, returns a tensor like latent.
        conditions: keyword arguments of predict: tensors (B, ...), lists or tuples of such, or None.
        null_conditions: the same keys with what stands for "not given", e.g. the context of the empty prompt.
        guidance_scale: 1 = off; larger follows the conditions more strongly.

    Returns:
        `denoise(latent (B, C, h, w), timestep (B,)) -> prediction (B, C, h, w)`.

    Raises:
        ValueError: if the two sets of conditions have different keys or cannot be joined.
    """
    if guidance_scale == 1:
        return guide(lambda latent, timestep, _: predict(latent, timestep, **conditions), [])
    both = join_branches([null_conditions, conditions])
    return guide(lambda latent, timestep, _: predict(latent, timestep, **both), [guidance_scale])


def join_branches(branches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Conditions of several branches of B samples as one batch.

    Args:
        branches: mappings with the same keys: tensors (B, ...), lists or tuples of such, or None.

    Returns:
        One mapping, tensors of (n * B, ...).

    Raises:
        ValueError: if keys, shapes or kinds differ.
    """
    names = {tuple(sorted(branch)) for branch in branches}
    if len(names) > 1:
        raise ValueError(
            f"with_guidance: branches have the keys {' and '.join(str(list(keys)) for keys in sorted(names))}."
            " Expected the same in all. Pass a stand-in for each."
        )
    return {name: _join(name, [branch[name] for branch in branches]) for name in branches[-1]}


def _join(name: str, values: Sequence[Any]) -> Any:
    first = values[0]
    if all(isinstance(value, Tensor) and value.shape == values[-1].shape for value in values):
        return torch.cat(list(values))
    if all(isinstance(value, (list, tuple)) and len(value) == len(values[-1]) for value in values):
        return type(first)(_join(name, parts) for parts in zip(*values, strict=True))
    if all(value is None for value in values):
        return None
    raise ValueError(
        f"with_guidance: condition {name} is {_describe(values[-1])}, without it {_describe(first)}."
        " Expected tensors of one shape, lists of such, or None throughout. Expand the null to the batch."
    )


def _describe(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
