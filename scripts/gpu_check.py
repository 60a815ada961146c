"""What scripts/gpu_check.sh runs: short trainings, sampling and measurements on a new GPU machine, and a table."""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# import name -> package, with what they need in turn: nothing is asked of an index
PACKAGES = {"omegaconf": "omegaconf", "yaml": "PyYAML", "pytorch_lightning": "pytorch-lightning",
            "lightning_utilities": "lightning-utilities", "torchmetrics": "torchmetrics", "tqdm": "tqdm",
            "numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "tokenizers": "tokenizers",
            "einops": "einops", "fsspec": "fsspec", "packaging": "packaging",
            "typing_extensions": "typing-extensions"}  # fmt: skip
# config of configs/train -> network of test size
CONFIGS = {"gid": "tisynth_tiny", "fusu": "tisynth_tiny", "loveda": "tisynth_tiny", "mini": "tisynth_tiny",
           "mini_references": "tisynth_tiny",
           "mini_autoencoder": "autoencoder_mini", "pixel_mini": "seg_guided_tiny", "seg_guided": "seg_guided_tiny",
           "sdm": "sdm_tiny"}  # fmt: skip
BENEATH = {"mini_references": "mini"}  # config that another is laid over
NOT_HERE = {"fusu_sd35": "needs encoded prompts and the group sd3", "sd35_lora": "needs encoded prompts and the "
            "group sd3"}  # fmt: skip


class Failed(Exception):
    """A step that ended otherwise than it should."""


class Check:
    """Runs the steps, keeps their rows and shows them.

    Args:
        args: command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.start = args, Path(args.out), time.monotonic()
        self.device, self.is_cuda = args.device, args.device == "cuda"
        self.steps = 12 if args.tiny else 60  # of the small model
        self.rows: list[dict[str, Any]] = []
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "log.txt").open("a", encoding="utf-8")
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=self.log)

    def seconds_left(self) -> float:
        """Of the minutes that were asked for."""
        return 60 * self.args.minutes - (time.monotonic() - self.start)

    def step(self, name: str, work: Callable[[], dict[str, Any] | None], need: float = 0.0) -> None:
        """Run a step and note how it ended; left out when less than `need` seconds are left.

        A work returns its numbers, or {"left_out": why}.
        """
        began = time.monotonic()
        row: dict[str, Any] = {"step": name, "result": "pass"}
        if self.seconds_left() < need:
            row |= {"result": "left out", "why": f"{self.seconds_left():.0f} s are left, it needs {need:.0f}"}
        else:
            try:
                with contextlib.redirect_stdout(self.log), contextlib.redirect_stderr(self.log):
                    found = work() or {}
                row |= {"result": "left out", "why": found["left_out"]} if "left_out" in found else found
            except (Exception, SystemExit) as error:  # the other steps of a rare machine are worth having
                traceback.print_exc(file=self.log)
                lines = str(error).strip().splitlines()
                row |= {"result": "FAIL", "why": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]}
        row["seconds"] = round(time.monotonic() - began, 1)
        self.rows.append(row)
        self.log.flush()
        (self.out / "gpu_check.json").write_text(json.dumps({"rows": self.rows}, indent=2) + "\n", encoding="utf-8")
        numbers = {key: value for key, value in row.items() if key not in ("step", "result", "seconds")}
        print(f"{row['result']:<9}{name:<34}{row['seconds']:>7.1f} s  "
              + ", ".join(f"{key} {value}" for key, value in numbers.items() if not isinstance(value, dict | list)),
              flush=True)

    def call(self, program: str, *arguments: str) -> None:
        """train.py or inference.py in this process."""
        place = ("--gpus", "0" if self.is_cuda else "") if program == "train" else ("--device", self.device)
        code = importlib.import_module(program).main([*arguments, *place])
        if code:
            raise Failed(f"{program}.py ended with {code}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    add = parser.add_argument
    add("minutes", nargs="?", type=float, default=4.0, help="nothing begins that would end later (%(default)s)")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: the GPU if there is one")
    add("--tiny", action="store_true", help="networks of test size throughout: proves that the steps run, fast")
    add("--no_compile", action="store_true", help="leave out compilation, which on a CPU takes a minute and g++")
    add("--find-links", dest="find_links", metavar="DIR", help="folder of wheels to install missing packages from")
    add("--out", default="gpu_check", help="folder for results (default: %(default)s)")
    return parser.parse_args(argv)


def install_missing(args: argparse.Namespace) -> None:
    """Install what is not there from the folder of wheels, beside the environment; exit code 2 with their names."""
    folder = Path(args.out) / "packages"
    sys.path.insert(1, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing and args.find_links:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links",
                        args.find_links, "--target", str(folder), *missing], check=False)
        importlib.invalidate_caches()
        missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if importlib.util.find_spec("torch") is None:
        missing.insert(0, "torch")
    if missing:
        print(f"error: {', '.join(missing)} missing. Expected packages of requirements/train.txt. Install them, or "
              "give --find-links a folder of their wheels (not for torch).", file=sys.stderr)
        sys.exit(2)


def describe(check: Check) -> dict[str, Any]:
    """The environment."""
    import torch

    from ldm.data.cache import shared_folder
    status = os.statvfs(shared_folder())
    found = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(),
             "lightning": importlib.metadata.version("pytorch-lightning"),
             "shared_memory_gb": round(status.f_bavail * status.f_frsize / 1e9, 1)}  # fmt: skip
    if check.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda,
                  "memory_gb": round(properties.total_memory / 1e9, 1),
                  "capability": f"{properties.major}.{properties.minor}", "bf16": torch.cuda.is_bf16_supported()}
    return found


def write_data(folder: Path, pixels: int) -> None:
    """Drawn tiles with the class table of the small model."""
    from benchmarks.measure import write_tiles
    write_tiles(folder, pixels, 64, "a road, water")
    (folder / "classes.yaml").write_bytes((ROOT / "configs/classes/mini.yaml").read_bytes())


def train_config(check: Check, name: str) -> dict[str, Any]:
    """Two optimizer steps of a config with its own precision, clipping, accumulation and averaging."""
    run = check.out / f"config_{name}"
    small = ["model.params.perceptual_weights=null", "model.params.perceptual_weight=0", "model.params.crop=16",
             "model.params.autoencoder.params.ch=8"] if name == "mini_autoencoder" else []  # fmt: skip
    init = ["init=null"] if name.startswith("mini") and name != "mini_autoencoder" else []
    files = [f"configs/train/{file}.yaml" for file in (BENEATH.get(name), name) if file]
    check.call(
        "train", "--config_model", f"configs/model/{CONFIGS[name]}.yaml", "-b", *files, "-p", str(run), "--data_root",
        str(check.out / "tiles"), "--train_txt_file", str(check.out / "tiles/train_set_items.json"),
        "data.params.batch_size=2", "data.params.size=[16,16]", "data.params.num_workers=0",
        "lightning.trainer.max_steps=2", "lightning.trainer.limit_val_batches=1",
        "lightning.trainer.enable_progress_bar=false", "training.cache_latents=null", *small, *init)
    if not (run / "checkpoints/last.safetensors").is_file():
        raise Failed("no export")
    return {}


def mini_arguments(check: Check) -> list[str]:
    """train.py's arguments for the small model."""
    batch, size = (4, 16) if check.args.tiny else (256, 128)
    model = "tisynth_tiny" if check.args.tiny else "tisynth_mini"
    return ["--config_model", f"configs/model/{model}.yaml", "-b", "configs/train/mini.yaml", "-p",
            str(check.out / "mini"), "--data_root", str(check.out / "tiles"), f"data.params.batch_size={batch}",
            f"data.params.size=[{size},{size}]", "data.params.cache=memory", "training.cache_latents=null", "init=null",
            "training.preview_every=null", f"data.params.num_workers={min(14, os.cpu_count() or 1)}",
            "lightning.trainer.val_check_interval=40", "lightning.trainer.limit_val_batches=1"]  # fmt: skip


def read_run(check: Check) -> tuple[int, float]:
    """Steps of the small model's run so far, and seconds that its training loop took."""
    import torch
    saved = torch.load(check.out / "mini/checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    return saved["global_step"], saved["callbacks"]["Budget"]["elapsed"]


def train_mini(check: Check) -> dict[str, Any]:
    """The first third of the steps."""
    check.call("train", *mini_arguments(check), f"lightning.trainer.max_steps={check.steps // 3}")
    return {"steps": read_run(check)[0]}


def resume_mini(check: Check) -> dict[str, Any]:
    """The others from the checkpoint; their speed includes loading, validation and saving."""
    before = read_run(check)
    check.call("train", "-r", str(check.out / "mini"), f"lightning.trainer.max_steps={check.steps}")
    after = read_run(check)
    if after[0] != check.steps:
        raise Failed(f"step {after[0]} instead of {check.steps}")
    rate = (after[0] - before[0]) / (after[1] - before[1])
    batch = 4 if check.args.tiny else 256
    return {"steps_a_second": round(rate, 2), "samples_a_second": round(rate * batch, 1), "batch": batch}


def sample_mini(check: Check, name: str, *extra: str) -> dict[str, Any]:
    """Images of all rows in the mode `fast`."""
    began, count = time.monotonic(), 8
    check.call("inference", "--ckpt", str(check.out / "mini/checkpoints/last.safetensors"), "--data_root",
                 str(check.out / "tiles"), "--txt_file", str(check.out / "tiles/val_set_items.json"), "--outdir",
                 str(check.out / name), "--mode", "fast", *extra)  # fmt: skip
    found = len(list((check.out / name / "images").glob("*.png")))
    if found < count:
        raise Failed(f"{found} images instead of {count}")
    return {"images": found, "images_a_second": round(found / (time.monotonic() - began), 2)}


def run_out_of_memory(check: Check) -> dict[str, Any]:
    """A batch that is too large is halved until it fits."""
    if not check.is_cuda:
        return {"left_out": "only a GPU's memory can be limited"}
    import torch
    before = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    position = check.log.tell()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (before + 2**30) / total))
    try:
        found = sample_mini(check, "memory", "--num_per_mask", "512", "--batch_size", "4096", "--num_steps", "2")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    check.log.flush()
    with (check.out / "log.txt").open(encoding="utf-8") as file:
        file.seek(position)
        halvings = file.read().count("out of memory: going on with")
    if not halvings:
        raise Failed("memory sufficed, nothing was halved")
    return {"halvings": halvings, "images": found["images"]}


def measure_rows(check: Check) -> Iterator[tuple[str, Callable[[], dict[str, Any]], float]]:
    """The most telling rows of benchmarks/bench_gpu.py, and one training step at the size of Stable Diffusion 1.5."""
    from benchmarks import bench_gpu
    machine = bench_gpu.Machine(argparse.Namespace(device=check.device, tiny=check.args.tiny))

    def rounded(line: dict[str, Any]) -> dict[str, Any]:
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}

    def ceilings() -> dict[str, Any]:
        lines = list(bench_gpu.ceilings(machine))
        return {"tflop_a_second": round(lines[0]["tflop_a_second"], 2),
                "copy_gb_a_second": round(lines[1]["gb_a_second"], 1), "attention": lines[2:]}

    def forward() -> dict[str, Any]:
        return rounded(bench_gpu.forward_line(machine, 1 if check.args.tiny else 8, layout="nhwc", weights="float32",
                                              compile="no", attention="sdpa"))

    def step() -> dict[str, Any]:
        return rounded(bench_gpu.training_line(machine, "ours_checkpointing", 1 if check.args.tiny else 4))

    yield "matrix product, copy, attention", ceilings, 5
    yield "network of SD1.5 size, one forward", forward, 25
    yield "network of SD1.5 size, one step", step, 40


def main(argv: list[str] | None = None) -> int:
    """Check; 1 if a step failed."""
    args = parse_arguments(argv)
    install_missing(args)
    import torch
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    os.chdir(ROOT)
    check = Check(args)
    check.step("environment", lambda: describe(check))
    check.step("data", lambda: write_data(check.out / "tiles", 16 if args.tiny else 128))
    for name in CONFIGS:
        check.step(f"config {name}", lambda name=name: train_config(check, name))
    for name, why in NOT_HERE.items():
        check.step(f"config {name}", lambda why=why: {"left_out": why})
    check.step("small model", lambda: train_mini(check), 20)
    check.step("small model, resumed", lambda: resume_mini(check), 20)
    check.step("small model, samples", lambda: sample_mini(check, "samples"), 10)
    if not args.no_compile:
        check.step("small model, samples, compiled", lambda: sample_mini(check, "compiled", "--compile"), 30)
    check.step("small model, memory that ends", lambda: run_out_of_memory(check), 10)
    for name, work, need in measure_rows(check):
        check.step(name, work, 0 if args.tiny else need)
    failed = [row["step"] for row in check.rows if row["result"] == "FAIL"]
    print(f"\n{len(check.rows)} steps, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}; everything is "
          f"in {check.out / 'gpu_check.json'}, what the steps printed in {check.out / 'log.txt'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
