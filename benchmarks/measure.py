"""Time, memory and arithmetic of a piece of code, and what the machine could do at best in the same minute."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


class Clock:
    """Seconds of a device: on a CPU those that this process computed, which other processes disturb little.

    Args:
        device: `cpu` or a CUDA device.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.is_cuda = torch.device(device).type == "cuda"
        self.unit = "s" if self.is_cuda else "CPU-s"

    def measure(self, work: Callable[[], Any]) -> float:
        """Seconds that the work takes."""
        start = self.now()
        work()
        return self.now() - start

    def now(self) -> float:
        """Seconds since some moment, with all queued work done."""
        if self.is_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def interleave(works: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock,
               warm_ups: int = 1) -> dict[str, list[float]]:
    """Seconds of every work in every round; the works take turns, so that a busy minute hits all of them alike."""
    for _ in range(warm_ups):
        for work in works.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(clock.measure(work))
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Minimum and median."""
    return {"min": round(min(seconds), 4), "median": round(statistics.median(seconds), 4)}


def count_flops(work: Callable[[], Any], grad: bool = False) -> float:
    """GFLOP of a work on meta tensors, 2 a multiplication; on other devices attention would not be counted."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
        work()
    return counter.get_total_flops() / 1e9


def matmul_rate(device: str | torch.device, dtype: torch.dtype, side: int = 2048, repeats: int = 5) -> float:
    """GFLOP a second of the best of some square matrix products: the ceiling of this machine, now."""
    clock = Clock(device)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * side**3 / min(clock.measure(lambda: left @ right) for _ in range(repeats)) / 1e9


def copy_rate(device: str | torch.device, megabytes: int = 256, repeats: int = 5) -> float:
    """GB a second, read and written, of the best of some copies."""
    clock = Clock(device)
    source = torch.zeros(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(clock.measure(lambda: target.copy_(source)) for _ in range(repeats)) / 1e9


def peak_memory(work: Callable[[], Any], device: str | torch.device) -> float:
    """MiB that a work needs on top of what is there, at its worst moment; on a CPU only right in a fresh process."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Not getrusage: what it calls the peak of a process begins with that of the process that started it.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """A size of this process in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 2**10


def machine(device: str | torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    is_cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "cores": os.cpu_count(), "load": [round(value, 2) for value in os.getloadavg()]}
