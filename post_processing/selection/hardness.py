"""How hard each class is for a segmentor: its mean cross entropy over the real pixels of that class."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ldm.data.classes import ClassTable
from ldm.data.images import Pair
from ldm.files import digest_of, file_sha256, lock, write_json
from ldm.util import UserError
from post_processing.segmentation.loading import identity_of, load_batches, run_in_parts, stack_batch
from post_processing.segmentation.segmentor import Segmentor, require_mmseg

logger = logging.getLogger(__name__)

CACHED_SCORES = 1 << 18  # one mebibyte of float32


@dataclass(frozen=True)
class Hardness:
    """Class-wise mean loss on real images.

    Attributes:
        names: K class names.
        mean: (K,) float64; NaN for classes without pixels.
        pixels: (K,) int64, pixels that the means are taken over.
        fingerprint: what it was measured from; equal inputs have equal fingerprints.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    pixels: np.ndarray
    fingerprint: dict[str, Any]

    def limits(self, margin: float) -> torch.Tensor:
        """Loss above which a pixel is dropped, `margin` times its class mean, by mask value: (256,) float32.

        Infinite for ignored pixels and for classes without statistics, which are left alone.
        """
        limits = np.full(256, np.inf)
        limits[: len(self.mean)] = np.where(np.isnan(self.mean), np.inf, margin * self.mean)
        return torch.from_numpy(limits).float()

    def to_json(self) -> dict[str, Any]:
        """As it stands in hardness.json."""
        classes = {
            name: {"mean": None if np.isnan(mean) else float(mean), "pixels": int(pixels)}
            for name, mean, pixels in zip(self.names, self.mean, self.pixels, strict=True)
        }
        return {"fingerprint": self.fingerprint, "classes": classes}


def read_hardness(path: Path) -> Hardness:
    """Read hardness.json; FileNotFoundError or UserError if it is missing or something else."""
    if not path.is_file():
        raise FileNotFoundError(f"hardness not found: {path}. Expected what filter.py writes. Check the path.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = content["classes"]
        mean = [np.nan if entry["mean"] is None else float(entry["mean"]) for entry in classes.values()]
        pixels = np.array([int(entry["pixels"]) for entry in classes.values()], np.int64)
        return Hardness(tuple(classes), np.array(mean, np.float64), pixels, dict(content["fingerprint"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a hardness file ({type(error).__name__} {error}). Expected what filter.py "
                        "writes. Remove it.") from error


def pixel_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every pixel: (B, K, H, W) float32, (B, H, W) int64 -> (B, H, W) float32, 0 where it is 255."""
    if logits.is_cuda:
        return F.cross_entropy(logits, mask, ignore_index=255, reduction="none")
    # On a CPU strips of rows that stay in the cache are up to four times as fast, and equal to the last bit.
    rows = max(1, CACHED_SCORES // (logits.shape[1] * logits.shape[3]))
    loss = torch.empty(mask.shape, dtype=logits.dtype)
    for image in range(len(mask)):
        for top in range(0, mask.shape[1], rows):
            place = slice(image, image + 1), slice(top, top + rows)
            scores = logits[place[0], :, place[1]]
            loss[place] = F.cross_entropy(scores, mask[place], ignore_index=255, reduction="none")
    return loss


def fingerprint_of(config: str | Path, checkpoint: str | Path, table: ClassTable, pairs: Sequence[Pair]) -> dict:
    """What a hardness depends on: the segmentor, the class table, and the content of the real pairs."""
    require_mmseg()
    from mmengine.config import Config

    content = Config.fromfile(str(config)).to_dict()  # with the files that it builds on
    model = {key: content.get(key) for key in ("model", "data_preprocessor")}
    files = sorted((pair.image.name, pair.mask.name, *sorted(identity_of(pair).items())) for pair in pairs)
    return {
        "segmentor_sha256": file_sha256(Path(checkpoint)),
        "segmentor_config_sha256": digest_of(model),
        "class_table_sha256": digest_of(table.to_dict()),
        "real_pairs": len(pairs),
        "real_pairs_sha256": digest_of(files),
    }


def get_hardness(path: Path, fingerprint: dict, parts: Iterable[tuple[Segmentor, Sequence[Pair]]], batch_size: int,
                 workers: int) -> Hardness:
    """Take the hardness from a file if it was measured from the same, else measure and write it.

    Processes that ask at the same time wait for the one that measures. The means are over the pixels of all `parts`:
    segmentors of one class table, each with the pairs that it judges, loaded only where they are needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(f".{path.name}.lock")):  # of its own: measuring takes long
        if path.is_file():
            hardness = read_hardness(path)
            if hardness.fingerprint == fingerprint:
                logger.info("hardness: taken from %s", path)
                return hardness
            logger.info("hardness: %s is of other inputs, measured again", path)
        measured = [measure_hardness(fingerprint, segmentor, pairs, batch_size, workers) for segmentor, pairs in parts]
        hardness = measured[0] if len(measured) == 1 else pool_hardness(measured)
        write_json(path, hardness.to_json())
    return hardness


def pool_hardness(parts: Sequence[Hardness]) -> Hardness:
    """Class means over the pixels of several measurements, which have one fingerprint."""
    pixels = np.sum([part.pixels for part in parts], axis=0)
    total = np.sum([np.where(part.pixels > 0, part.mean, 0.0) * part.pixels for part in parts], axis=0)
    mean = np.divide(total, pixels, out=np.full(len(pixels), np.nan), where=pixels > 0)
    return Hardness(parts[0].names, mean, pixels, parts[0].fingerprint)


@torch.inference_mode()
def measure_hardness(fingerprint: dict, segmentor: Segmentor, pairs: Sequence[Pair], batch_size: int,
                     workers: int) -> Hardness:
    """Mean loss of each class over all its pixels in the real pairs, summed in double precision.

    Raises:
        UserError: listing the pairs that cannot be read, or if the losses are not finite.
    """
    table = segmentor.class_table
    failures: list[str] = []
    sums = torch.zeros(256, dtype=torch.float64, device=segmentor.device)
    pixels = torch.zeros(256, dtype=torch.int64, device=segmentor.device)
    done = 0

    def count(images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        masks = masks.long()
        loss = pixel_loss(segmentor.logits(images), masks).double().flatten()
        masks = masks.flatten()
        return torch.bincount(masks, weights=loss, minlength=256), torch.bincount(masks, minlength=256)

    for batch in load_batches(pairs, table, batch_size, workers, lambda _, error: failures.append(str(error))):
        for part in run_in_parts(count, *stack_batch(batch, segmentor.device)):
            sums += part[0]
            pixels += part[1]
        done += len(batch)
        logger.debug("hardness: %d of %d real images", done, len(pairs))
    if failures:
        shown = "; ".join(failures[:5]) + ("; ..." if len(failures) > 5 else "")
        raise UserError(f"real images: {len(failures)} of {len(pairs)} pairs cannot be used: {shown}")
    total, number = sums.cpu().numpy()[: table.num_classes], pixels.cpu().numpy()[: table.num_classes]
    if not np.isfinite(total).all():
        raise UserError("segmentor: its losses on real images are not finite. Expected numbers. Train it again.")
    if not number.any():
        raise UserError("real masks: no pixel has a class. Expected masks with classes. Check --classes.")
    mean = np.divide(total, number, out=np.full(len(number), np.nan), where=number > 0)
    logger.info("hardness: measured on %d real images", len(pairs))
    return Hardness(tuple(table.names), mean, number, fingerprint)
