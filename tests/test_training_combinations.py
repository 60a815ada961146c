"""Precision, clipping, fused optimizer, accumulation, averaging and resuming: all of them go together."""

import itertools
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.training.callbacks import AveragedWeights
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
