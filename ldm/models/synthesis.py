"""Paints planned samples with any method and hands the pictures to a writer."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.data.classes import ClassTable
from ldm.data.dataset import PairDataset
from ldm.data.manifest import Row
from ldm.data.transforms import normalize_batch, to_uint8
from ldm.sampling.noise import SampleNoise

logger = logging.getLogger(__name__)

BATCH_KEYS = ("mask", "reference", "prompt")


@dataclass(frozen=True)
class Job:
    """One image to paint.

    Args:
        row: row of the manifest.
        noise_seed: seed of the sample's own random stream.
        record: its line of the index; has `row, copy, seed, image, height, width` among others.
    """

    row: Row
    noise_seed: int
    record: dict[str, Any]


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample.

    Args:
        num_steps: DDIM steps.
        guidance_scale: classifier-free weight, 1 = off.
        eta: share of fresh noise per step, [0, 1].
        use_autocast: bfloat16 where it is safe; False computes in float32 throughout.
    """

    num_steps: int
    guidance_scale: float
    eta: float
    use_autocast: bool


class JobDataset(Dataset):
    """Conditions of each job: mask, reference, prompt, and `job`, its index.

    Args:
        jobs: what to paint.
        table: class table that the masks are read with.
        size: (height, width) to resize to; None keeps each mask's own.
    """

    def __init__(self, jobs: Sequence[Job], table: ClassTable, size: tuple[int, int] | None) -> None:
        self.pairs = PairDataset([job.row for job in jobs], table, size=size, reference="manifest")

    def __len__(self) -> int:
        """Number of jobs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Conditions of one job (see PairDataset for shapes and ranges)."""
        item = self.pairs[index]
        return {"job": index} | {key: item[key] for key in BATCH_KEYS}


def plan_batches(jobs: Sequence[Job], batch_size: int) -> list[list[int]]:
    """Split jobs into batches whose images have one size, in the order of the jobs within each size.

    Args:
        jobs: what to paint.
        batch_size: most jobs in a batch.

    Returns:
        Indices of jobs, each in exactly one batch.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault((job.record["height"], job.record["width"]), []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def paint(
    method: nn.Module,
    jobs: Sequence[Job],
    loader: DataLoader,
    settings: SamplerSettings,
    device: torch.device,
    submit: Callable[[np.ndarray, dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Paint all jobs.

    Args:
        method: in evaluation mode, on the device.
        jobs: what to paint.
        loader: batches of JobDataset.
        settings: how to sample.
        device: where to compute.
        submit: takes each picture, (H, W, 3) uint8, and its record.

    Returns:
        Records of samples that came out as NaN or infinity, with a `reason`; they were not submitted.
    """
    failures = []
    with tqdm(total=len(jobs), unit="image", disable=not jobs) as bar:
        for batch in loader:
            chosen = [jobs[index] for index in batch["job"].tolist()]
            images = sample_images(method, batch, [job.noise_seed for job in chosen], settings, device)
            finite = torch.isfinite(images).flatten(1).all(dim=1).tolist()
            pixels = to_uint8(images.nan_to_num()).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
            for job, is_finite, picture in zip(chosen, finite, pixels, strict=True):
                if is_finite:
                    submit(picture, job.record)
                else:
                    failures.append(job.record | {"reason": "the model returned NaN or infinity"})
                    logger.warning("row %d copy %d: not finite, not written", job.record["row"], job.record["copy"])
            bar.update(len(chosen))
    return failures


def sample_images(
    method: nn.Module, batch: dict[str, Any], seeds: Sequence[int], settings: SamplerSettings, device: torch.device
) -> Tensor:
    """Paint one batch.

    Args:
        method: in evaluation mode, on the device.
        batch: mask (B, H, W) uint8, reference (B, 3, H, W) uint8, prompt: list of B strings.
        seeds: seed of each sample's noise.
        settings: how to sample.
        device: where to compute.

    Returns:
        Images, (B, 3, H, W) float32 in [-1, 1] unless something went wrong inside the network.
    """
    height, width = batch["mask"].shape[-2:]
    draw = SampleNoise(seeds, device)
    noise = draw(method.noise_shape(height, width))  # (B, C, h, w)
    conditions = normalize_batch({key: batch[key] for key in BATCH_KEYS}, device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=settings.use_autocast):
        images = method.sample(
            conditions,
            noise,
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            eta=settings.eta,
            draw=draw,
        )
    return images.float()
