"""Trainings that end with their time or by a signal, and what they leave."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import ROOT

import train
from ldm.training import callbacks
from ldm.training.budget import Budget
from ldm.training.module import learning_rate_factor
from ldm.weights.load import load_method, read_model_config


@pytest.fixture
def command(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(ROOT)
    return ["--config_model", "configs/model/tisynth_tiny.yaml", "-b", str(toy_data / "train.yaml"), "-p",
            str(tmp_path / "run"), "--data_root", str(toy_data), "--gpus", "", "--no-test", "training.schedule=cosine",
            "training.ema_decay=0.9", "lightning.trainer.limit_val_batches=0",
            "lightning.trainer.max_steps=1000000", "lightning.checkpoint.every_n_train_steps=1000000"]  # fmt: skip


def read_last(run: Path) -> dict:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def rate_of(checkpoint: dict) -> float:
    return checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] / 1e-2  # of the fixture's config


def assert_generates(run: Path) -> None:
    last = run / "checkpoints/last.safetensors"
    load_method(last, read_model_config(last), "cpu")
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "last.safetensors"]


def test_a_training_ends_with_its_time_at_the_end_of_its_schedule(command: list[str], tmp_path: Path):
    begun = time.monotonic()
    assert train.main([*command, "training.max_minutes=0.25", "training.warmup_steps=1000000"]) == 0
    wall = time.monotonic() - begun
    assert 4 < wall < 15 + 6
    first = read_last(tmp_path / "run")
    assert rate_of(first) < 0.05 and first["global_step"] > 3
    assert_generates(tmp_path / "run")
    # A new budget: the rate rises again, since the time that is used up is a smaller share, and falls to the end.
    assert train.main(["-r", str(tmp_path / "run"), "--gpus", "", "training.max_minutes=0.25", "--no-test"]) == 0
    second = read_last(tmp_path / "run")
    assert second["global_step"] > first["global_step"] and rate_of(second) < 0.05
    elapsed = [state["elapsed"] for checkpoint in (first, second) for name, state in checkpoint["callbacks"].items()
               if name == "Budget"]
    assert 2 < elapsed[0] < wall and elapsed[0] + 2 < elapsed[1] < wall + 15 + 6  # each second counts once


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_training_behind_a_step(command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture,
                                                caplog: pytest.LogCaptureFixture, number: int, code: int):
    def send() -> None:
        until = time.monotonic() + 60
        metrics = tmp_path / "run/csv/metrics.csv"
        while not metrics.is_file() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send, daemon=True).start()
    assert train.main([*command, "lightning.trainer.accumulate_grad_batches=2", "data.params.num_workers=1"]) == code
    assert signal.getsignal(number) == before
    last = read_last(tmp_path / "run")
    assert last["global_step"] * 2 == last["micro_batches"] > 0  # whole steps
    assert_generates(tmp_path / "run")
    assert f"stopped by {signal.Signals(number).name} after step {last['global_step']}; go on with" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    assert train.main(["-r", str(tmp_path / "run"), "--gpus", "", "--no-test", "data.params.num_workers=0",
                       f"lightning.trainer.max_steps={last['global_step'] + 1}"]) == 0  # fmt: skip
    assert read_last(tmp_path / "run")["global_step"] == last["global_step"] + 1


def test_a_kill_loses_at_most_some_minutes(command: list[str], tmp_path: Path):
    """Nothing but the clock saves here: after kill -9 the last checkpoint is there, and goes on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([sys.executable, "train.py", *command, "lightning.checkpoint.every_minutes=0.02"],
                               cwd=ROOT, env=environment, stdout=log, stderr=log)  # fmt: skip
    last, until = tmp_path / "run/checkpoints/last.ckpt", time.monotonic() + 120
    while not last.is_file() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    saved = read_last(tmp_path / "run")
    assert saved["global_step"] > 0, (tmp_path / "log").read_text()[-2000:]
    assert train.main(["-r", str(tmp_path / "run"), "--gpus", "", "--no-test",
                       f"lightning.trainer.max_steps={saved['global_step'] + 1}"]) == 0  # fmt: skip


def test_the_schedule_follows_steps_or_time_whichever_is_further():
    def factor(step: int, share: float | None) -> float:
        return learning_rate_factor(step, 10, "cosine", 100, share)

    assert factor(55, 0.2) == factor(55, None) == pytest.approx(0.505)
    assert factor(20, 0.5) == pytest.approx(0.505) and factor(20, 1.0) == pytest.approx(0.01)
    assert factor(0, 0.0) == pytest.approx(1 / 11) and factor(0, 0.04) == pytest.approx(0.8)  # a warm-up ends in time
    assert learning_rate_factor(5, 0, "cosine", -1, 0.5) == pytest.approx(0.505)
    with pytest.raises(ValueError, match=r"max_steps > 0 or max_epochs, or training.max_minutes"):
        learning_rate_factor(0, 0, "cosine", -1)


def test_what_earlier_runs_took_is_part_of_the_schedule():
    budget = Budget(max_minutes=2.0)
    budget.load_state_dict({"elapsed": 60.0})
    assert budget.share() == pytest.approx(1 / 3, abs=0.01) and math.isclose(budget.state_dict()["elapsed"], 60.0)


def test_progress_is_a_line_now_and_then_without_a_terminal(monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture):  # fmt: skip
    trainer = SimpleNamespace(global_step=7, max_steps=100, callback_metrics={"loss": torch.tensor(0.25)})
    clock = [1000.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    progress = callbacks.Progress()
    assert not progress.is_terminal
    progress.on_train_start(trainer, None)
    for clock[0], trainer.global_step in ((1010.0, 8), (1059.0, 30), (1061.0, 37), (1100.0, 50), (1122.0, 68)):
        progress.on_train_batch_end(trainer, None)
    assert capsys.readouterr().out.splitlines() == [
        "step 37 of 100, 0.492 steps/s, loss 0.25", "step 68 of 100, 0.5 steps/s, loss 0.25"]  # fmt: skip
    progress.disable()
    clock[0] = 9999.0
    progress.on_train_batch_end(trainer, None)
    assert not capsys.readouterr().out


def test_a_machine_without_git_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert callbacks.read_revision()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert callbacks.read_revision() == "unknown"
