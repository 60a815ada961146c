"""Look of a reference as a whole: statistics of its latent, on the direct way to every residual block."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.blocks import zero_module

COARSE = 4  # latent pixels that the second scale averages along each axis
NETWORKS = 3  # U-Net, mask branch, reference branch
GAIN = 8  # AdamW moves a weight by about the learning rate a step: from zero, the look would take thousands of steps


def pool_statistics(latent: Tensor) -> Tensor:
    """What is left of a latent (B, C, h, w) when places no longer count: colours, and texture at two scales.

    Returns:
        (B, 3C) float32: of every channel the mean, the standard deviation of its pixels, and that of its means over
        windows of COARSE x COARSE pixels (0 where the latent is not larger than one).
    """
    latent = latent.float()
    height, width = latent.shape[-2:]
    coarse = F.avg_pool2d(latent, (min(COARSE, height), min(COARSE, width)))
    deviations = [scale.std((2, 3), correction=0) for scale in (latent, coarse)]
    return torch.cat([latent.mean((2, 3)), *deviations], dim=1)


class ReferenceStatistics(nn.Module):
    """Statistics of a reference latent, turned into what the timestep embeddings of the three networks get added.

    The last layer starts at zero, so that a trained network without it goes on from where it was.

    Args:
        channels: of the latent.
        embedding_dim: width of the timestep embeddings.
    """

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(3 * channels, embedding_dim)
        self.out = zero_module(nn.Linear(embedding_dim, NETWORKS * embedding_dim))

    def forward(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) scaled latents of references -> (B, NETWORKS, embedding_dim)."""
        hidden = F.silu(self.hidden(pool_statistics(latent).to(self.hidden.weight.dtype)))
        return GAIN * self.out(hidden).unflatten(1, (NETWORKS, -1))
