"""When a training ends before its last step: a budget in minutes, signals; and when it saves in between."""
import logging
import signal
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl
import torch

from ldm.generation.machine import STOP_SIGNALS, Stopped

log = logging.getLogger("train")

MARGIN = 1.5  # seconds kept for what nobody measured: writing logs, ending loader processes


class Budget(pl.Callback):
    """Ends a training in time and after signals, always behind a whole optimizer step; saves every few minutes.

    The first SIGTERM, SIGINT or SIGUSR1 (SLURM's warning) ends the training after the step in flight; before the
    training has begun it ends the program there and then. The second one kills. All ranks follow rank 0.

    Args:
        max_minutes: of the whole program; None = as long as it takes. Within it, room is left for a step as long as the
            longest of the last twenty, and for a last checkpoint.
        every_minutes: most time between two checkpoints; None = as lightning.checkpoint says alone.
        started: time.monotonic() of the program's start.
    """

    def __init__(self, max_minutes: float | None = None, every_minutes: float | None = None,
                 started: float | None = None) -> None:
        self.limit = None if max_minutes is None else 60.0 * max_minutes
        self.every = None if every_minutes is None else 60.0 * every_minutes
        self.started = time.monotonic() if started is None else started
        self.elapsed_before = 0.0  # seconds of training of the runs that this one resumes
        self.began = self.stepped = self.started
        self.step_seconds: deque[float] = deque(maxlen=20)
        self.save_seconds = 0.0
        self.step = -1
        self.received: int | None = None
        self.is_training = False
        self.is_over = False
        self.handlers: dict[int, Any] = {}

    def catch_signals(self) -> None:
        """Take the stop signals over, from Lightning too."""
        for number in STOP_SIGNALS:
            self.handlers.setdefault(number, signal.getsignal(number))
            signal.signal(number, self.receive)

    def release_signals(self) -> None:
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, _: Any) -> None:
        """Handler of the stop signals."""
        for name in STOP_SIGNALS:
            signal.signal(name, signal.SIG_DFL)
        self.received = number
        if not self.is_training:
            raise Stopped(number)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The budget that is left begins to run; Lightning has put handlers of its own in the meantime."""
        self.catch_signals()
        self.is_training, self.step = True, trainer.global_step
        self.began = self.stepped = trainer.checkpoint_callback.saved_at = time.monotonic()
        if self.limit is not None:
            pl_module.time_share = self.share()

    def share(self) -> float:
        """Share of the time that is used up, in [0, 1]; with what earlier runs took, whose schedule goes on."""
        if self.limit is None:
            return 0.0
        now = time.monotonic()
        total = max(1e-9, self.limit - (self.began - self.started) - self.reserve() + self.elapsed_before)
        return min(1.0, (now - self.began + self.elapsed_before) / total)

    def reserve(self) -> float:
        """Seconds that the end will take."""
        return MARGIN + 1.2 * max(self.step_seconds, default=0.0) + 1.5 * self.save_seconds

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """After each optimizer step: how far the time is, and whether to save or to stop."""
        if trainer.global_step == self.step:
            return  # in the middle of an accumulation, whose gradients no checkpoint holds
        now, saver = time.monotonic(), trainer.checkpoint_callback
        self.step_seconds.append(now - self.stepped)
        self.save_seconds, self.step, self.stepped = saver.save_seconds, trainer.global_step, now
        is_due = self.every is not None and now - saver.saved_at + max(self.step_seconds) > self.every
        is_late = self.limit is not None and now - self.started + self.reserve() >= self.limit
        state = [self.share(), is_due, is_late, self.received or 0]
        if trainer.world_size > 1:  # Lightning itself waits for the device in every step of such a training
            tensor = torch.tensor(state, dtype=torch.float32, device=pl_module.device)
            torch.distributed.broadcast(tensor, src=0)
            state = tensor.tolist()
        share, is_due, is_late, number = state
        if self.limit is not None:
            pl_module.time_share = share
        self.received, self.is_over = int(number) or self.received, bool(is_late)
        if self.is_over or self.received:
            trainer.should_stop = True
        elif is_due:
            saver.save_last_step(trainer)
            self.stepped = time.monotonic()

    def finish(self, run_dir: Any, step: int) -> int:
        """What is left to say when the training has ended; returns the exit code: 0, or that of the signal."""
        self.is_training = False
        if self.received is not None:
            log.warning("stopped by %s after step %d; go on with: python train.py -r %s",
                        signal.Signals(self.received).name, step, run_dir)
            return Stopped(self.received).code
        if self.is_over:
            log.info("the time is used up: step %d after %.1f minutes", step, (time.monotonic() - self.started) / 60)
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Seconds of training so far."""
        running = time.monotonic() - self.began if self.is_training else 0.0
        return {"elapsed": self.elapsed_before + running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.elapsed_before = state_dict["elapsed"]
