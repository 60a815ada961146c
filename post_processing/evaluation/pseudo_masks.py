"""Masks predicted by a segmentor for images that have none, with what is known about buildings painted over."""

import numpy as np
import torch

from post_processing.segmentation.segmentor import Segmentor

IGNORE_INDEX = 255


def class_probabilities(segmentor: Segmentor, images: torch.Tensor) -> torch.Tensor:
    """Probability of every class in every pixel: (B, 3, H, W) uint8 RGB -> (B, K, H, W) float32."""
    logits = segmentor.logits(images)
    if logits.shape[1] == 1:  # a sigmoid head with one channel: the probability of class 1
        probability = logits.sigmoid()
        return torch.cat([1 - probability, probability], dim=1)
    return logits.softmax(dim=1)


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
