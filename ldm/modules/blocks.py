"""Convolutional building blocks of the U-Net, the control branches and the autoencoder."""
import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero, so that a fresh branch leaves its host unchanged at the start."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int, eps: float = 1e-5, affine: bool = True) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or fewer where that would leave less than four channels a group (small models)."""
    groups = 32
    while groups > 1 and (channels % groups or channels < 4 * groups):
        groups //= 2
    return nn.GroupNorm(groups, channels, eps=eps, affine=affine)


def set_norm_groups(module: nn.Module, groups: int) -> None:
    """Give all group norms whose channels it divides this number of groups; weights do not depend on it."""
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm) and layer.num_channels % groups == 0:
            layer.num_groups = groups


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of timesteps, cosines first: (B,), width dim -> (B, dim) float32.

    Source: Vaswani et al. 2017, section 3.5; order of the halves as in Stable Diffusion.
    """
    angle = timestep.float()[:, None] * frequencies(dim // 2, timestep.device)[None]  # (B, dim / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


@functools.lru_cache(maxsize=64)
def frequencies(count: int, device: torch.device) -> Tensor:
    """Frequencies falling from 1 to nearly 1 / 10000, (count,) float32; computed once, since they never change."""
    index = torch.arange(count, dtype=torch.float32, device=device)
    return torch.exp(-math.log(10000.0) * index / count)


def joint_linear(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What several linear layers make of the same input, in one product where gradients are kept.

    A small network's training step is bound by the number of its products, not by their size: forward and backward
    pass of n layers launch 3 n of them, one layer of all their outputs 3. Without gradients every layer computes for
    itself, so that samples do not depend on it.

    Args:
        x: (..., D).
        layers: all with a bias or none.
    Returns:
        Outputs (..., D_i) in order.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(layer(x) for layer in layers)
    biases = [layer.bias for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    joint = F.linear(x, weight, None if biases[0] is None else torch.cat(biases))
    return joint.split([layer.out_features for layer in layers], dim=-1)


class JointEmbedding:
    """An embedding of the timestep (B, E) with what all residual blocks of a network make of it, computed at once.

    It stands in for the tensor wherever a block takes one. `layers` are the blocks' `emb_layers`.
    """

    def __init__(self, embedding: Tensor, layers: Sequence[nn.Sequential]) -> None:
        outputs = joint_linear(F.silu(embedding), [layer[1] for layer in layers])
        self.outputs = dict(zip(layers, outputs, strict=True))


def embed(layers: nn.Sequential, embedding: Tensor | JointEmbedding) -> Tensor:
    """What a block's `emb_layers` make of an embedding, (B, D)."""
    return embedding.outputs[layers] if isinstance(embedding, JointEmbedding) else layers(embedding)


class TimestepSequential(nn.Sequential):
    """Sequential whose members take what they need: residual blocks the embedding, transformers the conditions.

    Upstream's checkpoints number the members of each block (`input_blocks.4.1`), hence a Sequential.
    """

    def forward(self, h: Tensor, embedding: Tensor, **conditions: Tensor | None) -> Tensor:
        """Pass (B, C, h, w) features through all members."""
        for layer in self:
            own = (embedding,) if getattr(layer, "takes_embedding", False) else ()
            h = layer(h, *own, **conditions) if getattr(layer, "takes_conditions", False) else layer(h, *own)
        return h


class Upsample(nn.Module):
    """Nearest-neighbour x2 and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.op(h)


def resampler(kind: str | None) -> nn.Module:
    """Resampling inside a residual block, without weights: `down` (mean of 2 x 2), `up` (nearest) or None."""
    return {None: nn.Identity, "down": lambda: nn.AvgPool2d(2), "up": lambda: nn.Upsample(scale_factor=2.0)}[kind]()


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the timestep embedding brought in between and a skip connection.

    Args:
        in_channels, out_channels, embedding_dim: widths of features and timestep embedding.
        use_scale_shift: the embedding scales and shifts the second norm's output instead of being added before it.
        resample: `down` or `up` changes the resolution in front of the first convolution, and of the skip; None = not.
    """

    takes_embedding = True

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, use_scale_shift: bool = False,
                 resample: str | None = None) -> None:
        super().__init__()
        self.use_scale_shift = use_scale_shift
        self.in_layers = nn.Sequential(
            group_norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, out_channels * (1 + use_scale_shift)))
        self.out_layers = nn.Sequential(  # the published weights have a dropout in third place
            group_norm(out_channels), nn.SiLU(), nn.Identity(),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.resample = resampler(resample)
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """(B, C_in, h, w) and (B, E) -> (B, C_out, h, w); with resample (B, C_out, h/2, w/2) or (B, C_out, 2h, 2w)."""
        norm, activation, convolution = self.in_layers
        residual = convolution(self.resample(activation(norm(h))))
        embedding = embed(self.emb_layers, embedding)[:, :, None, None].to(residual.dtype)
        norm, *rest = self.out_layers
        if self.use_scale_shift:
            scale, shift = embedding.chunk(2, dim=1)
            residual = norm(residual) * (1 + scale) + shift
        else:
            residual = norm(residual + embedding)
        for layer in rest:
            residual = layer(residual)
        return self.skip_connection(self.resample(h)) + residual
