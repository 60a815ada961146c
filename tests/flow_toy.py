"""A flow-matching method and a guide for it, small enough that everything they do has a closed form.

All that a method on a flow path needs is this file and flow_toy.yaml.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.classes import ClassTable
from ldm.methods.diffusion import DiffusionMethod


class FlowToy(DiffusionMethod):
    """Predicts the exact velocity for images whose pixels are N(mean of their class, spread^2); learns both."""

    takes = ()
    size_factor = 1

    def __init__(self, class_table: str | Mapping[str, Any], **diffusion: Any) -> None:
        super().__init__(**diffusion)
        self.class_table = ClassTable.load(class_table)
        self.means = nn.Parameter(torch.zeros(self.class_table.num_classes + 1, 3))  # the last: no class
        self.spread = nn.Parameter(torch.tensor(0.5))

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"toy": list(self.parameters())}

    def encode_image(self, image: Tensor) -> Tensor:
        return image

    def decode_latent(self, latent: Tensor) -> Tensor:
        return latent

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def conditions(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"mean": self.means[batch["mask"].clamp(max=len(self.means) - 1)].permute(0, 3, 1, 2)}

    def null_conditions(self, conditions: Mapping[str, Tensor],
                        drops: Sequence[str] | None = None) -> dict[str, Tensor]:
        return {"mean": torch.zeros_like(conditions["mean"])}

    def predict_noise(self, latent: Tensor, timestep: Tensor, mean: Tensor) -> Tensor:
        signal, noise = self.path.factors(timestep, latent)
        gain = signal * self.spread**2 / ((signal * self.spread) ** 2 + noise**2)
        return (latent - mean - gain * (latent - signal * mean)) / noise


class LinearGuide:
    """Class scores that are linear in each pixel's colour."""

    sees, channels = "images", 3

    def __init__(self, file: str | Path, device: str | torch.device = "cpu") -> None:
        content = torch.load(file, weights_only=True)
        self.weight, self.class_table = content["weight"].to(device), ClassTable.load(content["table"])

    def __call__(self, images: Tensor) -> Tensor:
        return torch.einsum("kc,bchw->bkhw", self.weight, images)
