"""Shards on a Ray cluster: actors with the model loaded take one shard after another. Ray is an optional package.

Which shard is finished is known from the output folder alone, as without Ray; all nodes must see it under one path.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.models.machine import stop_on_signals
from ldm.models.planning import Plan, RunSettings, make_plan
from ldm.models.worker import Worker, begin, finish
from ldm.sampling.modes import Sampling
from ldm.sampling.writer import OutputError
from ldm.util import UserError

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
OBJECT_STORE = 128 << 20  # bytes; only the plan goes through it
MOST_TRIES = 3  # of a shard whose actors die


class RayWorker:
    """A Worker in a process of Ray's; the model is loaded with the first shard, so that its errors arrive.

    Args:
        plan: of the run.
        folder: where the driver stands; relative paths of the plan begin there.
        threads: of the driver; with another number, sums on a CPU may round differently.
    """

    def __init__(self, plan: Plan, folder: str, threads: int) -> None:
        os.chdir(folder)
        torch.set_num_threads(threads)
        self.plan = plan
        self.worker: Worker | None = None

    def paint_shard(self, number: int) -> bool:
        """See Worker.paint_shard."""
        self.worker = self.worker or Worker(self.plan)
        return self.worker.paint_shard(number)


class ActorPool:
    """Actors and the shards that they paint.

    Args:
        ray: the package.
        plan: of the run.
        count: number of actors.
    """

    def __init__(self, ray: Any, plan: Plan, count: int) -> None:
        self.ray, self.plan = ray, plan
        self.needs = actor_needs(plan.device == "cuda", count, ray.cluster_resources().get("CPU", 1))
        self.arguments = ray.put(plan), os.getcwd(), torch.get_num_threads()
        self.idle = [self.start_actor() for _ in range(count)]
        self.running: dict[Any, tuple[Any, int]] = {}

    def start_actor(self) -> Any:
        """Start one actor."""
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
        return self.ray.remote(RayWorker).options(runtime_env=environment, **self.needs).remote(*self.arguments)

    def paint(self, numbers: list[int]) -> None:
        """Paint shards; those of an actor that dies go to another one.

        Raises:
            OutputError, UserError: from an actor, or if a shard killed several of them.
        """
        waiting, tries = deque(numbers), Counter()
        while waiting or self.running:
            while waiting and self.idle:
                actor, number = self.idle.pop(), waiting.popleft()
                self.running[actor.paint_shard.remote(number)] = actor, number
            for done in self.ray.wait(list(self.running))[0]:
                actor, number = self.running.pop(done)
                tries[number] += 1
                try:
                    if not self.ray.get(done):
                        logger.info("shard %d is left to the process that paints it", number)
                    self.idle.append(actor)
                except (OutputError, UserError) as error:
                    raise getattr(error, "cause", error) from error
                except self.ray.exceptions.RayError as error:
                    logger.warning("shard %d: %s", number, str(error).strip().splitlines()[-1])
                    if tries[number] == MOST_TRIES:
                        raise UserError(f"shard {number}: its worker failed {MOST_TRIES} times, last with: {error}. "
                                        "Paint it alone to see why: --engine local.") from error
                    waiting.append(number)
                    self.replace(actor)

    def replace(self, actor: Any) -> None:
        """Start an actor in the place of a lost one, unless its node went with it and others are left."""
        self.ray.kill(actor)
        free = self.ray.available_resources()
        if self.needs["num_gpus"] <= free.get("GPU", 0) or not (self.idle or self.running):
            self.idle.append(self.start_actor())


def actor_needs(is_cuda: bool, count: int, cpus: float) -> dict[str, float]:
    """Resources of an actor: with fewer CPUs than actors Ray would let the last ones wait for ever."""
    share = max(0.0, (cpus - 1) / count)
    return {"num_cpus": int(share) if share >= 1 else round(share, 2), "num_gpus": 1 if is_cuda else 0}


def connect() -> Any:
    """Import Ray and connect to the cluster of RAY_ADDRESS, or start one on this machine; returns the package."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError("--engine ray: the package is not installed. Expected it. Install it with: "
                        "pip install -r requirements/ray.txt") from error
    local = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    ray.init(logging_level=logging.WARNING, log_to_driver=True, **local)
    return ray


def run_on_ray(settings: RunSettings, choose_sampling: Callable[[Sampling], Sampling], workers: int | None) -> int:
    """Check everything, then paint with actors; returns the exit code.

    Args:
        settings, choose_sampling: see make_plan.
        workers: number of actors; None = one for each GPU of the cluster, or one on CPUs.
    """
    ray = connect()
    try:
        with stop_on_signals():  # Ray has handlers of its own
            gpus = 0 if settings.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
            if gpus and (workers or 1) > gpus:
                raise UserError(f"--ray_workers: {workers} for {gpus} GPUs. Expected at most one a GPU. Lower it.")
            plan = make_plan(settings, choose_sampling, has_gpu=gpus > 0)
            if plan.numbers:
                begin(plan)
                ActorPool(ray, plan, min(workers or gpus or 1, len(plan.numbers))).paint(plan.numbers)
            return finish(plan)
    finally:
        ray.shutdown()
