"""Segmentation-guided diffusion: a plain pixel-space U-Net that sees the mask beside the noisy image."""
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.methods.pixel import PixelDiffusion
from ldm.modules.attention import SelfAttention
from ldm.modules.blocks import set_norm_groups
from ldm.modules.unet import Parts, UNet


class SegGuided(PixelDiffusion):
    """Noise prediction from image and hint, concatenated (Konz et al. 2024).

    The network is that of diffusers' UNet2DModel, whose weights load (see ldm.weights.names).

    Args:
        class_table: name, file or mapping (see ClassTable.load).
        unet: model_channels, channel_mult, num_res_blocks, attention_resolutions, use_checkpoint of UNetEncoder.
        head_dim: width of an attention head; diffusers' default is 8.
        norm_groups: groups of the norms whose channels it divides.
        pixel: see PixelDiffusion. The published weights want hint_mode `single255`.
    """

    def __init__(self, class_table: str | Mapping[str, Any], unet: Mapping[str, Any], head_dim: int = 8,
                 norm_groups: int = 32, **pixel: Any) -> None:
        super().__init__(class_table, **{"guidance_scale": 1.0, **pixel})
        parts = Parts(attention=lambda width: SelfAttention(width, head_dim))
        self.model.diffusion_model = UNet(
            in_channels=self.image_channels + self.hint_channels, out_channels=self.image_channels, parts=parts, **unet)
        set_norm_groups(self, norm_groups)

    def predict_noise(self, latent: Tensor, timestep: Tensor, hint: Tensor) -> Tensor:
        """Prediction of kind prediction_type (see DiffusionMethod)."""
        return self.model.diffusion_model(torch.cat([latent, hint], dim=1), timestep)
