"""Time and memory of CRFM at the size of its config with random weights: passes, training steps, a rectified step.

    python benchmarks/bench_sd35.py --device cuda            # the full size, for a GPU of 80 GB
    python benchmarks/bench_sd35.py --device cpu --config configs/model/sd35_tiny.yaml --sizes 64 --batches 1

Prints a line of JSON a measurement; sizes and batches that memory does not suffice for are said to be so. It needs no
weights, no vectors and no network.
"""
import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import Clock, machine, peak_memory  # noqa: E402
from ldm.cli import choose_device, positive_int  # noqa: E402
from ldm.generation.machine import is_out_of_memory  # noqa: E402
from ldm.training.module import freeze_all_but  # noqa: E402
from ldm.util import instantiate_from_config, load_config, run_entry_point  # noqa: E402

TEXT_TOKENS, RATE = 333, 1e-5


def build(config: str, device: torch.device, groups: list[str]) -> Any:
    """The method with random weights, built on the device: in training what trains in float32, the rest in bfloat16."""
    node = OmegaConf.to_container(load_config([config]), resolve=True)["model"]
    node["params"] |= {"train": groups, "frozen_dtype": "bfloat16", "vectors_dir": None}
    with device:
        method = instantiate_from_config(node)
    method.start_training()
    freeze_all_but(method, method.trainable_groups())
    return method


def make_inputs(method: Any, size: int, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random inputs of the network; text as long as the stock pipeline's."""
    config, shape = method.network.base.config, (batch, *method.latent_shape(size, size))
    draw = {"latent": shape, "mask_latent": shape, "context": (batch, TEXT_TOKENS, config.joint_attention_dim),
            "pooled": (batch, config.pooled_projection_dim)}
    inputs = {name: torch.randn(sizes, device=device) for name, sizes in draw.items()}
    return inputs | {"timestep": torch.full((batch,), 700.0, device=device)}


def works(method: Any, inputs: dict[str, torch.Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What there is to measure of a batch, in evaluation."""
    stock = {name: value for name, value in inputs.items() if name != "mask_latent"}

    def decode() -> torch.Tensor:
        leaf = inputs["latent"].clone().requires_grad_()
        return torch.autograd.grad(method.decode_latent(leaf).square().mean(), leaf)[0]

    yield "pass without mask", torch.no_grad()(lambda: method.network(**stock))
    yield "pass with mask", torch.no_grad()(lambda: method.predict_noise(**inputs))
    yield "decode", torch.no_grad()(lambda: method.decode_latent(inputs["latent"]))
    yield "decode with gradient", decode


def make_step(method: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """A training step with AdamW."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=inputs["latent"].is_cuda or None)

    def step() -> torch.Tensor:
        loss = (method.predict_noise(**inputs).float() - inputs["latent"]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite(), "the loss is not finite"
        return loss

    return step


def measure(name: str, work: Callable[[], Any], clock: Clock, device: torch.device, **details: Any) -> None:
    """Print seconds (the second of two runs) and peak memory of a work, or that memory does not suffice."""
    record = {"work": name, **details}
    try:
        with torch.autocast(device.type, torch.bfloat16):
            record["extra_mib"] = round(peak_memory(work, device))
            record["seconds"] = round(clock.measure(work), 4)
        record["total_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2) if clock.is_cuda else None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        record["out_of_memory"] = True
        if clock.is_cuda:
            torch.cuda.empty_cache()
    print(json.dumps(record), flush=True)


def main(argv: list[str]) -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="configs/model/sd35_crfm.yaml", help="model yaml (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    add("--sizes", type=positive_int, nargs="+", default=[512, 1024], help="edges of images (default: 512 1024)")
    add("--batches", type=positive_int, nargs="+", default=[1, 8], help="images at once (default: 1 8)")
    add("--groups", nargs="+", default=["lora,mask", "image,mask"], help="what trains (default: lora,mask image,mask)")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    clock = Clock(device)
    print(json.dumps({"machine": machine(device), "unit": clock.unit}), flush=True)
    torch.manual_seed(0)
    for number, groups in enumerate(args.groups):
        method = build(args.config, device, groups.split(","))
        for size in args.sizes:
            for batch in args.batches:
                inputs = make_inputs(method, size, batch, device)
                for name, work in works(method.eval(), inputs) if number == 0 else ():
                    measure(name, work, clock, device, size=size, batch=batch)
                measure("training step", make_step(method.train(), inputs), clock, device, size=size, batch=batch,
                        trains=groups)  # fmt: skip
        del method, inputs


if __name__ == "__main__":
    run_entry_point(main)
