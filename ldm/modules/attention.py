"""Attention on flattened feature maps: self-, cross- and transformer block of Stable Diffusion."""
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.blocks import group_norm, joint_linear, zero_module


class CrossAttention(nn.Module):
    """Multi-head attention of a query sequence to a source sequence (to itself when none is given).

    Args:
        query_dim: width of the queries and of the output.
        context_dim: width of the source; None = query_dim.
        heads, head_dim: number of heads and width of each.
    """

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        inner = heads * head_dim
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        # A Sequential of two because the published weights are called to_out.0.*
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Identity())

    def forward(self, query: Tensor, context: "Tensor | KeysValues | None" = None) -> Tensor:
        """(B, N, query_dim) and (B, M, context_dim), or its keys and values -> (B, N, query_dim)."""
        if context is None:
            q, k, v = map(self.split_heads, joint_linear(query, (self.to_q, self.to_k, self.to_v)))
        else:
            k, v = context if isinstance(context, tuple) else self.keys_values(context)
            q = self.split_heads(self.to_q(query))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, head_dim)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def keys_values(self, context: Tensor) -> "KeysValues":
        """(B, M, context_dim) -> keys and values, each (B, heads, M, head_dim)."""
        k, v = joint_linear(context, (self.to_k, self.to_v))
        return self.split_heads(k), self.split_heads(v)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, heads * d) -> (B, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


KeysValues = tuple[Tensor, Tensor]


class FixedContext:
    """A context that many steps attend to: every layer's keys and values of it are computed once, at the first use.

    It stands in for the tensor wherever a network takes a context.

    Args:
        context: (B, L, D).
    """

    def __init__(self, context: Tensor) -> None:
        self.context = context
        self.kept: dict[CrossAttention, KeysValues] = {}
        self.look_up: Callable[[CrossAttention], KeysValues] = lambda layer: layer.keys_values(self.context)

    def keys_values(self, layer: CrossAttention) -> KeysValues:
        """What CrossAttention.keys_values gives for the context."""
        if layer not in self.kept:
            self.kept[layer] = self.look_up(layer)
        return self.kept[layer]

    def last(self, count: int) -> "FixedContext":
        """The last `count` samples; they share what is computed for all."""
        if count == len(self.context):
            return self
        part = FixedContext(self.context[-count:])
        part.look_up = lambda layer: tuple(tensor[-count:] for tensor in self.keys_values(layer))
        return part


class JointContext(FixedContext):
    """A context whose keys and values of all layers that attend to it are computed at once, for one training step."""

    def __init__(self, context: Tensor, layers: Sequence[CrossAttention]) -> None:
        super().__init__(context)
        outputs = joint_linear(context, [linear for layer in layers for linear in (layer.to_k, layer.to_v)])
        self.kept = {layer: (layer.split_heads(k), layer.split_heads(v))
                     for layer, k, v in zip(layers, outputs[::2], outputs[1::2], strict=True)}


class GEGLU(nn.Module):
    """Linear layer to four times the width whose output is gated by the GELU of its second half (Shazeer 2020)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, 4 * dim)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU feed-forward layer, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each behind a LayerNorm and added to its input."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, head_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor, **_: Tensor | None) -> Tensor:
        """(B, N, dim) features and (B, L, context_dim) text -> (B, N, dim)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block applied to the positions of a feature map, with 1x1 convolutions around it.

    Args:
        channels: feature width.
        block: the transformer block; anything called as block(x, **conditions) on (B, N, channels).
    """

    takes_conditions = True

    def __init__(self, channels: int, block: nn.Module) -> None:
        super().__init__()
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = zero_module(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor, **conditions: Tensor | None) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        height, width = h.shape[-2:]
        x = self.proj_in(self.norm(h)).flatten(2).transpose(1, 2)  # (B, h*w, C)
        context = conditions.get("context")
        for block in self.transformer_blocks:
            if isinstance(context, FixedContext):
                conditions = {**conditions, "context": context.keys_values(block.attn2)}
            x = block(x, **conditions)
        x = x.transpose(1, 2).unflatten(2, (height, width))  # (B, C, h, w)
        return h + self.proj_out(x)


class SelfAttention(nn.Module):
    """Self-attention of a feature map, added to it; its weights are called as in diffusers' UNet2DModel."""

    def __init__(self, channels: int, head_dim: int = 8) -> None:
        super().__init__()
        self.heads = count_heads(channels, head_dim)
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(zero_module(nn.Linear(channels, channels)))

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        x = self.group_norm(h).flatten(2).transpose(1, 2)  # (B, h*w, C)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in joint_linear(x, (self.to_q, self.to_k, self.to_v)))  # (B, heads, h*w, d)
        out = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + out.transpose(1, 2).unflatten(2, h.shape[-2:])


class FusedSelfAttention(nn.Module):
    """The same with one projection, as in ADM and SDM: a head's queries, keys and values lie side by side in `qkv`."""

    def __init__(self, channels: int, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = count_heads(channels, head_dim)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        qkv = self.qkv(self.norm(h).flatten(2)).unflatten(1, (self.heads, 3, -1))  # (B, heads, 3, d, h*w)
        q, k, v = qkv.transpose(-1, -2).unbind(2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)  # (B, C, h*w)
        return h + self.proj_out(out).unflatten(2, h.shape[-2:])


def count_heads(channels: int, head_dim: int) -> int:
    """Heads of this width in so many channels; ValueError if it does not divide them."""
    if channels % head_dim:
        raise ValueError(f"attention: head_dim {head_dim} does not divide {channels} channels. Change head_dim.")
    return channels // head_dim
