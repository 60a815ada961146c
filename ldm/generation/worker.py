"""Paints shards: the loop that a single process, torchrun ranks, SLURM tasks and Ray actors all run."""

import logging
import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.cli import choose_device
from ldm.data.transforms import to_uint8
from ldm.files import Record, read_lines
from ldm.generation.generator import ConditionDataset, Job, Painter, make_loader, plan_batches
from ldm.generation.guide import load_guide
from ldm.generation.machine import compile_blocks
from ldm.generation.plan import Plan, is_unfinished
from ldm.generation.run import open_run
from ldm.generation.store import Claim, ShardStore, mask_name
from ldm.generation.writer import ImageWriter
from ldm.sampling.rectify import Rectifier
from ldm.util import UserError, locate
from ldm.weights.load import load_method

logger = logging.getLogger(__name__)

EXIT_FAILED_SAMPLES = 3
LOADERS_PER_GPU = 4
PNG_SHARE = 0.8  # of the raw bytes of a textured picture


class Worker:
    """A process with the model loaded.

    Args:
        plan: of the run; its folder need not exist yet.
    """

    def __init__(self, plan: Plan) -> None:
        settings = plan.settings
        self.plan, self.store = plan, plan.store()
        self.device = choose_device(plan.device)
        is_cuda = self.device.type == "cuda"
        # Full precision means it: convolutions on CUDA would otherwise round their inputs to TF32.
        torch.backends.cudnn.allow_tf32 = settings.precision != "full"
        kept = locate(plan.config["model"]["target"]).autocast_dtype if plan.use_autocast else torch.float32
        method = load_method(settings.ckpt, plan.config, self.device, kept)
        if settings.compile:
            compile_blocks(method)
        self.rectifier = None
        if plan.sampling.rectify is not None:
            guide = load_guide(settings.guide, method, self.device, settings.allow_modules)
            self.rectifier = Rectifier(plan.sampling.rectify, guide)
        self.painter = Painter(method, plan.sampling, self.device, plan.use_autocast, settings.batch_size,
                               settings.compile, self.rectifier)  # fmt: skip
        default = min(LOADERS_PER_GPU, len(os.sched_getaffinity(0))) if is_cuda else 0
        num_workers = default if settings.num_workers is None else settings.num_workers
        dataset = ConditionDataset(plan.rows, plan.table, settings.size, method.image_channels)
        self.loader = make_loader(dataset, num_workers, is_cuda)
        if num_workers:
            list(self.loader)  # starts its processes now: later they would inherit a lock and could outlive us with it
        self.old = {number: self.store.statistics_time(number) for number in plan.numbers}

    def close(self) -> None:
        """End the loader's processes.

        Python itself would send them SIGTERM, which they ignore, and wait for ever: after an error that nobody catches,
        whose traceback holds on to the iterator that would end them.
        """
        iterator = self.loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()

    def paint_shard(self, number: int) -> bool:
        """Paint what is missing of a shard and publish it; False if another process has the shard."""
        begun = time.monotonic()
        with self.store.claim(number) as claim:
            if claim is None:
                return False
            statistics = self.store.statistics(number)
            is_old = self.plan.settings.overwrite and self.store.statistics_time(number) == self.old[number]
            if not is_old and not is_unfinished(statistics, self.plan.layout["copies"]):
                return True  # another process was faster
            copies = max(self.plan.layout["copies"], (statistics or {}).get("copies", 0))
            jobs, left_out = self.plan.jobs(number, copies)
            records = [job.record for job in jobs]
            if is_old:
                self.store.forget(claim, records)
            self.store.find_finished(claim, records)
            found = len(claim.files)
            failures = left_out + self.paint_jobs(claim, jobs)
            details = {"rows": self.plan.bounds(number), "copies": copies, "painted": len(claim.files) - found,
                       "seconds": round(time.monotonic() - begun, 3), "device": device_name(self.device),
                       "batch_size": self.painter.batch_size, "torch": torch.__version__}  # fmt: skip
            details |= {"rectified": self.rectifier.report()} if self.rectifier else {}
            self.store.publish(claim, [r for r in records if r["image"] in claim.files], failures, details)
        return True

    def paint_jobs(self, claim: Claim, jobs: Sequence[Job]) -> list[Record]:
        """Paint the jobs of a shard whose images are not there; returns records of samples without an image."""
        todo = [slot for slot, job in enumerate(jobs) if job.record["image"] not in claim.files]
        if not todo:
            return []
        self.loader.batch_sampler.batches = plan_batches(jobs, todo, self.plan.settings.batch_size,
                                                              self.painter.method.batch_kind)
        failures: list[Record] = []
        claim.report(len(jobs) - len(todo), len(jobs))
        bar = tqdm(total=len(todo), unit="image", desc=f"shard {claim.number}")
        with bar, self.store.writer(claim) as writer:
            for batch in self.loader:
                for slot, error in batch["errors"].items():
                    failures.append(jobs[slot].record | {"reason": error})
                if batch["slot"]:
                    failures += self.paint_batch(batch, jobs, claim, writer)
                bar.update(len(batch["slot"]) + len(batch["errors"]))
                claim.report(len(jobs) - len(todo) + bar.n, len(jobs))
        for job in jobs:
            path = self.store.target(claim.number, job.record)
            if path in writer.written:
                claim.files[job.record["image"]] = writer.written[path]
        for failure in failures:
            logger.warning("row %d copy %d: no image: %s", failure["row"], failure["copy"], failure["reason"])
        return failures

    def paint_batch(
        self, batch: dict[str, Any], jobs: Sequence[Job], claim: Claim, writer: ImageWriter
    ) -> list[Record]:
        """Paint one batch and hand its pictures to the writer; returns records of those that are not finite."""
        chosen = [jobs[slot] for slot in batch["slot"]]
        images = self.painter.paint(batch, [job.noise_seed for job in chosen])
        finite, pixels = to_pixels(images)
        failures = []
        for i, job in enumerate(chosen):
            if not finite[i]:
                failures.append(job.record | {"reason": "the model returned NaN or infinity"})
                continue
            path = self.store.target(claim.number, job.record)
            if self.store.is_tar:
                writer.submit(batch["mask"][i].numpy(), path.with_name(mask_name(path.name)))
            writer.submit(pixels[i], path)
        return failures


def to_pixels(images: Tensor) -> tuple[list[bool], np.ndarray]:
    """Pictures as they are written.

    Args:
        images: (B, C, H, W) float32 in [-1, 1].

    Returns:
        Whether each is finite, and (B, H, W, C) uint8, grey ones (B, H, W).
    """
    finite = torch.isfinite(images).flatten(1).all(dim=1).tolist()
    pixels = to_uint8(images.nan_to_num()).permute(0, 2, 3, 1).cpu().numpy()
    return finite, pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def device_name(device: torch.device) -> str:
    """Name of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def run(plan: Plan) -> int:
    """Paint the shards of this process; returns the exit code.

    Raises:
        OutputError: if the output folder cannot be written.
        UserError: if the weights do not fit, or not even one image fits into memory.
    """
    if plan.numbers:
        worker = Worker(plan)
        try:
            begin(plan)
            left = list(plan.numbers)
            while left:
                busy = [number for number in left if not worker.paint_shard(number)]
                if len(busy) == len(left):
                    logger.info("%d shards are left to the processes that paint them", len(busy))
                    break
                left = busy  # whoever had them may have died since
        finally:
            worker.close()
    elif not plan.folder.is_dir():  # more processes than shards, and this one is the first to be here
        return 0
    return finish(plan)


def give_up(plan: Plan, number: int, reason: str) -> None:
    """Publish a shard that no process can paint, with a reason for every image that is missing.

    So the exit code and --status say it, and the next run tries again.
    """
    store, copies = plan.store(), plan.layout["copies"]
    with store.claim(number) as claim:
        if claim is None:  # it is another process's
            return
        jobs, failures = plan.jobs(number, copies)
        if not plan.settings.overwrite:
            store.find_finished(claim, [job.record for job in jobs])
        found = [job.record for job in jobs if job.record["image"] in claim.files]
        failures += [job.record | {"reason": reason} for job in jobs if job.record["image"] not in claim.files]
        details = {"rows": plan.bounds(number), "copies": copies, "painted": 0, "seconds": 0.0}
        store.publish(claim, found, failures, details)


def begin(plan: Plan) -> None:
    """Create or join the output folder, and say how much there is to do."""
    layout = open_run(plan.folder, plan.fingerprint, plan.details(), plan.layout)
    if layout["shard_size"] != plan.layout["shard_size"]:
        raise UserError(f"--outdir: {plan.folder} was begun by another process a moment ago, with "
                        f"{layout['shard_size']} rows a shard. Expected {plan.layout['shard_size']}. Start this again.")
    rows = sum(end - first for first, end in map(plan.bounds, plan.numbers))
    logger.info("%d shards to paint, %d rows, %d images each", len(plan.numbers), rows, layout["copies"])
    height, width = plan.settings.size or (512, 512)
    needed = int(rows * layout["copies"] * height * width * 3 * PNG_SHARE)
    free = shutil.disk_usage(plan.folder).free
    if needed > free:
        logger.warning("%s: %d MB are free, about %d MB may be needed", plan.folder, free >> 20, needed >> 20)


def finish(plan: Plan) -> int:
    """Leave the lists of the output folder complete and in order; returns the exit code."""
    store: ShardStore = plan.store()
    store.sweep(lambda statistics: not is_unfinished(statistics, plan.layout["copies"]))
    store.settle()
    first, step = plan.settings.shard
    size = plan.layout["shard_size"]
    failures = read_lines(store.failures, "row", "copy").values()
    failures = [record for record in failures if record["row"] // size % step == first]
    logger.info("results are in %s", plan.folder)
    if not failures:
        return 0
    logger.error("error: %d samples have no image, see %s", len(failures), store.failures)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun would stop the other ranks; --status has the exit code
        return 0
    return EXIT_FAILED_SAMPLES
