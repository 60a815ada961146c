"""All-in-attention: decoder blocks that attend to the reference, the mask and the text (TISynth)."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cldm.control import Features
from ldm.modules.attention import BasicTransformerBlock, CrossAttention, FixedContext
from ldm.modules.blocks import zero_module
from ldm.modules.unet import UNet


class AllInAttentionBlock(BasicTransformerBlock):
    """Attention to the reference and to the mask in front of a block of Stable Diffusion.

    The names are those of the published weights, in which `ssl` labels the attention to the *mask* features although
    the reference branch is called `ssl_stage_model`: `attn00_ls_trainable` attends to the reference,
    `attn01_ssl_trainable` to the mask.

    Args:
        dim: width of the features.
        heads, head_dim: attention heads.
        context_dim: width of the text embedding.
        source_dim: width of the mask and reference features.
        normalise_sources: LayerNorm on keys' and values' source (upstream: none).
        zero_out: start both attentions with a zero output projection, weights and bias (upstream: random, so that a
            fresh layer adds a random constant).
    """

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int, source_dim: int,
                 normalise_sources: bool, zero_out: bool) -> None:
        super().__init__(dim, heads, head_dim, context_dim)
        self.attn00_ls_trainable = CrossAttention(dim, source_dim, heads, head_dim)
        self.attn01_ssl_trainable = CrossAttention(dim, source_dim, heads, head_dim)
        self.norm00_trainable = nn.LayerNorm(dim)
        self.norm01_trainable = nn.LayerNorm(dim)
        self.reference_norm_trainable = nn.LayerNorm(source_dim) if normalise_sources else nn.Identity()
        self.hint_norm_trainable = nn.LayerNorm(source_dim) if normalise_sources else nn.Identity()
        if zero_out:
            zero_module(self.attn00_ls_trainable.to_out)
            zero_module(self.attn01_ssl_trainable.to_out)

    def forward(self, x: Tensor, context: Tensor, hint: Tensor, reference: Tensor) -> Tensor:
        """Features (B, N, dim), text (B, L, context_dim), maps of two branches (B, source_dim, h, w) -> (B, N, dim)."""
        reference = self.reference_norm_trainable(reference.flatten(2).transpose(1, 2))  # (B, h*w, source_dim)
        hint = self.hint_norm_trainable(hint.flatten(2).transpose(1, 2))  # (B, h*w, source_dim)
        x = x + self.attn00_ls_trainable(self.norm00_trainable(x), reference)
        x = x + self.attn01_ssl_trainable(self.norm01_trainable(x), hint)
        return super().forward(x, context)


class AllInAttentionUNet(UNet):
    """U-Net whose middle and decoder transformers attend to the features of two control branches.

    Args:
        coupling: how the branches reach the decoder.
            `upstream`: only by attention, on the projected features. Decoder levels without a transformer drop them.
            `residual`: attention on the raw features, normalised and with zero-initialised outputs; and the projected
            features are added to skips and middle, as in ControlNet, on every level. Both start at zero, and both
            have gradients from the first step (a zero projection behind a zero projection would have none).
        unet: see UNet.
    """

    def __init__(self, coupling: str = "residual", **unet: object) -> None:
        if coupling not in ("upstream", "residual"):
            raise ValueError(f"coupling: {coupling!r} is unknown. Expected upstream or residual.")
        is_residual = coupling == "residual"

        def factory(channels: int, heads: int, head_dim: int, context_dim: int, skip_channels: int) -> nn.Module:
            return AllInAttentionBlock(channels, heads, head_dim, context_dim, skip_channels,
                                       normalise_sources=is_residual, zero_out=is_residual)

        super().__init__(decoder_factory=factory, **unet)
        self.is_residual = is_residual

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, hint: Features, reference: Features,
                look: Tensor | None = None) -> Tensor:
        """Prediction (see UNet) from the features of the mask branch and of the reference branch.

        `look`: (B, E), see UNetEncoder.embed_timestep.
        """
        embedding = self.embed_timestep(timestep, look)
        return self.decode(list(self.encode(latent, embedding, context)), embedding, context, hint, reference)

    def decode(self, skips: Sequence[Tensor], embedding: Tensor, context: Tensor | FixedContext, hint: Features,
               reference: Features) -> Tensor:
        """Prediction from the features of every input block, `skips`, which `encode` yields (see forward)."""
        skips = list(skips)
        hints, references = (list(f.raw if self.is_residual else f.projected) for f in (hint, reference))
        h = self.run(self.middle_block, skips[-1], embedding, context=context, hint=hints.pop(),
                     reference=references.pop())
        if self.is_residual:
            *added, extra = (a + b for a, b in zip(hint.projected, reference.projected, strict=True))
            h, skips = h + extra, [skip + extra for skip, extra in zip(skips, added, strict=True)]
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), embedding, context=context, hint=hints.pop(),
                         reference=references.pop())
        return self.out(h)

    def attended(self) -> list[bool]:
        """For every encoder feature and the middle one: does a transformer of the decoder attend to it?"""
        return [len(block) > 1 and hasattr(block[1], "transformer_blocks")
                for block in reversed(self.output_blocks)] + [True]
