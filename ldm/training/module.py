"""The one LightningModule: trains any method that gives `training_loss(batch)` and `trainable_groups()`."""
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.data.transforms import normalize_batch
from ldm.training.precision import StepWeights
from ldm.util import UserError

log = logging.getLogger(__name__)

WARMUP_SHARE = 0.05  # of a budget of time, the most that a warm-up takes


def freeze_all_but(method: nn.Module, groups: Mapping[str, list[nn.Parameter]]) -> str:
    """Give gradients to the parameters of the named groups and to no other; returns a table of them for the log."""
    method.requires_grad_(False)
    lines, trained = [], 0
    for name, parameters in groups.items():
        for parameter in parameters:
            parameter.requires_grad_(True)
        count = sum(p.numel() for p in parameters)
        trained += count
        lines.append(f"  {name:<24}{len(parameters):>6} tensors {count:>14,} parameters")
    total = sum(p.numel() for p in method.parameters())
    return f"trains {trained:,} of {total:,} parameters\n" + "\n".join(lines)


def learning_rate_factor(step: int, warmup_steps: int, schedule: str, max_steps: int,
                         time_share: float | None = None) -> float:
    """Factor on the learning rate at an optimizer step.

    Args:
        step: optimizer steps done.
        warmup_steps: steps of linear rise from 0.
        schedule: `constant` or `cosine` (falls to 1 % at max_steps).
        max_steps: length of the training in optimizer steps; only for `cosine`.
        time_share: share of a budget of time that is used up; the further of steps and time counts. None = no budget.
    Returns:
        Factor in [0, 1].
    Raises:
        ValueError: for another schedule, or cosine without a length.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"training.schedule: {schedule!r} is unknown. Expected constant or cosine.")
    if schedule == "cosine" and max_steps <= 0 and time_share is None:
        raise ValueError("training.schedule=cosine needs lightning.trainer.max_steps > 0 or max_epochs, or "
                         "training.max_minutes.")
    used = time_share or 0.0
    if step < warmup_steps and used < WARMUP_SHARE:
        return max((step + 1) / (warmup_steps + 1), used / WARMUP_SHARE)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps) if max_steps > 0 else 0.0
    progress = min(1.0, max(progress, used))
    return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress))


class TrainingModule(pl.LightningModule):
    """Optimises a method.

    All random draws of a step depend on (seed, micro-batch index, rank): a resumed run repeats the draws of an
    uninterrupted one, and no two ranks draw the same noise.

    Args:
        method: see ldm.methods.base.
        learning_rate, weight_decay, betas: AdamW's; the rate at its peak.
        seed: base seed.
        warmup_steps, schedule: see learning_rate_factor.
        left_out: gives the tensors of the method that files need not hold, name -> file that has them.
    """

    def __init__(self, method: nn.Module, learning_rate: float, seed: int = 23, weight_decay: float = 0.01,
                 betas: tuple[float, float] = (0.9, 0.999), warmup_steps: int = 0, schedule: str = "constant",
                 left_out: Callable[[], Mapping[str, str]] = dict) -> None:
        super().__init__()
        self.method = method
        self.learning_rate, self.seed, self.weight_decay, self.betas = learning_rate, seed, weight_decay, tuple(betas)
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.micro_batches, self.left_out = 0, left_out
        self.is_compiled, self.step_weights = False, None
        self.time_share: float | None = None  # of a budget of minutes; whoever keeps it sets it (see Budget)
        self.strict_loading = False  # files may leave parts out; on_load_checkpoint sees to those that train
        log.info(freeze_all_but(method, method.trainable_groups()))

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the trained parameters, its rate stepped by optimizer steps."""
        parameters = [p for p in self.method.parameters() if p.requires_grad]
        # A fused optimizer takes the loss's scale out of fp16's gradients by itself, too late to clip them.
        is_scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        fused = not is_scaled and all(p.device.type in ("cuda", "cpu") for p in parameters)
        optimizer = torch.optim.AdamW(
            parameters, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay, fused=fused or None)
        max_steps = self.trainer.max_steps
        if max_steps < 0 and (self.trainer.max_epochs or 0) > 0:
            max_steps = self.trainer.estimated_stepping_batches  # optimizer steps, accumulation considered
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(
                step, self.warmup_steps, self.schedule, max_steps, self.time_share))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None,
                                    gradient_clip_algorithm: str | None = None) -> None:
        """Clip by norm or by value, the same in every precision.

        Lightning's own clipping refuses every fused optimizer under mixed precision, also where, as with bf16,
        gradients have no scale that would have to be taken out first.
        """
        if not gradient_clip_val:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if (gradient_clip_algorithm or "norm") == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """uint8 batches become what the methods expect, on the device."""
        return normalize_batch(batch, self.device)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Seed the step (see the class)."""
        torch.manual_seed(step_seed(self.seed, self.micro_batches, self.global_rank))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch; logs its parts."""
        with self.half_weights():
            loss, parts = self.method.training_loss(batch)
        self.micro_batches += 1
        size = len(batch["prompt"])
        self.log_dict({"loss": loss.detach(), **parts}, prog_bar=True, batch_size=size)
        # The mean over an epoch is what lightning.checkpoint.monitor and training.patience can look at.
        self.log("loss_epoch", loss.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return loss

    def half_weights(self) -> AbstractContextManager:
        """Where autocast is on and nothing is compiled, weights that are cast all at once (see StepWeights)."""
        device = self.device.type
        if self.is_compiled or not torch.is_autocast_enabled(device):
            return nullcontext()
        self.step_weights = self.step_weights or StepWeights(self.method)
        return self.step_weights.in_place(torch.get_autocast_dtype(device))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss with draws that are the same at every validation, so that the curve is comparable."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(step_seed(self.seed, 10**9 + batch_idx, self.global_rank))
            loss, parts = self.method.training_loss(batch)
        logs = {f"val_{name}": value for name, value in {"loss": loss, **parts}.items()}
        self.log_dict(logs, sync_dist=True, batch_size=len(batch["prompt"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the position in the stream of draws."""
        checkpoint["micro_batches"] = self.micro_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the stream of draws and the training's own weights; their average waits for its callback."""
        self.micro_batches = checkpoint["micro_batches"]
        checkpoint["averaged_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = checkpoint["state_dict"] | checkpoint.get("current_model_state", {})
        missing = [name for name, p in self.named_parameters() if p.requires_grad and name not in
                   checkpoint["state_dict"]]
        if missing:
            raise UserError(f"-r: {len(missing)} tensors that train are not in the checkpoint (first: {missing[0]}). "
                            "Expected a checkpoint of the same model.params.train. Start a new run with --finetune.")


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one step on one rank, in [0, 2**63): distinct for all steps below 2**31 and ranks below 2**16."""
    return ((seed * 1_000_003 % 2**16) << 47) + (rank << 31) + step
