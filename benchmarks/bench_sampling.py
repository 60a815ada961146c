"""Speed and memory of sampling: upstream's way, diffusers' ControlNet pipeline and ours, in one run.

    python benchmarks/bench_sampling.py                                    # a CPU, width 64 instead of 320, minutes
    python benchmarks/bench_sampling.py --size full --batch 1 2 4 8 16 32  # a GPU, the sizes of Stable Diffusion 1.5

Weights are random, those of the zero convolutions too. First it prints how far our exact walk ends from upstream's.
Then the arms take turns for some rounds. The walk is timed with fewer steps and scaled per step to the 50 and 20 of the
modes; the autoencoder is timed apart. Peak memory is that of a fresh process for each arm, on
a CPU for one image of 512 x 512 pixels.
Every line of --out is one JSON object.
"""

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks import measure, upstream_style  # noqa: E402
from benchmarks.setting import SIZES, make_diffusers, make_inputs, make_ours, sample_given  # noqa: E402
from ldm.sampling.modes import MODES  # noqa: E402

ARMS = ("upstream_naive", "upstream_sdpa", "diffusers", "exact", "fast", "turbo")
SCALE = 9.0
MEMORY_PIXELS = {"cpu": 512}


class Bench:
    """Networks and inputs of one size on one device.

    Args:
        args: command line.
        batch: images at once.
        device: overrides that of args; `meta` counts arithmetic.
    """

    def __init__(self, args: argparse.Namespace, batch: int, device: str | None = None) -> None:
        self.args, self.batch, self.device = args, batch, device or args.device
        self.size = replace(SIZES[args.size], heads=args.heads or SIZES[args.size].heads)
        self.is_cuda = torch.device(self.device).type == "cuda"
        self.ours = make_ours(self.size, self.device).to(memory_format=torch.channels_last)
        self.inputs = make_inputs(self.size, self.ours, batch, self.device)
        # The stand-in of the text encoder knows no empty prompt.
        self.ours.null_conditions = lambda conditions, drops=None: self.inputs["null"]
        self.pipeline: Any = None

    def steps(self, arm: str) -> int:
        """Steps that are timed."""
        return self.args.fast_steps if arm in ("fast", "turbo") else self.args.steps

    def walk(self, arm: str) -> torch.Tensor:
        """Latents of an arm, (B, 4, h, w)."""
        inputs = [self.inputs[key] for key in ("conditions", "null", "noise")]
        if arm == "diffusers":
            return self.walk_diffusers()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.is_cuda):
            if arm.startswith("upstream"):
                return upstream_style.sample_latent(
                    self.ours, *inputs, self.steps(arm), SCALE, arm.removeprefix("upstream_"))
            sampling = replace(MODES[arm], num_steps=self.steps(arm), guidance_scale=SCALE)
            return sample_given(self.ours, inputs[0], inputs[2], sampling)

    def walk_diffusers(self) -> torch.Tensor:
        """Latents of StableDiffusionControlNetPipeline with two control nets; both see the mask's hint."""
        if self.pipeline is None:
            from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

            nets = make_diffusers(self.size, self.device, torch.bfloat16 if self.is_cuda else torch.float32)
            scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                      clip_sample=False, set_alpha_to_one=False)
            self.pipeline = StableDiffusionControlNetPipeline(
                vae=nets["vae"], text_encoder=None, tokenizer=None, unet=nets["unet"],
                controlnet=[nets["first"], nets["second"]], scheduler=scheduler, safety_checker=None,
                feature_extractor=None, requires_safety_checker=False)
            self.pipeline.set_progress_bar_config(disable=True)
        dtype = self.pipeline.unet.dtype
        hint = self.inputs["conditions"]["hint"].to(dtype)
        return self.pipeline(
            prompt_embeds=self.inputs["conditions"]["context"].to(dtype),
            negative_prompt_embeds=self.inputs["null"]["context"].to(dtype), image=[hint, hint], guidance_scale=SCALE,
            latents=self.inputs["noise"].to(dtype), num_inference_steps=self.args.steps, output_type="latent").images

    @torch.inference_mode()
    def autoencode(self, arm: str) -> None:
        """Encode a reference and decode a latent for every image, as often as an image needs it."""
        latent, image = self.inputs["noise"], self.inputs["image"]
        if arm == "diffusers":
            vae = self.pipeline.vae
            vae.encode(image.to(vae.dtype)), vae.decode(latent.to(vae.dtype))
            return
        kind = "naive" if arm == "upstream_naive" else "sdpa"
        with torch.autocast("cuda", torch.bfloat16, enabled=self.is_cuda), upstream_style.attention_of(kind):
            self.ours.first_stage_model.encode(image)
            for part in latent.split(self.ours.decode_batch if arm in MODES else len(latent)):
                self.ours.decode_latent(part)


def gflop_per_step(args: argparse.Namespace) -> dict[str, float]:
    """GFLOP that every arm really computes in a step of one image, guidance included."""
    meta = Bench(args, 1, "meta")
    count = {arm: measure.count_flops(lambda arm=arm: meta.walk(arm)) / meta.steps(arm)
             for arm in ARMS if arm not in ("diffusers", "upstream_sdpa")}
    count["upstream_sdpa"] = count["upstream_naive"]
    nets, inputs = make_diffusers(meta.size, "meta"), meta.inputs
    timestep = torch.zeros(1, dtype=torch.long, device="meta")

    def forward() -> None:
        noise, context, hint = inputs["noise"], inputs["null"]["context"], inputs["conditions"]["hint"]
        for net in (nets["first"], nets["second"]):
            down, middle = net(noise, timestep, context, hint, return_dict=False)
        nets["unet"](noise, timestep, context, down_block_additional_residuals=down,
                     mid_block_additional_residual=middle)

    return {**count, "diffusers": 2 * measure.count_flops(forward)}


def memory_of(arm: str, args: argparse.Namespace) -> dict[str, float]:
    """MiB beyond weights and inputs that an arm needs, for the walk and for all of it; asks a fresh process."""
    return measure.ask_fresh(
        __file__, "--memory_of", arm, "--size", args.size, "--device", args.device, "--threads", args.threads,
        "--batch", args.batch[0], "--heads", args.heads)  # fmt: skip


def answer_memory(args: argparse.Namespace) -> None:
    """What memory_of's process does: a step or two and the autoencoder, and print their peaks.

    On a CPU one image of MEMORY_PIXELS, since what libraries need for themselves would outweigh a smaller one; a walk
    with tiny inputs loads their code before.
    """
    bench, arm = Bench(args, args.batch[0]), args.memory_of
    if not bench.is_cuda:
        sizes = replace(bench.size, pixels=64), replace(bench.size, pixels=MEMORY_PIXELS.get(args.size, 64))
        small, inputs = (make_inputs(size, bench.ours, 1, args.device) for size in sizes)
        args.steps, args.fast_steps, bench.inputs = 1, 1, small
        bench.walk(arm), bench.autoencode(arm)
        bench.inputs = inputs
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    else:
        bench.walk(arm)  # builds the pipeline of diffusers
    args.steps, args.fast_steps = 1, 2  # turbo keeps features from one step to the next
    walking = measure.peak_memory(lambda: bench.walk(arm), args.device)
    coding = measure.peak_memory(lambda: bench.autoencode(arm), args.device)
    print(json.dumps({"walk": round(walking, 1), "all": round(max(walking, coding), 1)}))


def time_arms(bench: Bench, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of all arms: `step` and `autoencoder`, each per image, minimum and median of the rounds."""
    clock = measure.Clock(args.device)
    works: dict[str, Callable[[], Any]] = {arm: lambda arm=arm: bench.walk(arm) for arm in ARMS}
    walks = measure.interleave(works, args.rounds, clock, args.warm_ups)
    coding = measure.interleave({arm: lambda arm=arm: bench.autoencode(arm) for arm in (*ARMS[:3], "exact")},
                                args.rounds, clock, args.warm_ups)
    result = {}
    for arm in ARMS:
        seconds = [value / bench.steps(arm) / bench.batch for value in walks[arm]]
        result[arm] = {"step": measure.summary(seconds),
                       "autoencoder": measure.summary([v / bench.batch for v in coding.get(arm, coding["exact"])])}
    return result


def compare_latents(bench: Bench) -> dict[str, float]:
    """How far our exact walk ends from upstream's, before anything is timed."""
    ours, theirs = bench.walk("exact").float(), bench.walk("upstream_naive").float()
    return {"largest_difference": float((ours - theirs).abs().max()), "mean_size": float(theirs.abs().mean())}


def ratios(lines: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The ratios that matter: times per image and per FLOP, and memory where it was measured."""
    naive, exact = lines["upstream_naive"], lines["exact"]
    result = {f"{arm}, speed per image against upstream_naive": naive["image"] / lines[arm]["image"]
              for arm in ARMS[1:]}
    result |= {f"exact, speed per image against {arm}": lines[arm]["image"] / exact["image"] for arm in ARMS[1:3]}
    result["exact, speed per FLOP against diffusers"] = exact["gflop_a_second"] / lines["diffusers"]["gflop_a_second"]
    for part in ("walk", "all") if "memory" in exact else ():
        result |= {f"{arm}, memory of {part} against {other}": lines[arm]["memory"][part] / lines[other]["memory"][part]
                   for arm, other in (("exact", "upstream_naive"), ("exact", "diffusers"), ("turbo", "upstream_naive"))}
    return {name: round(value, 3) for name, value in result.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", help="images at once, several for a sweep; default: the size's")
    parser.add_argument("--heads", type=int, default=0, help="of attention; default: the size's, 8")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of exact, upstream and diffusers")
    parser.add_argument("--fast_steps", type=int, default=2, help="timed steps of fast and turbo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm_ups", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--no_memory", action="store_true", help="leave out the measurement of memory")
    parser.add_argument("--out", help="file for the lines as JSON")
    parser.add_argument("--memory_of", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.batch = args.batch or [SIZES[args.size].batch]
    torch.set_num_threads(args.threads)
    if args.memory_of:
        answer_memory(args)
        return
    with measure.lines_to(args.out) as emit:
        measure_all(args, emit)


def measure_all(args: argparse.Namespace, emit: Callable[[dict[str, Any]], None]) -> None:
    """Measure, and pass every line on as soon as it is known."""
    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    unit = measure.Clock(args.device).unit
    ceiling = measure.matmul_rate(args.device, dtype)
    emit({**measure.machine(args.device), "unit": unit, "size": args.size, "matmul_gflop_a_second": round(ceiling, 1),
          "copy_gb_a_second": round(measure.copy_rate(args.device), 1)})
    flops = gflop_per_step(args)
    memory = {} if args.no_memory else {arm: memory_of(arm, args) for arm in ARMS}
    for batch in args.batch:
        try:
            bench = Bench(args, batch)
            emit({"batch": batch, **compare_latents(bench)})
            times = time_arms(bench, args)
        except torch.cuda.OutOfMemoryError:
            emit({"batch": batch, "error": "out of memory"})
            break
        lines = {}
        for arm in ARMS:
            best, steps = times[arm]["step"]["min"], 20 if arm in ("fast", "turbo") else 50
            lines[arm] = {**times[arm], "gflop_a_step": round(flops[arm], 1),
                          "gflop_a_second": round(flops[arm] / best, 1),
                          "share_of_matmul": round(flops[arm] / best / ceiling, 3),
                          "steps": steps, "image": round(steps * best + times[arm]["autoencoder"]["min"], 3)}
            lines[arm] |= {"memory": memory[arm]} if batch == args.batch[0] and memory else {}
            emit({"batch": batch, "arm": arm, **lines[arm]})
        emit({"batch": batch, **ratios(lines), "load": measure.machine(args.device)["load"]})


if __name__ == "__main__":
    main()
