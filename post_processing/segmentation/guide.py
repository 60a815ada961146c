"""A segmentor that guides a generator (see ldm.sampling.rectify)."""

from pathlib import Path

import torch
from torch import Tensor

from post_processing.segmentation.segmentor import load_segmentor


class SegmentorGuide:
    """Any MMSegmentation segmentor as a differentiable function of images, frozen and in evaluation mode.

    Args:
        config, checkpoint: see load_segmentor; the class table is the one inside the checkpoint.
        device: where it computes.
    """

    sees, channels = "images", 3

    def __init__(self, config: str | Path, checkpoint: str | Path, device: str | torch.device = "cpu") -> None:
        self.segmentor = load_segmentor(config, checkpoint, device)
        self.class_table = self.segmentor.class_table

    def __call__(self, images: Tensor) -> Tensor:
        """Class scores, (B, K, H, W) float32, of images (B, 3, H, W) float in [0, 1]."""
        scores = self.segmentor.scores(images * 255)
        if scores.shape[1] == 1:  # a sigmoid head with one channel: class 1 against nothing
            scores = torch.cat([torch.zeros_like(scores), scores], dim=1)
        return scores
