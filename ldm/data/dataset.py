"""The one dataset of every method: rows of a manifest become uint8 tensors."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from ldm.data.classes import ClassTable, read_mask, read_raw_mask
from ldm.data.images import read_image
from ldm.data.manifest import Row
from ldm.data.transforms import (
    change_colours,
    draw_colour_change,
    fit_pair,
    fit_reference,
    match_colours,
    resize_mask,
)
from ldm.util import UserError

REFERENCE_MODES = ("target", "manifest", "none")


class PairDataset(Dataset):
    """Images, masks, references and prompts of a manifest.

    An item has the keys `image` (C, H, W) uint8 (left out when the row has none), `mask` (H, W) uint8, 0..K-1 or 255,
    `reference` (3, H, W) uint8 (left out with reference="none"), `instance` (H, W) int32 where the row
    has one, `prompt`, `name` str (stem of the mask), `row` int.
    Its random draws depend on (seed, epoch, row) alone: not on workers, ranks, order or restarts.

    Args:
        rows: from read_manifest.
        table: classes of the masks.
        size: (height, width) of all items; None = the size of each mask.
        flip: probability of the horizontal flip that image, mask and a reference made of the target share.
        random_crop: cut a random window at the images' own scale, the same for image and mask (a reference from the
            manifest gets its own). False = resize image and mask whole; a reference is scaled to cover the size.
        centre_crop: like random_crop with the window in the centre (for validation).
        colour_jitter: strength of a random change of colours that image and reference share (see draw_colour_change),
            made for half of the draws. Masks of one data set look alike, so without it a network learns a set's colours
            by its masks and need not look at the reference.
        reference: `target` = the image itself, `manifest` = the row's ref_image, `none`.
        target_share: with `manifest`, share of the draws whose reference is the image itself all the same. Nothing
            tells more of its look, so it teaches to look at references; the method's reference_augment has to move it.
        recolour_share: with `manifest`, share of the draws whose reference is the image of any other row, and whose
            image gets the mean and covariance of that reference's colours (see match_colours): masks of one data set
            in the colours of another, which no data set has. The shares together are at most 1.
        seed: base seed of the draws.
        channels: C of the images: 3 = RGB, 1 = grey, others = arrays of so many bands (see read_image).
    Raises:
        UserError: if the rows lack what `reference` asks for, or a value is out of range.
    """

    def __init__(self, rows: Sequence[Row], table: ClassTable, size: tuple[int, int] | None = None, flip: float = 0.0,
                 random_crop: bool = False, centre_crop: bool = False, colour_jitter: float = 0.0,
                 reference: str = "target", seed: int = 0, channels: int = 3, target_share: float = 0.0,
                 recolour_share: float = 0.0) -> None:
        if reference not in REFERENCE_MODES:
            raise UserError(f"reference: {reference!r} is unknown. Expected one of {', '.join(REFERENCE_MODES)}.")
        if not 0 <= flip <= 1:
            raise UserError(f"flip: {flip}. Expected a probability, 0..1.")
        shares = (target_share, recolour_share)
        if min(shares) < 0 or sum(shares) > 1 or (any(shares) and reference != "manifest"):
            raise UserError(f"target_share: {target_share}, recolour_share: {recolour_share} with "
                            f"reference={reference}. Expected shares, 0..1 together, and above 0 only with "
                            "reference=manifest.")
        if colour_jitter < 0:
            raise UserError(f"colour_jitter: {colour_jitter}. Expected 0 (off) or a small number such as 0.3.")
        if (random_crop or centre_crop) and (size is None or random_crop == centre_crop):
            raise UserError(f"random_crop={random_crop}, centre_crop={centre_crop}, size={size}. Expected a size and "
                            "only one of the two crops.")
        if channels != 3 and (colour_jitter or reference != "none"):
            raise UserError(f"colour_jitter={colour_jitter}, reference={reference}, channels={channels}. Expected no "
                            "jitter and no references of images that are not RGB.")
        lacking = {"target": "image", "manifest": "reference"}.get(reference)
        bad = [row.line for row in rows if lacking and getattr(row, lacking) is None]
        if bad:
            raise UserError(f"reference={reference} needs an {lacking} in every row; line {bad[0]} has none. Read the "
                            f"manifest with need={lacking!r}.")
        self.rows, self.table, self.flip, self.reference, self.seed = list(rows), table, flip, reference, seed
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.crop, self.random_crop = random_crop or centre_crop, random_crop
        self.colour_jitter, self.channels = colour_jitter, channels
        self.target_share, self.recolour_share = shares
        self.latents = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Load a row; a pair (row, epoch) gives it the draws of that epoch, a plain index those of epoch 0."""
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        row = self.rows[index]
        random = np.random.default_rng((self.seed, epoch, row.index))
        if self.latents is not None:
            return self.cached_item(row, random)
        image = None if row.image is None else read_image(row.image, self.channels)
        mask = read_mask(row.mask, self.table)
        instance = None if row.instance is None else read_instances(row.instance)
        size = self.size or mask.shape
        position = random if self.random_crop else None
        image, mask, instance = fit_pair(image, mask, size, self.crop, position, instance)
        if self.flip and random.random() < self.flip:
            image, mask, instance = (None if part is None else part[:, ::-1] for part in (image, mask, instance))
        item = {} if instance is None else {"instance": torch.from_numpy(instance.copy())}
        item |= {"mask": torch.from_numpy(mask.copy()), "prompt": row.prompt, "name": row.mask.stem, "row": row.index}
        pictures = {} if image is None else {"image": image}
        if self.reference == "manifest":
            pictures |= self.draw_reference(row, image, size, random)
        if self.colour_jitter and random.random() < 0.5:
            change = draw_colour_change(random, self.colour_jitter)
            pictures = {key: change_colours(picture, change) for key, picture in pictures.items()}
        item |= {key: to_tensor(picture) for key, picture in pictures.items()}
        if self.reference == "target":
            item["reference"] = item["image"].clone()
        return item

    def draw_reference(self, row: Row, image: np.ndarray | None, size: tuple[int, int],
                       random: np.random.Generator) -> dict[str, np.ndarray]:
        """Reference of a draw as `reference`, and as `image` what becomes of the image where its colours change."""
        drawn = random.random() if self.target_share or self.recolour_share else 1.0
        if drawn < self.target_share:
            return {"reference": image}
        is_other = drawn < self.target_share + self.recolour_share
        path = self.rows[random.integers(len(self.rows))].image if is_other else row.reference
        reference = fit_reference(read_image(path), size, self.crop, random if self.random_crop else None)
        if not is_other:
            return {"reference": reference}
        change = match_colours(image.reshape(-1, 3), reference.reshape(-1, 3))
        return {"reference": reference, "image": change_colours(image, change)}

    def cached_item(self, row: Row, random: np.random.Generator) -> dict[str, Any]:
        """Item with cached latents in the place of the images."""
        mask = resize_mask(read_mask(row.mask, self.table), self.size)
        is_flipped = bool(self.flip) and random.random() < self.flip
        item = {"mask": torch.from_numpy((mask[:, ::-1] if is_flipped else mask).copy()), "prompt": row.prompt,
                "name": row.mask.stem, "row": row.index, "moments": self.latents.get(row.image, is_flipped)}
        if self.reference == "manifest":
            item["reference_moments"] = self.latents.get(row.reference, False)
        return item

    def cacheable_paths(self) -> list[Path]:
        """Distinct images that items are made of, in sorted order.

        Raises:
            UserError: if the items are not the same whole images in every epoch.
        """
        if self.crop or self.size is None or self.reference == "target" or any(
                (self.target_share, self.recolour_share, self.colour_jitter)):
            raise UserError("cache_latents needs whole images of one size (size set, no random_crop), their own "
                            "colours (no colour_jitter, recolour_share 0) and references that are other images "
                            "(reference: manifest or none, target_share 0). Turn cache_latents off, or change these.")
        used = {row.image for row in self.rows}
        return sorted(used | ({row.reference for row in self.rows} if self.reference == "manifest" else set()))


def read_instances(path: Path) -> np.ndarray:
    """Read a map of object numbers exactly, (H, W) int32; UserError for a picture in colours."""
    numbers = read_raw_mask(path)
    if numbers.ndim != 2:
        raise UserError(f"{path}: an instance map in RGB. Expected one number a pixel: grey PNG of 8 or 16 bit.")
    return numbers.astype(np.int32)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 array -> (C, H, W) uint8 tensor with memory of its own."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)).copy())


def collate_batch(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack items to a batch (tensors stacked, prompts and names in lists).

    Raises:
        UserError: naming two rows whose masks differ in size.
    """
    for item in items:
        if item["mask"].shape != items[0]["mask"].shape:
            sizes = ["x".join(str(side) for side in entry["mask"].shape) for entry in (items[0], item)]
            raise UserError(f"batch: mask {items[0]['name']} is {sizes[0]}, mask {item['name']} is {sizes[1]} "
                            "(height x width). Expected one size. Give a size (--H and --W) or use batch_size 1.")
    return default_collate(items)
