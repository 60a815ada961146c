"""Generates planned samples with any method."""

import logging
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.cli import choose_device
from ldm.data.classes import ClassTable
from ldm.data.dataset import PairDataset, stack
from ldm.data.transforms import normalize_batch, to_uint8
from ldm.generation.guide import load_guide
from ldm.generation.machine import compile_blocks, in_parts
from ldm.generation.plan import Job, Plan, size_of
from ldm.methods.base import Method
from ldm.sampling.modes import Sampling
from ldm.sampling.noise import SampleNoise
from ldm.sampling.rectify import Rectifier
from ldm.util import UserError, leave_signals_to_main, locate
from ldm.weights.load import load_method

logger = logging.getLogger(__name__)

TENSOR_KEYS = ("mask", "image", "reference", "instance")  # of these, what the method takes
# On a CPU larger batches are not faster; with a fixed one, --batch_size does not change a bit of the images.
CPU_BATCH = 2
LOADERS_PER_GPU = 4


class Result(NamedTuple):
    """What became of a job: pixels (H, W, 3) or (H, W) uint8, (H, W, C) for other bands; or None and the reason."""

    job: Job
    pixels: np.ndarray | None
    reason: str = ""


class ConditionDataset(Dataset):
    """Conditions of a job: what its row has of mask, reference, instance map (int32) and image to start from (uint8).

    A job whose files cannot be read gives its Result instead: one bad file does not end a run.

    Args:
        method: of which `takes` and `image_channels` count.
        table: class table that the masks are read with.
        size: (height, width) to resize to; None keeps each mask's own.
    """

    def __init__(self, method: Method, table: ClassTable, size: tuple[int, int] | None) -> None:
        reference = "manifest" if "reference" in method.takes else "none"
        self.pairs = PairDataset([], table, size=size, reference=reference, channels=method.image_channels)

    def __getitem__(self, job: Job) -> dict[str, Any] | Result:
        """The job and its conditions, as arrays (see PairDataset.load)."""
        try:
            conditions, _ = self.pairs.load(job.row)
        except (OSError, ValueError) as error:
            return Result(job, None, str(error))
        if conditions["mask"].shape != job.size:
            return Result(job, None, f"{job.row.mask}: its size changed since the run began")
        return {"job": job, **conditions}


def collate(items: list[dict[str, Any] | Result]) -> dict[str, Any]:
    """Stack the good items of a batch as tensors, images channels first; `failed` has the Results of the others."""
    good = [item for item in items if not isinstance(item, Result)]
    jobs = [item["job"] for item in good]
    batch = {"job": jobs, "failed": [item for item in items if isinstance(item, Result)],
             "prompt": [job.row.prompt for job in jobs], "reference_key": [str(job.row.reference) for job in jobs]}
    return batch | {key: stack([item[key] for item in good]) for key in TENSOR_KEYS if good and key in good[0]}


def make_loader(dataset: ConditionDataset, num_workers: int = 0, is_cuda: bool = False) -> DataLoader:
    """Loader of conditions; its `batch_sampler` is the list of the batches, lists of jobs, of the next pass."""
    return DataLoader(
        dataset, batch_sampler=[], collate_fn=collate, num_workers=num_workers, pin_memory=is_cuda,
        persistent_workers=num_workers > 0, worker_init_fn=leave_signals_to_main,
    )  # fmt: skip


def plan_batches(jobs: Sequence[Job], batch_size: int,
                 kind: Callable[[str], Hashable] = lambda prompt: None) -> list[list[Job]]:
    """Split jobs into batches of one size and one kind of prompts (see Method.batch_kind), in the order of the jobs."""
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.size, kind(job.row.prompt)), []).append(job)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def generate_batches(batch_generator: "BatchGenerator", loader: DataLoader, jobs: Sequence[Job],
                     batch_size: int) -> Iterator[list[Result]]:
    """Generate images, one batch of at most `batch_size` after another; nothing is written.

    Yields:
        What became of the jobs of a batch; each job comes once. A file that cannot be read and an image that is not
        finite are no error, they have a reason.
    """
    loader.batch_sampler[:] = plan_batches(jobs, batch_size, batch_generator.method.batch_kind)
    for batch in loader:
        results = list(batch["failed"])
        if batch["job"]:
            finite, pixels = to_pixels(batch_generator.generate(batch, [job.noise_seed for job in batch["job"]]))
            results += [Result(job, image) if is_finite else Result(job, None, "the model returned NaN or infinity")
                        for job, image, is_finite in zip(batch["job"], pixels, finite, strict=True)]
        yield results


def to_pixels(images: Tensor) -> tuple[list[bool], np.ndarray]:
    """Whether each image (B, C, H, W) in [-1, 1] is finite, and all as (B, H, W, C) uint8, grey ones (B, H, W)."""
    finite = torch.isfinite(images).flatten(1).all(dim=1).tolist()
    pixels = to_uint8(images.nan_to_num()).permute(0, 2, 3, 1).cpu().numpy()
    return finite, pixels[..., 0] if pixels.shape[-1] == 1 else pixels


class Generator:
    """A planned run with its model loaded.

    Args:
        plan: of the run; its folder need not exist.
    """

    def __init__(self, plan: Plan) -> None:
        settings = plan.settings
        self.plan, self.device = plan, choose_device(plan.device)
        is_cuda = self.device.type == "cuda"
        # Full precision means it: convolutions on CUDA would otherwise round their inputs to TF32.
        torch.backends.cudnn.allow_tf32 = settings.precision != "full"
        kept = locate(plan.config["model"]["target"]).autocast_dtype if plan.use_autocast else torch.float32
        method = load_method(settings.ckpt, plan.config, self.device, kept)
        if settings.compile:
            compile_blocks(method)
        rectifier = None
        if plan.sampling.rectify is not None:
            guide = load_guide(settings.guide, method, self.device, settings.allow_modules)
            rectifier = Rectifier(plan.sampling.rectify, guide)
        self.batch_generator = BatchGenerator(
            method, plan.sampling, self.device, plan.use_autocast, settings.batch_size, settings.compile, rectifier)
        default = min(LOADERS_PER_GPU, len(os.sched_getaffinity(0))) if is_cuda else 0
        num_workers = default if settings.num_workers is None else settings.num_workers
        dataset = ConditionDataset(method, plan.table, size_of(settings))
        self.loader = make_loader(dataset, num_workers, is_cuda)
        if num_workers:
            list(self.loader)  # starts its processes now: later they would inherit a lock and could outlive us with it

    def generate(self, jobs: Sequence[Job]) -> Iterator[list[Result]]:
        """Generate images of the plan, one batch after another (see generate_batches)."""
        return generate_batches(self.batch_generator, self.loader, jobs, self.plan.settings.batch_size)

    def close(self) -> None:
        """End the loader's processes.

        Python itself would send them SIGTERM, which they ignore, and wait for ever: after an error that nobody catches,
        whose traceback holds on to the iterator that would end them.
        """
        iterator = self.loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()


def generate(plan: Plan) -> Iterator[list[Result]]:
    """Generate the images of a plan that its folder does not have, one batch after another; nothing is written.

    inference.py's worker does the same and stores what comes (see ldm/generation/worker.py).

    Yields:
        What became of the jobs of a batch (see Result).
    """
    generator = Generator(plan)
    try:
        for number in plan.numbers:
            yield from generator.generate(plan.jobs(number, plan.layout["copies"])[0])
    finally:
        generator.close()


class BatchGenerator:
    """Generates batches with a method.

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

    def generate(self, batch: dict[str, Any], seeds: Sequence[int]) -> Tensor:
        """Generate one batch.

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
            logger.warning("%d images are not finite in bfloat16, generated again in float32", len(broken))
            usual = self.batch_size
            with suppress(UserError):  # of memory: they stay NaN
                result[broken] = self.sample(batch, seeds, broken, use_autocast=False)
            self.batch_size = usual  # what float32 took too much memory for is possible again
        return result

    def sample(self, batch: dict[str, Any], seeds: Sequence[int], chosen: Sequence[int], use_autocast: bool) -> Tensor:
        """Generate the chosen samples of a batch in as many parts as memory asks for."""

        def attempt(part: Sequence[int], size: int) -> Tensor:
            self.batch_size = size  # stays so for the rest of the run
            return sample_images(self, batch, seeds, part, use_autocast)

        return torch.cat(in_parts(attempt, chosen, self.batch_size))


def sample_images(batch_generator: BatchGenerator, batch: dict[str, Any], seeds: Sequence[int], chosen: Sequence[int],
                  use_autocast: bool) -> Tensor:
    """Generate chosen samples of a batch, at most the batch size; filled up to it where the generator is_padded.

    Returns:
        Images, (len(chosen), C, H, W) float32 in [-1, 1] unless something went wrong inside the network.
    """
    method, device = batch_generator.method, batch_generator.device
    filled = [*chosen, *[chosen[-1]] * ((batch_generator.batch_size - len(chosen)) * batch_generator.is_padded)]
    draw = SampleNoise([seeds[i] for i in filled], device)
    noise = draw(method.noise_shape(*batch["mask"].shape[-2:]))  # (B, C, h, w)
    part = {key: batch[key][filled] for key in TENSOR_KEYS if key in batch}
    part |= {key: [batch[key][i] for i in filled] for key in ("prompt", "reference_key")}
    conditions = normalize_batch(part, device)
    cache = method.condition_cache
    if use_autocast != batch_generator.use_autocast:
        method.condition_cache = None  # it holds what was computed in the other precision
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=use_autocast):
            images = method.sample(conditions, noise, batch_generator.sampling, draw, batch_generator.rectifier)
    finally:
        method.condition_cache = cache
    if batch_generator.rectifier is not None:
        batch_generator.rectifier.settle(len(chosen))
    return images[: len(chosen)].float().clone()
