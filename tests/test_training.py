"""Training: what moves, what it is weighted by, and train.py really run: resumed, averaged, on two processes."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from tiny import ROOT, model_params, randomize
from torch.utils.data import DataLoader

import train
from cldm.tisynth import TISynth
from ldm.data.dataset import to_tensor
from ldm.data.images import read_image
from ldm.data.transforms import normalize_batch, resize_image
from ldm.diffusion.objective import loss_weight
from ldm.diffusion.path import DiscretePath, FlowPath
from ldm.sampling.modes import Sampling
from ldm.training.latents import build_latent_cache
from ldm.training.module import TrainingModule, freeze_all_but, learning_rate_factor, step_seed
from ldm.util import UserError, run_entry_point
from ldm.weights.checkpoint import save_safetensors
from ldm.weights.load import load_method, read_model_config

IMPROVED = ("tisynth_sd15", "tisynth_tiny")
DECODER = "model.diffusion_model."


def batch_of(size: int = 16) -> dict:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (2, 2, 3, size, size), generator=generator).to(torch.uint8)
    mask = torch.randint(0, 5, (2, size, size), generator=generator).to(torch.uint8)
    return {"image": image[0], "reference": image[1], "mask": mask, "prompt": ["a road", "water and land"]}


def pretrained(name: str, **changes: object) -> TISynth:
    """A method as training finds it: what is frozen has been trained, what trains is at its initial values."""
    torch.manual_seed(0)
    method = TISynth(**model_params(name, **changes))
    freeze_all_but(method, method.trainable_groups())
    for parameter in method.parameters():
        if not parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return method


def expected_to_train(name: str, method: TISynth) -> set[str]:
    names = {key for key, _ in method.named_parameters()}
    if name == "tisynth_tiny":
        return {key for key in names if not key.startswith("first_stage_model.")}
    attention = {key for key in names if key.startswith(DECODER) and "trainable" in key}
    reference = {key for key in names if key.startswith(("ssl_stage_model.", "reference_statistics."))}
    if name == "tisynth_sd15":
        return attention | reference | {key for key in names if key.startswith("control_model.")}
    # The two features of the level without a transformer reach nothing, nor do the projections that make them.
    return attention | {key for key in reference if not key.startswith(tuple(
        f"ssl_stage_model.zero_convs.{i}." for i in (2, 3)))}  # fmt: skip


@pytest.mark.parametrize("name", ["tisynth_sd15_upstream", *IMPROVED])
def test_training_moves_exactly_what_the_log_says(name: str, caplog: pytest.LogCaptureFixture):
    """Six steps without weight decay, so that only gradients move weights; six, as zero-initialised layers queue up."""
    method = pretrained(name)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    caplog.set_level(logging.INFO)
    module = TrainingModule(method, learning_rate=1e-2, weight_decay=0.0)
    trainer = pl.Trainer(accelerator="cpu", max_steps=6, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader([batch_of()] * 6, batch_size=None))
    moved = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    expected = expected_to_train(name, method)
    assert moved == expected
    assert {key for key, p in method.named_parameters() if p.requires_grad} == expected
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for key, p in method.named_parameters() if key in expected}
    sizes = {key: p.numel() for key, p in method.named_parameters()}
    log = caplog.text
    assert f"trains {sum(sizes[key] for key in expected):,} of {sum(sizes.values()):,} parameters" in log
    for group, parameters in method.trainable_groups().items():
        line = next(line for line in log.splitlines() if line.split()[:1] == [group])
        assert line.split()[1:4:2] == [str(len(parameters)), f"{sum(p.numel() for p in parameters):,}"]


@pytest.fixture(scope="module")
def gradients() -> Callable[..., tuple[TISynth, dict]]:
    def compute(name: str, **changes: object) -> tuple[TISynth, dict]:
        method = pretrained(name, **changes)
        freeze_all_but(method, method.trainable_groups())
        for parameter in method.parameters():  # as after some steps, when no zero-initialised layer is zero any more
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        loss, _ = method.training_loss(normalize_batch(batch_of(), "cpu"))
        loss.backward()
        return method, {key: p.grad for key, p in method.named_parameters() if p.grad is not None}

    return compute


@pytest.mark.parametrize("name", IMPROVED)
def test_upstream_gradient_defects_are_gone(name: str, gradients: Callable):
    method, found = gradients(name)
    reached = {key for key, gradient in found.items() if gradient.any()}
    # 1. upstream's optimizer never got the mask branch
    assert {key for key, _ in method.named_parameters() if key.startswith("control_model.")} <= reached
    # 2. upstream ran the middle block of the decoder without gradients
    middle = {key for key, _ in method.named_parameters() if key.startswith(DECODER + "middle_block.1.")
              and "trainable" in key}  # fmt: skip
    assert len(middle) >= 14 and middle <= reached
    # 3. upstream dropped the features of the level without a transformer
    for branch in ("control_model", "ssl_stage_model"):
        assert {f"{branch}.zero_convs.{i}.0.weight" for i in range(4)} <= reached
    # 9. upstream computed gradients for hundreds of millions of weights that its optimizer did not have
    trained = {id(p) for parameters in method.trainable_groups().values() for p in parameters}
    assert {key for key, p in method.named_parameters() if id(p) in trained} == set(found)


def test_upstream_coupling_leaves_out_what_no_gradient_reaches(gradients: Callable):
    method, found = gradients("tisynth_sd15_upstream", train=["all_in_attention", "control", "reference"])
    assert all(gradient.any() for gradient in found.values())
    assert {key for key, p in method.named_parameters() if p.requires_grad} == set(found)
    assert not {key for key in found if "zero_convs.2." in key or "zero_convs.3." in key}


def test_min_snr_weights():
    path = DiscretePath(num_timesteps=2, kind="linear", start=0.1, end=0.5)  # abar = 0.9, 0.45; snr = 9, 9/11
    factors = path.factors(torch.tensor([0, 1]), torch.zeros(2, 1, 1, 1))
    for kind, expected in (("epsilon", [5 / 9, 1.0]), ("v", [0.5, 0.45]), ("x0", [5.0, 9 / 11])):
        torch.testing.assert_close(loss_weight(*factors, kind, 5.0), torch.tensor(expected))
    assert loss_weight(*factors, "v", None).tolist() == [1.0, 1.0]
    factors = FlowPath().factors(torch.tensor([200.0, 800.0]), torch.zeros(2, 1, 1, 1))  # snr = 16, 1 / 16
    torch.testing.assert_close(loss_weight(*factors, "velocity", 5.0), torch.tensor([5 * 0.04, 0.04]))


def test_learning_rate_factor():
    constant = [learning_rate_factor(step, 3, "constant", -1) for step in range(5)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = [learning_rate_factor(step, 0, "cosine", 10) for step in (0, 5, 10, 99)]
    assert cosine == pytest.approx([1.0, 0.505, 0.01, 0.01])
    for schedule, message in (("linear", "'linear' is unknown"), ("cosine", "max_steps > 0")):
        with pytest.raises(ValueError, match=message):
            learning_rate_factor(0, 0, schedule, -1)


def test_step_seeds_differ():
    assert len({step_seed(23, step, rank) for step in range(50) for rank in range(50)}) == 2500
    assert step_seed(22, 1, 0) != step_seed(23, 1, 0)
    assert 0 <= step_seed(10**9, 2**31 - 1, 2**16 - 1) < 2**63


@pytest.fixture
def fit(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run train.py in this process; returns the last checkpoint."""
    monkeypatch.chdir(ROOT)

    def run(run_dir: Path, *arguments: str, resume: Path | None = None) -> dict:
        flags = ["-r", str(resume)] if resume else [
            "--config_model", "configs/model/tisynth_tiny.yaml", "-b", str(toy_data / "train.yaml"), "-p", str(run_dir),
            "--data_root", str(toy_data)]  # fmt: skip
        train.main([*flags, "--gpus", "", "--no-test", "lightning.trainer.limit_val_batches=0", *arguments])
        return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)

    return run


def assert_same_state(first: dict, second: dict) -> None:
    assert first["global_step"] == second["global_step"]
    for key in ("state_dict", "current_model_state"):
        assert (key in first) == (key in second)
        for name, value in first.get(key, {}).items():
            assert torch.equal(value, second[key][name]), name
    for states in zip(*(c["optimizer_states"][0]["state"].values() for c in (first, second)), strict=True):
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert first["lr_schedulers"] == second["lr_schedulers"]


@pytest.mark.parametrize(("ema", "accumulate"), [("null", 1), ("0.9", 2)])
def test_resuming_is_exact(fit: Callable, tmp_path: Path, recwarn: pytest.WarningsRecorder, ema: str,
                           accumulate: int):  # fmt: skip
    """Six steps = three + resume + three, from the end of a run and from the middle of one (an epoch is 4 batches)."""
    options = [f"training.ema_decay={ema}", f"lightning.trainer.accumulate_grad_batches={accumulate}", "--seed", "7"]
    every = ["lightning.checkpoint.every_n_train_steps=3", "lightning.checkpoint.save_top_k=-1"]
    straight = fit(tmp_path / "a", *options, *every, "lightning.trainer.max_steps=6")
    assert straight["global_step"] == 6
    half = fit(tmp_path / "b", *options, "lightning.trainer.max_steps=3")
    assert half["global_step"] == 3
    recwarn.clear()
    resumed = fit(tmp_path / "b", "lightning.trainer.max_steps=6", resume=tmp_path / "b")
    assert not [w for w in recwarn if "resumable" in str(w.message)]
    assert_same_state(straight, resumed)
    middle = tmp_path / "a/checkpoints/step-0000003.ckpt"
    (tmp_path / "a/checkpoints/last.ckpt").unlink()
    assert_same_state(straight, fit(tmp_path / "a", resume=middle))
    if ema == "null":
        return
    files = sorted(path.name for path in (tmp_path / "b/checkpoints").iterdir())
    assert files == ["last.ckpt", "last.safetensors"]  # the run went on in its own folder
    for folder, steps in (("csv", (0, 2)), ("csv_2", (3, 5))):  # and the first half's record is still there
        lines = (tmp_path / "b" / folder / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("step")
        found = [int(line.split(",")[column]) for line in lines[1:]]
        assert (min(found), max(found)) == steps


def test_ema_is_the_average_and_leaves_frozen_weights_alone(fit: Callable, tmp_path: Path):
    one = fit(tmp_path / "one", "lightning.trainer.max_steps=1")["state_dict"]
    two = fit(tmp_path / "two", "lightning.trainer.max_steps=2")["state_dict"]
    averaged = fit(tmp_path / "ema", "lightning.trainer.max_steps=2", "training.ema_decay=0.75",
                   "training.ema_warmup=false")
    name = "method.model.diffusion_model.out.2.weight"
    assert not torch.equal(one[name], two[name])
    trained = set(averaged["current_model_state"])  # averages of frozen weights do not exist
    assert trained and not any(key.startswith("method.first_stage_model.") for key in trained)
    for key, value in averaged["state_dict"].items():
        if key in trained:
            assert torch.equal(averaged["current_model_state"][key], two[key]), key
        if key.startswith("method.first_stage_model.") or torch.equal(one[key], two[key]):
            assert torch.equal(value, two[key]), key
        else:
            torch.testing.assert_close(value, 0.75 * one[key] + 0.25 * two[key])
    weights = tmp_path / "ema/checkpoints/last.safetensors"
    assert read_model_config(weights) == read_model_config(tmp_path / "ema/checkpoints/last.ckpt")
    method = load_method(weights, read_model_config(weights), "cpu")  # the export holds the averaged weights
    for key, value in method.state_dict().items():
        assert torch.equal(value, averaged["state_dict"]["method." + key]), key
    noise = torch.randn(2, *method.noise_shape(16, 16))
    image = method.sample(normalize_batch(batch_of(), "cpu"), noise, Sampling(num_steps=1))
    assert image.shape == (2, 3, 16, 16)


def test_training_with_previews_validation_and_cached_latents(fit: Callable, tmp_path: Path):
    fit(tmp_path / "run", "lightning.trainer.max_steps=2", f"training.cache_latents={tmp_path / 'latents'}",
        "training.preview_every=2", "lightning.trainer.limit_val_batches=1", "training.ema_decay=0.5")  # fmt: skip
    assert len(list((tmp_path / "latents").glob("latents-*.npy"))) == 1
    assert (tmp_path / "run/images/gs-000002.png").is_file()
    record = json.loads((tmp_path / "run/run.jsonl").read_text())
    assert record["world_size"] == 1 and record["start_step"] == 0
    # The frozen autoencoder stays what it was to the bit, so the resumed run finds the latents.
    fit(tmp_path / "run", "lightning.trainer.max_steps=3", resume=tmp_path / "run")
    assert len(list((tmp_path / "latents").glob("latents-*.npy"))) == 1


def test_cached_latents_are_those_of_the_images(toy_data: Path, tmp_path: Path):
    method = randomize(TISynth(**model_params("tisynth_tiny")), 0.1).eval()
    paths = sorted((toy_data / "img").iterdir())[:3]
    cache = build_latent_cache(paths, (16, 16), method.first_stage_model, tmp_path, "cpu", num_workers=0)
    batch = normalize_batch(batch_of(), "cpu")
    for is_flipped in (False, True):
        images = [resize_image(read_image(path), (16, 16)) for path in paths[:2]]
        images = [to_tensor(image[:, ::-1] if is_flipped else image) for image in images]
        # In memory as cached moments are, since a draw fills the memory in order.
        image = normalize_batch({"image": torch.stack(images)}, "cpu")["image"].contiguous()
        moments = torch.stack([cache.get(path, is_flipped) for path in paths[:2]])
        posterior = method.first_stage_model.encode(image)
        expected = torch.cat([posterior.mean, posterior.logvar], 1)
        torch.testing.assert_close(moments.float(), expected, rtol=2e-3, atol=1e-3)
        losses = []
        for part in ({"image": image, "reference": image}, {"moments": moments, "reference_moments": moments}):
            torch.manual_seed(0)
            losses.append(method.training_loss({**{k: batch[k] for k in ("mask", "prompt")}, **part})[0].item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-2) and losses[0] != losses[1]


DDP = ["lightning.trainer.accelerator=cpu", "lightning.trainer.devices=2", "lightning.trainer.strategy=ddp"]


@pytest.mark.parametrize("coupling", ["residual", "upstream"])
def test_two_processes(coupling: str, toy_data: Path, tmp_path: Path):
    """DDP raises when a trained parameter has no gradient; ranks share weights, not draws."""
    settings = []
    if coupling == "upstream":
        params = model_params("tisynth_tiny", coupling=coupling)
        save_safetensors(tmp_path / "start.safetensors", randomize(TISynth(**params), 0.1).state_dict())
        settings = ["model.params.train=[all_in_attention,control,reference]", "--pretrain_path",
                    tmp_path / "start.safetensors"]  # fmt: skip
    command = [sys.executable, "train.py", "--config_model", "configs/model/tisynth_tiny.yaml", "-b",
               toy_data / "train.yaml", "model.target=tiny.RecordingTISynth", "--allow_modules", "tiny",
               f"model.params.coupling={coupling}",
               "lightning.trainer.max_steps=3", *DDP, *settings, "--data_root", toy_data, "-p",
               tmp_path / "run"]  # fmt: skip
    environment = {**os.environ, "RECORD_TO": str(tmp_path), "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1",
                   "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [[json.loads(line) for line in (tmp_path / f"rank_{i}.jsonl").read_text().splitlines()] for i in (0, 1)]
    training = [[record for record in rank if record["training"]] for rank in ranks]
    assert len(training[0]) == len(training[1]) == 3
    for first, second in zip(*training, strict=True):
        assert first["weights"] == second["weights"]
        assert first["timestep"] != second["timestep"] and first["latent"] != second["latent"]
    # The validation at the end sees the final weights.
    assert ranks[0][-1]["weights"] == ranks[1][-1]["weights"] != training[0][0]["weights"]
    assert not ranks[0][-1]["training"]
    assert (tmp_path / "run/checkpoints/last.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpsu", "0"], "--gpsu is an unknown flag. Did you mean --gpus?"),
        (["--seed", "x"], "argument -s/--seed: invalid int value: 'x'"),
        (["--gpus", "99"], "--gpus 99: this machine has"),
        (["--gpus", "all"], "--gpus 'all': expected numbers of GPUs"),
        (["training.learning_rte=1"], "training.learning_rte is unknown. Did you mean learning_rate?"),
        (["lightning.trainer.max_step=1"], "lightning.trainer.max_step is unknown. Did you mean max_steps?"),
        (["lightning.checkpoint.every_n_steps=1"], "lightning.checkpoint.every_n_steps is unknown. Did you mean"),
        (["data.params.batchsize=1"], "Did you mean batch_size?"),
        (["model.params.hintmode=palette"], "Did you mean hint_mode?"),
        (["model.params.predictiontype=v"], "Did you mean prediction_type?"),
        (["data.params.size=[18,16]"], "18x16 (height x width). Expected multiples of 4"),
        (["lightning.trainer.max_steps=[1"], "lightning.trainer.max_steps=[1"),
        (["--data_root", "nowhere"], "nowhere"),
        (["--pretrain_path", "nowhere.ckpt"], "checkpoint not found: nowhere.ckpt"),
        (["-r", "nowhere"], "-r nowhere: no checkpoint at"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str, toy_data: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):  # fmt: skip
    monkeypatch.chdir(ROOT)
    command = ["--data_root", str(toy_data), "-p", str(tmp_path / "run"), *arguments]
    if "-r" not in arguments:
        command = ["--config_model", "configs/model/tisynth_tiny.yaml", "-b", str(toy_data / "train.yaml"), *command]
    with pytest.raises(SystemExit) as stopped:
        run_entry_point(train.main, command)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    command = ["--config_model", "configs/model/tisynth_tiny.yaml", "-b", str(toy_data / "train.yaml"), "-p",
               str(tmp_path), "--data_root", str(toy_data)]  # fmt: skip
    with pytest.raises(FileExistsError, match="holds a run"):
        train.main(command)
    with pytest.raises(UserError, match="data.params.data_root must be given"):
        train.main(command[:-2])


def test_overrides_may_stand_behind_yaml_files_and_flags():
    args = train.parse_arguments(["-b", "a.yaml", "b.yaml", "x.y=1", "--name", "n", "z=[1,2]", "-s", "3"])
    assert (args.base, args.overrides, args.name, args.seed) == (["a.yaml", "b.yaml"], ["x.y=1", "z=[1,2]"], "n", 3)


def test_a_lone_number_is_a_gpu_and_not_a_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for argument, devices in (("0", [0]), ("3", [3]), ("0,", [0]), ("0,1,2,3", [0, 1, 2, 3])):
        assert train.pick_devices(argument) == {"accelerator": "gpu", "devices": devices}
    assert train.pick_devices("") == {"accelerator": "cpu", "devices": 1}
    assert train.pick_devices(None) == {"accelerator": "auto", "devices": "auto"}
    with pytest.raises(UserError, match="4 GPUs, numbered from 0"):
        train.pick_devices("4")


def test_tiles_that_are_enlarged_are_named(toy_data: Path):
    rows = [SimpleNamespace(mask=toy_data / "label/0.png")]  # 32 x 32 pixels
    for size, expected in (((64, 64), "tiles of 32x32 pixels (0.png) are enlarged to 64x64, which takes 4 times"),
                           ((32, 32), ""), ((16, 16), ""), (None, "")):  # fmt: skip
        said = train.describe_resize(SimpleNamespace(train_set=SimpleNamespace(rows=rows, size=size)))
        assert said.startswith(expected) and bool(said) == bool(expected)
        assert "data.params.size=[32,32]" in said or not expected

