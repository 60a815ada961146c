"""What train.py writes beside the weights: the record of the run, sample grids, weights for inference."""
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from tqdm import tqdm

from ldm.data.transforms import normalize_batch, to_uint8
from ldm.files import atomic_write
from ldm.methods.diffusion import evaluating
from ldm.sheet import Cell, draw_sheet
from ldm.training.average import averaged_weights
from ldm.weights.checkpoint import describe_bases, save_safetensors


class RunRecord(pl.Callback):
    """Writes run_dir/config.yaml and a line of run_dir/run.jsonl (command, revision, versions) when a fit starts."""

    def __init__(self, run_dir: Path, config: DictConfig) -> None:
        self.run_dir, self.config = run_dir, config

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write both files, on one process."""
        if not trainer.is_global_zero:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.run_dir / "config.yaml")
        record = {"command": sys.argv, "revision": read_revision(), "python": platform.python_version(),
                  "torch": torch.__version__, "lightning": pl.__version__, "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
                  "world_size": trainer.world_size, "start_step": trainer.global_step}
        with (self.run_dir / "run.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_revision() -> str:
    """Revision of this code; `unknown` outside of a repository, or where there is no git."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                              cwd=Path(__file__).parent, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that also saves the last step of a training.

    Lightning's saves last.ckpt at the end only when it never saved one before. And it would save a resumed run at the
    step it was resumed at, in the middle of an accumulation, whose gradients are in no checkpoint.

    Attributes:
        saved_at: time.monotonic() of the last checkpoint.
        save_seconds: how long it took.
    """

    saved_at = save_seconds = 0.0

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        began = time.monotonic()
        super()._save_checkpoint(trainer, filepath)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - began

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the step that a run starts at as saved."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save last.ckpt unless it is there."""
        self.save_last_step(trainer)

    def save_last_step(self, trainer: pl.Trainer) -> None:
        """Save last.ckpt if there were steps since the last checkpoint."""
        if trainer.global_step != self._last_global_step_saved:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class Progress(pl.callbacks.ProgressBar):
    """One bar over all optimizer steps; where there is no terminal, one line a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled, self.bar, self.is_terminal = True, None, sys.stderr.isatty()

    def disable(self) -> None:
        """Lightning's way to silence the ranks above 0."""
        self.is_enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self.began = self.told = time.monotonic()
        self.first = trainer.global_step
        if self.is_enabled and self.is_terminal:
            self.bar = tqdm(total=trainer.max_steps if trainer.max_steps > 0 else None, initial=self.first,
                            unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Show the step; the loss, for which the device has to be waited for, once in a while."""
        now = time.monotonic()
        if not self.is_enabled or now - self.told < (1.0 if self.bar is not None else 60.0):
            return
        loss = trainer.callback_metrics.get("loss")
        loss = "" if loss is None else f"loss {float(loss):.4g}"
        step, self.told = trainer.global_step, now
        if self.bar is not None:
            self.bar.set_postfix_str(loss)
            self.bar.update(step - self.bar.n)
            return
        total = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
        print(f"step {step}{total}, {(step - self.first) / (now - self.began):.3g} steps/s, {loss}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()


class WeightExport(pl.Callback):
    """Puts the config into every checkpoint, and exports the weights for inference.

    They go to run_dir/checkpoints/last.safetensors; the averaged ones when EMA is on. Both files leave out what the
    module says other files hold, and say which (see ldm.weights.checkpoint).
    """

    def __init__(self, run_dir: Path, config: DictConfig) -> None:
        self.path, self.config = run_dir / "checkpoints" / "last.safetensors", config
        self.base: str | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule,
                           checkpoint: dict[str, Any]) -> None:
        """Add the config; export whenever Lightning saves a checkpoint."""
        checkpoint["config"] = OmegaConf.to_container(self.config, resolve=True)
        if not trainer.is_global_zero:  # the others write nothing
            return
        left_out, metadata = pl_module.left_out(), {"step": str(trainer.global_step)}
        if left_out:
            self.base = self.base or describe_bases(left_out)  # hashing gigabytes once is enough
            checkpoint["base"] = metadata["base"] = self.base
            names = {"method." + name for name in left_out}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in names}
        weights = {k.removeprefix("method."): v for k, v in checkpoint["state_dict"].items()}
        save_safetensors(self.path, pl_module.method.exported(weights), self.config, metadata)


class ImageGrid(pl.Callback):
    """Generates the same few validation rows every `every` optimizer steps: run_dir/images/gs-000100.png.

    Each line of the grid is one row of the manifest, ROWS of them evenly spaced, each column one image of
    `method.preview(batch)`. With EMA they are generated with the averaged weights, as the exported ones are.
    """

    ROWS = 6

    def __init__(self, run_dir: Path, dataset: torch.utils.data.Dataset, every: int) -> None:
        self.folder, self.every = run_dir / "images", every
        count = min(self.ROWS, len(dataset))
        self.items = [dataset[i * len(dataset) // count] for i in range(count)]
        self.last_step = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Write the grid when it is due."""
        step = trainer.global_step
        if step % self.every or step == self.last_step or not trainer.is_global_zero:
            return
        self.last_step = step
        batch = normalize_batch(torch.utils.data.default_collate(self.items), pl_module.device)
        with averaged_weights(trainer, pl_module), evaluating(pl_module), torch.random.fork_rng(), torch.no_grad(), \
                trainer.precision_plugin.forward_context():
            columns = pl_module.method.preview(batch)
        images = [to_uint8(images).permute(0, 2, 3, 1).cpu().numpy() for images in columns.values()]
        sheet = draw_sheet([[Cell(image, name) for name, image in zip(columns, row, strict=True)]
                            for row in zip(*images, strict=True)])  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / f"gs-{step:06d}.png", lambda file: sheet.save(file, "PNG"))
