"""Fewer and larger kernels in training: the same numbers as without."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from tiny import model_params, randomize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.launches import autocast, count_launches
from cldm.tisynth import TISynth
from ldm.data.transforms import normalize_batch
from ldm.modules import attention, blocks
from ldm.modules.unet import UNetEncoder
from ldm.training.build import compile_training
from ldm.training.module import TrainingModule, freeze_all_but
from ldm.training.precision import StepWeights


def make_method() -> TISynth:
    method = randomize(TISynth(**model_params("tisynth_tiny")), 0.1).train()
    freeze_all_but(method, method.trainable_groups())
    return method


def make_batch() -> dict:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (2, 2, 3, 16, 16), generator=generator).to(torch.uint8)
    mask = torch.randint(0, 5, (2, 16, 16), generator=generator).to(torch.uint8)
    return {"image": image[0], "reference": image[1], "mask": mask, "prompt": ["a road", "water and land"]}


def loss_and_gradients(method: TISynth, is_half: bool = False, weights: StepWeights | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    method.zero_grad()
    with autocast(is_half), nullcontext() if weights is None else weights.in_place(torch.bfloat16):
        loss, _ = method.training_loss(normalize_batch(make_batch(), "cpu"))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in method.named_parameters() if p.grad is not None}}


def separately(monkeypatch: pytest.MonkeyPatch, method: nn.Module) -> None:
    """Every linear layer by itself, image and reference one after the other."""
    for module in (attention, blocks):
        monkeypatch.setattr(module, "joint_linear", lambda x, layers: tuple(layer(x) for layer in layers))
    monkeypatch.setattr(TISynth, "encode_together", lambda self, batch: batch)
    for part in method.modules():
        if isinstance(part, UNetEncoder):
            part.is_joint = False


def test_joint_products_are_those_of_the_layers(monkeypatch: pytest.MonkeyPatch):
    joint = loss_and_gradients(method := make_method())
    launches = count_launches(lambda: loss_and_gradients(method))
    separately(monkeypatch, method)
    single = loss_and_gradients(method)
    assert joint.keys() == single.keys() and len(joint) > 200
    for name, value in single.items():
        torch.testing.assert_close(joint[name], value, rtol=2e-3, atol=1e-6, msg=name)
    assert launches < 0.87 * count_launches(lambda: loss_and_gradients(method))


def test_weights_that_are_cast_at_once_are_those_that_autocast_casts(monkeypatch: pytest.MonkeyPatch):
    method = make_method()
    weights = StepWeights(method)
    expected, found = loss_and_gradients(method, is_half=True), loss_and_gradients(method, True, weights)
    assert torch.equal(expected["loss"], found["loss"])
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-5, msg=name)
    assert all(isinstance(p, nn.Parameter) and p.dtype == torch.float32 for p in method.parameters())  # put back
    assert not any(p.grad is not None for p in method.first_stage_model.parameters())
    launches = count_launches(lambda: loss_and_gradients(method, True, weights))
    separately(monkeypatch, method)
    assert 1.7 * launches < count_launches(lambda: loss_and_gradients(method, is_half=True))


def test_a_training_uses_them_and_leaves_its_weights_in_float32(monkeypatch: pytest.MonkeyPatch):
    def train(is_plain: bool) -> tuple[list[float], TISynth]:
        torch.manual_seed(1)
        method, losses = make_method(), []
        module = TrainingModule(method, learning_rate=1e-3)
        if is_plain:
            monkeypatch.setattr(module, "half_weights", nullcontext)
        step = module.training_step
        monkeypatch.setattr(module, "training_step", lambda *a: losses.append(step(*a)) or losses[-1])
        trainer = pl.Trainer(accelerator="cpu", max_steps=4, precision="bf16-mixed", gradient_clip_val=1.0,
                             logger=False, enable_checkpointing=False, enable_progress_bar=False,
                             enable_model_summary=False)  # fmt: skip
        trainer.fit(module, DataLoader([make_batch()] * 4, batch_size=None))
        assert (module.step_weights is None) == is_plain
        return [float(loss) for loss in losses], method

    plain, cast = train(True), train(False)
    assert plain[0] == pytest.approx(cast[0], rel=1e-3) and plain[0][0] != plain[0][-1]
    for first, second in zip(plain[1].parameters(), cast[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_training_has_the_same_losses(backend: str):
    def losses(prepare: Callable[[TISynth], None]) -> list[float]:
        torch.manual_seed(1)
        method, found = make_method(), []
        prepare(method)
        optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
        for step in range(20):
            torch.manual_seed(step)
            loss, _ = method.training_loss(normalize_batch(make_batch(), "cpu"))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))
        return found

    torch._dynamo.reset()
    eager, compiled = losses(lambda method: None), losses(lambda method: compile_training(method, backend=backend))
    torch._dynamo.reset()
    assert compiled == pytest.approx(eager, rel=2e-3) and eager[-1] != eager[0]
