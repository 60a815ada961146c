"""Rectifying: one step whatever the prediction, downhill for the guide, each sample alone; run through inference.py."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from denoisers import STABLE, gaussian_denoiser
from omegaconf import OmegaConf
from painting import MODEL, arguments, contents, make_workspace, pixels, run
from PIL import Image
from segmentors import make_segmentor, table_of
from zygote import Zygote, wait_until

from ldm.data.classes import ClassTable
from ldm.diffusion.path import FlowPath
from ldm.diffusion.prediction import target_of
from ldm.sampling.guidance import Run, make_denoiser
from ldm.sampling.modes import PRESETS, Rectify, Sampling
from ldm.sampling.noise import SampleNoise, sample_noise
from ldm.sampling.rectify import Rectifier, choose_levels
from ldm.sampling.samplers import sample
from ldm.util import say_once
from ldm.weights.checkpoint import save_safetensors
from ldm.weights.load import load_method, read_model_config

MINI = ClassTable.load("mini")
PATHS = {"discrete": STABLE, "flow": FlowPath(3.0)}


class Linear:
    """Scores linear in each pixel of what it sees."""

    sees, channels, class_table = "images", 2, None

    def __init__(self) -> None:
        self.weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.einsum("kc,bchw->bkhw", self.weight.to(images.dtype), images)


def bind(settings: Rectify, guide, path, mask: torch.Tensor, **sampling):
    levels = path.levels(8, "trailing", "clean")
    # Clean latents are about 1.5: decoded images are within [-1, 1], where nothing is clipped.
    sampling = Sampling(rectify=settings, **sampling)
    return Rectifier(settings, guide), Run({"mask": mask}, sampling, path, levels, lambda z: z / 4)


def masks(count: int = 2) -> torch.Tensor:
    mask = torch.randint(0, 3, (count, 4, 4), generator=torch.Generator().manual_seed(2))
    mask[:, 0] = 255
    return mask


@pytest.mark.parametrize("name", PATHS)
def test_a_step_is_the_same_whatever_the_network_predicts(name: str):
    path, x = PATHS[name], sample_noise((2, 4, 4), [0, 1]) * 0.3
    found = []
    for kind in path.predictions:
        def predict(x, level, kind=kind):
            clean = gaussian_denoiser()(x, level)
            return target_of(kind, clean, (x - level.signal * clean) / level.noise, level.signal, level.noise)

        rectifier, run = bind(Rectify(0.2, (0, 1)), Linear(), path, masks())
        found.append(rectifier(make_denoiser(predict, kind), run)(x, run.levels[3]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)
    # The size of the step: `scale` of the velocity's, which for a flow is that of what it predicts.
    level, clean = run.levels[3], gaussian_denoiser()(x, run.levels[3])
    velocity = (level.signal * x - clean if name == "discrete" else x - clean) / level.noise
    step = ((found[0] - clean) / level.noise).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(step, 0.2 * velocity.square().mean((1, 2, 3)).sqrt(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PATHS)
def test_the_guides_loss_falls_and_with_the_sign_flipped_rises(name: str):
    path, x = PATHS[name], sample_noise((2, 4, 4), [0, 1]) * 0.3
    for sign, compare in ((1.0, torch.lt), (-1.0, torch.gt)):
        rectifier, run = bind(Rectify(0.05, (0, 1), log=True), Linear(), path, masks())
        plain = rectifier.gradient
        if sign < 0:
            rectifier.gradient = lambda *args, plain=plain, **kw: (lambda a, g: (a, -g))(*plain(*args, **kw))
        rectified = rectifier(gaussian_denoiser(), run)
        for level in run.levels[:-1]:
            rectified(x, level)
        for _, _, rows in rectifier.pending:
            assert compare(rows[:, 1], rows[:, 0]).all(), name


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("name", PATHS)
def test_scale_zero_changes_nothing_and_any_other_each_sample_alone(name: str, solver: str):
    path, noise = PATHS[name], sample_noise((2, 4, 4), [0, 1, 2])

    def go(scale: float, chosen: list[int]) -> torch.Tensor:
        rectifier, run = bind(Rectify(scale, (0.3, 1)), Linear(), path, masks(3)[chosen])
        return sample(rectifier(gaussian_denoiser(), run), noise[chosen], run.levels, solver)

    plain = sample(gaussian_denoiser(), noise, path.levels(8, "trailing", "clean"), solver)
    assert torch.equal(go(0.0, [0, 1, 2]), plain)
    together = go(0.2, [0, 1, 2])
    assert (together - plain).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(torch.cat([go(0.2, [i]) for i in range(3)]), together, atol=1e-5, rtol=1e-5)


def test_ignored_pixels_and_samples_without_a_gradient_keep_the_plain_step():
    x, mask = sample_noise((2, 4, 4), [0, 1, 2]) * 0.3, masks(3)
    mask[1] = 255

    class Broken(Linear):
        def __call__(self, images):
            scores = super().__call__(images)
            return torch.cat([scores[:2], scores[2:] * torch.nan]) if len(scores) == 3 else scores

    rectifier, run = bind(Rectify(0.2, (0, 1)), Broken(), STABLE, mask)
    plain, level = gaussian_denoiser()(x, run.levels[2]), run.levels[2]
    found = rectifier(gaussian_denoiser(), run)(x, level)
    assert torch.equal(found[1:], plain[1:]) and not torch.equal(found[0], plain[0])
    assert torch.equal(found[0, :, 0], plain[0, :, 0])  # its row of ignored pixels
    rectifier.settle(3)
    (record,) = rectifier.report()
    assert (record["samples"], record["skipped"]) == (3, 2) and np.isfinite(record["loss"]) and not rectifier.report()
    # What filled the batch up is in no record.
    rectifier(gaussian_denoiser(), run)(x, level)
    rectifier.settle(1)
    assert rectifier.report()[0]["samples"] == 1


def test_windows_steps_schedules_and_groups():
    def chosen(settings: Rectify, **sampling) -> dict[int, float]:
        _, run = bind(settings, Linear(), STABLE, masks(), **sampling)  # 999, 874, ..., 124
        return {level.time: round(scale, 4) for level, scale in choose_levels(run.sampling, run.levels).items()}

    assert chosen(Rectify()) == {999: 0.2, 874: 0.2, 749: 0.2}
    assert chosen(Rectify(0.1, (0.3, 0.6))) == {499: 0.1, 374: 0.1}
    assert chosen(Rectify(steps=2)) == {999: 0.2, 874: 0.2}
    assert chosen(Rectify(steps=2, schedule="falling")) == {999: 0.175, 874: 0.15}
    assert chosen(Rectify(steps=1), method={"reuse_every": 2}) == {999: 0.2, 874: 0.2}
    assert chosen(Rectify(0.1, (0.3, 0.8)), method={"reuse_every": 2}) == dict.fromkeys((749, 624, 499, 374), 0.1)
    with pytest.raises(ValueError, match="holds none of the 8 steps"):
        chosen(Rectify(window=(0.55, 0.6)))
    for field, value in (("scale", 0.6), ("window", (0.7, 0.1)), ("steps", 0), ("schedule", "cosine"), ("loss", "no")):
        with pytest.raises(ValueError, match=f"--rectify_{field}"):
            Rectify(**{field: value})
    with pytest.raises(ValueError, match="sampling: rectify"):
        Sampling("ddpm", end="clean", rectify=Rectify())
    assert "rectify_scale" not in Sampling().to_dict()
    assert Sampling(rectify=Rectify(log=True)).to_dict() == Sampling(rectify=Rectify()).to_dict()
    assert PRESETS["upstream"].rule == "clamped" and "rectify_rule" in Sampling(rectify=Rectify()).to_dict()


def test_gradients_arrive_within_inference_mode():
    x, mask, guide = sample_noise((2, 4, 4), [0, 1]) * 0.3, masks(), Linear()
    rectifier, run = bind(Rectify(0.2, (0, 1)), guide, STABLE, mask)
    expected = rectifier(gaussian_denoiser(), run)(x, run.levels[2])
    with torch.inference_mode():
        rectifier, run = bind(Rectify(0.2, (0, 1)), guide, STABLE, mask + 0)
        found = rectifier(gaussian_denoiser(), run)(x + 0, run.levels[2])
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mmseg")
    pytest.importorskip("tokenizers")
    root = make_workspace(tmp_path_factory.mktemp("rectify"), sizes=((16, 16), (16, 32), (16, 16)))
    make_segmentor(root / "guide", MINI)
    return root


def guided(workspace: Path, *flags: str) -> list[str]:
    return ["--guide", str(workspace / "guide/config.json"), str(workspace / "guide/segmentor.pth"), "--rectify_window",
            "0", "1", "--num_steps", "4", *flags]  # fmt: skip


@pytest.fixture(scope="module")
def finished(workspace: Path) -> Path:
    assert run(workspace, workspace / "finished", *guided(workspace, "--rectify_log", "--rectify_scale", "0.1")) == 0
    return workspace / "finished"


def test_the_guides_loss_falls_at_every_step_of_a_run(workspace: Path, finished: Path, tmp_path: Path):
    (shard,) = (json.loads(path.read_text()) for path in (finished / "shards").iterdir())
    assert [record["time"] for record in shard["rectified"]] == [751, 501, 251, 1]
    for record in shard["rectified"]:
        assert record["samples"] == 3 and record["skipped"] == 0 and record["gradient"] > 0 and record["velocity"] > 0
        assert record["loss_after"] < record["loss"]
    fingerprint = json.loads((finished / "run.json").read_text())["settings"]
    assert fingerprint["guide"][0].endswith("SegmentorGuide") and len(fingerprint["guide"]) == 3
    assert fingerprint["rectify_scale"] == 0.1 and fingerprint["rectify_window"] == [0.0, 1.0]
    assert run(workspace, tmp_path / "plain", "--num_steps", "4") == 0
    plain, rectified = pixels(tmp_path / "plain"), pixels(finished)
    assert set(plain) == set(rectified) and all(not np.array_equal(plain[name], rectified[name]) for name in plain)
    assert not any(key.startswith(("rectify", "guide")) for key in
                   json.loads((tmp_path / "plain/run.json").read_text())["settings"])  # fmt: skip
    statistics = json.loads(next((tmp_path / "plain/shards").iterdir()).read_text())
    assert "rectified" not in statistics


@pytest.mark.parametrize("precision", ["full", "autocast"])
def test_shards_give_what_one_run_gives(workspace: Path, finished: Path, tmp_path: Path, precision: str):
    flags = guided(workspace, "--rectify_scale", "0.1", "--shard_size", "1", "--precision", precision)
    for part in ("1/2", "0/2"):
        assert run(workspace, tmp_path / "parts", *flags, "--shard", part) == 0
    if precision == "full":
        assert contents(tmp_path / "parts") == contents(finished)
    else:  # the guide's gradient is finite in bfloat16, and says much the same
        images = pixels(tmp_path / "parts")
        assert all(np.abs(images[name].astype(int) - image).mean() < 20 for name, image in pixels(finished).items())
        shards = [json.loads(path.read_text()) for path in (tmp_path / "parts/shards").glob("*.json")]
        assert all(record["skipped"] == 0 for shard in shards for record in shard["rectified"])


def test_a_killed_run_goes_on_with_the_same_files(workspace: Path, finished: Path, tmp_path: Path):
    flags = guided(workspace, "--rectify_scale", "0.1", "--shard_size", "1")
    with Zygote() as zygote:
        pid = zygote.start(arguments(workspace, tmp_path / "out", *flags), tmp_path / "log")
        wait_until(lambda: len(list((tmp_path / "out").glob("images/*"))) >= 1)
        os.kill(pid, signal.SIGKILL)
        assert zygote.wait(pid) == -signal.SIGKILL
    assert len(list((tmp_path / "out/images").iterdir())) < 3
    assert run(workspace, tmp_path / "out", *flags) == 0
    assert contents(tmp_path / "out") == contents(finished)


def test_latents_do_not_depend_on_the_batch(workspace: Path):
    from ldm.data.transforms import normalize_batch
    from post_processing.segmentation.guide import SegmentorGuide

    method = load_method(workspace / "tiny.safetensors", read_model_config(workspace / "tiny.safetensors"), "cpu")
    guide = SegmentorGuide(workspace / "guide/config.json", workspace / "guide/segmentor.pth")
    random = np.random.default_rng(5)
    batch = {"mask": torch.from_numpy(random.integers(0, 5, (4, 16, 16), np.uint8)),
             "reference": torch.from_numpy(random.integers(0, 256, (4, 3, 16, 16), np.uint8)), "prompt": ["road"] * 4}
    sampling = replace(method.own_sampling, num_steps=3, rectify=Rectify(0.2, (0, 1)))

    def latents(chosen: list[int], batch_size: int) -> torch.Tensor:
        part = {key: value[chosen] if key != "prompt" else [value[i] for i in chosen] for key, value in batch.items()}
        noise = SampleNoise(chosen)(method.noise_shape(16, 16))
        rectifier = Rectifier(sampling.rectify, guide, batch_size)
        return method.sample_latent(normalize_batch(part, "cpu"), noise, sampling, correct=rectifier)

    together = latents([0, 1, 2, 3], 8)
    for other in (torch.cat([latents([i], 8) for i in range(4)]), latents([0, 1, 2, 3], 3)):
        assert (other - together).abs().max() <= 1e-4 * together.std()
    with pytest.raises(ValueError, match="there is no guide"):
        method.sample(normalize_batch(batch, "cpu"), torch.zeros(4, *method.noise_shape(16, 16)), sampling)


def test_guides_that_do_not_fit_are_refused_before_anything_is_written(workspace: Path, tmp_path: Path, capsys):
    config, weights = make_segmentor(tmp_path / "other", table_of(5))
    steps = ["--num_steps", "8"]
    cases = [
        ([*steps, "--guide", str(config), str(weights)], "trained on the classes class 0"),
        ([*steps, "--guide", str(config), str(tmp_path / "absent.pth")], "absent.pth not found"),
        ([*steps, "--guide", str(config), str(weights), str(weights)], "3 files"),
        (["--guide", str(config), str(weights)], "holds none of the 2 steps"),
        (["--rectify_scale", "0.1"], "there is no guide"),
        (guided(workspace, "--rectify_preset", "upstream"), "a flow"),
        (guided(workspace, "--rectify_scale", "0.9"), "--rectify_scale: 0.9"),
    ]  # fmt: skip
    for flags, message in cases:
        assert run(workspace, tmp_path / "out", *flags) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_guide_that_knows_more_classes_drops_them(workspace: Path, tmp_path: Path, capsys, caplog):
    """A foreign segmentor has one output more, and its class names, in mmseg's place, say which are shared."""
    from ldm.generation.guide import load_guide
    from post_processing.segmentation.guide import SegmentorGuide
    from post_processing.segmentation.segmentor import read_checkpoint

    config, weights = make_segmentor(tmp_path / "foreign", table_of(6))
    content = read_checkpoint(weights)

    def rename(names: list[str], **meta: object) -> list[str]:
        torch.save({"state_dict": content["state_dict"], "meta": {"dataset_meta": {"classes": names}, **meta}}, weights)
        return [str(config), str(weights)]

    method = load_method(workspace / "tiny.safetensors", read_model_config(workspace / "tiny.safetensors"), "cpu")
    images, shared = torch.rand(2, 3, 16, 16), [name.title() for name in MINI.names]
    for names in ([*shared, "background"], [shared[1], "background", shared[0], *shared[2:]]):
        files = rename(names)
        say_once.cache_clear()
        caplog.clear()
        guide = load_guide(files, method, "cpu")
        expected = SegmentorGuide(*files)(images)[:, [names.index(name) for name in shared]]
        assert torch.equal(guide(images), expected) and expected.shape[1] == 5
        lines = [line for line in caplog.messages if line.startswith("--guide")]
        assert len(lines) == 1 and "its outputs background are no classes of the model" in lines[0]
    steps = ("--num_steps", "2", "--rectify_window", "0", "1")
    assert run(workspace, tmp_path / "out", *steps, "--guide", *files) == 0
    capsys.readouterr()
    stored = {"class_table": table_of(6).to_dict()}
    for names, meta, message in (([*shared[:4], "lake", "background"], {}, "trained on the classes"),
                                 (shared, {}, "it has 6 classes"), ([], {}, "no class table inside"),
                                 (list(table_of(6).names), stored, "trained on the classes class 0")):
        assert run(workspace, tmp_path / "no", *steps, "--guide", *rename(names, **meta)) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_another_guide_is_another_run(workspace: Path, finished: Path, tmp_path: Path, capsys):
    content = torch.load(workspace / "guide/segmentor.pth", weights_only=True)
    content["state_dict"]["decode_head.conv_seg.bias"] += 1
    torch.save(content, tmp_path / "segmentor.pth")
    flags = guided(workspace, "--rectify_scale", "0.1")
    flags[2] = str(tmp_path / "segmentor.pth")
    assert run(workspace, finished, *flags) == 2
    assert "guide was" in capsys.readouterr().err
    assert run(workspace, finished, *guided(workspace, "--rectify_scale", "0.2")) == 2
    assert "rectify_scale was 0.1, is 0.2" in capsys.readouterr().err


def test_a_guide_on_latents_learns_and_guides_without_the_decoder(workspace: Path, tmp_path: Path, capsys, monkeypatch):
    """Trained on images whose colours are their classes, it knows them; with it the decoder runs once an image."""
    from scripts import train_segmentor

    random = np.random.default_rng(0)
    colours = np.array(MINI.colours, np.uint8)
    rows = []
    for index in range(6):
        mask = np.kron(random.integers(0, 5, (2, 2)), np.ones((8, 8))).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / f"mask_{index}.png")
        Image.fromarray(colours[mask]).save(tmp_path / f"image_{index}.png")
        rows.append({"source": f"mask_{index}.png", "target": f"image_{index}.png", "prompt": "x"})
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--on_latents", str(workspace / "tiny.safetensors"), "--classes", "mini", "--data_root", str(tmp_path),
             "--train_txt_file", str(tmp_path / "train.json"), "--max_steps", "120",
             "--learning_rate", "0.01"]  # fmt: skip
    train_segmentor.main([*flags, "--work_dir", str(tmp_path / "guide")])
    train_segmentor.main([*flags, "--max_steps", "2", "--work_dir", str(tmp_path / "short")])  # fewer than ten
    file = tmp_path / "guide/guide.safetensors"
    from ldm.training.latent_guide import LatentGuide, encode_pairs

    method = load_method(workspace / "tiny.safetensors", read_model_config(workspace / "tiny.safetensors"), "cpu")
    pairs = [(tmp_path / row["target"], tmp_path / row["source"]) for row in rows]
    latents, wanted = encode_pairs(method, pairs, MINI, torch.device("cpu"))
    found = torch.nn.functional.interpolate(LatentGuide(file)(latents.float()), wanted.shape[-2:]).argmax(1)
    assert (found == wanted).float().mean() > 0.45  # by chance 0.2; the autoencoder is random

    calls = []
    monkeypatch.setattr("ldm.methods.latent.LatentDiffusion.decode_latent", lambda self, z: calls.append(len(z)) or
                        self.first_stage_model.decode(z / self.scale_factor))  # fmt: skip
    out = tmp_path / "out"
    flags = ["--rectify_window", "0", "1", "--num_steps", "4", "--rectify_log"]
    assert run(workspace, out, "--guide", str(file), *flags) == 0
    records = [record for path in (out / "shards").iterdir() for record in json.loads(path.read_text())["rectified"]]
    assert len(records) == 4 and all(record["loss_after"] < record["loss"] for record in records)
    assert calls == [2, 2]  # two batches of two, one of them filled up
    assert run(workspace, tmp_path / "no", *flags, "--guide", str(workspace / "tiny.safetensors")) == 2
    assert "no guide on latents" in capsys.readouterr().err
    make_workspace(tmp_path)
    weights = method.state_dict()
    weights["first_stage_model.quant_conv.bias"] = weights["first_stage_model.quant_conv.bias"] + 1
    save_safetensors(tmp_path / "tiny.safetensors", weights, OmegaConf.create({"model": MODEL}))
    assert run(tmp_path, tmp_path / "other", *flags, "--guide", str(file)) == 2
    assert "another autoencoder" in capsys.readouterr().err
