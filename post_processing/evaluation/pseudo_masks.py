"""Masks predicted by a segmentor for images that have none, with what is known about buildings drawn over."""

import numpy as np
import torch

from ldm.data.classes import IGNORE_INDEX
from post_processing.segmentation.segmentor import Segmentor

STRIDE = 32  # the coarsest grid of the usual backbones, pixels


def class_probabilities(segmentor: Segmentor, images: torch.Tensor) -> torch.Tensor:
    """Probability of every class in every pixel: (B, 3, H, W) uint8 RGB -> (B, K, H, W) float32.

    Sides that STRIDE does not divide are filled up with the last row or column. mmseg would stretch the coarse scores
    over them instead, so that an image and a part of it were predicted on different grids.
    """
    height, width = images.shape[-2:]
    rows, columns = (torch.arange(-(-side // STRIDE) * STRIDE).clamp(max=side - 1) for side in (height, width))
    if len(rows) > height or len(columns) > width:
        images = images[:, :, rows][:, :, :, columns]
    return segmentor.logits(images)[:, :, :height, :width].softmax(dim=1)


def pick_classes(probabilities: torch.Tensor, threshold: float = 0.0) -> np.ndarray:
    """Most likely class of every pixel, where it is likely enough.

    Args:
        probabilities: (B, K, H, W).
        threshold: probability in [0, 1] below which a pixel gets no class.

    Returns:
        (B, H, W) uint8, class ids of the segmentor, 255 = ignored.
    """
    confidence, ids = probabilities.max(dim=1)
    return ids.to(torch.uint8).masked_fill(confidence < threshold, IGNORE_INDEX).cpu().numpy()


def predict_classes(segmentor: Segmentor, images: torch.Tensor, threshold: float = 0.0) -> np.ndarray:
    """Classes of a batch of images, (B, 3, H, W) uint8 RGB -> (B, H, W) uint8 (see pick_classes)."""
    return pick_classes(class_probabilities(segmentor, images), threshold)


def burn_in(mask: np.ndarray, known: np.ndarray, building: int, background: int) -> np.ndarray:
    """Replace predicted buildings by known ones: predicted ones become background first.

    Args:
        mask: (H, W) uint8 class ids.
        known: (H, W) bool, true where a building is known to be.
        building, background: their class ids; background may be 255.
    """
    return np.where(known, building, np.where(mask == building, background, mask)).astype(np.uint8)
