"""Control branch: a second U-Net encoder that also sees a hint or a reference (Zhang et al. 2023)."""
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from ldm.modules.attention import FixedContext
from ldm.modules.blocks import zero_module
from ldm.modules.unet import UNetEncoder

STEM_WIDTHS = (16, 16, 32, 32, 96, 96, 256)


class Features(NamedTuple):
    """What a branch hands to the decoder, one map for every input block and one for the middle block.

    Attributes:
        raw: encoder features, (B, C_i, h_i, w_i).
        projected: the same behind their zero-initialised 1x1 convolutions.
    """

    raw: list[Tensor]
    projected: list[Tensor]


class ControlBranch(UNetEncoder):
    """U-Net encoder whose first features get the stem of a hint added.

    Args:
        hint_channels: channels of the hint (image resolution) or of the reference latent.
        hint_strides: strides of the stem's three reductions: (2, 2, 2) takes a hint from image to latent resolution,
            (1, 1, 1) leaves a latent as it is.
        stem_widths: widths of the stem's seven hidden convolutions.
        encoder: see UNetEncoder; the same numbers as the U-Net's.
    """

    def __init__(self, hint_channels: int, hint_strides: Sequence[int] = (2, 2, 2),
                 stem_widths: Sequence[int] = STEM_WIDTHS, **encoder: object) -> None:
        super().__init__(**encoder)
        strides = (1, 1, hint_strides[0], 1, hint_strides[1], 1, hint_strides[2])
        layers: list[nn.Module] = []
        for (width_in, width_out), stride in zip(pairwise((hint_channels, *stem_widths)), strides, strict=True):
            layers += [nn.Conv2d(width_in, width_out, 3, padding=1, stride=stride), nn.SiLU()]
        layers.append(zero_module(nn.Conv2d(stem_widths[-1], self.model_channels, 3, padding=1)))
        self.input_hint_block = nn.Sequential(*layers)
        # Each wrapped in a Sequential, because the published weights are called zero_convs.N.0.*
        self.zero_convs = nn.ModuleList(
            nn.Sequential(zero_module(nn.Conv2d(c, c, 1))) for c in self.feature_channels[:-1])
        middle = self.feature_channels[-1]
        self.middle_block_out = nn.Sequential(zero_module(nn.Conv2d(middle, middle, 1)))

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, hint: Tensor,
                look: Tensor | None = None) -> Features:
        """Features for the decoder; arguments as for the U-Net, `hint` as for `stem`."""
        return self.features(latent, timestep, context, self.stem(hint, latent.shape[-2:]), look)

    def stem(self, hint: Tensor, size: Sequence[int]) -> Tensor:
        """What the branch adds behind its first convolution: (B, hint_channels, H, W) -> (B, model_channels, h, w).

        Raises:
            ValueError: if H, W divided by the strides are not the `size` (h, w) of the latent.
        """
        stem = self.input_hint_block(hint)
        if stem.shape[-2:] != tuple(size):
            raise ValueError(f"control branch: hint {tuple(hint.shape[-2:])} becomes {tuple(stem.shape[-2:])}, but the "
                             f"latent is {tuple(size)}. Give both the same image size.")
        return stem

    def features(self, latent: Tensor, timestep: Tensor, context: Tensor | FixedContext, stem: Tensor,
                 look: Tensor | None = None) -> Features:
        """The same as forward, from a stem that was computed before."""
        embedding = self.embed_timestep(timestep, look)
        raw = list(self.encode(latent, embedding, context, stem))
        projected = [conv(h) for conv, h in zip(self.zero_convs, raw, strict=True)]
        raw.append(self.run(self.middle_block, raw[-1], embedding, context=context))
        projected.append(self.middle_block_out(raw[-1]))
        return Features(raw, projected)
