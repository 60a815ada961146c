"""What a network can predict of a latent x = signal * clean + noise * epsilon, and the clean latent it implies.

| kind | is | on |
|---|---|---|
| epsilon | the noise | paths whose signal is never 0 |
| x0 | the clean latent | every path |
| v | signal * epsilon - noise * clean | variance-preserving paths (signal^2 + noise^2 = 1) |
| velocity | epsilon - clean, dx/ds | flows (signal + noise = 1) |

Source: Salimans and Ho 2022, appendix D (v); Liu et al. 2023 (velocity).
"""

from torch import Tensor

KINDS = ("epsilon", "x0", "v", "velocity")
Factor = float | Tensor


def target_of(kind: str, clean: Tensor, epsilon: Tensor, signal: Factor, noise: Factor) -> Tensor:
    """What a network of this kind is trained to predict.

    Args:
        kind: of KINDS.
        clean, epsilon: clean latent of unit variance and the noise it is mixed with, (B, C, h, w).
        signal, noise: factors of the mixture, numbers or (B, 1, 1, 1).
    Returns:
        (B, C, h, w).
    Raises:
        ValueError: for an unknown kind, or shapes that differ.
    """
    check(kind, "epsilon", epsilon, clean)
    if kind == "v":
        return signal * epsilon - noise * clean
    if kind == "velocity":
        return epsilon - clean
    return clean if kind == "x0" else epsilon


def to_x0(prediction: Tensor, x: Tensor, signal: Factor, noise: Factor, kind: str) -> Tensor:
    """The clean latent that a prediction implies; arguments, shapes and errors as for target_of, x the mixture."""
    check(kind, "prediction", prediction, x)
    if kind == "x0":
        return prediction
    if kind == "epsilon":
        return (x - noise * prediction) / signal
    return (signal * x if kind == "v" else x) - noise * prediction


def check(kind: str, what: str, tensor: Tensor, like: Tensor) -> None:
    """ValueError for an unknown kind, or if a tensor has not the shape of the latent."""
    if kind not in KINDS:
        raise ValueError(f"prediction_type: unknown value {kind!r}. Expected one of {', '.join(KINDS)}. Change the "
                         "config.")
    if tensor.shape != like.shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}. Expected {tuple(like.shape)}, the latent's.")
