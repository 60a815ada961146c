"""Exponential moving average of what trains: what validation, previews and exports use."""
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

FINETUNED = 1_000_000  # updates that an average handed over counts as, so that no warm-up throws it away


class AveragedWeights(pl.Callback):
    """Average of the trained weights, float32, on their device; nothing exists twice that does not train.

    After n updates a step keeps min(decay, (1 + n) / (10 + n)) of the average, and the first one keeps nothing: the
    random start is forgotten at once, and the average spans about the last tenth of the steps until 1 / (1 - decay)
    steps are less. With decay alone, 39 % of an average were its start after 930 steps of 0.999.

    Args:
        decay: largest share of the old average that an optimizer step keeps.
        use_warmup: False = keep `decay` from the second update on.
        start: averaged weights to go on from, by the names of the method; None = those of the first step.
    """

    def __init__(self, decay: float, use_warmup: bool = True, start: Mapping[str, Tensor] | None = None) -> None:
        self.decay, self.use_warmup, self.start = decay, use_warmup, start
        self.average: dict[str, Tensor] = {}
        self.count = self.latest_step = 0
        self.current: list[Tensor] | None = None  # the trained weights while the average is in their place

    def share_kept(self) -> float:
        """Share of the old average that the next update keeps."""
        if self.count == 0:
            return 0.0
        return min(self.decay, (1 + self.count) / (10 + self.count)) if self.use_warmup else self.decay

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights, with `start`, or with what a checkpoint held; on the device of the weights."""
        trained = trained_parameters(pl_module)
        if self.start is not None and not self.average:
            # What only a training has, such as adapters, has no average yet.
            self.average = {name: self.start.get(name.removeprefix("method."), p) for name, p in trained.items()}
            self.count = FINETUNED
        source = self.average or trained
        self.average = {name: source[name].detach().to(p.device, torch.float32, copy=True)
                        for name, p in trained.items()}
        self.start = None

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Update after an optimizer step; nothing waits for the device."""
        if trainer.global_step <= self.latest_step:
            return
        current = [p.detach().float() for p in trained_parameters(pl_module).values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1.0 - self.share_kept())
        self.latest_step = trainer.global_step
        self.count += 1

    def put_in_place(self, pl_module: nn.Module) -> None:
        """Give the module the averaged weights; the trained ones are kept aside."""
        parameters = list(trained_parameters(pl_module).values())
        self.current = [p.detach().clone() for p in parameters]
        torch._foreach_copy_([p.data for p in parameters], list(self.average.values()))

    def take_back(self, pl_module: nn.Module) -> None:
        """Give the module the trained weights again, to the bit."""
        torch._foreach_copy_([p.data for p in trained_parameters(pl_module).values()], self.current)
        self.current = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the averaged weights."""
        if self.average:
            self.put_in_place(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the trained ones."""
        if self.average:
            self.take_back(pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule,
                           checkpoint: dict[str, Any]) -> None:
        """`state_dict` holds the averaged weights, `current_model_state` the trained ones."""
        state = checkpoint["state_dict"]
        checkpoint["current_model_state"] = {name: state[name] for name in self.average}
        checkpoint["state_dict"] = state | self.average
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self.count)}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule,
                           checkpoint: dict[str, Any]) -> None:
        """Take the average up again; a run that kept none begins one. The module has set its weights apart from it."""
        self.latest_step = checkpoint["global_step"]
        if "averaging_state" in checkpoint:
            averaged = checkpoint["averaged_state"]
            self.average = {name: averaged[name].detach().clone() for name in trained_parameters(pl_module)}
            self.count = int(checkpoint["averaging_state"]["n_averaged"])


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a module that have gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@contextmanager
def averaged_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Within it the module has the averaged weights, if the run keeps some."""
    averages = [callback for callback in trainer.callbacks
                if isinstance(callback, AveragedWeights) and callback.average]
    for average in averages:
        average.put_in_place(pl_module)
    try:
        yield
    finally:
        for average in averages:
            average.take_back(pl_module)
