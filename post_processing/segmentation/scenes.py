"""Masks predicted for images that have none: of a batch, and of scenes of any size by windows with blended borders."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch

from ldm.data.classes import IGNORE_INDEX
from ldm.data.images import OpenImage
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
    """Most likely class of every pixel, 255 below the threshold: (B, K, H, W) in [0, 1] -> (B, H, W) uint8."""
    confidence, ids = probabilities.max(dim=1)
    return ids.to(torch.uint8).masked_fill(confidence < threshold, IGNORE_INDEX).cpu().numpy()


def predict_classes(segmentor: Segmentor, images: torch.Tensor, threshold: float = 0.0) -> np.ndarray:
    """Classes of a batch of images, (B, 3, H, W) uint8 RGB -> (B, H, W) uint8 (see pick_classes)."""
    return pick_classes(class_probabilities(segmentor, images), threshold)


def window_weights(length: int, overlap: int, at_start: bool, at_end: bool) -> torch.Tensor:
    """How much each pixel of a window counts along one axis.

    A window knows least at its edges, so the outer quarter of an overlap belongs to the neighbour alone; in between
    the two are blended linearly. At the edge of the scene there is no neighbour.

    Args:
        length: of the window, pixels.
        overlap: pixels that it shares with each neighbour, at most half of length.
        at_start, at_end: whether the window lies at an edge of the scene.

    Returns:
        (length,) float32 in [0, 1].
    """
    weights = torch.ones(length)
    outer = overlap // 4
    inner = overlap - 2 * outer
    ramp = torch.cat([torch.zeros(outer), (torch.arange(inner) + 0.5) / max(inner, 1), torch.ones(outer)])
    if not at_start:
        weights[:overlap] *= ramp
    if not at_end:
        weights[length - overlap :] *= ramp.flip(0)
    return weights


def window_spans(length: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """First pixel of every window along an axis, and the one after its last.

    They start at multiples of STRIDE, where a network sees the same grid as in the whole image; the last one is longer
    than the others by what then is left.
    """
    last = max(length - window, 0) // STRIDE * STRIDE
    starts = range(0, last, (window - overlap) // STRIDE * STRIDE)
    return [*((start, start + window) for start in starts), (last, length)]


@torch.inference_mode()
def predict_scene(segmentor: Segmentor, image: OpenImage, window: int, overlap: int, batch_size: int,
                  threshold: float = 0.0) -> Iterator[tuple[int, np.ndarray]]:
    """Predict an image by windows; what is in memory are the rows of one window.

    Args:
        segmentor: whose classes are wanted.
        image: opened, RGB.
        window: side of the windows, pixels.
        overlap: pixels that neighbours share, at most half of window and at most window - STRIDE.
        batch_size: windows at once.
        threshold: probability in [0, 1] below which a pixel gets no class.

    Yields:
        First row, and (h, W) uint8 class ids of the segmentor, 255 = ignored or no data; from the top, without gaps.
    """
    height, width = image.info.height, image.info.width
    rows, columns = window_spans(height, window, overlap), window_spans(width, window, overlap)
    kept: tuple[torch.Tensor, ...] = ()  # scores and weights of rows that later windows reach, too
    for number, (top, bottom) in enumerate(rows):
        values, valid = image.read(top, bottom)
        pixels = torch.from_numpy(values).permute(2, 0, 1)
        down = window_weights(bottom - top, overlap, top == 0, bottom == height)[:, None]
        sums: tuple[torch.Tensor, ...] = ()
        for across, same in groupby(columns, key=lambda span: span[1] - span[0]):
            spans = list(same)
            for batch in (spans[start : start + batch_size] for start in range(0, len(spans), batch_size)):
                found = class_probabilities(segmentor, torch.stack([pixels[:, :, a:b] for a, b in batch]))
                sums = sums or carry_over(kept, found, bottom - top, width)
                for (left, right), probability in zip(batch, found, strict=True):
                    weights = (down * window_weights(across, overlap, left == 0, right == width)).to(found.device)
                    sums[0][:, :, left:right] += probability * weights
                    sums[1][:, :, left:right] += weights
        done = (rows[number + 1][0] if bottom < height else height) - top  # no later window reaches these rows
        mask = pick_classes((sums[0][:, :done] / sums[1][:, :done])[None], threshold)[0]
        if valid is not None:
            mask[~valid[:done]] = IGNORE_INDEX
        yield top, mask
        kept = tuple(one[:, done:] for one in sums)


def carry_over(kept: tuple[torch.Tensor, ...], like: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Sums of scores (K, height, width) and weights (1, height, width), zero but for the first rows, which are kept."""
    sums = like.new_zeros(like.shape[1], height, width), like.new_zeros(1, height, width)
    for new, old in zip(sums, kept, strict=False):
        new[:, : old.shape[1]] = old
    return sums
