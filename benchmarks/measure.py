"""Time, memory and arithmetic of a piece of code, and what the machine could do at best in the same minute."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
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
    before = process_size("VmRSS")
    work()
    return process_size("VmHWM") - before


def process_size(name: str) -> float:
    """A size of this process in MiB (Linux): VmRSS, resident now; VmHWM, at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 2**10


def machine(device: str | torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    is_cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "cores": os.cpu_count(), "load": [round(value, 2) for value in os.getloadavg()]}


def ask_fresh(script: str, *arguments: Any, **environment: str) -> Any:
    """What a script prints as its last line, JSON, in a fresh process; RuntimeError with its errors if it fails."""
    done = subprocess.run([sys.executable, script, *map(str, arguments)], env={**os.environ, **environment},
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def lines_to(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that prints a record as a line of JSON, and writes it to a file if there is one."""
    with open(path, "w", encoding="utf-8") if path else nullcontext() as file:

        def emit(record: dict[str, Any]) -> None:
            for target in (sys.stdout, file) if file else (sys.stdout,):
                print(json.dumps(record), file=target, flush=True)

        yield emit


def write_tiles(folder: Path, pixels: int, count: int, prompt: str = "a satellite image of road") -> Path:
    """Draw PNG tiles whose colours follow their masks (classes 0 to 4), each with another as reference.

    Returns:
        Their manifest, rows.json; train_set_items.json and val_set_items.json hold all but its last 8 rows, and these.
    """
    random, rows = np.random.default_rng(0), []
    colours = random.integers(40, 215, (5, 3))
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        mask = np.kron(random.integers(0, 5, (4, 4)), np.ones((pixels // 4, pixels // 4), int)).astype(np.uint8)
        image = (colours[mask] + random.integers(-20, 20, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(mask).save(folder / f"mask_{index}.png")
        Image.fromarray(image).save(folder / f"image_{index}.png")
        rows.append({"source": f"mask_{index}.png", "target": f"image_{index}.png", "prompt": prompt,
                     "ref_image": f"image_{(index - 1) % count}.png"})
    for name, part in (("rows", rows), ("train_set_items", rows[:-8]), ("val_set_items", rows[-8:])):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder / "rows.json"
