"""The filter under Ray Data, for clusters whose CPUs are on many machines. Ray is an optional package.

The actors write to one folder that all machines see under one path, so what is finished is known as without Ray.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.files import Record
from ldm.util import UserError
from post_processing.segmentation.loading import Item
from post_processing.selection.rules import PixelFilter

REPOSITORY = Path(__file__).resolve().parents[1]
OBJECT_STORE = 128 << 20  # bytes; only names go through it
BATCHES = 8  # of the segmentor in one task: enough to read ahead, few enough to share the work evenly


class FilterActor:
    """A PixelFilter as Ray Data calls it.

    Args:
        build: makes the filter, given a folder for unfinished files.
        work: where each actor makes that folder of its own.
        items: all pictures; tasks name them by their places.
    """

    def __init__(self, build: Callable[[Path], PixelFilter], work: Path, items: Sequence[Item]) -> None:
        own = work / f"{os.uname().nodename}-{os.getpid()}"
        own.mkdir(exist_ok=True)
        self.worker, self.items = build(own), items

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Filter some pictures; the values of each failure's record come back as columns."""
        failures = self.worker.run([self.items[place] for place in batch["id"]])
        return {key: [failure[key] for failure in failures] for key in ("image", "mask", "reason")}


def run_on_ray(
    build: Callable[[Path], PixelFilter], work: Path, items: Sequence[Item], batch_size: int, actors: int, is_cuda: bool
) -> list[Record]:
    """Filter pictures with actors on the cluster of RAY_ADDRESS, or on this machine.

    Args:
        build, work, items: see FilterActor.
        batch_size: of the segmentor.
        actors: how many.
        is_cuda: give each actor a GPU.
    Returns:
        The records of pictures that could not be judged.
    Raises:
        UserError: if Ray is missing.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            f"--engine ray: Ray Data cannot be imported ({error}). Expected it. Install it with: pip install -r "
            "requirements/ray.txt"
        ) from error
    # A cluster that already runs on this machine is not joined unasked: it would refuse to be given a size.
    own = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    cluster = {} if os.environ.get("RAY_ADDRESS") else own
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}}, **cluster)
    try:
        # One CPU stays free: if actors take them all, Ray Data's own tasks wait for ever.
        share = max(0.1, (ray.cluster_resources().get("CPU", 1) - 1) / actors)
        share = min(share, 1) if is_cuda else share  # the CPUs of a cluster are not all beside its GPUs
        found = ray.data.range(len(items)).map_batches(
            FilterActor,
            fn_constructor_args=(build, work, items),
            batch_size=batch_size * BATCHES,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=int(share) if share >= 1 else share,
            num_gpus=1 if is_cuda else 0,
        )
        return [dict(row) for row in found.take_all()]
    finally:
        ray.shutdown()
