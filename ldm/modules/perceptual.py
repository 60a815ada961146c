"""LPIPS: distance of two images in the features of a classification network."""
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import UserError

VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)


class PerceptualLoss(nn.Module):
    """LPIPS with VGG16 features; frozen.

    Args:
        weights: safetensors file with `convs.N.weight`, `convs.N.bias`, `heads.N`, as written by
            demo/make/convert_lpips.py, in any precision. Stages that it lacks at the end, as a packed data set's does,
            are left out of the distance.
    Source: Zhang et al. 2018, Eq. 1, version 0.1 of the linear heads.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        from safetensors.torch import load_file
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"perceptual weights not found: {weights}. Make the file with demo/make/convert_lpips.py, or set the "
                "autoencoder's perceptual_weight to 0.")
        tensors = load_file(str(weights))
        stages = sum(name.startswith("heads.") for name in tensors)
        ends = [index for index, step in enumerate((*VGG16, "pool")) if step == "pool"]
        if not 1 <= stages <= len(ends):
            raise UserError(f"{weights}: {stages} heads of LPIPS inside. Expected 1 to {len(ends)}, as written by "
                            "demo/make/convert_lpips.py. Make the file anew.")
        self.layers = (*VGG16, "pool")[:ends[stages - 1] + 1]
        widths = [3, *(w for w in self.layers if w != "pool")]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.heads = nn.ParameterList(torch.empty(1, w, 1, 1) for w in (64, 128, 256, 512, 512)[:stages])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.load_state_dict(tensors)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Distance of two batches of images (B, 3, H, W) in [-1, 1]: (B,) float32, 0 for equal images."""
        total = 0.0
        for head, a, b in zip(self.heads, self.features(image), self.features(other), strict=True):
            difference = (F.normalize(a.float(), dim=1, eps=1e-10) - F.normalize(b.float(), dim=1, eps=1e-10)).square()
            total = total + (difference * head).sum(1).mean((1, 2))
        return total

    def features(self, image: Tensor) -> list[Tensor]:
        """The feature maps before each pooling, at full, 1/2, 1/4, 1/8 and 1/16 resolution."""
        h = (image - self.shift) / self.scale
        convs = iter(self.convs)
        maps = []
        for step in self.layers:
            if step == "pool":
                maps.append(h)
                h = F.max_pool2d(h, 2)
            else:
                h = F.relu(next(convs)(h))
        return maps
