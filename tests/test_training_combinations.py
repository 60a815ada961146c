"""Precision, clipping, fused optimizer, accumulation, averaging and resuming: all of them go together."""

import itertools
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.training.average import AveragedWeights
from ldm.training.module import TrainingModule

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
CLIPPINGS = ({}, {"gradient_clip_val": 1e-3}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"})


class Linear(nn.Module):
    """A linear map that learns the sum of its inputs; half of it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(4, 1), nn.Linear(4, 1)

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"trained": list(self.trained.parameters())}

    def training_loss(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        # Inputs that differ by the step's seed, as the noise of a diffusion model does.
        inputs = torch.randn(len(batch["prompt"]), 4, dtype=self.trained.weight.dtype)
        return (self.trained(inputs) + 0 * self.frozen(inputs) - inputs.sum(1, keepdim=True)).square().mean(), {}


def fit(folder: Path, steps: int, precision: str = "32-true", clip: dict | None = None, accumulate: int = 1,
        decay: float | None = None, resume: Path | None = None, rate: float = 0.1) -> tuple[TrainingModule, dict]:
    """Train the toy as train.py would; returns the module and the checkpoint at the end."""
    torch.manual_seed(0)
    module = TrainingModule(Linear(), learning_rate=rate, weight_decay=0.0)
    # Lightning itself turns 16-mixed into bf16-mixed on a CPU; a GPU's scaling of the loss exists there, too.
    scaler = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]}
    trainer = pl.Trainer(accelerator="cpu", max_steps=steps, accumulate_grad_batches=accumulate, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                         callbacks=[] if decay is None else [AveragedWeights(decay)], **(clip or {}),
                         **(scaler if precision == "16-mixed" else {"precision": precision}))  # fmt: skip
    loader = DataLoader([{"prompt": [""] * 2}] * (steps * accumulate), batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    assert trainer.global_step == steps
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module, torch.load(folder / f"{steps}.ckpt", weights_only=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip", CLIPPINGS, ids=("free", "norm", "value"))
def test_all_combinations_take_two_steps_and_resume_exactly(tmp_path: Path, precision: str, clip: dict):
    for accumulate, decay in itertools.product((1, 2), (None, 0.9)):
        options = {"precision": precision, "clip": clip, "accumulate": accumulate, "decay": decay}
        module, straight = fit(tmp_path, 2, **options)
        optimizer = module.optimizers(use_pl_optimizer=False)
        assert bool(optimizer.param_groups[0]["fused"]) == (precision != "16-mixed")
        gradients = [p.grad.float() for p in module.method.trained.parameters()]
        if "gradient_clip_algorithm" in clip:
            assert max(g.abs().max() for g in gradients) == pytest.approx(1e-3, rel=1e-2)
        elif clip:
            assert torch.stack([g.norm() for g in gradients]).norm() == pytest.approx(1e-3, rel=1e-2)
        else:
            assert max(g.abs().max() for g in gradients) > 1e-2
        fit(tmp_path, 1, **options)
        _, resumed = fit(tmp_path, 2, **options, resume=tmp_path / "1.ckpt")
        for key in {"state_dict", "current_model_state"} & straight.keys():
            assert straight[key].keys() == resumed[key].keys()
            assert all(torch.equal(value, resumed[key][name]) for name, value in straight[key].items()), options


def distance(module: TrainingModule, averaged: dict, other: dict) -> float:
    return sum((averaged[name] - other[name]).norm().item() for name in other)


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
def test_the_average_is_nearer_to_the_trained_weights_than_to_the_start(tmp_path: Path, steps: int):
    """Even with a decay that would take ten thousand steps to forget, and while the weights still move."""
    torch.manual_seed(0)
    start = {f"method.{name}": p.detach().clone() for name, p in Linear().trained.named_parameters("trained")}
    module, saved = fit(tmp_path, steps, decay=0.9999, rate=3e-3)
    current, averaged = saved["current_model_state"], saved["state_dict"]
    assert current.keys() == start.keys()  # averages of frozen weights do not exist
    assert distance(module, current, start) > 0
    assert distance(module, averaged, current) < 0.5 * distance(module, averaged, start)
    frozen = module.method.frozen.state_dict()
    assert all(torch.equal(averaged[f"method.frozen.{name}"], value) for name, value in frozen.items())


def test_the_average_is_what_its_formula_says(tmp_path: Path):
    """Steps of an optimizer with a constant gradient are equal: w_n = w_0 + n d; the average follows in closed form."""
    average, module = AveragedWeights(0.9), nn.Linear(1, 1, bias=False).to(torch.float64)
    trainer, position, expected = pl.Trainer(logger=False, accelerator="cpu"), 0.0, None
    average.on_fit_start(trainer, module)
    for count in range(200):
        with torch.no_grad():
            module.weight.fill_(position := position + 0.25)
        trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.ready = 0
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = count + 1
        average.on_train_batch_end(trainer, module)
        kept = 0.0 if count == 0 else min(0.9, (1 + count) / (10 + count))
        expected = position if expected is None else kept * expected + (1 - kept) * position
    assert average.average["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert average.average["weight"].item() == pytest.approx(position - 0.25 * 9, rel=1e-4)  # 1 / (1 - 0.9) - 1 behind


def test_stopping_to_average_does_not_leave_the_average_in_training(tmp_path: Path):
    _, saved = fit(tmp_path, 5, decay=0.9)
    module, resumed = fit(tmp_path, 6, resume=tmp_path / "5.ckpt")  # without the callback
    _, straight = fit(tmp_path, 6)
    assert all(torch.equal(resumed["state_dict"][name], value) for name, value in straight["state_dict"].items())
    assert any(not torch.equal(saved["state_dict"][name], v) for name, v in saved["current_model_state"].items())
