"""Semantic diffusion models (SDM, ISDM): a pixel-space U-Net whose decoder is normalised by the mask."""
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cldm.spade import spade_parts
from ldm.methods.pixel import PixelDiffusion
from ldm.modules.blocks import set_norm_groups
from ldm.modules.unet import UNet


class SDM(PixelDiffusion):
    """Noise and variance prediction; middle and decoder are SPADE blocks, the encoder never sees the mask.

    Weights are called as in the published files (see ldm.weights.names).

    Args:
        class_table: name, file or mapping (see ClassTable.load).
        unet: model_channels, channel_mult, num_res_blocks, attention_resolutions (downsampling factors, not pixels),
            use_checkpoint of UNetEncoder.
        head_dim: width of an attention head.
        spade_hidden: width inside each SPADE norm.
        norm_groups: groups of the norms whose channels it divides.
        pixel: see PixelDiffusion.
    Source: Wang et al. 2022 (SDM).
    """

    has_learned_variance = True

    def __init__(self, class_table: str | Mapping[str, Any], unet: Mapping[str, Any], head_dim: int = 64,
                 spade_hidden: int = 128, norm_groups: int = 32, **pixel: Any) -> None:
        super().__init__(class_table, **{"guidance_scale": 1.5, **pixel})
        if self.prediction_type != "epsilon":
            raise ValueError(f"SDM: prediction_type {self.prediction_type!r}. Expected epsilon: its bound wants it.")
        self.model.diffusion_model = UNet(
            in_channels=self.image_channels, out_channels=2 * self.image_channels,
            parts=spade_parts(self.hint_channels, spade_hidden, head_dim), **unet)
        set_norm_groups(self, norm_groups)

    def predict_noise(self, latent: Tensor, timestep: Tensor, hint: Tensor) -> Tensor:
        """Predicted noise and, behind it, the values of learned_log_variance (see DiffusionMethod)."""
        return self.model.diffusion_model(latent, timestep, hint=hint)
