"""The U-Net of latent diffusion under its CompVis key names: encoder half, and the whole network."""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.modules.attention import BasicTransformerBlock, JointContext, SpatialTransformer
from ldm.modules.blocks import (
    Downsample,
    JointEmbedding,
    ResBlock,
    TimestepSequential,
    Upsample,
    group_norm,
    timestep_embedding,
    zero_module,
)

# make_block(channels, heads, head_dim, context_dim, skip_channels): the transformer block of a decoder level.
# skip_channels is the width of the encoder features that arrive there.
BlockFactory = Callable[[int, int, int, int, int], nn.Module]


def plain_block(channels: int, heads: int, head_dim: int, context_dim: int, skip_channels: int) -> nn.Module:
    """Stable Diffusion's transformer block, which does not look at the skip features."""
    return BasicTransformerBlock(channels, heads, head_dim, context_dim)


@dataclass(frozen=True)
class Parts:
    """What a U-Net is built of: functions that make its layers. The defaults are Stable Diffusion's.

    Attributes:
        residual: `(in, out, embedding_dim)`, a block of the encoder.
        late_residual: the same for middle and decoder.
        downsample, upsample: `(width, embedding_dim)`, the change to the next level.
        attention: `(width)`, in the place of the transformers; None = these, which attend to a context.
    """

    residual: Callable[[int, int, int], nn.Module] = ResBlock
    late_residual: Callable[[int, int, int], nn.Module] = ResBlock
    downsample: Callable[[int, int], nn.Module] = lambda width, embedding_dim: Downsample(width)
    upsample: Callable[[int, int], nn.Module] = lambda width, embedding_dim: Upsample(width)
    attention: Callable[[int], nn.Module] | None = None


STABLE_DIFFUSION = Parts()


class UNetEncoder(nn.Module):
    """Timestep embedding, input blocks and middle block.

    Args:
        in_channels: channels of the latent.
        model_channels: width of the first level.
        num_res_blocks: residual blocks a level.
        attention_resolutions: downsampling factors (1, 2, 4, ...) at which there are transformers.
        channel_mult: width of each level as a whole multiple of model_channels; each further level halves the
            resolution.
        num_heads: attention heads; their width is channels / num_heads.
        num_head_channels: width of the heads, whose number then is channels / num_head_channels (SD2: 64); None =
            num_heads counts.
        context_dim: width of the text embedding.
        use_checkpoint: recompute activations in the backward pass to save memory.
        middle_factory: makes the middle transformer block.
        parts: makes the layers.
    Raises:
        ValueError: for fractions in channel_mult, or widths that num_heads does not divide.
    """

    def __init__(self, in_channels: int = 4, model_channels: int = 320, num_res_blocks: int = 2,
                 attention_resolutions: Sequence[int] = (4, 2, 1), channel_mult: Sequence[int] = (1, 2, 4, 4),
                 num_heads: int = 8, context_dim: int = 768, use_checkpoint: bool = False,
                 middle_factory: BlockFactory = plain_block, parts: Parts = STABLE_DIFFUSION,
                 num_head_channels: int | None = None) -> None:
        super().__init__()
        if not all(isinstance(multiple, int) and multiple > 0 for multiple in channel_mult):
            raise ValueError(f"U-Net: channel_mult {list(channel_mult)}. Expected whole multiples, 1 or more. "
                             "Give a smaller model_channels: 128 times 1, 2, 4 for 256 times 0.5, 1, 2.")
        self.widths = widths = [model_channels * multiple for multiple in channel_mult]
        what = "num_head_channels" if num_head_channels else "num_heads"
        divisor = num_head_channels or num_heads
        odd = [w for w in widths if w % divisor and parts.attention is None]
        if odd:
            raise ValueError(f"U-Net: {what}={divisor} does not divide the widths {odd}. Change {what}.")
        self.parts, self.is_joint = parts, True  # False where blocks are compiled, which take tensors only
        self.in_channels, self.model_channels = in_channels, model_channels
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.context_dim, self.use_checkpoint = context_dim, use_checkpoint
        self.num_res_blocks, self.attention_resolutions = num_res_blocks, attention_resolutions
        self.downsampling = 2 ** (len(channel_mult) - 1)
        self.embedding_dim = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, self.embedding_dim), nn.SiLU(), nn.Linear(self.embedding_dim, self.embedding_dim))
        self.input_blocks = nn.ModuleList([TimestepSequential(nn.Conv2d(in_channels, model_channels, 3, padding=1))])
        self.feature_channels = [model_channels]  # of every input block, and of the middle block at the end
        width = model_channels
        for level, level_width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [parts.residual(width, level_width, self.embedding_dim)]
                width = level_width
                if 2**level in attention_resolutions:
                    layers.append(self.make_transformer(width, plain_block, width))
                self.add_input_block(layers, width)
            if level < len(widths) - 1:
                self.add_input_block([parts.downsample(width, self.embedding_dim)], width)
        self.middle_block = TimestepSequential(
            parts.late_residual(width, width, self.embedding_dim), self.make_transformer(width, middle_factory, width),
            parts.late_residual(width, width, self.embedding_dim))
        self.feature_channels.append(width)

    def make_transformer(self, channels: int, factory: BlockFactory, skip_channels: int) -> nn.Module:
        """A transformer at this width, its block made by the factory; or the attention that `parts` has instead."""
        if self.parts.attention is not None:
            return self.parts.attention(channels)
        heads = channels // self.num_head_channels if self.num_head_channels else self.num_heads
        return SpatialTransformer(channels, factory(channels, heads, channels // heads, self.context_dim,
                                                    skip_channels))

    def add_input_block(self, layers: list[nn.Module], width: int) -> None:
        """Append an input block and note the width of its features."""
        self.input_blocks.append(TimestepSequential(*layers))
        self.feature_channels.append(width)

    def embed_timestep(self, timestep: Tensor, added: Tensor | None = None) -> Tensor | JointEmbedding:
        """(B,) int64 -> (B, 4 * model_channels), plus what else all residual blocks get to know, of the same shape."""
        embedding = self.time_embed(
            timestep_embedding(timestep, self.model_channels).to(self.time_embed[0].weight.dtype))
        embedding = embedding if added is None else embedding + added
        if not (self.is_joint and torch.is_grad_enabled()):
            return embedding
        return JointEmbedding(embedding, [layer.emb_layers for layer in self.modules() if hasattr(layer, "emb_layers")])

    def join_context(self, context: Tensor, *others: "UNetEncoder") -> Tensor | JointContext:
        """A context for this network and others, its keys and values for all of them computed at once (training)."""
        if not (self.is_joint and torch.is_grad_enabled()):
            return context
        return JointContext(context, [block.attn2 for network in (self, *others) for part in network.modules()
                                      if isinstance(part, SpatialTransformer) for block in part.transformer_blocks])

    def run(self, block: nn.Module, *args: Tensor, **conditions: Tensor | None) -> Tensor:
        """Run a block, recomputing it in the backward pass when use_checkpoint is on."""
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, **conditions)
        return block(*args, **conditions)

    def encode(self, latent: Tensor, embedding: Tensor, context: Tensor | None,
               stem: Tensor | None = None) -> Iterator[Tensor]:
        """Features (B, feature_channels[i], h_i, w_i) of every input block in order (see UNet.forward).

        Args:
            embedding: (B, E) of the timestep.
            stem: (B, model_channels, h, w), added behind the first convolution.
        """
        h = latent
        for index, block in enumerate(self.input_blocks):
            h = self.run(block, h, embedding, context=context)
            if index == 0 and stem is not None:
                h = h + stem
            yield h


class UNet(UNetEncoder):
    """The noise-predicting network.

    Args:
        out_channels: channels of the prediction.
        decoder_factory: makes the transformer blocks of middle and output blocks.
        encoder: the other arguments, see UNetEncoder.
    """

    def __init__(self, out_channels: int = 4, decoder_factory: BlockFactory = plain_block, **encoder: object) -> None:
        super().__init__(middle_factory=decoder_factory, **encoder)
        self.output_blocks = nn.ModuleList()
        *skips, width = self.feature_channels
        for level, level_width in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks + 1):
                skip = skips.pop()
                layers: list[nn.Module] = [self.parts.late_residual(width + skip, level_width, self.embedding_dim)]
                width = level_width
                if 2**level in self.attention_resolutions:
                    layers.append(self.make_transformer(width, decoder_factory, skip))
                if level and i == self.num_res_blocks:
                    layers.append(self.parts.upsample(width, self.embedding_dim))
                self.output_blocks.append(TimestepSequential(*layers))
        self.out = nn.Sequential(
            group_norm(width), nn.SiLU(), zero_module(nn.Conv2d(width, out_channels, 3, padding=1)))

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor | None = None,
                **conditions: Tensor) -> Tensor:
        """Prediction without any control branch.

        Args:
            latent: (B, in_channels, h, w), h and w multiples of `downsampling`.
            timestep: (B,) int64.
            context: (B, L, context_dim), None without transformers.
            conditions: what else the layers of middle and decoder take.
        Returns:
            (B, out_channels, h, w).
        """
        embedding = self.embed_timestep(timestep)
        skips = list(self.encode(latent, embedding, context))
        h = self.run(self.middle_block, skips[-1], embedding, context=context, **conditions)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, skips.pop()], dim=1), embedding, context=context, **conditions)
        return self.out(h)
