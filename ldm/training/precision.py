"""Half-precision copies of the weights for one training step under autocast: cast all at once instead of one by one."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)  # whose weights autocast would cast; norms stay float32


class CastAll(torch.autograd.Function):
    """Tensors in another precision; their gradients come back in the precision of the tensors, all at once too."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Cast."""
        ctx.set_materialize_grads(False)  # what the step did not use has no gradient, rather than one of zeros
        return tuple(cast_all(tensors, dtype))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Cast back."""
        cast = iter(cast_all([g for g in gradients if g is not None], torch.float32))
        return None, *(None if g is None else next(cast) for g in gradients)


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another precision, in the memory format that each has."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


class StepWeights:
    """Gives the layers of a method their weights in half precision for the time of a forward pass.

    Autocast casts each weight by itself, at every use: a third of all kernels of a small model's step. Frozen weights
    are cast once. Numbers are those of autocast.

    Args:
        method: in training; its parameters must not be replaced later.
    """

    def __init__(self, method: nn.Module) -> None:
        places: dict[int, list[tuple[dict, str]]] = {}
        parameters: dict[int, nn.Parameter] = {}
        for layer in method.modules():
            if isinstance(layer, LAYERS):
                for name, parameter in layer._parameters.items():
                    if parameter is not None and parameter.dtype == torch.float32:
                        places.setdefault(id(parameter), []).append((layer._parameters, name))
                        parameters[id(parameter)] = parameter
        ids = sorted(places, key=lambda key: not parameters[key].requires_grad)  # those that train come first
        self.places = [places[key] for key in ids]
        self.parameters = [parameters[key] for key in ids]
        self.num_trained = sum(p.requires_grad for p in self.parameters)
        self.frozen: list[Tensor] | None = None

    @contextmanager
    def in_place(self, dtype: torch.dtype) -> Iterator[None]:
        """Within it, layers have weights of this dtype; gradients reach the float32 parameters."""
        trained, frozen = self.parameters[:self.num_trained], self.parameters[self.num_trained:]
        if self.frozen is None:
            self.frozen = cast_all([p.detach() for p in frozen], dtype)
        self.put([*CastAll.apply(dtype, *trained), *self.frozen])
        try:
            yield
        finally:
            self.put(self.parameters)

    def put(self, weights: Sequence[Tensor]) -> None:
        """Put tensors in the places of the parameters."""
        for places, weight in zip(self.places, weights, strict=True):
            for owner, name in places:
                owner[name] = weight
