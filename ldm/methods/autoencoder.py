"""Training of the autoencoder, as a method behind the same train.py as the generators."""
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.methods.base import Method, WeightGroup
from ldm.modules.perceptual import PerceptualLoss
from ldm.util import instantiate_from_config


class AutoencoderMethod(Method):
    """Trains an autoencoder on single images: L1 in opponent colours + LPIPS + a little KL.

    Its state_dict has the keys of the autoencoder under `first_stage_model.`, as the latent methods load it.

    Args:
        autoencoder: config of the network.
        perceptual_weights: file for PerceptualLoss; needed when perceptual_weight > 0.
        perceptual_weight, kl_weight: factors beside the L1 term.
        chroma_gain: factor on the first convolution's initial response to colour (not brightness) of an AutoencoderKL.
            Colours of land vary some seven times less than its brightness and are learned as much later without it.
        crop: edge of a random window that is trained on (pixels); None = the whole image. The network is
            convolutional, and small windows give more variety for the same time.
    """

    def __init__(self, autoencoder: Mapping[str, Any], perceptual_weights: str | None = None,
                 perceptual_weight: float = 1.0, kl_weight: float = 1e-6, chroma_gain: float = 1.0,
                 crop: int | None = None) -> None:
        super().__init__()
        self.first_stage_model = instantiate_from_config(autoencoder)
        if chroma_gain != 1:
            amplify_chroma(self.first_stage_model.encoder.conv_in.weight, chroma_gain)
        self.perceptual_weight, self.kl_weight, self.crop = perceptual_weight, kl_weight, crop
        # In a tuple, so that 15 M frozen weights of the loss stay out of the checkpoints.
        self._perceptual = (PerceptualLoss(perceptual_weights),) if perceptual_weight else ()
        self.size_factor = self.first_stage_model.downsampling
        if crop is not None and (crop < 1 or crop % self.size_factor):
            raise ValueError(f"autoencoder: crop {crop}. Expected a multiple of {self.size_factor}, or null.")

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named groups of the parameters that train."""
        return {"autoencoder": list(self.first_stage_model.parameters())}

    def weight_groups(self) -> tuple[WeightGroup, ...]:
        """One (see Method)."""
        return (WeightGroup("autoencoder", "first_stage_model."),)

    def training_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch.

        Args:
            batch: `image` (B, 3, H, W) float32 in [-1, 1].
        Returns:
            Scalar loss and its detached parts `l1`, `lpips`, `kl` (per latent element).
        """
        image = batch["image"] if self.crop is None else self.random_window(batch["image"])
        posterior = self.first_stage_model.encode(image)
        restored = self.first_stage_model.decode(posterior.sample())
        l1 = opponent_l1(restored.float(), image)
        kl = posterior.kl().mean()
        parts = {"l1": l1, "kl": kl / posterior.mean[0].numel()}
        loss = l1 + self.kl_weight * kl
        if self._perceptual:
            parts["lpips"] = self._perceptual[0].to(image.device)(restored, image).mean()
            loss = loss + self.perceptual_weight * parts["lpips"]
        return loss, {name: value.detach() for name, value in parts.items()}

    def random_window(self, image: Tensor) -> Tensor:
        """The same random window of crop x crop pixels of all images; ValueError if they are smaller."""
        if min(image.shape[-2:]) < self.crop:
            raise ValueError(f"autoencoder: images {tuple(image.shape[-2:])} are smaller than crop {self.crop}. "
                             "Lower crop, or set data.params.size.")
        top = int(torch.randint(image.shape[-2] - self.crop + 1, ()))
        left = int(torch.randint(image.shape[-1] - self.crop + 1, ()))
        return image[..., top:top + self.crop, left:left + self.crop]

    @torch.no_grad()
    def preview(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Images for the grid: the image and its reconstruction, (B, 3, H, W) in [-1, 1]."""
        posterior = self.first_stage_model.encode(batch["image"])
        return {"image": batch["image"], "restored": self.first_stage_model.decode(posterior.mean).float()}


def amplify_chroma(weight: Tensor, gain: float) -> None:
    """Multiply a convolution's (C, 3, k, k) response to differences between red, green and blue by `gain`, in place."""
    with torch.no_grad():
        grey = weight.mean(1, keepdim=True)
        weight.copy_(grey + gain * (weight - grey))


def opponent_l1(image: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of images (B, 3, H, W) along grey and, twice as heavy, red-green and yellow-blue.

    In RGB all three signs follow the error of the brightness as long as that is larger than the error of the colour,
    so the colour gets no gradient: on land, whose colours are weak, a network trained that way generates in grey. The
    three axes are orthonormal.
    """
    r, g, b = (image - other).unbind(1)
    grey, red_green, yellow_blue = (r + g + b) / 3**0.5, (r - g) / 2**0.5, (r + g - 2 * b) / 6**0.5
    return (grey.abs().mean() + 2.0 * (red_green.abs().mean() + yellow_blue.abs().mean())) / 3
