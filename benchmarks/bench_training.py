"""Speed and memory of training: diffusers' recipe for a ControlNet, and ours with and without its savings, in one run.

    python benchmarks/bench_training.py                             # a CPU, width 64 instead of 320
    python benchmarks/bench_training.py --size full --num_workers 8 # a GPU, the sizes of Stable Diffusion 1.5

The recipe is that of diffusers' train_controlnet example, written anew: one control net trains, the autoencoder
encodes every image in every step, AdamW, gradients clipped at 1. Ours trains both branches and the all-in-attention
(configs/model/tisynth_sd15.yaml). Both read the same PNG tiles of noise. Text encoders are left out on both sides.
Samples a second say little, since the networks differ in size; GFLOP a second, counted on meta tensors, compare them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.setting import SIZES, TOKENS, make_diffusers, make_inputs, make_ours  # noqa: E402
from ldm.data.dataset import PairDataset, collate_batch  # noqa: E402
from ldm.data.manifest import read_manifest  # noqa: E402
from ldm.data.transforms import normalize_batch  # noqa: E402
from ldm.training.latents import build_latent_cache  # noqa: E402
from ldm.training.module import freeze_all_but  # noqa: E402

ARMS = ("diffusers", "ours", "ours_cached_latents", "ours_checkpointing")


class RecipeDataset(Dataset):
    """Image and conditioning image as the recipe ships them: float32, normalised while loading."""

    def __init__(self, dataset: PairDataset) -> None:
        self.rows = dataset.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        def read(path: Path) -> Tensor:
            pixels = np.array(Image.open(path).convert("RGB"), dtype=np.float32) / 255
            return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

        row = self.rows[index]
        return {"pixel_values": read(row.image) * 2 - 1, "conditioning": read(row.mask)}


class Training:
    """One arm: networks, optimizer and data.

    Args:
        arm: one of ARMS.
        args: command line.
        folder: with write_tiles' files.
    """

    def __init__(self, arm: str, args: argparse.Namespace, folder: Path) -> None:
        self.arm, self.device = arm, torch.device(args.device)
        self.size = replace(SIZES[args.size], batch=args.batch or SIZES[args.size].batch)
        self.nets, self.method = {}, None
        if arm == "diffusers":
            self.nets = make_diffusers(self.size, self.device)
            self.nets["first"].train().requires_grad_(True)
            parameters = list(self.nets["first"].parameters())
            self.context = torch.randn(self.size.batch, TOKENS, self.size.context, device=self.device)
        else:
            self.method = make_training_method(self.size, self.device, arm)
            parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=self.device.type == "cuda" or None)
        table = make_training_method(SIZES["tiny"], "meta", arm).class_table
        rows = read_manifest(folder / "rows.json", folder, need=("image", "reference", "prompt"), table=table)
        dataset = PairDataset(rows, table, size=(self.size.pixels,) * 2, reference="manifest", flip=0.5)
        if arm == "ours_cached_latents":
            dataset.latents = build_latent_cache(sorted({row.image for row in rows}), (self.size.pixels,) * 2,
                                                 self.method.first_stage_model, folder, self.device, num_workers=0)
        is_recipe = arm == "diffusers"
        self.loader = DataLoader(
            RecipeDataset(dataset) if is_recipe else dataset, self.size.batch, drop_last=True,
            num_workers=args.num_workers, collate_fn=None if is_recipe else collate_batch,
            persistent_workers=args.num_workers > 0, pin_memory=self.device.type == "cuda")

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches without end."""
        while True:
            yield from self.loader

    def step(self, batch: dict[str, Any]) -> float:
        """One step of the optimizer; returns the loss."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            if self.method is None:
                loss = self.recipe_loss(batch)
            else:
                loss, _ = self.method.training_loss(normalize_batch(batch, self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def recipe_loss(self, batch: dict[str, Any]) -> Tensor:
        """Loss of the recipe: the error of the noise that the network predicts."""
        images, hint = (batch[key].to(self.device, non_blocking=True) for key in ("pixel_values", "conditioning"))
        with torch.no_grad():
            latent = self.nets["vae"].encode(images).latent_dist.sample() * 0.18215
        noise, timestep = torch.randn_like(latent), torch.randint(1000, (len(latent),), device=self.device)
        alpha = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=self.device) ** 2).cumprod(0)
        alpha = alpha[timestep][:, None, None, None]
        noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
        return F.mse_loss(recipe_forward(self.nets, noisy, timestep, self.context, hint).float(), noise)

    def run(self, steps: int, clock: measure.Clock) -> tuple[float, float]:
        """Seconds a step, and seconds of it that the training waits for data."""
        batches, waited = self.batches(), 0.0
        self.step(next(batches))
        start = clock.now()
        for _ in range(steps):
            asked = time.perf_counter() if clock.is_cuda else time.process_time()
            batch = next(batches)
            waited += (time.perf_counter() if clock.is_cuda else time.process_time()) - asked
            self.step(batch)
        return (clock.now() - start) / steps, waited / steps


def make_training_method(size: Any, device: Any, arm: str) -> nn.Module:
    """TISynth as we train it, its trained groups with gradients; not augmented, so that latents can be cached."""
    method = make_ours(size, device, config="tisynth_sd15", use_checkpoint=arm == "ours_checkpointing",
                       reference_augment=None).train()
    freeze_all_but(method, method.trainable_groups())
    return method.to(memory_format=torch.channels_last) if torch.device(device).type == "cuda" else method


def recipe_forward(nets: dict[str, nn.Module], noisy: Tensor, timestep: Tensor, context: Tensor,
                   hint: Tensor) -> Tensor:
    """Prediction of the frozen U-Net with the control net that trains."""
    down, middle = nets["first"](noisy, timestep, context, hint, return_dict=False)
    return nets["unet"](noisy, timestep, context, down_block_additional_residuals=down,
                        mid_block_additional_residual=middle, return_dict=False)[0]


def gflop_per_sample(arm: str, args: argparse.Namespace) -> float:
    """GFLOP of forward and backward pass and of the encodings of one sample."""
    size = SIZES[args.size]
    ours = make_training_method(size, "meta", arm)
    inputs, timestep = make_inputs(size, ours, 1, "meta"), torch.zeros(1, dtype=torch.long, device="meta")
    conditions, noise = inputs["conditions"], inputs["noise"]
    encode = measure.count_flops(lambda: ours.first_stage_model.encode(inputs["image"]))
    if arm == "diffusers":
        nets = make_diffusers(size, "meta")
        nets["first"].requires_grad_(True)
        hint = torch.zeros(1, 3, size.pixels, size.pixels, device="meta")
        return encode + measure.count_flops(
            lambda: recipe_forward(nets, noise, timestep, conditions["context"], hint).sum().backward(), grad=True)
    passes = measure.count_flops(lambda: ours.predict_noise(noise, timestep, **conditions).sum().backward(), grad=True)
    return passes + (0 if arm == "ours_cached_latents" else 2 * encode)


def answer_memory(args: argparse.Namespace, folder: Path) -> None:
    """What a fresh process does: two steps, and print their peak; gradients and moments count, weights do not."""
    training = Training(args.memory_of, args, folder)
    batch = next(training.batches())
    print(json.dumps(round(measure.peak_memory(lambda: [training.step(batch) for _ in range(2)], args.device), 1)))


def memory_of(arm: str, args: argparse.Namespace, folder: Path) -> float:
    """MiB of an arm's training beyond its weights, from a fresh process."""
    return measure.ask_fresh(
        __file__, "--memory_of", arm, "--size", args.size, "--device", args.device, "--threads", args.threads,
        "--tiles", folder, "--batch", args.batch)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=0, help="samples a step; default: the size's")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes; 0 counts loading as CPU time")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--no_memory", action="store_true", help="leave out the measurement of memory")
    parser.add_argument("--out", help="file for the lines as JSON")
    parser.add_argument("--tiles", help=argparse.SUPPRESS)
    parser.add_argument("--memory_of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        answer_memory(args, Path(args.tiles))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure.write_tiles(Path(folder), SIZES[args.size].pixels, max(8, args.batch or SIZES[args.size].batch))
        measure_all(args, Path(folder))


def measure_all(args: argparse.Namespace, folder: Path) -> None:
    """Measure and print the lines of the report."""
    clock = measure.Clock(args.device)
    dtype = torch.bfloat16 if clock.is_cuda else torch.float32
    ceiling = measure.matmul_rate(args.device, dtype)
    lines = [{**measure.machine(args.device), "unit": clock.unit, "size": args.size,
              "matmul_gflop_a_second": round(ceiling, 1)}]
    memory = {} if args.no_memory else {arm: memory_of(arm, args, folder) for arm in ARMS}
    trainings = {arm: Training(arm, args, folder) for arm in ARMS}
    seconds: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm, training in trainings.items():
            seconds[arm].append(training.run(args.steps, clock))
    rates = {}
    for arm, training in trainings.items():
        best, waited = min(seconds[arm])
        gflop = gflop_per_sample(arm, args)
        rates[arm] = gflop * training.size.batch / best
        lines.append({"arm": arm, "step": measure.summary([total for total, _ in seconds[arm]]),
                      "samples_a_second": round(training.size.batch / best, 3), "wait": round(waited / best, 4),
                      "gflop_a_sample": round(gflop, 1), "gflop_a_second": round(rates[arm], 1),
                      "share_of_matmul": round(rates[arm] / ceiling, 3), "memory": memory.get(arm)})
    lines.append({f"{arm}, speed per FLOP against diffusers": round(rates[arm] / rates["diffusers"], 3)
                  for arm in ARMS[1:]} | {"load": measure.machine(args.device)["load"]})
    with measure.lines_to(args.out) as emit:
        for line in lines:
            emit(line)


if __name__ == "__main__":
    main()
