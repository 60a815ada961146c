"""Write a checkpoint of full SD1.5 size with random weights (3.7 GB as fp16), and measure how it loads.

    python benchmarks/make_random_sd15.py random_sd15.safetensors
    python benchmarks/make_random_sd15.py random_sd15.safetensors --measure      # in a fresh process each time
"""
import argparse
import json
import struct
import sys
import time
from pathlib import Path
from typing import IO

import torch
from omegaconf import OmegaConf
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.diffusion.path import DiscretePath  # noqa: E402
from ldm.files import atomic_write  # noqa: E402
from ldm.util import UserError, check_targets, load_config, run_entry_point  # noqa: E402
from ldm.weights.load import SCHEDULE, build_skeleton, load_method, read_model_config  # noqa: E402

DTYPES = {"fp16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16"), "fp32": (torch.float32, "F32")}


def make_header(names: dict[str, Tensor], kind: str, config: str) -> tuple[bytes, int]:
    """Header of a safetensors file.

    Args:
        names: tensors without memory, by name.
        kind: key of DTYPES, for all but the schedule.
        config: yaml for the metadata.
    Returns:
        The header with its length in front, and the bytes of data that follow.
    """
    header: dict[str, object] = {"__metadata__": {"config": config}}
    position = 0
    for name, tensor in names.items():
        dtype, code = DTYPES["fp32" if name in SCHEDULE else kind]
        end = position + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, position


def random_values(name: str, like: Tensor) -> Tensor:
    """Values that keep activations finite: unit scale for norms, small random numbers elsewhere; float32."""
    if name in SCHEDULE:
        return DiscretePath().vectors().get(name, torch.zeros(like.shape))
    if like.ndim == 1:
        is_norm = "norm" in name or ".in_layers.0." in name or ".out_layers.0." in name or ".out.0." in name
        return torch.ones(like.shape) if is_norm and name.endswith("weight") else torch.zeros(like.shape)
    return torch.empty(like.shape).normal_(std=0.5 * like[0].numel() ** -0.5)


def write(path: Path, config_file: str, kind: str) -> int:
    """Write the checkpoint tensor by tensor, so that it takes no memory; returns its size in bytes."""
    config = OmegaConf.to_container(load_config([config_file]), resolve=True)
    check_targets(config, config_file)
    names = {name: tensor.detach() for name, tensor in build_skeleton(config).state_dict().items()}
    header, size = make_header(names, kind, OmegaConf.to_yaml(OmegaConf.create(config)))
    torch.manual_seed(0)

    def write(file: IO[bytes]) -> None:
        file.write(header)
        for name, tensor in names.items():
            dtype = DTYPES["fp32" if name in SCHEDULE else kind][0]
            value = random_values(name, tensor).to(dtype).contiguous()
            file.write(value.view(torch.uint8).numpy().data)

    atomic_write(path, write)
    return len(header) + size


def peak_memory() -> int:
    """Largest resident set of this process so far in bytes (Linux)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise UserError("--measure: needs /proc/self/status. Expected Linux. Leave it out.")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(path: Path) -> str:
    """Load the checkpoint in its own precision; returns time and memory in words."""
    before, start = peak_memory(), time.perf_counter()
    method = load_method(path, read_model_config(path), "cpu", dtype=None)
    seconds, peak, size = time.perf_counter() - start, peak_memory(), path.stat().st_size
    count = sum(p.numel() for p in method.parameters())
    return (f"{count:,} parameters, file {size / 1e9:.2f} GB: loaded in {seconds:.1f} s of wall time "
            f"({time.process_time():.1f} s of the processor since the start), peak memory {peak / 1e9:.2f} GB = "
            f"{peak / size:.2f} x the file ({before / 1e9:.2f} GB of it before loading)")


def main(argv: list[str]) -> None:
    """Write or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="safetensors file to write, or to load with --measure")
    parser.add_argument("--config", default="configs/model/tisynth_sd15_upstream.yaml", help="default: %(default)s")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16", help="precision (default: %(default)s)")
    parser.add_argument("--measure", action="store_true", help="load an existing file and print time and peak memory")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if args.measure:
        print(measure(args.path))
    else:
        print(f"wrote {args.path}: {write(args.path, args.config, args.dtype) / 1e9:.2f} GB")


if __name__ == "__main__":
    run_entry_point(main)
