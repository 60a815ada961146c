"""Paints planned samples with any method."""

import gc
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.data.classes import ClassTable
from ldm.data.dataset import PairDataset
from ldm.data.manifest import Row
from ldm.data.transforms import normalize_batch
from ldm.generation.machine import is_out_of_memory
from ldm.sampling.modes import Sampling
from ldm.sampling.noise import SampleNoise
from ldm.sampling.rectify import Rectifier
from ldm.util import UserError, leave_signals_to_main

logger = logging.getLogger(__name__)

TENSOR_KEYS = ("mask", "image", "reference", "instance")  # of these, what the method takes
LIST_KEYS = ("prompt", "reference_key", "slot")
# On a CPU larger batches are not faster; with a fixed one, --batch_size does not change a bit of the pictures.
CPU_BATCH = 2


@dataclass(frozen=True)
class Job:
    """One image to paint.

    Args:
        row: row of the manifest.
        position: of the row in the list of rows.
        noise_seed: seed of the sample's own random stream.
        record: its line of the index; has `row, copy, seed, image, height, width` among others.
    """

    row: Row
    position: int
    noise_seed: int
    record: dict[str, Any]


class Request(NamedTuple):
    """What a loader is asked for: the row at a position of the list, for the job of this number, at this size."""

    position: int
    slot: int
    size: tuple[int, int]


class ConditionDataset(Dataset):
    """Conditions of jobs: mask, reference, instance map, prompt, `reference_key` and `slot`, the number of the job.

    References, instance maps and images to start from are there if the rows have them. All but the maps (int32) are
    uint8.

    A file that cannot be read gives `slot` and `error` instead: one bad file does not end a run.

    Args:
        rows: of the manifest.
        table: class table that the masks are read with.
        size: (height, width) to resize to; None keeps each mask's own.
        channels: of the images to start from.
    """

    def __init__(self, rows: Sequence[Row], table: ClassTable, size: tuple[int, int] | None, channels: int = 3) -> None:
        reference = "manifest" if rows and rows[0].reference else "none"
        self.pairs = PairDataset(rows, table, size=size, reference=reference, channels=channels)

    def __getitem__(self, request: Request) -> dict[str, Any]:
        """Conditions for one request (see PairDataset for shapes and ranges)."""
        row = self.pairs.rows[request.position]
        try:
            item = self.pairs[request.position]
        except (OSError, ValueError) as error:
            return {"slot": request.slot, "error": str(error)}
        if tuple(item["mask"].shape) != request.size:
            return {"slot": request.slot, "error": f"{row.mask}: its size changed since the run began"}
        return {"slot": request.slot, "prompt": row.prompt, "reference_key": str(row.reference),
                **{key: item[key] for key in TENSOR_KEYS if key in item}}  # fmt: skip


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack the good items of a batch; `errors` maps the slots of the others to what is wrong."""
    good = [item for item in items if "error" not in item]
    batch = {"errors": {item["slot"]: item["error"] for item in items if "error" in item}}
    batch |= {key: [item[key] for item in good] for key in LIST_KEYS}
    present = [key for key in TENSOR_KEYS if good and key in good[0]]
    return batch | {key: default_collate([item[key] for item in good]) for key in present}


class BatchPlan:
    """Batch sampler whose batches are set before each pass, so that a loader keeps its processes between shards."""

    def __init__(self) -> None:
        self.batches: list[list[Request]] = []

    def __iter__(self) -> Iterator[list[Request]]:
        """The batches."""
        return iter(self.batches)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)


def make_loader(dataset: ConditionDataset, num_workers: int, is_cuda: bool) -> DataLoader:
    """Loader of conditions; its `batch_sampler` is a BatchPlan."""
    return DataLoader(
        dataset, batch_sampler=BatchPlan(), collate_fn=collate, num_workers=num_workers, pin_memory=is_cuda,
        persistent_workers=num_workers > 0, worker_init_fn=leave_signals_to_main,
    )  # fmt: skip


def plan_batches(jobs: Sequence[Job], slots: Iterable[int], batch_size: int,
                 kind: Callable[[str], Hashable] = lambda prompt: None) -> list[list[Request]]:
    """Split jobs into batches whose images have one size, in the order of the jobs within each size.

    Args:
        jobs: of a shard.
        slots: numbers of those to paint.
        batch_size: most jobs in a batch.
        kind: of a prompt; a batch has prompts of one kind (see Method.batch_kind).

    Returns:
        Requests, each slot in exactly one batch.
    """
    groups: dict[Hashable, list[Request]] = {}
    for slot in slots:
        size = jobs[slot].record["height"], jobs[slot].record["width"]
        group = groups.setdefault((size, kind(jobs[slot].row.prompt)), [])
        group.append(Request(jobs[slot].position, slot, size))
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


class Painter:
    """Paints batches with a method.

    On a CPU and with compiled blocks every call of the network has the same number of images, the last one filled up:
    there, what a sample looks like does not depend on its neighbours, on restarts or on shards, and nothing is compiled
    twice. Elsewhere a batch that is not full is faster. Memory that runs out halves the number for the rest of the run.

    Args:
        method: in evaluation mode, on the device.
        sampling: how to sample.
        device: where to compute.
        use_autocast: bfloat16 where it is safe; False computes in float32 throughout.
        batch_size: images at once; on a CPU CPU_BATCH.
        is_compiled: the method's blocks are compiled, for batches of one size.
        rectifier: corrects clean latents while sampling.
    """

    def __init__(self, method: nn.Module, sampling: Sampling, device: torch.device, use_autocast: bool,
                 batch_size: int, is_compiled: bool = False, rectifier: Rectifier | None = None) -> None:
        self.method, self.sampling, self.device, self.use_autocast = method, sampling, device, use_autocast
        self.rectifier = rectifier
        self.batch_size = CPU_BATCH if device.type == "cpu" else batch_size
        self.is_padded = is_compiled or device.type == "cpu"

    def paint(self, batch: dict[str, Any], seeds: Sequence[int]) -> Tensor:
        """Paint one batch.

        Args:
            batch: from the loader: mask (B, H, W) uint8, what else the method takes, lists of B.
            seeds: seed of each sample's noise.

        Returns:
            Images, (B, C, H, W) float32 in [-1, 1]; NaN where the network failed, in full precision too.

        Raises:
            UserError: if not even one image fits into memory.
        """
        result = self.sample(batch, seeds, range(len(seeds)), self.use_autocast)
        broken = [i for i, is_good in enumerate(torch.isfinite(result).flatten(1).all(1).tolist()) if not is_good]
        if broken and self.use_autocast:
            logger.warning("%d images are not finite in bfloat16, painted again in float32", len(broken))
            usual = self.batch_size
            with suppress(UserError):  # of memory: they stay NaN
                result[broken] = self.sample(batch, seeds, broken, use_autocast=False)
            self.batch_size = usual  # what float32 took too much memory for is possible again
        return result

    def sample(self, batch: dict[str, Any], seeds: Sequence[int], chosen: Sequence[int], use_autocast: bool) -> Tensor:
        """Paint the chosen samples of a batch in as many parts as memory asks for."""
        images, start = [], 0
        while start < len(chosen):
            part = self.try_to_sample(batch, seeds, chosen[start : start + self.batch_size], use_autocast)
            if part is None:
                self.halve()
            else:
                images.append(part)
                start += len(part)
        return torch.cat(images)

    def try_to_sample(self, batch: dict[str, Any], seeds: Sequence[int], chosen: Sequence[int],
                      use_autocast: bool) -> Tensor | None:
        """Paint the chosen samples of a batch at once; None if memory does not suffice."""
        try:
            return sample_images(self, batch, seeds, chosen, use_autocast)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None  # what the error holds on to is free once this function is left

    def halve(self) -> None:
        """Go on with half as many images at once."""
        if self.batch_size == 1:
            raise UserError(f"--batch_size: not even one image fits into the memory of {self.device}. Choose a smaller "
                            "--H and --W, or another device; finished images stay.")
        self.batch_size //= 2
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory: going on with %d images at once; pictures may differ from those of larger "
                       "batches in the last bit", self.batch_size)


def sample_images(painter: Painter, batch: dict[str, Any], seeds: Sequence[int], chosen: Sequence[int],
                  use_autocast: bool) -> Tensor:
    """Paint chosen samples of a batch, filled up to the painter's batch size where it is_padded.

    Args:
        painter: method, device, settings.
        batch, seeds: see Painter.paint.
        chosen: numbers of samples in the batch, at most the painter's batch size.
        use_autocast: see Painter.

    Returns:
        Images, (len(chosen), C, H, W) float32 in [-1, 1] unless something went wrong inside the network.
    """
    method, device = painter.method, painter.device
    filled = [*chosen, *[chosen[-1]] * ((painter.batch_size - len(chosen)) * painter.is_padded)]
    draw = SampleNoise([seeds[i] for i in filled], device)
    noise = draw(method.noise_shape(*batch["mask"].shape[-2:]))  # (B, C, h, w)
    part = {key: batch[key][filled] for key in TENSOR_KEYS if key in batch}
    part |= {key: [batch[key][i] for i in filled] for key in ("prompt", "reference_key")}
    conditions = normalize_batch(part, device)
    cache = method.condition_cache
    if use_autocast != painter.use_autocast:
        method.condition_cache = None  # it holds what was computed in the other precision
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=use_autocast):
            images = method.sample(conditions, noise, painter.sampling, draw, painter.rectifier)
    finally:
        method.condition_cache = cache
    if painter.rectifier is not None:
        painter.rectifier.settle(len(chosen))
    return images[: len(chosen)].float().clone()
