"""Generates shards: the loop that a single process, torchrun ranks, SLURM tasks and Ray actors all run."""

import logging
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch
from tqdm import tqdm

from ldm import ray_pool
from ldm.files import Record
from ldm.generation.generator import Generator
from ldm.generation.machine import stop_on_signals
from ldm.generation.plan import Job, Plan, make_plan, size_of
from ldm.generation.store import Claim
from ldm.util import UserError

logger = logging.getLogger(__name__)

EXIT_FAILED_SAMPLES = 3
PNG_SHARE = 0.8  # of the raw bytes of a textured image


class Worker:
    """A process with the model loaded.

    Args:
        plan: of the run; its folder need not exist yet.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.store, self.generator = plan, plan.store(), Generator(plan)
        self.old = {number: self.store.statistics_time(number) for number in plan.numbers}

    def generate_shard(self, number: int) -> bool:
        """Generate what is missing of a shard and publish it; False if another process has the shard."""
        begun = time.monotonic()
        with self.store.claim_shard(number) as claim:
            if claim is None:
                return False
            statistics = self.store.statistics(number)
            is_old = self.plan.settings.overwrite and self.store.statistics_time(number) == self.old[number]
            if not is_old and not self.store.is_unfinished(number, self.plan.layout["copies"]):
                return True  # another process was faster
            copies = max(self.plan.layout["copies"], (statistics or {}).get("copies", 0))
            jobs, failures = self.plan.jobs(number, copies)
            records = [job.record for job in jobs]
            if is_old:
                self.store.forget(claim, records)
            self.store.find_finished(claim, records)
            found = len(claim.files)
            missing = [job for job in jobs if job.record["image"] not in claim.files]
            failures += self.generate_jobs(claim, missing, found)
            device = self.generator.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
            details = {"rows": self.plan.bounds(number), "copies": copies, "painted": len(claim.files) - found,
                       "seconds": round(time.monotonic() - begun, 3), "device": name,
                       "batch_size": self.generator.batch_generator.batch_size, "torch": torch.__version__}  # fmt: skip
            rectifier = self.generator.batch_generator.rectifier
            details |= {"rectified": rectifier.report()} if rectifier else {}
            self.store.publish(claim, records, failures, details)
        return True

    def generate_jobs(self, claim: Claim, jobs: Sequence[Job], found: int) -> list[Record]:
        """Write the images of jobs of a shard that has `found` already; returns records of those without an image."""
        if not jobs:
            return []
        failures: list[Record] = []
        claim.report(found, found + len(jobs))
        bar = tqdm(total=len(jobs), unit="image", desc=f"shard {claim.number}")
        with bar, self.store.writer(claim) as writer:
            for results in self.generator.generate(jobs):
                for job, pixels, reason in results:
                    if pixels is None:
                        failures.append(job.record | {"reason": reason})
                    else:
                        writer.submit(pixels, self.store.folder / job.record["image"])
                bar.update(len(results))
                claim.report(found + bar.n, found + len(jobs))
        claim.files |= {path.relative_to(self.store.folder).as_posix(): it for path, it in writer.written.items()}
        for failure in failures:
            logger.warning("row %d copy %d: no image: %s", failure["row"], failure["copy"], failure["reason"])
        return failures


def run(plan: Plan) -> int:
    """Generate the shards of this process; returns the exit code.

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
                busy = [number for number in left if not worker.generate_shard(number)]
                if len(busy) == len(left):
                    logger.info("%d shards are left to the processes that generate them", len(busy))
                    break
                left = busy  # whoever had them may have died since
        finally:
            worker.generator.close()
    elif not plan.folder.is_dir():  # more processes than shards, and this one is the first to be here
        return 0
    return finish(plan)


def load_worker(plan: Plan) -> Callable[[int], bool]:
    """Load the model of a plan in a process of Ray's; gives the function that does a shard."""
    return Worker(plan).generate_shard


def run_on_ray(settings: Namespace) -> int:
    """Check everything, then let actors do the shards; returns the exit code (see run).

    Args:
        settings: see make_plan; without --ray_workers, one actor for each GPU of the cluster, or one on CPUs.
    """
    ray = ray_pool.connect()
    try:
        with stop_on_signals():  # Ray has handlers of its own
            gpus = ray_pool.count_gpus(settings.device, ray.cluster_resources())
            count = ray_pool.count_actors(settings.ray_workers, gpus)
            plan = make_plan(settings, has_gpu=gpus > 0, processes=count)
            if plan.numbers:
                begin(plan)
                actors = min(count, len(plan.numbers))
                pool = ray_pool.ActorPool(ray, partial(load_worker, plan), actors, plan.device == "cuda")
                pool.run(plan.numbers, partial(give_up, plan))
            return finish(plan)
    finally:
        ray.shutdown()


def give_up(plan: Plan, number: int, reason: str) -> None:
    """Publish a shard that no process can generate, with a reason for every image that is missing.

    So the exit code and --status say it, and the next run tries again.
    """
    store, copies = plan.store(), plan.layout["copies"]
    with store.claim_shard(number) as claim:
        if claim is None:  # it is another process's
            return
        jobs, failures = plan.jobs(number, copies)
        records = [job.record for job in jobs]
        if not plan.settings.overwrite:
            store.find_finished(claim, records)
        failures += [record | {"reason": reason} for record in records if record["image"] not in claim.files]
        store.publish(claim, records, failures, {"rows": plan.bounds(number), "copies": copies, "painted": 0,
                                                 "seconds": 0.0})  # fmt: skip


def begin(plan: Plan) -> None:
    """Create or join the output folder, and say how much there is to do."""
    layout = plan.store().begin(plan.layout)
    if layout["shard_size"] != plan.layout["shard_size"]:
        raise UserError(f"--outdir: {plan.folder} was begun by another process a moment ago, with "
                        f"{layout['shard_size']} rows a shard. Expected {plan.layout['shard_size']}. Start this again.")
    rows = sum(end - first for first, end in map(plan.bounds, plan.numbers))
    logger.info("%d shards to generate, %d rows, %d images each", len(plan.numbers), rows, layout["copies"])
    height, width = size_of(plan.settings) or (512, 512)
    needed = int(rows * layout["copies"] * height * width * 3 * PNG_SHARE)
    free = shutil.disk_usage(plan.folder).free
    if needed > free:
        logger.warning("%s: %d MB are free, about %d MB may be needed", plan.folder, free >> 20, needed >> 20)


def finish(plan: Plan) -> int:
    """Leave the lists of the output folder complete and in order; returns the exit code."""
    store = plan.store()
    store.sweep(plan.layout["copies"])
    store.settle()
    first, step = plan.settings.shard
    size = plan.layout["shard_size"]
    failures = store.failed().values()
    failures = [record for record in failures if record["row"] // size % step == first]
    logger.info("results are in %s", plan.folder)
    if not failures:
        return 0
    logger.error("error: %d samples have no image, see %s", len(failures), store.failures)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun would stop the other ranks; --status has the exit code
        return 0
    return EXIT_FAILED_SAMPLES
