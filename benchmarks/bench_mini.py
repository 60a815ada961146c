"""Training of tisynth_mini as train.py does it, loader included, in this tree and in others, in one run.

    git worktree add --detach /tmp/before 7fb62f5
    python benchmarks/bench_mini.py --tree before=/tmp/before --out mini.jsonl

Every arm trains for three epochs of drawn tiles with the settings of configs/train/mini.yaml (no latents cached, the
autoencoder random), the arms in turn, in rounds. Lines: samples a second between the first and the last step, the share
of that time that a step waits for its batch, and the launches of a step, counted as benchmarks/launches.py does, with
the optimizer fused as on a GPU and with the average of the weights.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def work(tree: Path, arguments: list[str], count: bool) -> None:
    """Run train.py of a tree in this process and print what was measured; the last line is JSON."""
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    import pytorch_lightning as pl
    import torch

    import train
    times: list[tuple[float, float]] = []  # batch is there, step is done
    computed: list[float] = []  # CPU seconds of this process, which other programs disturb less
    launches: list[int] = []
    spec = importlib.util.spec_from_file_location("launches", ROOT / "benchmarks/launches.py")
    counting = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counting)

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.perf_counter()
            if count:
                self.mode = counting.LaunchCount()
                self.mode.__enter__()

        def on_train_batch_end(self, *_: Any) -> None:
            if count:
                self.mode.__exit__(None, None, None)
                launches.append(self.mode.total)
            times.append((self.began, time.perf_counter()))
            computed.append(time.process_time())

    fit, fused = pl.Trainer.fit, torch.optim.AdamW.__init__

    def watched(self: pl.Trainer, *args: Any, **options: Any) -> None:
        self.callbacks.append(Watch())  # behind all others, so that what they do counts
        fit(self, *args, **options)

    pl.Trainer.fit = watched
    if count:  # as on a GPU
        torch.optim.AdamW.__init__ = lambda self, *args, **options: fused(self, *args, **{**options, "fused": True})
    train.main(arguments)
    seconds = times[-1][1] - times[0][1]
    waited = sum(begin - end for (_, end), (begin, _) in zip(times, times[1:], strict=False))
    print(json.dumps({"steps": len(times) - 1, "seconds": round(seconds, 3),
                      "cpu_seconds": round(computed[-1] - computed[0], 3), "waiting": round(waited / seconds, 4),
                      "launches": launches[-1] if launches else None}))  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=DIR", help="another checkout to compare")
    parser.add_argument("--tiles", type=int, default=2000, help="of an epoch (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--model", default="tisynth_mini")
    parser.add_argument("--gpus", default="")
    parser.add_argument("--out", help="file for the lines as JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args(argv)
    if args.work:
        work(Path(args.work), rest[1:], rest[0] == "count")
        return
    trees = {**dict(tree.split("=", 1) for tree in args.tree), "now": str(ROOT)}
    arms = {**{name: (path, []) for name, path in trees.items()},
            "now, decoded once": (str(ROOT), ["data.params.cache=memory"])}  # fmt: skip
    sys.path.insert(0, str(ROOT))
    from benchmarks.measure import ask_fresh, lines_to, write_tiles

    with tempfile.TemporaryDirectory() as name, lines_to(args.out) as emit:
        folder = Path(name)
        write_tiles(folder / "data", 128, args.tiles)

        def run(arm: str, steps: int, count: bool) -> dict[str, Any]:
            tree, extra = arms[arm]
            arguments = [
                "--config_model", f"configs/model/{args.model}.yaml", "-b", "configs/train/mini.yaml", "-p",
                f"{folder}/run_{time.time_ns()}", "--data_root", f"{folder}/data", "--gpus", args.gpus, "--no-test",
                "init=null", "training.cache_latents=null", "training.preview_every=null",
                f"data.params.batch_size={2 if count else args.batch}", f"data.params.num_workers={args.num_workers}",
                f"lightning.trainer.max_steps={steps}", "lightning.trainer.limit_val_batches=0",
                "lightning.trainer.enable_progress_bar=false", *extra,
                *(["lightning.trainer.gradient_clip_val=null"] if count else [])]  # fmt: skip
            return ask_fresh(__file__, "--work", tree, "count" if count else "time", *arguments,
                             OMP_NUM_THREADS=str(args.threads), PYTHONPATH="")  # fmt: skip

        for arm in arms:
            emit({"arm": arm, "launches_a_step": run(arm, 3, True)["launches"]})
        steps = args.epochs * (args.tiles // args.batch)
        for number in range(args.rounds):
            for arm in arms:
                found = run(arm, steps, False)
                emit({"arm": arm, "round": number, **found,
                      "samples_a_second": round(found["steps"] * args.batch / found["seconds"], 3),
                      "samples_a_cpu_second": round(found["steps"] * args.batch / found["cpu_seconds"], 3),
                      "load": [round(value, 1) for value in os.getloadavg()]})  # fmt: skip


if __name__ == "__main__":
    main()
