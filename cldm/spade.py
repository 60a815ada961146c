"""SPADE: norms whose scale and shift are painted by the mask, and residual blocks made of them."""
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import FusedSelfAttention
from ldm.modules.blocks import ResBlock, embed, group_norm, resampler, zero_module
from ldm.modules.unet import Parts


class SpadeNorm(nn.Module):
    """Group norm whose scale and shift at every position come from the hint there.

    Args:
        channels: feature width.
        hint_channels: channels of the hint.
        hidden: width of the convolution that scale and shift share.
    Source: Park et al. 2019 (SPADE); Wang et al. 2022 (SDM), section 3.2.
    """

    def __init__(self, channels: int, hint_channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(hint_channels, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, h: Tensor, hint: Tensor) -> Tensor:
        """(B, C, h, w) features and (B, K, H, W) hint of any size -> (B, C, h, w)."""
        shared = self.mlp_shared(F.interpolate(hint, h.shape[-2:], mode="nearest"))  # (B, hidden, h, w)
        return self.norm(h) * (1 + self.mlp_gamma(shared)) + self.mlp_beta(shared)


class SpadeResBlock(nn.Module):
    """Residual block of the decoder: ResBlock with both norms replaced by SPADE norms.

    Args:
        in_channels, out_channels: feature widths.
        embedding_dim: width of the timestep embedding, which scales and shifts the second norm's output.
        hint_channels, hidden: see SpadeNorm.
        resample: `up` or None, see ResBlock.
    """

    takes_embedding = takes_conditions = True

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, hint_channels: int,
                 hidden: int = 128, resample: str | None = None) -> None:
        super().__init__()
        self.in_norm = SpadeNorm(in_channels, hint_channels, hidden)
        self.in_layers = nn.Sequential(nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_dim, 2 * out_channels))
        self.out_norm = SpadeNorm(out_channels, hint_channels, hidden)
        # The published weights of the convolution are called out_layers.2, behind a dropout that never drops.
        self.out_layers = nn.Sequential(
            nn.SiLU(), nn.Identity(), zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        self.resample = resampler(resample)
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, h: Tensor, embedding: Tensor, hint: Tensor, **_: Tensor | None) -> Tensor:
        """(B, C_in, h, w), (B, E) and the hint (B, K, H, W) -> (B, C_out, h, w), or twice as large with `up`."""
        activation, convolution = self.in_layers
        residual = convolution(self.resample(activation(self.in_norm(h, hint))))
        scale, shift = embed(self.emb_layers, embedding)[:, :, None, None].to(residual.dtype).chunk(2, dim=1)
        residual = self.out_layers(self.out_norm(residual, hint) * (1 + scale) + shift)
        return self.skip_connection(self.resample(h)) + residual


def spade_parts(hint_channels: int, hidden: int, head_dim: int) -> Parts:
    """Layers of SDM's U-Net: a plain encoder that never sees the mask, SPADE blocks in middle and decoder.

    Args:
        hint_channels, hidden: see SpadeNorm.
        head_dim: width of an attention head.
    """
    def late(width_in: int, width_out: int, embedding_dim: int, resample: str | None = None) -> nn.Module:
        return SpadeResBlock(width_in, width_out, embedding_dim, hint_channels, hidden, resample)

    def early(width_in: int, width_out: int, embedding_dim: int, resample: str | None = None) -> nn.Module:
        return ResBlock(width_in, width_out, embedding_dim, use_scale_shift=True, resample=resample)

    return Parts(
        residual=early, late_residual=late,
        downsample=lambda width, embedding_dim: early(width, width, embedding_dim, "down"),
        upsample=lambda width, embedding_dim: late(width, width, embedding_dim, "up"),
        attention=lambda width: FusedSelfAttention(width, head_dim))
