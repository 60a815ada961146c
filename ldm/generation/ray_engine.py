"""Shards on a Ray cluster: actors with the model loaded take one shard after another. Ray is an optional package.

Which shard is finished is known from the output folder alone, as without Ray; all nodes must see it under one path.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.files import OutputError
from ldm.generation.machine import stop_on_signals
from ldm.generation.plan import Plan, RunSettings, make_plan
from ldm.generation.worker import Worker, begin, finish, give_up
from ldm.sampling.modes import Sampling
from ldm.util import UserError

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
OBJECT_STORE = 128 << 20  # bytes; only the plan goes through it
MOST_TRIES = 3  # of a shard whose actors die
CPUS_OF_GPU_ACTOR = 1  # its loaders use more, but a share of all CPUs may be more than one node with a free GPU has


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
        """Paint shards; one whose actor fails goes to another actor, and is given up after MOST_TRIES.

        Ends early where every shard is given up: thousands would meet the same fault.

        Raises:
            OutputError, UserError: from an actor.
        """
        waiting, tries, painted, lost, actors = deque(numbers), Counter(), 0, 0, len(self.idle)
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
                    painted += 1
                    self.idle.append(actor)
                except (OutputError, UserError) as error:
                    raise getattr(error, "cause", error) from error
                except self.ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[-1]
                    logger.warning("shard %d: %s", number, reason)
                    self.replace(actor, isinstance(error, self.ray.exceptions.RayTaskError))
                    if tries[number] < MOST_TRIES:
                        waiting.appendleft(number)
                        continue
                    give_up(self.plan, number, f"its worker failed {MOST_TRIES} times, last with: {reason}")
                    lost += 1
                    if not painted and lost >= max(MOST_TRIES, actors):
                        logger.error("error: %d shards failed and none was painted, the others are left. Run it with "
                                     "--engine local to see why.", lost)
                        return

    def replace(self, actor: Any, is_alive: bool) -> None:
        """Start an actor in the place of one, unless its node went with it and others are left."""
        self.ray.kill(actor)
        free = self.ray.available_resources()
        if is_alive or self.needs["num_gpus"] <= free.get("GPU", 0) or not (self.idle or self.running):
            self.idle.append(self.start_actor())


def actor_needs(is_cuda: bool, count: int, cpus: float) -> dict[str, float]:
    """Resources of an actor: with fewer CPUs than actors Ray would let the last ones wait for ever.

    Args:
        is_cuda: it paints on a GPU, which then is all that it takes for itself.
        count: number of actors.
        cpus: of the whole cluster.
    """
    share = max(0.0, (cpus - 1) / count)
    share = min(share, CPUS_OF_GPU_ACTOR) if is_cuda else share
    return {"num_cpus": int(share) if share >= 1 else round(share, 2), "num_gpus": 1 if is_cuda else 0}


def count_gpus(device: str, resources: Mapping[str, float]) -> int:
    """GPUs of a cluster that --device lets actors use; UserError if it wants some and there are none."""
    gpus = 0 if device == "cpu" else int(resources.get("GPU", 0))
    if device.startswith("cuda") and not gpus:
        raise UserError(f"--device: {device}, but the Ray cluster has no GPU. Expected one at least. Set RAY_ADDRESS "
                        "to a cluster with GPUs, or leave the flag out to paint on CPUs.")
    return gpus


def connection(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Arguments of ray.init: none to join RAY_ADDRESS, else those of a cluster of our own.

    A cluster that already runs on this machine is not joined unasked: it would refuse to be given a size.
    """
    if environment.get("RAY_ADDRESS"):
        return {}
    return {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE}


def connect() -> Any:
    """Import Ray and connect to the cluster of RAY_ADDRESS, or start one on this machine; returns the package."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError("--engine ray: the package is not installed. Expected it. Install it with: "
                        "pip install -r requirements/ray.txt") from error
    ray.init(logging_level=logging.WARNING, log_to_driver=True, **connection())
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
            gpus = count_gpus(settings.device, ray.cluster_resources())
            if gpus and (workers or 1) > gpus:
                raise UserError(f"--ray_workers: {workers} for {gpus} GPUs. Expected at most one a GPU. Lower it.")
            count = workers or gpus or 1
            plan = make_plan(settings, choose_sampling, has_gpu=gpus > 0, processes=count)
            if plan.numbers:
                begin(plan)
                ActorPool(ray, plan, min(count, len(plan.numbers))).paint(plan.numbers)
            return finish(plan)
    finally:
        ray.shutdown()
