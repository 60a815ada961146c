"""What diffusion methods in pixel space share: no autoencoder, no text, no reference; a hint encodes the mask."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.classes import ClassTable
from ldm.data.transforms import draw_edges, encode_mask, hint_channels
from ldm.methods.base import WeightGroup
from ldm.methods.diffusion import DiffusionMethod

EDGES = ("semantic", "instance")


class PixelDiffusion(DiffusionMethod):
    """A generator whose latents are the images themselves, steered by the mask alone.

    A subclass sets `model.diffusion_model` and defines predict_noise(latent, timestep, hint).

    Args:
        class_table: name, file or mapping (see ClassTable.load).
        image_channels: 1 = grey, 3 = RGB, others: as many bands (see read_image).
        hint_mode: `one_hot`, or another of encode_mask.
        edge: adds a channel with the borders between classes (`semantic`) or between the objects of the manifest's
            instance maps (`instance`); None = no such channel.
        mask_dropout: share of training samples whose hint, edges included, is all zero: what guidance does without.
        ablation: probability of each class, drawn for each training sample, that its pixels lose their class.
        diffusion: see DiffusionMethod. The path has DDPM's noise schedule unless told otherwise.
    """

    clip = 1.0

    def __init__(self, class_table: str | Mapping[str, Any], image_channels: int = 3, hint_mode: str = "one_hot",
                 edge: str | None = None, mask_dropout: float = 0.0, ablation: float = 0.0, **diffusion: Any) -> None:
        if diffusion.get("path") is None:
            diffusion["schedule"] = {"kind": "linear", "start": 1e-4, "end": 0.02, **(diffusion.get("schedule") or {})}
        super().__init__(**diffusion)
        if edge not in (None, *EDGES):
            raise ValueError(f"edge: {edge!r} is unknown. Expected one of {', '.join(EDGES)}, or null.")
        self.class_table = ClassTable.load(class_table)
        self.image_channels, self.hint_mode, self.edge = image_channels, hint_mode, edge
        self.mask_dropout, self.ablation = mask_dropout, ablation
        self.takes = ("instance",) if edge == "instance" else ()
        self.hint_channels = hint_channels(hint_mode, self.class_table) + (edge is not None)
        self.model = nn.Module()

    @property
    def size_factor(self) -> int:
        """Heights and widths must be multiples of it."""
        return self.model.diffusion_model.downsampling

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters."""
        return {"unet": list(self.model.parameters())}

    def weight_groups(self) -> tuple[WeightGroup, ...]:
        """One (see Method)."""
        return (WeightGroup("U-Net", "model.diffusion_model."),)

    def encode_image(self, image: Tensor) -> Tensor:
        """The image itself."""
        return image

    def decode_latent(self, latent: Tensor) -> Tensor:
        """The latent itself."""
        return latent

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(image_channels, height, width)."""
        return self.image_channels, height, width

    def conditions(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Hint of a batch.

        Args:
            batch: `mask` (B, H, W) int64; `instance` (B, H, W) int64 for edges of instances. Nothing else is looked at.
        Returns:
            `hint` (B, hint_channels, H, W) in [0, 1].
        """
        mask = batch["mask"]
        if self.training and self.ablation:
            mask = erase_classes(mask, self.ablation, self.class_table.num_classes)
        hint = encode_mask(mask, self.hint_mode, self.class_table)
        if self.edge:
            hint = torch.cat([hint, draw_edges(batch["instance"] if self.edge == "instance" else mask)], dim=1)
        if self.training and self.mask_dropout:
            keep = torch.rand(len(mask), 1, 1, 1) >= self.mask_dropout
            hint = hint * keep.to(hint.device, hint.dtype)
        return {"hint": hint}

    def null_conditions(self, conditions: Mapping[str, Tensor],
                        drops: Sequence[str] | None = None) -> dict[str, Tensor]:
        """A hint of zeros, unless only what the method has not is to be dropped."""
        is_dropped = drops is None or "mask" in drops
        return {"hint": torch.zeros_like(conditions["hint"]) if is_dropped else conditions["hint"]}


def erase_classes(mask: Tensor, probability: float, num_classes: int) -> Tensor:
    """Masks (B, H, W) int64 with 255 in the place of classes 0..K-1, each drawn with this probability for each mask."""
    lost = torch.zeros(len(mask), 256, dtype=torch.bool)
    lost[:, :num_classes] = torch.rand(len(mask), num_classes) < probability
    is_lost = lost.to(mask.device).gather(1, mask.flatten(1)).reshape(mask.shape)
    return mask.masked_fill(is_lost, 255)
