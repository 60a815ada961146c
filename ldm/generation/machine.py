"""The machine that a run finds itself on: its share of the work, and signals that ask it to stop."""

import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ldm.methods.base import Method
from ldm.util import UserError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

COMPILED_VARIANTS = 256  # shapes and widths of blocks in one network; torch gives up after 8 unless told otherwise
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# What torch's allocators and NVIDIA's libraries, which allocate on their own, say of memory that does not suffice.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED",
                 "CUDNN_STATUS_ALLOC_FAILED", "HOST_ALLOCATION_FAILED", "DEVICE_ALLOCATION_FAILED")


class Stopped(BaseException):
    """The process was asked to stop; what is finished is on disk.

    Attributes:
        code: exit code: 130 after Ctrl-C, else 143, whether it was SIGTERM or SLURM's warning SIGUSR1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 130 if number == signal.SIGINT else 143


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within it, the first SIGTERM, SIGUSR1 or SIGINT raises Stopped where the main thread stands; the next one kills.

    Nothing is lost either way: files are whole or absent at every moment.
    """

    def stop(number: int, _: Any) -> None:
        for name in STOP_SIGNALS:
            signal.signal(name, signal.SIG_DFL)
        raise Stopped(number)

    before = {name: signal.signal(name, stop) for name in STOP_SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def find_share(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which shards this process generates, from what started it: torchrun, srun, a SLURM array, or arrays of these.

    Returns:
        (i, n): shards i, i + n, i + 2n, ...; (0, 1) if nothing says that there are several processes.

    Raises:
        UserError: for an array whose indices are not 0..n-1.
    """

    def number(name: str, default: int) -> int:
        return int(environment.get(name) or default)

    index, count = number("SLURM_ARRAY_TASK_ID", 0), number("SLURM_ARRAY_TASK_COUNT", 1)
    if number("SLURM_ARRAY_TASK_MIN", 0) != 0 or number("SLURM_ARRAY_TASK_MAX", count - 1) != count - 1:
        raise UserError(
            f"--shard: the job is task {index} of a SLURM array from {environment.get('SLURM_ARRAY_TASK_MIN')} to "
            f"{environment.get('SLURM_ARRAY_TASK_MAX')} with {count} tasks. Expected indices 0..n-1, as --array=0-7 "
            "gives. To repeat some tasks of an array, add --shard $SLURM_ARRAY_TASK_ID/8, for example."
        )
    if "WORLD_SIZE" in environment:
        rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
    else:  # SLURM_NTASKS would also be set outside of srun, where there is one process only
        rank, size = number("SLURM_PROCID", 0), number("SLURM_STEP_NUM_TASKS", 1)
        rank = rank if size > 1 else 0
    return index * size + rank, count * size


def compile_blocks(method: Method, **options: Any) -> None:
    """Compile the repeated blocks of a network in place, with options of torch.compile.

    A network is a few kinds of blocks many times over: compiling these takes a small part of the time that the whole
    takes. Batches must keep their size, else everything is compiled again.
    """
    torch._dynamo.config.recompile_limit = max(COMPILED_VARIANTS, torch._dynamo.config.recompile_limit)
    blocks = list(method.blocks())
    for block in blocks:
        block.compile(dynamic=False, **options)
    logger.info("%d blocks are compiled when they first run, which takes a while", len(blocks))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the GPU or of the CPU, does not suffice."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    )


def in_parts(function: Callable[[Sequence[int], int], Result], chosen: Sequence[int], size: int) -> list[Result]:
    """Call a function on numbers and their limit, `size` at a time, and on half as many from where memory ends.

    Returns:
        What the function gave for each part, in order.
    Raises:
        UserError: if one at a time is too much.
    """
    results, start = [], 0
    while start < len(chosen):
        part = chosen[start : start + size]
        try:
            results.append(function(part, size))
            start += len(part)
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # Outside of the except block, which would keep the tensors of the failed call alive.
        if size == 1:
            raise UserError(f"--batch_size: not even one image fits into memory ({reason}). Choose smaller images, or "
                            "another device; what is finished stays.")
        size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory: going on with %d images at once; results may differ from those of larger "
                       "batches in the last bit", size)
    return results
