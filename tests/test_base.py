"""Checkpoints and exports that leave out what another file holds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ROOT, model_params, randomize

import train
from cldm.tisynth import TISynth
from ldm.training import build
from ldm.util import UserError
from ldm.weights.checkpoint import hash_weights, save_safetensors
from ldm.weights.load import load_method, read_model_config
from scripts import convert_checkpoint

FROZEN = ("first_stage_model.", "cond_stage_model.")


@pytest.fixture
def run(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Two steps of train.py on a base file, as if it were as large as Stable Diffusion; returns the run folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(build, "WHOLE_BELOW", 0)
    method = randomize(TISynth(**model_params("tisynth_tiny")), 0.1)
    save_safetensors(tmp_path / "base.safetensors", {k: v.half() for k, v in method.state_dict().items()})

    def fit(name: str, *arguments: str) -> Path:
        train.main([*arguments, "--gpus", "", "--no-test", "lightning.trainer.limit_val_batches=0",
                    "training.ema_decay=0.9"])  # fmt: skip
        return tmp_path / name

    start = ["--config_model", "configs/model/tisynth_tiny.yaml", "-b", str(toy_data / "train.yaml"), "--data_root",
             str(toy_data), "--pretrain_path", str(tmp_path / "base.safetensors"),
             "model.params.train=[control,reference]", "model.params.text_encoder.params.frozen=true"]  # fmt: skip
    return lambda name, *arguments: fit(name, *(arguments or [*start, "-p", str(tmp_path / name)]))


def test_a_run_saves_what_trains_and_the_hash_of_its_base(run: Callable, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    folder = run("run")
    last = folder / "checkpoints/last.safetensors"
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if name.removeprefix("method.").startswith(FROZEN)]
    (base,) = json.loads(saved["base"])
    assert base["sha256"] == hash_weights(tmp_path / "base.safetensors")
    config = read_model_config(last)
    method = load_method(last, config, "cpu")
    files = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    trained = {name for name in saved["current_model_state"]}
    assert trained and all(torch.equal(method.state_dict()[n.removeprefix("method.")], files[n]) for n in trained)
    own = load_method(folder / "checkpoints/last.ckpt", config, "cpu").state_dict()  # a checkpoint generates, too
    assert all(torch.equal(value, own[name]) for name, value in method.state_dict().items())

    # One whole file of both; it needs nothing else.
    convert_checkpoint.main([str(last), str(tmp_path / "whole.safetensors")])
    whole = tmp_path / "elsewhere/whole.safetensors"
    whole.parent.mkdir()
    shutil.copy(tmp_path / "whole.safetensors", whole)
    found = load_method(whole, config, "cpu").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in method.state_dict().items())

    # Resumed and finetuned, with the frozen parts from the base; below the limit files are whole.
    monkeypatch.setattr(build, "WHOLE_BELOW", 1 << 30)
    run("run", "-r", str(folder), "lightning.trainer.max_steps=3")
    resumed = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == 3 and "base" not in resumed
    for name, value in method.state_dict().items():
        if name.startswith(FROZEN):
            assert torch.equal(resumed["state_dict"]["method." + name], value), name


def test_a_missing_base_is_named_with_its_hash(run: Callable, tmp_path: Path):
    last = run("run") / "checkpoints/last.safetensors"
    digest = hash_weights(tmp_path / "base.safetensors")
    config = read_model_config(last)
    (tmp_path / "base.safetensors").rename(tmp_path / "run/checkpoints/base.safetensors")  # beside the export
    load_method(last, config, "cpu")
    moved = tmp_path / "run/checkpoints/base.safetensors"
    moved.rename(tmp_path / "gone.safetensors")
    for use in (lambda: read_model_config(last), lambda: load_method(last, config, "cpu")):
        with pytest.raises(UserError, match=f"base.safetensors .sha256 {digest}., which is missing"):
            use()
    save_safetensors(moved, {"x": torch.zeros(1)})
    with pytest.raises(UserError, match=rf"{digest}.*{moved} is another file"):
        load_method(last, config, "cpu")


def test_a_small_model_is_one_file(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "WHOLE_BELOW", 256 << 20)
    last = run("run") / "checkpoints/last.safetensors"
    (tmp_path / "base.safetensors").unlink()
    load_method(last, read_model_config(last), "cpu")
