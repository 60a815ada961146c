"""What one GPU does with this code, in about eight minutes: the table to fill on a new machine.

    python benchmarks/bench_gpu.py --out gpu.jsonl            # a CUDA device, the sizes of Stable Diffusion 1.5
    python benchmarks/bench_gpu.py --tiny --device cpu        # the same rows at a size that only proves they run

Random weights, no data needed. Every row is a JSON line, written as soon as it is known. A row that fails becomes a
line with `error`, and the exit code is then 1; what would begin after --seconds is left out with a line that says so.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import inference  # noqa: E402
from benchmarks import bench_sampling, bench_training, measure, upstream_style  # noqa: E402
from benchmarks.setting import SIZES, config_of, make_inputs, make_ours  # noqa: E402
from ldm.generation.machine import compile_blocks  # noqa: E402
from ldm.sampling.guidance import join_branches  # noqa: E402
from ldm.weights.checkpoint import save_safetensors  # noqa: E402

Line = dict[str, Any]
ATTENTION = ((8, 4096, 40), (5, 4096, 64), (8, 1024, 80), (8, 256, 160))  # heads, positions, width of a head


class Machine:
    """Device, size and what rows share.

    Args:
        args: command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.tiny = args, torch.device(args.device), args.tiny
        self.is_cuda = self.device.type == "cuda"
        self.size = SIZES["tiny" if args.tiny else "full"]
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.clock = measure.Clock(self.device)
        self.ceiling = 0.0
        self.gflop: float | None = None  # of the network's forward pass for one image

    def best(self, work: Callable[[], Any], repeats: int = 5) -> float:
        """Seconds of the best of some runs, after two to warm up."""
        repeats, warm_ups = (1, 1) if self.tiny else (repeats, 2)
        for _ in range(warm_ups):
            work()
        return min(self.clock.measure(work) for _ in range(repeats))

    def pick(self, values: tuple, tiny: tuple) -> tuple:
        """Values of a sweep, fewer in a tiny run."""
        return tiny if self.tiny else values


def ceilings(machine: Machine) -> Iterator[Line]:
    """Matrix product, copy, and attention with every kernel there is."""
    machine.ceiling = measure.matmul_rate(machine.device, machine.dtype, 128 if machine.tiny else 8192)
    yield {"row": "matmul", "tflop_a_second": machine.ceiling / 1e3}
    yield {"row": "copy", "gb_a_second": measure.copy_rate(machine.device, 1 if machine.tiny else 2048)}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    batch = 1 if machine.tiny else 16
    for heads, positions, width in machine.pick(ATTENTION, ((2, 64, 40),)):
        q, k, v = (torch.randn(batch, heads, positions, width, device=machine.device, dtype=machine.dtype)
                   for _ in range(3))
        for name, backend in backends.items():
            line = {"row": "attention", "heads": heads, "positions": positions, "width": width, "kernel": name}
            try:
                with sdpa_kernel(backend):
                    seconds = machine.best(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
            except RuntimeError as error:
                yield {**line, "unavailable": str(error).splitlines()[0]}
                continue
            yield {**line, "tflop_a_second": 4 * batch * heads * positions**2 * width / seconds / 1e12}


def forward_line(machine: Machine, batch: int, **how: Any) -> Line:
    """Time and memory of the network for the 2B samples of a guided step; `how` holds the variant.

    Args:
        machine: where.
        batch: images, B.
        how: `layout` nchw or nhwc; `weights` float32 (autocast, as inference.py) or bfloat16; `compile` no, blocks or
            graphs; `attention` sdpa or naive.
    """
    method = make_ours(machine.size, machine.device)
    if how["layout"] == "nhwc":
        method.to(memory_format=torch.channels_last)
    if how["weights"] == "bfloat16" and machine.is_cuda:
        method.model.bfloat16(), method.control_model.bfloat16(), method.ssl_stage_model.bfloat16()
    if how["compile"] != "no":
        compile_blocks(method, **({"mode": "reduce-overhead"} if how["compile"] == "graphs" else {}))
    inputs = make_inputs(machine.size, method, batch, machine.device)
    joined = join_branches([inputs["null"], inputs["conditions"]])
    predict = method.prepare([inputs["null"], inputs["conditions"]])
    latent, timestep = inputs["noise"].repeat(2, 1, 1, 1), torch.full((2 * batch,), 500, device=machine.device)

    @torch.inference_mode()
    def work() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=machine.is_cuda), \
                upstream_style.attention_of(how["attention"]):
            if how["attention"] == "naive":  # upstream's, which keeps nothing between steps
                upstream_style.predict(method, latent, timestep, joined)
            else:
                predict(latent, timestep, 2)

    first = machine.clock.measure(work)
    seconds = machine.best(work)
    if machine.gflop is None:
        meta = make_ours(machine.size, "meta")
        few = make_inputs(machine.size, meta, 1, "meta")
        step = torch.zeros(1, dtype=torch.long, device="meta")
        machine.gflop = measure.count_flops(lambda: meta.predict_noise(few["noise"], step, **few["conditions"]))
    rate = 2 * batch * machine.gflop / seconds
    return {"row": "forward", "batch": batch, **how, "first_call": first, "seconds": seconds,
            "tflop_a_second": rate / 1e3, "share_of_matmul": rate / machine.ceiling,
            "images_an_hour_20_steps": 3600 * batch / seconds / 20,
            "peak_mib": measure.peak_memory(work, machine.device)}


def forwards(machine: Machine) -> Iterator[Line]:
    """Batch sweep of a guided step for both layouts, with weights in float32 and in bfloat16."""
    for layout, weights in (("nhwc", "float32"), ("nchw", "float32"), ("nhwc", "bfloat16")):
        for batch in machine.pick((1, 4, 8, 16, 32, 64), (1,)):
            try:
                yield forward_line(machine, batch, layout=layout, weights=weights, compile="no", attention="sdpa")
            except torch.cuda.OutOfMemoryError:
                yield {"row": "forward", "batch": batch, "layout": layout, "weights": weights, "oom": True}
                break


def compiled(machine: Machine) -> Iterator[Line]:
    """The same with compiled blocks, with CUDA graphs, and with upstream's attention."""
    common = {"layout": "nhwc", "weights": "float32"}
    yield forward_line(machine, 1 if machine.tiny else 8, **common, compile="no", attention="naive")
    for how in machine.pick(("blocks", "graphs"), () if machine.args.no_compile else ("blocks",)):
        for batch in machine.pick((8, 32), (1,)):
            yield forward_line(machine, batch, **common, compile=how, attention="sdpa")
            torch._dynamo.reset()


def autoencoder(machine: Machine) -> Iterator[Line]:
    """Encoding and decoding in micro-batches, and bringing the pixels home."""
    method = make_ours(machine.size, machine.device).to(memory_format=torch.channels_last)
    for batch in machine.pick((1, 4, 8, 16), (1,)):
        inputs = make_inputs(machine.size, method, batch, machine.device)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=machine.is_cuda):
            encode = machine.best(lambda i=inputs: method.first_stage_model.encode(i["image"]))
            decode = machine.best(lambda i=inputs: method.decode_latent(i["noise"]))
        pixels = inputs["image"].mul(127.5).add(127.5).byte()
        home = torch.empty_like(pixels, device="cpu", pin_memory=machine.is_cuda)
        copy_home = machine.best(lambda p=pixels, h=home: h.copy_(p))
        yield {"row": "autoencoder", "batch": batch, "encode_an_image": encode / batch,
               "decode_an_image": decode / batch, "copy_home_an_image": copy_home / batch}


def end_to_end(machine: Machine) -> Iterator[Line]:
    """inference.py itself, loading, generating and writing; and our walk against diffusers' pipeline, step for step."""
    count, batch = (2, 1) if machine.tiny else (128, 16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure.write_tiles(folder, machine.size.pixels, count)
        method = make_ours(machine.size, "cpu")
        save_safetensors(folder / "model.safetensors", method.state_dict(), OmegaConf.create(config_of(machine.size)))
        del method
        for extension in ("png", "jpg"):
            start = time.perf_counter()
            steps = "2" if machine.tiny else "20"
            code = inference.main([
                "--ckpt", f"{folder}/model.safetensors", "--data_root", name, "--txt_file", f"{folder}/rows.json",
                "--outdir", f"{folder}/{extension}", "--ext", extension, "--mode", "fast", "--num_steps", steps,
                "--batch_size", str(batch), "--device", str(machine.device)])
            seconds = time.perf_counter() - start
            yield {"row": "inference.py", "format": extension, "images": count, "exit_code": code, "seconds": seconds,
                   "images_an_hour": 3600 * count / seconds}
    args = argparse.Namespace(size="tiny" if machine.tiny else "full", device=str(machine.device), heads=0, steps=4,
                              fast_steps=4)
    bench = bench_sampling.Bench(args, 1 if machine.tiny else 8)
    for arm in ("exact", "diffusers"):
        seconds = machine.best(lambda arm=arm: bench.walk(arm), repeats=3)
        yield {"row": "walk", "arm": arm, "batch": bench.batch, "seconds_a_step_an_image": seconds / 4 / bench.batch}


def training_line(machine: Machine, arm: str, batch: int) -> Line:
    """Speed and memory of a training step."""
    args = argparse.Namespace(size="tiny" if machine.tiny else "full", device=str(machine.device), batch=batch,
                              num_workers=0 if machine.tiny else 4)
    with tempfile.TemporaryDirectory() as name:
        measure.write_tiles(Path(name), machine.size.pixels, 16)
        run = bench_training.Training(arm, args, Path(name))
        seconds, waited = run.run(1 if machine.tiny else 4, machine.clock)
        data = next(run.batches())
        peak = measure.peak_memory(lambda: run.step(data), machine.device)
    rate = bench_training.gflop_per_sample(arm, args) * batch / seconds
    return {"row": "training", "arm": arm, "batch": batch, "samples_a_second": batch / seconds,
            "wait": waited / seconds, "share_of_matmul": rate / machine.ceiling if machine.ceiling else None,
            "peak_mib": peak}


def training(machine: Machine) -> Iterator[Line]:
    """Training steps, with and without checkpointing."""
    for arm in ("ours", "ours_checkpointing"):
        for batch in machine.pick((4, 8, 16), (1,)):
            try:
                yield training_line(machine, arm, batch)
            except torch.cuda.OutOfMemoryError:
                yield {"row": "training", "arm": arm, "batch": batch, "oom": True}
                break


PARTS = (ceilings, forwards, compiled, autoencoder, end_to_end, training)


def main(argv: list[str] | None = None) -> int:
    """Measure all rows; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks of test size, one batch each")
    parser.add_argument("--no_compile", action="store_true", help="with --tiny: leave out compilation, which is slow")
    parser.add_argument("--seconds", type=float, default=480.0, help="nothing begins after so many")
    parser.add_argument("--out", help="file for the lines")
    args = parser.parse_args(argv)
    machine, start, failed = Machine(args), time.monotonic(), False
    with measure.lines_to(args.out) as put:

        def emit(line: Line) -> None:
            put({key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in line.items()})

        emit({"row": "machine", **measure.machine(machine.device)})
        for part in PARTS:
            if time.monotonic() - start > args.seconds:
                emit({"row": part.__name__, "left_out": f"{args.seconds:.0f} seconds are over"})
                continue
            try:
                for line in part(machine):
                    emit(line)
            except Exception as error:  # the other rows of a rare machine are worth having
                failed = True
                emit({"row": part.__name__, "error": f"{type(error).__name__}: {error}"})
            if machine.is_cuda:
                torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
