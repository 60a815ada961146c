"""Which pixels of synthesized images do not show their class: the rule, and the process that applies it to files."""

import hashlib
import io
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.data.classes import IGNORE_INDEX, ClassTable
from ldm.data.images import Pair, first_three
from ldm.files import Record, append_lines, atomic_write, file_sha256
from post_processing.segmentation.loading import (
    Loaded,
    identity_of,
    load_batches,
    load_pair,
    run_in_parts,
    stack_batch,
)
from post_processing.segmentation.segmentor import Segmentor
from post_processing.selection.hardness import pixel_loss

logger = logging.getLogger(__name__)

DROPPED_COLOUR = np.array([255, 0, 255], np.float32)  # no class of the tables that come with the code has it


def judge_pixels(loss: torch.Tensor, mask: torch.Tensor, limits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the pixels whose loss is above the limit of their class.

    Args:
        loss: (B, H, W) float32.
        mask: (B, H, W) int64, 0..K-1 or 255.
        limits: (256,) float32, by mask value (see Hardness.limits).
    Returns:
        (B, H, W) bool, true where a pixel is dropped; (B, 256, 2) int64, pixels kept and dropped by mask value.
    """
    is_dropped = loss > limits.index_select(0, mask.flatten()).view_as(mask)
    offset = torch.arange(len(mask), device=mask.device).mul_(256)[:, None, None]
    counts = torch.bincount(((mask + offset) * 2 + is_dropped).flatten(), minlength=len(mask) * 512)
    return is_dropped, counts.view(len(mask), 256, 2)


@torch.inference_mode()
def judge_batch(segmentor: Segmentor, images: torch.Tensor, masks: torch.Tensor,
                limits: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Judge a batch, in parts if the device's memory is too small for it.

    Args:
        segmentor, images, masks: see stack_batch.
        limits: see judge_pixels; on the segmentor's device.
    Returns:
        (B, H, W) bool of dropped pixels, (B, 256, 2) int64 counts, (B,) float64 sums of the loss.
    """

    def judge(images: torch.Tensor, masks: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        masks = masks.long()
        loss = pixel_loss(segmentor.logits(images), masks)
        is_dropped, counts = judge_pixels(loss, masks, limits)
        return is_dropped.cpu().numpy(), counts.cpu().numpy(), loss.double().sum((1, 2)).cpu().numpy()

    return tuple(np.concatenate(values) for values in zip(*run_in_parts(judge, images, masks), strict=True))


def encode_mask(raw: np.ndarray, is_dropped: np.ndarray, table: ClassTable) -> bytes:
    """PNG of a mask in the numbers of its source file, with the dropped pixels set to what the table reads as ignored.

    Args:
        raw: (H, W) ids on disk, or (H, W, 3) colours.
        is_dropped: (H, W) bool.
        table: class table that the source was read with.
    Raises:
        UserError: if the table has no number for ignored pixels.
    """
    ignored = table.ignore_colour if raw.ndim == 3 else table.ignored_value()
    values = np.where(is_dropped[..., None] if raw.ndim == 3 else is_dropped, ignored, raw)
    buffer = io.BytesIO()
    is_wide = raw.ndim == 2 and (raw.dtype != np.uint8 or ignored > 255)
    # Level 1: three times as fast as Pillow's default, and masks are small all the same.
    Image.fromarray(values.astype(np.uint16 if is_wide else np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True)
class PixelFilter:
    """Filters images into a folder of masks; every image is finished when its record is in items.jsonl.

    Plain values, so that it can be sent to other processes, each with a segmentor of its own.

    Attributes:
        limits: see judge_pixels.
        table: class table that the masks on disk are read with.
        folder: output folder.
        batch_size: images at once.
        workers: threads that read, and threads that write.
        is_resized: images may have been generated at another size than their masks (see load_pair).
    """

    limits: torch.Tensor
    table: ClassTable
    folder: Path
    batch_size: int
    workers: int
    is_resized: bool = False

    def run(self, segmentor: Segmentor, work: Path, pairs: Sequence[Pair]) -> list[Record]:
        """Filter images.

        Args:
            segmentor: the judge.
            work: folder for what is not complete, of this process alone, on the file system of the output folder.
            pairs: the images.
        Returns:
            A record with `image`, `mask` and `reason` for each image that could not be judged.
        Raises:
            OSError: if the folder cannot be written; what is finished stays.
        """
        failures: list[Record] = []

        def fail(pair: Pair, error: Exception | str) -> None:
            logger.warning("%s: %s", pair.image.name, error)
            failures.append(failure_of(pair, error))

        limits = self.limits.to(segmentor.device)
        waiting: deque[list[Future]] = deque()
        done = 0
        with ThreadPoolExecutor(self.workers) as pool:
            for batch in load_batches(pairs, self.table, self.batch_size, self.workers, fail, self.is_resized):
                dropped, counts, sums = judge_batch(segmentor, *stack_batch(batch, segmentor.device), limits)
                futures = []
                for loaded, *judged in zip(batch, dropped, counts, sums, strict=True):
                    if np.isfinite(judged[2]):
                        futures.append(pool.submit(self.write, work, loaded, *judged))
                    else:
                        fail(loaded.pair, "the segmentor's scores are not finite. Expected numbers.")
                waiting.append(futures)
                if len(waiting) > 2:
                    self.settle(waiting.popleft())
                done += len(batch)
                logger.info("filtered %d of %d", done, len(pairs))
            while waiting:
                self.settle(waiting.popleft())
        return failures

    def settle(self, futures: Sequence[Future]) -> None:
        """Wait for the masks of a batch, then note that they are finished."""
        append_lines(self.folder / "items.jsonl", [future.result() for future in futures])

    def write(self, work: Path, loaded: Loaded, is_dropped: np.ndarray, counts: np.ndarray, loss: float) -> Record:
        """Write one mask; returns its record."""
        content = encode_mask(loaded.raw, is_dropped, self.table)
        name = f"{loaded.pair.image.stem}.png"
        # A power cut may damage it, which its hash in the record shows: no need to wait for the disk.
        atomic_write(self.folder / name, content, work / name, is_synced=False)
        totals = counts[: self.table.num_classes].sum(axis=1)
        classes = {
            self.table.names[index]: [int(totals[index]), int(counts[index, 1])] for index in np.flatnonzero(totals)
        }
        return {
            "image": loaded.pair.image.name,
            "file": name,
            "mask": str(loaded.pair.mask.absolute()),
            "height": loaded.mask.shape[0],
            "width": loaded.mask.shape[1],
            "loss": round(float(loss) / max(1, int(totals.sum())), 6),
            "dropped": round(float(counts[: self.table.num_classes, 1].sum() / max(1, totals.sum())), 6),
            "classes": classes,
            "sources": loaded.identity,
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def failure_of(pair: Pair, reason: Exception | str) -> Record:
    """Record of an image that could not be judged."""
    return {"image": pair.image.name, "mask": str(pair.mask), "reason": str(reason)}


def is_finished(record: Record, pair: Pair, folder: Path) -> bool:
    """Whether an image's mask is complete and made of the very files that are there now."""
    try:
        return file_sha256(folder / record["file"]) == record["sha256"] and record["sources"] == identity_of(pair)
    except (OSError, KeyError):
        return False


def draw_overlay(record: Record, pair: Pair, folder: Path, table: ClassTable) -> None:
    """Draw overlays/{stem}.png: image, mask in the table's colours, image with the dropped pixels in magenta."""
    loaded = load_pair(pair, table, is_resized=True)
    filtered = load_pair(Pair(pair.image, folder / record["file"]), table).mask
    is_dropped = (filtered == IGNORE_INDEX) & (loaded.mask != IGNORE_INDEX)
    image = first_three(loaded.image)
    marked = image.astype(np.float32)
    marked[is_dropped] = 0.4 * marked[is_dropped] + 0.6 * DROPPED_COLOUR
    parts = [image, table.colourise(loaded.mask), marked.round().astype(np.uint8)]
    (folder / "overlays").mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(parts, axis=1)).save(folder / "overlays" / f"{pair.image.stem}.png")
