"""A method that nobody has heard of: trained by train.py, sampled by inference.py, guided by a gradient."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from painting import contents, pixels, read_lines
from PIL import Image
from tiny import ROOT

import inference
import train
from ldm.data.classes import ClassTable
from ldm.diffusion.path import FlowPath
from ldm.sampling.noise import sample_noise
from ldm.util import run_entry_point
from ldm.weights.load import load_method, read_model_config

MINI = ClassTable.load("mini")


@pytest.fixture(scope="module")
def checkpoint(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("flow")
    train.main(["--config_model", str(ROOT / "tests/flow_toy.yaml"), "-b", str(toy_data / "train.yaml"), "--project",
                str(run), "--data_root", str(toy_data), "--allow_modules", "flow_toy", "--gpus", "",
                "training.learning_rate=0.05", "lightning.trainer.max_steps=120", "data.params.batch_size=8"])
    return run / "checkpoints/last.safetensors"


def generate(checkpoint: Path, data: Path, out: Path, *flags: str) -> int:
    with pytest.raises(SystemExit) as stop:
        run_entry_point(inference.main, [
            "--ckpt", str(checkpoint), "--allow_modules", "flow_toy", "--data_root", str(data), "--txt_file",
            str(data / "train_set_items.json"), "--outdir", str(out), "--device", "cpu", *flags])  # fmt: skip
    return stop.value.code


class Expected:
    """What inference.py must give, in float64 and without any of the code in question."""

    def __init__(self, checkpoint: Path, data: Path, out: Path) -> None:
        method = load_method(checkpoint, read_model_config(checkpoint, allow_modules=["flow_toy"]), "cpu")
        self.means, self.spread = method.means.double().numpy(), float(method.spread.abs())
        self.images, rows = pixels(out), read_lines(out / "index.jsonl")
        masks = [np.asarray(Image.open(data / row["mask"])) for row in rows]
        self.masks = np.stack(masks)
        self.mean = self.means[np.minimum(self.masks, 5)].transpose(0, 3, 1, 2)
        self.noise = sample_noise((3, 32, 32), [row["seed"] for row in rows]).double().numpy()
        self.names = [Path(row["image"]).name for row in rows]

    def levels(self, steps: int) -> list[float]:
        u = np.linspace(1, 0.001, steps)
        return [*(3 * u / (1 + 2 * u)), 0.0]

    def clean(self, x: np.ndarray, s: float, mean: np.ndarray | float) -> np.ndarray:
        gain = (1 - s) * self.spread**2 / (((1 - s) * self.spread) ** 2 + s**2)
        return mean + gain * (x - (1 - s) * mean)

    def close(self, image: np.ndarray, most: float) -> None:
        """Within so many grey levels, of which the file's rounding takes half a level."""
        expected = ((np.clip(image, -1, 1) + 1) * 127.5).transpose(0, 2, 3, 1)
        found = np.stack([self.images[name] for name in self.names])
        assert np.abs(expected - found).max() <= most + 0.5 and found.std() > 20


def test_it_learns_the_colours_of_the_classes(checkpoint: Path, toy_data: Path):
    method = load_method(checkpoint, read_model_config(checkpoint, allow_modules=["flow_toy"]), "cpu")
    rows = [json.loads(line) for line in (toy_data / "train_set_items.json").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(toy_data / row["target"])) for row in rows]) / 127.5 - 1
    masks = np.stack([np.asarray(Image.open(toy_data / row["source"])) for row in rows])
    for label in range(5):
        assert np.abs(method.means[label].numpy() - images[masks == label].mean(0)).max() < 0.1
    assert 0.02 < float(method.spread.abs()) < 0.3


def test_ddim_is_euler_and_unipc_finds_the_end_of_the_flow(checkpoint: Path, toy_data: Path, tmp_path: Path):
    assert generate(checkpoint, toy_data, tmp_path / "ddim", "--scale", "1.5", "--num_steps", "9") == 0
    case = Expected(checkpoint, toy_data, tmp_path / "ddim")
    x, levels = case.noise, case.levels(9)
    for here, there in zip(levels, levels[1:], strict=False):
        full, null = case.clean(x, here, case.mean), case.clean(x, here, 0.0)
        x = x + (there - here) * (x - (null + 1.5 * (full - null))) / here
    case.close(x, 0.01)

    flags = ["--solver", "unipc", "--spacing", "trailing", "--num_steps", "200"]
    assert generate(checkpoint, toy_data, tmp_path / "unipc", *flags) == 0
    case = Expected(checkpoint, toy_data, tmp_path / "unipc")
    case.close(case.mean + case.spread * case.noise, 1.0)  # at s = 1 nothing is left of the image: x there is the noise


def test_shards_and_resumed_runs_give_the_same_files(checkpoint: Path, toy_data: Path, tmp_path: Path):
    flags = ["--num_steps", "3", "--num_per_mask", "2", "--shard_size", "2"]
    assert generate(checkpoint, toy_data, tmp_path / "whole", *flags) == 0
    for part in ("1/2", "0/2"):
        assert generate(checkpoint, toy_data, tmp_path / "parts", *flags, "--shard", part) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    (tmp_path / "parts/shards/000001.json").unlink()
    next((tmp_path / "parts/images").glob("2_*")).unlink()
    assert generate(checkpoint, toy_data, tmp_path / "parts", *flags) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--mode", "fast"], "Add --end clean"), (["--spacing", "leading"], "spacing"),
     (["--reuse_every", "2"], "reuse_every"), (["--num_steps", "2000"], "num_steps")],
)  # fmt: skip
def test_what_a_flow_cannot_do_is_refused(checkpoint: Path, toy_data: Path, tmp_path: Path, capsys, flags, message):
    assert generate(checkpoint, toy_data, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["default", "upstream"])
def test_a_guides_gradient_is_the_closed_form(checkpoint: Path, toy_data: Path, tmp_path: Path, preset: str):
    weight = np.random.default_rng(0).normal(size=(5, 3)) * 4
    torch.save({"weight": torch.from_numpy(weight).float(), "table": MINI.to_dict()}, tmp_path / "guide.pt")
    flags = ["--guide", "flow_toy.LinearGuide", str(tmp_path / "guide.pt"), "--num_steps", "6"]
    flags += ["--rectify_preset", "upstream"] if preset == "upstream" else ["--rectify_window", "0.6", "1",
                                                                           "--rectify_scale", "0.3"]  # fmt: skip
    assert generate(checkpoint, toy_data, tmp_path / "out", *flags) == 0
    case = Expected(checkpoint, toy_data, tmp_path / "out")
    x, levels, losses = case.noise, case.levels(6), []
    label, counted = np.eye(6)[np.minimum(case.masks, 5)][..., :5].transpose(0, 3, 1, 2), case.masks < 5
    for index, (here, there) in enumerate(zip(levels, levels[1:], strict=False)):
        clean = case.clean(x, here, case.mean)
        if here >= 0.6 if preset == "default" else index < 4:
            image = (clean + 1) / 2
            score = np.einsum("kc,bchw->bkhw", weight, image.clip(0, 1))
            share = np.exp(score - score.max(1, keepdims=True))
            share /= share.sum(1, keepdims=True)
            used = counted if preset == "default" else counted & (score.argmax(1) != case.masks)
            count = np.maximum(used.sum((1, 2), keepdims=True), 1)[:, None]
            gradient = np.einsum("kc,bkhw->bchw", weight, (share - label) * used[:, None]) / count / 2
            gradient *= (image >= 0) & (image <= 1)
            losses.append(-(np.log((share * label).sum(1), where=used, out=np.zeros(used.shape)) * used).sum((1, 2))
                          / count.flatten())
            velocity = (x - clean) / here
            rms = [np.sqrt((value**2).mean((1, 2, 3), keepdims=True)) for value in (velocity, gradient)]
            if preset == "default":
                clean = clean - 0.3 * here * rms[0] * gradient / rms[1]
            else:
                clean = x - here * np.clip(velocity + 0.1 * (1 - (index + 1) / 6) * here * gradient, -1, 1)
        x = x + (there - here) * (x - clean) / here
    case.close(x, 0.05)
    shards = [json.loads(path.read_text()) for path in (tmp_path / "out/shards").iterdir()]
    records = shards[0]["rectified"]
    assert [record["samples"] for record in records] == [8] * len(losses) and records[0]["skipped"] == 0
    assert [record["loss"] for record in records] == pytest.approx([loss.mean() for loss in losses], rel=1e-3)
    assert ("clamped" in records[0]) == (preset == "upstream")


def test_training_times_follow_the_path_of_the_config(checkpoint: Path):
    method = load_method(checkpoint, read_model_config(checkpoint, allow_modules=["flow_toy"]), "cpu")
    assert isinstance(method.path, FlowPath) and method.path.shift == 3 and method.prediction_type == "velocity"
    assert not list(method.buffers())  # none of a discrete path
