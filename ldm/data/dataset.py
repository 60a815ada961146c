"""The one dataset of every method: rows of a manifest become uint8 tensors."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from ldm.data.cache import TileCache, TileKey
from ldm.data.classes import ClassTable, read_mask, read_raw_mask
from ldm.data.images import read_image
from ldm.data.manifest import Row
from ldm.data.transforms import (
    apply_draws,
    cover_size,
    draw_colour_change,
    draw_window,
    match_colours,
    resize_image,
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
        self.latents = None  # LatentCache
        self.tiles: TileCache | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, ...]) -> dict[str, Any]:
        """Load a row; a pair (row, epoch) gives it the draws of that epoch, a plain index those of epoch 0.

        A third number tells the copies of a row apart that has a weight: each has draws of its own.
        """
        if self.latents is not None:
            return self.cached_item(index)
        batch = self.__getitems__([index])
        result = apply_draws({key: value for key, value in batch.items() if isinstance(value, torch.Tensor)})
        item = {key: value[0].clone() for key, value in result.items() if value.ndim > 1}
        for key in ("image", "reference"):
            if key in item:
                item[key] = item[key].to(torch.uint8).contiguous()
        return item | {"prompt": batch["prompt"][0], "name": batch["name"][0], "row": int(batch["row"][0])}

    def __getitems__(self, indices: Sequence[int | tuple[int, ...]]) -> dict[str, Any]:
        """Load rows as one batch; what is done to the pixels at random is drawn here and done later, on the device.

        Args:
            indices: see __getitem__.
        Returns:
            The keys of an item, stacked, images in channels_last memory; and for normalize_batch `flip` (B,) bool where
            there are flips, `colour` and `recolour` (B, 3, 4) float32 where colours change, of image and reference or
            of the image alone (matrix and offset, see draw_colour_change), `own_reference` (B,) bool: the reference is
            the image itself. Where all are, there is no `reference`.
        Raises:
            UserError: naming two rows whose masks differ in size.
        """
        if self.latents is not None:
            return collate_batch([self.cached_item(index) for index in indices])
        drawn = [self.draw_row(index) for index in indices]
        rows = [row for row, _ in drawn]
        loaded = [self.load(*pair) for pair in drawn]
        check_sizes([(row.mask.stem, tiles["mask"].shape) for row, (tiles, _) in zip(rows, loaded, strict=True)])
        batch: dict[str, Any] = {"prompt": [row.prompt for row in rows], "name": [row.mask.stem for row in rows],
                                 "row": torch.tensor([row.index for row in rows])}
        batch |= {key: stack([tiles[key] for tiles, _ in loaded]) for key in loaded[0][0]}
        for key, is_used in (("flip", self.flip), ("colour", self.colour_jitter), ("recolour", self.recolour_share),
                             ("own_reference", self.reference == "target" or self.target_share)):
            if is_used:
                batch[key] = torch.from_numpy(np.stack([draws[key] for _, draws in loaded]))
        return batch

    def load(self, row: Row, random: np.random.Generator | None = None) -> tuple[dict[str, np.ndarray],
                                                                               dict[str, Any]]:
        """Windows of a row's mask, image, reference and instance (H, W[, C]), and the draws of its pixels.

        Where nothing is drawn, `random` may be None and the row any.
        """
        mask = self.tile(("mask", str(row.mask), None))
        size = self.size or mask.shape
        position = random if self.random_crop else None
        window = draw_window(mask.shape, size, position)
        tiles = {"mask": mask[window]}
        if row.image is not None:
            tiles["image"] = self.tile(("image", str(row.image), mask.shape))[window]
        if row.instance is not None:
            tiles["instance"] = self.tile(("instance", str(row.instance), mask.shape))[window]
        draws: dict[str, Any] = {"flip": bool(self.flip) and random.random() < self.flip}
        draws["own_reference"] = self.reference == "target"
        if self.reference == "manifest":
            self.draw_reference(row, tiles, draws, size, random)
        if self.colour_jitter:
            is_changed = random.random() < 0.5
            draws["colour"] = draw_colour_change(random, self.colour_jitter if is_changed else 0.0)
        return tiles, draws

    def draw_reference(self, row: Row, tiles: dict[str, np.ndarray], draws: dict[str, Any], size: tuple[int, int],
                       random: np.random.Generator) -> None:
        """Add a reference to the tiles of a row, and to its draws how the image takes on that reference's colours."""
        drawn = random.random() if self.target_share or self.recolour_share else 1.0
        draws["own_reference"] = drawn < self.target_share
        draws["recolour"] = np.eye(3, 4, dtype=np.float32)
        if draws["own_reference"]:
            tiles["reference"] = tiles["image"]
            return
        is_other = drawn < self.target_share + self.recolour_share
        path = self.rows[random.integers(len(self.rows))].image if is_other else row.reference
        whole = self.tile(("reference", str(path), size))
        reference = whole[draw_window(whole.shape[:2], size, random if self.random_crop else None)]
        tiles["reference"] = reference
        if is_other:
            colours = (torch.tensor(tile.reshape(1, -1, 3)) for tile in (tiles["image"], reference))
            draws["recolour"] = match_colours(*colours)[0].numpy()

    def draw_row(self, index: int | tuple[int, ...]) -> tuple[Row, np.random.Generator]:
        """A row and the source of its draws."""
        index, epoch, *copy = index if isinstance(index, tuple) else (index, 0)
        row = self.rows[index]
        return row, np.random.default_rng((self.seed, epoch, row.index, *[c for c in copy if c]))

    def tile(self, key: TileKey) -> np.ndarray:
        """What of a row's file is cut later: decoded, and resized as far as the window asks for it."""
        cached = None if self.tiles is None else self.tiles.get(key)
        return self.read_tile(key) if cached is None else cached

    def read_tile(self, key: TileKey) -> np.ndarray:
        """Decode a tile (see tile)."""
        kind, file, size = key
        path = Path(file)
        if kind == "mask":
            mask = read_mask(path, self.table)
            whole = cover_size(mask.shape, self.size, shrink=False) if self.crop else self.size or mask.shape
            return resize_mask(mask, whole)
        if kind == "instance":
            return resize_mask(read_instances(path), size)
        if kind == "image":
            return resize_image(read_image(path, self.channels), size)
        reference = read_image(path)
        return resize_image(reference, cover_size(reference.shape[:2], size, shrink=not self.crop))

    def tile_keys(self) -> list[TileKey]:
        """All tiles of the set, each once, for a TileCache; masks are decoded for it where their size decides."""
        keys: dict[TileKey, None] = {}
        for row in self.rows:
            keys["mask", str(row.mask), None] = None
        if self.latents is not None:
            return list(keys)
        shapes = {} if self.size and not self.crop else {key[1]: self.read_tile(key).shape for key in list(keys)}
        for row in self.rows:
            whole = shapes.get(str(row.mask), self.size)
            if row.image is not None:
                keys["image", str(row.image), whole] = None
            if row.instance is not None:
                keys["instance", str(row.instance), whole] = None
            for path in (row.reference if self.reference == "manifest" else None,
                         row.image if self.recolour_share else None):
                if path is not None:
                    keys["reference", str(path), self.size or whole] = None
        return list(keys)

    def cached_item(self, index: int | tuple[int, ...]) -> dict[str, Any]:
        """Item with cached latents in the place of the images."""
        row, random = self.draw_row(index)
        mask = self.tile(("mask", str(row.mask), None))
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
    """Read a map of object numbers exactly, (H, W) int32; UserError for an image in colours."""
    numbers = read_raw_mask(path)
    if numbers.ndim != 2:
        raise UserError(f"{path}: an instance map in RGB. Expected one number a pixel: grey PNG of 8 or 16 bit.")
    return numbers.astype(np.int32)


def stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Arrays (H, W) or (H, W, C) of one shape as a tensor (B, H, W), or (B, C, H, W) in channels_last memory."""
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked.permute(0, 3, 1, 2) if stacked.ndim == 4 else stacked


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, C) uint8 array -> (C, H, W) uint8 tensor with memory of its own."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)).copy())


def collate_batch(items: list[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """Stack items to a batch (tensors stacked, prompts and names in lists); a batch stays as it is.

    Raises:
        UserError: naming two rows whose masks differ in size.
    """
    if isinstance(items, dict):
        return items
    check_sizes([(item["name"], item["mask"].shape) for item in items])
    return default_collate(items)


def check_sizes(masks: Sequence[tuple[str, Sequence[int]]]) -> None:
    """UserError naming two masks of different sizes, which no batch can hold."""
    for name, shape in masks:
        if tuple(shape) != tuple(masks[0][1]):
            sizes = ["x".join(map(str, size)) for size in (masks[0][1], shape)]
            raise UserError(f"batch: mask {masks[0][0]} is {sizes[0]}, mask {name} is {sizes[1]} "
                            "(height x width). Expected one size. Give a size (--H and --W) or use batch_size 1.")
