"""Classifier-free guidance as a wrapper of a network, so that no sampler knows about it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]


def with_guidance(
    predict: Callable[..., Tensor],
    conditions: Mapping[str, Any],
    null_conditions: Mapping[str, Any],
    guidance_scale: float,
) -> Denoise:
    """Bind conditions to a network and steer it away from the unconditional answer.

    Both branches run as one batch of 2B. At guidance_scale 1 the unconditional one has no weight and is left out.

    Args:
        predict: `predict(latent, timestep, **conditions)`, returns a tensor like latent.
        conditions: keyword arguments of predict: tensors (B, ...), lists or tuples of such, or None.
        null_conditions: the same keys with what stands for "not given", e.g. the context of the empty prompt.
        guidance_scale: 1 = off; larger follows the conditions more strongly.

    Returns:
        `denoise(latent (B, C, h, w), timestep (B,)) -> prediction (B, C, h, w)`.

    Raises:
        ValueError: if the two sets of conditions have different keys or cannot be joined.
    Source: Ho and Salimans 2022, Eq. 6, in the form with weight 1 for plain conditional sampling.
    """
    if guidance_scale == 1:
        return lambda latent, timestep: predict(latent, timestep, **conditions)
    if set(conditions) != set(null_conditions):
        raise ValueError(
            f"with_guidance: null_conditions has keys {sorted(null_conditions)}. Expected {sorted(conditions)},"
            " those of conditions. Pass a stand-in for each."
        )
    both = {name: _join(name, null_conditions[name], value) for name, value in conditions.items()}

    def denoise(latent: Tensor, timestep: Tensor) -> Tensor:
        prediction = predict(torch.cat([latent, latent]), torch.cat([timestep, timestep]), **both)
        unconditional, conditional = prediction.chunk(2)  # each (B, C, h, w)
        return unconditional + guidance_scale * (conditional - unconditional)

    return denoise


def _join(name: str, null: Any, value: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(null, Tensor) and value.shape == null.shape:
        return torch.cat([null, value])
    if isinstance(value, (list, tuple)) and isinstance(null, (list, tuple)) and len(value) == len(null):
        return type(value)(_join(name, first, second) for first, second in zip(null, value, strict=True))
    if value is None and null is None:
        return None
    raise ValueError(
        f"with_guidance: condition {name} is {_describe(value)}, its null is {_describe(null)}."
        " Expected two tensors of one shape, two lists of such, or None twice. Expand the null to the batch."
    )


def _describe(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
