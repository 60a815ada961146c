"""Units of work on a Ray cluster: actors, each with what it needs loaded, take one unit after another.

Ray is an optional package. What is finished is known from the output folder alone, as without Ray; all nodes must see
it under one path.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.files import OutputError
from ldm.util import UserError

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[1]
OBJECT_STORE = 128 << 20  # bytes; only plans and names go through it
MOST_TRIES = 3  # of a unit whose actors die
CPUS_OF_GPU_ACTOR = 1  # its loaders use more, but a share of all CPUs may be more than one node with a free GPU has

Work = Callable[[Any], Any]


class Actor:
    """A process of Ray's. What it needs is loaded with the first unit, so that its errors arrive.

    Args:
        build: loads it; gives the function that does a unit.
        folder: where the driver stands; relative paths begin there.
        threads: of the driver; with another number, sums on a CPU may round differently.
    """

    def __init__(self, build: Callable[[], Work], folder: str, threads: int) -> None:
        import torch

        os.chdir(folder)
        torch.set_num_threads(threads)
        self.build = build
        self.work: Work | None = None

    def run(self, unit: Any) -> Any:
        """Do one unit."""
        self.work = self.work or self.build()
        return self.work(unit)


class ActorPool:
    """Actors, with a GPU each if `is_cuda`, and the units that they do; `build` is Actor's."""

    def __init__(self, ray: Any, build: Callable[[], Work], count: int, is_cuda: bool) -> None:
        import torch

        self.ray = ray
        self.needs = actor_needs(is_cuda, count, ray.cluster_resources().get("CPU", 1))
        self.arguments = ray.put(build), os.getcwd(), torch.get_num_threads()
        self.idle = [self.start_actor() for _ in range(count)]
        self.running: dict[Any, tuple[Any, int]] = {}

    def start_actor(self) -> Any:
        """Start one actor."""
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
        return self.ray.remote(Actor).options(runtime_env=environment, **self.needs).remote(*self.arguments)

    def run(self, units: Sequence[Any], give_up: Callable[[Any, str], None]) -> list[Any]:
        """Do units for Actor.run; one whose actor fails goes to another actor, and after MOST_TRIES to `give_up`.

        Ends early where every unit is given up: thousands would meet the same fault.

        Returns:
            What the units gave, in the order in which they ended.
        Raises:
            OutputError, UserError: from an actor.
        """
        waiting, tries, lost, actors = deque(range(len(units))), Counter(), 0, len(self.idle)
        results = []
        while waiting or self.running:
            while waiting and self.idle:
                actor, place = self.idle.pop(), waiting.popleft()
                self.running[actor.run.remote(units[place])] = actor, place
            for done in self.ray.wait(list(self.running))[0]:
                actor, place = self.running.pop(done)
                tries[place] += 1
                try:
                    results.append(self.ray.get(done))
                    self.idle.append(actor)
                except (OutputError, UserError) as error:
                    raise getattr(error, "cause", error) from error
                except self.ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[-1]
                    logger.warning("unit %d of %d: %s", place, len(units), reason)
                    self.replace(actor, isinstance(error, self.ray.exceptions.RayTaskError))
                    if tries[place] < MOST_TRIES:
                        waiting.appendleft(place)
                        continue
                    give_up(units[place], f"its worker failed {MOST_TRIES} times, last with: {reason}")
                    lost += 1
                    if not results and lost >= max(MOST_TRIES, actors):
                        logger.error("error: %d units of work failed and none was done, the others are left. Run it "
                                     "with --engine local to see why.", lost)
                        return results
        return results

    def replace(self, actor: Any, is_alive: bool) -> None:
        """Start an actor in the place of one, unless its node went with it and others are left."""
        self.ray.kill(actor)
        free = self.ray.available_resources()
        if is_alive or self.needs["num_gpus"] <= free.get("GPU", 0) or not (self.idle or self.running):
            self.idle.append(self.start_actor())


def actor_needs(is_cuda: bool, count: int, cpus: float) -> dict[str, float]:
    """Resources of one of `count` actors: with fewer CPUs than actors Ray would let the last ones wait for ever.

    On a GPU, that is all that it takes for itself; `cpus` are those of the whole cluster.
    """
    share = max(0.0, (cpus - 1) / count)
    share = min(share, CPUS_OF_GPU_ACTOR) if is_cuda else share
    return {"num_cpus": int(share) if share >= 1 else round(share, 2), "num_gpus": 1 if is_cuda else 0}


def count_gpus(device: str, resources: Mapping[str, float]) -> int:
    """GPUs of a cluster that --device lets actors use; UserError if it wants some and there are none."""
    gpus = 0 if device == "cpu" else int(resources.get("GPU", 0))
    if device.startswith("cuda") and not gpus:
        raise UserError(f"--device: {device}, but the Ray cluster has no GPU. Expected one at least. Set RAY_ADDRESS "
                        "to a cluster with GPUs, or leave the flag out to compute on CPUs.")
    return gpus


def count_actors(workers: int | None, gpus: int) -> int:
    """Number of actors: --ray_workers, by default one a GPU, or one on CPUs; UserError for more than GPUs."""
    if gpus and (workers or 1) > gpus:
        raise UserError(f"--ray_workers: {workers} for {gpus} GPUs. Expected at most one a GPU. Lower it.")
    return workers or gpus or 1


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
