"""Images and their masks, read ahead by threads and put together in batches of one size."""

import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from ldm.data.classes import ClassTable, decode_values, read_raw_mask
from ldm.data.images import IMAGE_SUFFIXES, Pair, find_images, read_image
from ldm.files import file_identity
from ldm.generation.machine import in_parts
from ldm.util import UserError
from post_processing.segmentation.segmentor import Segmentor

logger = logging.getLogger(__name__)
Source = TypeVar("Source")
Result = TypeVar("Result")

SEED_ENDING = re.compile(r"_seed_\d+$")


@dataclass(frozen=True)
class Loaded:
    """A pair in memory.

    Attributes:
        pair: where it comes from.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 ids of the class table, 255 = ignored.
        raw: the numbers of the mask's file, (H, W) ids or (H, W, 3) colours.
        identity: of the two files (see file_identity).
    """

    pair: Pair
    image: np.ndarray
    mask: np.ndarray
    raw: np.ndarray
    identity: dict[str, str]


def find_generated(image_folder: Path, mask_folder: Path) -> list[Pair]:
    """Pair images called `{mask stem}_seed_{N}` (or as their mask) with masks; a mask need not exist.

    Raises:
        FileNotFoundError: if a folder is missing, or none of the images has a mask.
        ValueError: if there are no images, or two of one name.
    """
    found, masks = find_images(image_folder), find_images(mask_folder).files
    if found.problems:
        raise UserError("; ".join(found.problems[:5]))
    images = list(found.files.values())
    if not images:
        raise ValueError(f"{image_folder}: no images. Expected files ending in {', '.join(IMAGE_SUFFIXES)}.")
    pairs = []
    for image in images:
        stem = SEED_ENDING.sub("", image.stem)  # the end only: a mask may be called a_seed_1 itself
        pairs.append(Pair(image, masks.get(stem) or masks.get(image.stem) or mask_folder / f"{stem}.png", image.stem))
    if not any(pair.mask.is_file() for pair in pairs):
        raise FileNotFoundError(f"{mask_folder}: none of the {len(pairs)} images in {image_folder} has its mask there "
                                f"(the first would be {pairs[0].mask.name}). Expected {{mask stem}}_seed_{{N}} or the "
                                "mask's own name. Check the folders.")
    return pairs


def load_pair(pair: Pair, table: ClassTable, is_resized: bool = False) -> Loaded:
    """Read an image and its mask, which is brought to the image's size (nearest pixel) if `is_resized`.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if one is damaged, an id is not in the table, or they differ in size.
    """
    image = read_image(pair.image, None)
    raw = read_raw_mask(pair.mask, table)
    size = image.shape[:2]
    if raw.shape[:2] != size:
        if not is_resized:
            raise ValueError(f"mask {pair.mask}: {raw.shape[0]}x{raw.shape[1]} pixels, its image {pair.image.name} "
                             f"{size[0]}x{size[1]} (height x width). Expected equal sizes. Replace one of them.")
        raw = resize_nearest(raw, size)
    return Loaded(pair, image, decode_values(raw, table, pair.mask), raw, identity_of(pair))


def resize_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bring (H, W, ...) numbers to another (height, width) by the nearest pixel, which is Pillow's."""
    rows, columns = (
        np.asarray(Image.fromarray(np.arange(old, dtype=np.int32)[None]).resize((new, 1), Image.Resampling.NEAREST))[0]
        for old, new in zip(values.shape[:2], size, strict=True))
    return values[rows][:, columns]


def identity_of(pair: Pair) -> dict[str, str]:
    """What tells the content of a pair's files from other content."""
    return {"image": file_identity(pair.image), "mask": file_identity(pair.mask)}


def stream_batches(
    items: Iterable[Source],
    load: Callable[[Source], Result],
    size_of: Callable[[Result], tuple[int, int]],
    batch_size: int,
    workers: int,
    on_failure: Callable[[Source, Exception], None] | None = None,
) -> Iterator[list[tuple[Source, Result]]]:
    """Yield batches of one size, read ahead by threads; the order does not depend on their number.

    Args:
        items: what to read.
        load: reads one of them.
        size_of: (height, width) of what was read.
        batch_size: most items in a batch.
        workers: threads.
        on_failure: gets every item that cannot be read (OSError, ValueError), and why; None = the error is raised.
    """
    groups: dict[tuple[int, int], list[tuple[Source, Result]]] = {}
    waiting: deque = deque()
    source = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(waiting) < 2 * batch_size + workers and (item := next(source, None)) is not None:
                waiting.append((item, pool.submit(load, item)))
            if not waiting:
                break
            item, future = waiting.popleft()
            try:
                loaded = future.result()
            except (ValueError, OSError) as error:
                if on_failure is None:
                    raise
                on_failure(item, error)
                continue
            size = tuple(size_of(loaded))
            groups.setdefault(size, []).append((item, loaded))
            if len(groups[size]) == batch_size:
                yield groups.pop(size)
            elif sum(map(len, groups.values())) > 4 * batch_size:  # many sizes: do not hold them all
                yield groups.pop(max(groups, key=lambda size: len(groups[size])))
    yield from groups.values()


def load_batches(pairs: Iterable[Pair], table: ClassTable, batch_size: int, workers: int,
                 on_failure: Callable[[Pair, Exception], None] | None = None,
                 is_resized: bool = False) -> Iterator[list[Loaded]]:
    """Yield batches of images with their masks (see stream_batches and load_pair)."""

    def load(pair: Pair) -> Loaded:
        return load_pair(pair, table, is_resized)

    for batch in stream_batches(pairs, load, lambda loaded: loaded.mask.shape, batch_size, workers, on_failure):
        yield [loaded for _, loaded in batch]


def map_images(paths: Iterable[Path], work: Callable[[torch.Tensor], torch.Tensor], batch_size: int,
               workers: int) -> dict[Path, torch.Tensor]:  # fmt: skip
    """What a function of images (B, 3, H, W) uint8 RGB gives for each file, on the CPU, in batches of one size."""
    results: dict[Path, torch.Tensor] = {}
    for batch in stream_batches(paths, lambda path: read_image(path, None), lambda image: image.shape[:2], batch_size,
                                workers):  # fmt: skip
        images = torch.from_numpy(np.stack([image for _, image in batch])).permute(0, 3, 1, 2)
        results.update(zip((path for path, _ in batch), work(images).cpu(), strict=True))
    return results


def stack_batch(batch: Sequence[Loaded], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W) uint8 and masks (B, H, W) uint8 of a batch, on a device."""
    images = torch.from_numpy(np.stack([loaded.image for loaded in batch])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([loaded.mask for loaded in batch]))
    return images.to(device), masks.to(device)


def run_in_parts(function: Callable[..., Result], *batch: torch.Tensor) -> list[Result]:
    """Call a function on a batch of tensors (B, ...), or on halves, quarters, ... of it where memory ends.

    Returns:
        What the function gave for each part, in order.
    Raises:
        UserError: if one image alone is too much.
    """

    def run(part: Sequence[int], _: int) -> Result:
        return function(*(tensor[part[0] : part[-1] + 1] for tensor in batch))

    return in_parts(run, range(len(batch[0])), len(batch[0]))


def predict_batches(segmentor: Segmentor,
                    batches: Iterable[list[Loaded]]) -> Iterator[tuple[list[Loaded], torch.Tensor, torch.Tensor]]:
    """Yield each batch with the predicted classes and the masks, (B, H, W) uint8 on the segmentor's device."""
    for batch in batches:
        images, masks = stack_batch(batch, segmentor.device)
        yield batch, torch.cat(run_in_parts(segmentor.predict, images)), masks
