"""Joint resizing, cropping and flipping of images and masks, and the encoding of batches for the networks."""
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.classes import ClassTable
from ldm.util import UserError

DRAWS = ("flip", "recolour", "colour", "own_reference")  # what PairDataset draws and leaves to the device
HINT_MODES = ("rgb_id", "palette", "one_hot", "single255", "levels", "grey_upstream")


def hint_channels(mode: str, table: ClassTable) -> int:
    """Number of channels of a hint in the given mode (see encode_mask); UserError for an unknown mode."""
    if mode not in HINT_MODES:
        raise UserError(f"hint mode: {mode!r} is unknown. Expected one of {', '.join(HINT_MODES)}.")
    return {"one_hot": table.num_classes, "single255": 1}.get(mode, 3)


def encode_mask(mask: Tensor, mode: str, table: ClassTable) -> Tensor:
    """Encode a mask as the hint of a control branch; the only place where hints are made.

    Args:
        mask: (B, H, W) int64, 0..K-1 or 255 = ignore.
        mode: `single255`: id / 255 in one channel, ignore = 0 (published weights of segmentation-guided diffusion);
            `rgb_id`: id / 255 in three equal channels, ignore = 1.0 (as the public checkpoints were trained);
            `palette`: the table's colours / 255, ignore = the table's ignore colour (black, all zero, by default);
            `one_hot`: K channels, ignore = all zero;
            `levels`: K + 1 equally spaced greys in three equal channels, ignore = white (1.0);
            `grey_upstream`: greys as the public code of CRFM makes them, floor(id * 255 / (K + 1)) / 255 in a byte:
            ignore overflows to the grey of another class. Only for weights that were trained so.
        table: gives K and the colours.
    Returns:
        Hint, (B, hint_channels, H, W) float32 in [0, 1], on the mask's device.
    Raises:
        UserError: for an unknown mode.
        ValueError: if the mask is not (B, H, W) int64.
    """
    hint_channels(mode, table)  # refuses unknown modes
    if mask.ndim != 3 or mask.dtype != torch.int64:
        raise ValueError(f"encode_mask: mask is {tuple(mask.shape)} {mask.dtype}. Expected (B, H, W) int64.")
    if mode == "single255":
        return (mask.masked_fill(mask == 255, 0).float() / 255)[:, None]  # (B, 1, H, W)
    if mode == "rgb_id":
        return (mask.float() / 255)[:, None].repeat(1, 3, 1, 1)  # (B, 3, H, W)
    if mode in ("levels", "grey_upstream"):
        grey = torch.arange(256, dtype=torch.float64, device=mask.device) * 255
        if mode == "levels":
            grey = (grey / table.num_classes).round()
            grey[255] = 255
        else:
            grey = (grey / (table.num_classes + 1)).floor() % 256
        return (grey[mask].float() / 255)[:, None].repeat(1, 3, 1, 1)  # (B, 3, H, W)
    if mode == "palette":
        palette = torch.from_numpy(table.palette()).to(mask.device)  # (256, 3)
        return palette[mask].permute(0, 3, 1, 2).float().contiguous() / 255  # (B, 3, H, W)
    ids = torch.arange(table.num_classes, device=mask.device)[None, :, None, None]
    return (mask[:, None] == ids).float()  # (B, K, H, W)


def draw_edges(ids: Tensor) -> Tensor:
    """Mark both sides of every border between two ids (B, H, W) int64, classes or objects.

    Returns:
        (B, 1, H, W) float32: 1 where one of the four neighbours has another id, else 0.
    """
    edges = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    across, down = ids[:, :, 1:] != ids[:, :, :-1], ids[:, 1:] != ids[:, :-1]
    edges[:, :, 1:] |= across
    edges[:, :, :-1] |= across
    edges[:, 1:] |= down
    edges[:, :-1] |= down
    return edges[:, None].float()


def normalize_batch(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Move a batch of the dataset to a device and give its tensors the types the methods expect.

    Args:
        batch: `image`, `reference` (B, C, H, W) and `mask` (B, H, W) uint8, `instance` (B, H, W) int32, as far as
            present; other entries (`prompt`, `name`, ...) are kept as they are.
        device: where the tensors go; they travel as uint8.
    Returns:
        New dict; images float32 in [-1, 1], mask int64 0..K-1 or 255, instance int64.
    Raises:
        ValueError: if an image or mask is not uint8, since its range would be unknown.
    """
    result = dict(batch)
    for key in ("image", "reference", "mask", "instance"):
        expected = torch.int32 if key == "instance" else torch.uint8
        if key in batch and batch[key].dtype != expected:
            raise ValueError(f"normalize_batch: {key} is {batch[key].dtype}. Expected {expected} as the dataset gives "
                             "it.")
    for key in ("image", "reference", "mask", "instance", *DRAWS):
        if key in batch:
            result[key] = batch[key].to(device, non_blocking=True)
    result = apply_draws(result)
    for key in ("image", "reference"):
        if key in result:
            # channels_last: convolutions are up to eight times faster on a CPU, and need no transposes on a GPU.
            result[key] = result[key].to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1
    for key in ("mask", "instance"):
        if key in result:
            result[key] = result[key].long()
    return result


def apply_draws(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Do to a batch what PairDataset.__getitems__ drew for its samples, on the batch's device.

    Returns:
        New dict without the draws. Where colours change, images are float32 with whole values 0..255, else uint8.
    """
    result = {key: value for key, value in batch.items() if key not in DRAWS}
    flip, colour, own = (batch.get(key) for key in ("flip", "colour", "own_reference"))
    if flip is not None:
        for key in ("image", "mask", "instance"):
            if key in batch:
                result[key] = flip_some(batch[key], flip)
        if "reference" in batch and own is not None:
            result["reference"] = flip_some(batch["reference"], flip & own)
    if "recolour" in batch:
        result["image"] = change_colours(result["image"], batch["recolour"])
    if colour is not None:
        result |= {key: change_colours(result[key], colour) for key in ("image", "reference") if key in result}
    if own is not None and "reference" not in batch:
        result["reference"] = result["image"]
    return result


def flip_some(values: Tensor, flip: Tensor) -> Tensor:
    """Mirror the columns of those samples of (B, ..., W) that flip (B,) bool says."""
    return torch.where(flip.reshape(-1, *[1] * (values.ndim - 1)), values.flip(-1), values)


def to_uint8(image: Tensor) -> Tensor:
    """Turn images in [-1, 1] into uint8 0..255, clamped and rounded to the nearest value; same shape."""
    return ((image.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, C) uint8 to `size` = (height, width), bicubic; returned as it is if it has that size."""
    if image.shape[:2] == tuple(size):
        return image
    if image.shape[2] != 3:
        bands = [Image.fromarray(band) for band in image.transpose(2, 0, 1)]
        return np.stack([band.resize(size[::-1], Image.Resampling.BICUBIC) for band in bands], axis=-1)
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask (H, W) uint8, or object numbers int32, to `size` = (height, width), nearest: no new ids appear."""
    if mask.shape == tuple(size):
        return mask
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def cover_size(shape: tuple[int, int], size: tuple[int, int], shrink: bool) -> tuple[int, int]:
    """Size (height, width) that an image of `shape` takes to cover a window of `size`, aspect kept.

    Images that are larger than the window become smaller only if `shrink` says so.
    """
    factor = max(size[0] / shape[0], size[1] / shape[1])
    if factor <= 1 and not shrink:
        return shape
    return max(size[0], round(shape[0] * factor)), max(size[1], round(shape[1] * factor))


def draw_window(shape: tuple[int, int], size: tuple[int, int],
                random: np.random.Generator | None) -> tuple[slice, slice]:
    """Row and column slices of a window of `size` in an image of `shape`, (height, width); None = in the centre."""
    free = shape[0] - size[0], shape[1] - size[1]
    top, left = (space // 2 if random is None else int(random.integers(space + 1)) for space in free)
    return slice(top, top + size[0]), slice(left, left + size[1])


def draw_colour_change(random: np.random.Generator, strength: float) -> np.ndarray:
    """Draw a change of colours as other sensors, seasons and lights make it.

    Args:
        random: source of the draw.
        strength: standard deviation of the logarithms of saturation, contrast and the three channels' gains (the last
            at half the strength), and of the brightness (at half the strength, in units of the full range).
    Returns:
        (3, 4) float32, a matrix and behind it an offset: rgb in 0..255 becomes `matrix @ rgb + offset`.
    """
    saturation, contrast = np.exp(strength * random.standard_normal(2))
    gains = np.exp(0.5 * strength * random.standard_normal(3))
    brightness = 0.5 * strength * random.standard_normal()
    mix = saturation * np.eye(3) + (1 - saturation) / 3  # away from or towards grey
    matrix = contrast * gains[:, None] * mix
    offset = 127.5 * (1 - contrast * gains + brightness)  # contrast and gains turn about the middle grey
    return np.concatenate([matrix, offset[:, None]], axis=1).astype(np.float32)


def change_colours(image: Tensor, change: Tensor) -> Tensor:
    """Apply draw_colour_change's results (B, 3, 4) to a batch (B, 3, H, W), 0..255.

    Returns:
        (B, 3, H, W) float32 in channels_last memory, clipped to 0..255 and rounded to whole values.
    """
    pixels = image.float().permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, 3)
    with torch.autocast(image.device.type, enabled=False):
        changed = torch.baddbmm(change[:, None, :, 3], pixels, change[:, :, :3].transpose(1, 2))
    return changed.clamp(0, 255).round().unflatten(1, image.shape[2:]).permute(0, 3, 1, 2)


def match_colours(source: Tensor, target: Tensor, limit: float = 3.0) -> Tensor:
    """The least change that gives the colours of each image the mean and covariance of another's.

    Args:
        source, target: (B, N, 3) and (B, M, 3) colours of any space, in units of about one level of 256.
        limit: most that a direction of colour is stretched, and 1 / limit the least: more would blow up the noise of
            plain surfaces.
    Returns:
        (B, 3, 4) float32 on the device of the colours: a symmetric matrix and behind it an offset (see change_colours).
    Source: Pitie and Kokaram 2007 (the linear Monge-Kantorovitch map between two normal distributions).
    """
    source, target = source.double(), target.double()
    # A level of variance: plain surfaces have none, and a root has no inverse there.
    own, wanted = (covariance(colours) + torch.eye(3, dtype=torch.float64, device=colours.device)
                   for colours in (source, target))  # fmt: skip
    root, inverse = raise_symmetric(own, 0.5), raise_symmetric(own, -0.5)
    matrix = inverse @ raise_symmetric(root @ wanted @ root, 0.5) @ inverse
    stretches, axes = torch.linalg.eigh((matrix + matrix.mT) / 2)
    matrix = (axes * stretches.clamp(1 / limit, limit)[:, None]) @ axes.mT
    offset = target.mean(1)[..., None] - matrix @ source.mean(1)[..., None]
    return torch.cat([matrix, offset], dim=2).float()


def covariance(colours: Tensor) -> Tensor:
    """Covariance of the colours of each image, (B, N, 3) -> (B, 3, 3)."""
    centred = colours - colours.mean(1, keepdim=True)
    return centred.mT @ centred / max(colours.shape[1] - 1, 1)


def raise_symmetric(matrix: Tensor, power: float) -> Tensor:
    """Power of symmetric positive matrices, (B, N, N) float64."""
    values, axes = torch.linalg.eigh(matrix)
    return (axes * values.clamp(min=1e-12)[:, None] ** power) @ axes.mT


def recolour(image: Tensor, reference: Tensor) -> Tensor:
    """Give images the mean and covariance of the RGB colours of their references.

    Args:
        image, reference: (B, 3, H, W) and (B, 3, h, w) float32 in [-1, 1].
    Returns:
        (B, 3, H, W) float32 in [-1, 1], clipped.
    """
    image, reference = ((one.float() + 1) * 127.5 for one in (image, reference))
    change = match_colours(image.flatten(2).mT, reference.flatten(2).mT)
    return change_colours(image, change) / 127.5 - 1
