"""What both pixel-space methods share: hints and what is dropped from them, published weights, training, inference."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image
from pixel import TINY, config, make
from tiny import ROOT, model_params, randomize

import inference
import train
from cldm.published import infer_model
from cldm.tisynth import TISynth
from ldm.data.classes import ClassTable
from ldm.data.dataset import PairDataset
from ldm.data.images import read_image
from ldm.data.manifest import ManifestError, read_manifest
from ldm.data.transforms import draw_edges, encode_mask
from ldm.methods.pixel import erase_classes
from ldm.sampling.noise import SampleNoise
from ldm.training.average import AveragedWeights
from ldm.training.build import Start, start_finetuning
from ldm.training.callbacks import ImageGrid
from ldm.training.module import learning_rate_factor
from ldm.util import UserError, load_config, run_entry_point
from ldm.weights.checkpoint import save_safetensors
from ldm.weights.load import build_skeleton, load_method, read_model_config
from scripts import convert_checkpoint, preview

MINI = ClassTable.load("mini")


def batch_of(count: int = 2, size: int = 8, channels: int = 3) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.rand(count, channels, size, size, generator=generator) * 2 - 1,
            "mask": torch.randint(0, 5, (count, size, size), generator=generator)}  # fmt: skip


def paint(method: torch.nn.Module, batch: dict, seeds: list[int], **sampling: object) -> torch.Tensor:
    draw = SampleNoise(seeds)
    noise = draw(method.noise_shape(*batch["mask"].shape[-2:]))
    return method.sample(batch, noise, replace(method.own_sampling, **{"num_steps": 4, **sampling}), draw)


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [("sdm", [], 652_314_118), ("isdm", [], 652_371_718), ("isdm", ["model_channels=128"], 188_302_342),
     ("isdm", ["model_channels=64"], 59_855_494), ("seg_guided", [], 113_681_283),
     ("seg_guided", ["hint_mode=single255"], 113_674_371)],
)  # fmt: skip
def test_parameters_are_those_of_the_published_networks(name: str, changes: list, count: int):
    changes = [f"model.params.{'' if 'hint' in change else 'unet.'}{change}" for change in changes]
    loaded = load_config([ROOT / f"configs/model/{name}.yaml"], changes)
    method = build_skeleton(OmegaConf.to_container(loaded, resolve=True))
    assert sum(p.numel() for p in method.parameters()) == count
    assert len(method.model.state_dict()) == {"sdm": 766, "isdm": 766, "seg_guided": 450}[name]
    assert method.noise_shape(256, 256) == (3, 256, 256)
    with pytest.raises(ValueError, match="multiples of 32"):
        method.noise_shape(256, 272)


def test_edges():
    blocks = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 1, 1], [2, 2, 1, 1]])[None]
    expected = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]])[None, None].float()
    assert torch.equal(draw_edges(blocks), expected)
    mask = torch.randint(0, 3, (2, 9, 7))
    for axis in (1, 2):
        assert torch.equal(draw_edges(mask.flip(axis)), draw_edges(mask).flip(axis + 1))


def test_hints():
    mask = torch.tensor([[[0, 4], [255, 2]]])
    hint = encode_mask(mask, "one_hot", MINI)
    assert hint.sum(1).tolist() == [[[1, 1], [0, 1]]]  # ignored pixels are in no class, and not in class 0
    single = encode_mask(mask, "single255", MINI)
    torch.testing.assert_close(single, torch.tensor([[[[0, 4 / 255], [0, 2 / 255]]]]))
    method = make("sdm_tiny")
    assert torch.equal(method.conditions({"mask": mask})["hint"], torch.cat([hint, draw_edges(mask)], 1))
    instance = torch.tensor([[[7, 7], [300, 7]]])
    method = make("sdm_tiny", edge="instance")
    assert method.takes == ("instance",)
    assert method.conditions({"mask": mask, "instance": instance})["hint"][:, -1].tolist() == [[[1, 0], [1, 1]]]
    with pytest.raises(ValueError, match="edge: 'instances' is unknown"):
        make("sdm_tiny", edge="instances")


@pytest.mark.parametrize("name", TINY)
def test_whole_hints_are_dropped_per_sample_while_training(name: str):
    method = make(name, mask_dropout=0.3).train()
    torch.manual_seed(0)
    lost = ~method.conditions(batch_of(2000, 2))["hint"].flatten(1).any(1)  # edges are part of it
    assert abs(lost.float().mean() - 0.3) < 3 * (0.3 * 0.7 / 2000) ** 0.5
    method.eval()
    assert method.conditions(batch_of(50, 2))["hint"].flatten(1).any(1).all()


def test_classes_are_ablated_per_sample_in_training_and_never_in_sampling(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    mask = torch.arange(5).repeat(400, 1)[:, None]
    lost = erase_classes(mask, 0.5, 5) == 255
    assert len({tuple(row) for row in lost[:, 0].tolist()}) == 32  # every subset of the classes
    assert abs(lost.float().mean() - 0.5) < 3 * 0.5 / 2000**0.5
    ignored = torch.full((1, 1, 1), 255)
    assert torch.equal(erase_classes(ignored, 1.0, 5), ignored)
    calls = []
    monkeypatch.setattr("ldm.methods.pixel.erase_classes", lambda mask, *_: calls.append(1) or mask)
    method = make("seg_guided_tiny", ablation=0.5).train()
    method.training_loss(batch_of())
    assert len(calls) == 1
    paint(method, batch_of(), [0, 1], guidance_scale=2.0)
    assert len(calls) == 1 and method.training


@pytest.mark.parametrize("name", [*TINY, "tisynth_tiny"])
def test_sampling_in_training_mode_drops_nothing_and_leaves_the_mode(name: str):
    batch = {**batch_of(size=16), "prompt": ["a road", "water"]}
    if name in TINY:
        method = make(name, mask_dropout=1.0, ablation=1.0)
    else:
        method = randomize(TISynth(**model_params(name, joint_dropout=1.0, sample_reference=False))).eval()
        batch["reference"] = batch["image"]
    expected = paint(method, batch, [0, 1])
    method.train().model.eval()  # as a frozen part is
    assert torch.equal(paint(method, batch, [0, 1]), expected)
    assert method.training and not any(part.training for part in method.model.modules())
    with pytest.raises(RuntimeError):
        paint(method, {**batch, "mask": batch["mask"][:1]}, [0, 1])
    assert method.training


@pytest.mark.parametrize("name", TINY)
def test_guidance(name: str):
    method = make(name)
    calls, predict = [], method.predict_noise
    method.predict_noise = lambda latent, *args, **kwargs: calls.append(len(latent)) or predict(latent, *args, **kwargs)
    plain = paint(method, batch_of(), [0, 1], guidance_scale=1.0)
    assert calls == [2] * 4  # one pass, without the null branch
    guided = paint(method, batch_of(), [0, 1], guidance_scale=3.0)
    assert calls[4:] == [4] * 4 and (plain - guided).abs().max() > 1e-3
    nothing = {**batch_of(), "mask": torch.full((2, 8, 8), 255)}
    same = [paint(method, nothing, [0, 1], guidance_scale=scale) for scale in (1.0, 3.0)]
    torch.testing.assert_close(*same, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_images_belong_to_their_seeds(name: str):
    method, batch = make(name), batch_of(4)
    together = paint(method, batch, [3, 4, 5, 6], solver="ddpm")
    alone = [paint(method, {"mask": batch["mask"][i:i + 1]}, [3 + i], solver="ddpm") for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-4, rtol=1e-4)
    assert (together - paint(method, batch, [3, 4, 5, 7], solver="ddpm")).abs().amax((1, 2, 3)).gt(1e-3).tolist() == [
        False, False, False, True]
    assert together.abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_image_channels(channels: int):
    for name in TINY:
        method = make(name, image_channels=channels)
        loss, parts = method.training_loss(batch_of(channels=channels))
        assert loss.isfinite() and ("vb" in parts) == (name == "sdm_tiny")
        assert paint(method, batch_of(), [0, 1]).shape == (2, channels, 8, 8)


@pytest.mark.parametrize("name", TINY)
def test_overfitting_four_images(name: str):
    """The loss on fixed timesteps and noise falls by 40 % and more within 60 small steps."""
    torch.manual_seed(0)
    method = make(name, std=None, mask_dropout=0.0)
    batch = batch_of(4)
    # Smooth images that follow their masks, as images do.
    batch["image"] = torch.linspace(-0.8, 0.8, 5)[batch["mask"]][:, None].repeat(1, 3, 1, 1)
    many = {key: value.repeat(16, 1, 1, 1) if value.ndim == 4 else value.repeat(16, 1, 1)
            for key, value in batch.items()}

    def fixed_loss() -> float:
        torch.manual_seed(7)
        with torch.no_grad():
            return method.training_loss(many)[1]["mse"].item()

    before = fixed_loss()
    optimizer = torch.optim.AdamW(method.parameters(), 2e-3)
    for step in range(60):
        torch.manual_seed(100 + step)
        loss, _ = method.training_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert fixed_loss() < 0.6 * before


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sdm_tiny", {"head_dim": 64, "edge": "semantic"}), ("sdm_tiny", {"head_dim": 64, "edge": None}),
     ("seg_guided_tiny", {"hint_mode": "one_hot"}), ("seg_guided_tiny", {"hint_mode": "single255"})],
)  # fmt: skip
def test_published_weights(name: str, changes: dict, tmp_path: Path):
    """Random weights under the published names come back bit for bit, and say what network they are of."""
    unet = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}
    method, prefix = make(name, unet=unet, norm_groups=32, **changes), "model.diffusion_model."
    bare = {key.removeprefix(prefix): value for key, value in method.state_dict().items() if key.startswith(prefix)}
    torch.save(bare, tmp_path / "ema_0.9999_000100.pt")
    out = tmp_path / "ours.safetensors"
    if changes.get("hint_mode") != "single255":  # which says nothing of the classes
        with pytest.raises(UserError, match="the table loveda has 7 classes"):
            convert_checkpoint.main([str(tmp_path / "ema_0.9999_000100.pt"), str(out), "--class_table", "loveda"])
    convert_checkpoint.main([str(tmp_path / "ema_0.9999_000100.pt"), str(out), "--class_table", "mini"])
    model = read_model_config(out)["model"]
    assert model["target"] == config(name)["target"] and model["params"]["unet"] == unet
    assert all(model["params"][key] == value for key, value in changes.items() if key != "head_dim")
    back = load_method(out, {"model": model}, "cpu")
    assert all(torch.equal(back.state_dict()[prefix + key], value) for key, value in bare.items())
    # Loaded weights lie channels last, which rounds otherwise.
    torch.testing.assert_close(*(paint(one, batch_of(), [0, 1], num_steps=2) for one in (method, back)),
                               atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_a_saved_and_loaded_method_paints_the_same_bits(name: str, tmp_path: Path):
    method = make(name).to(memory_format=torch.channels_last)  # as loaded weights lie
    save_safetensors(tmp_path / "method.safetensors", method.state_dict(), OmegaConf.create({"model": config(name)}))
    loaded = load_method(tmp_path / "method.safetensors", read_model_config(tmp_path / "method.safetensors"), "cpu")
    assert torch.equal(paint(loaded, batch_of(), [0, 1]), paint(method, batch_of(), [0, 1]))


def test_widths_are_whole_multiples():
    unet = {"model_channels": 16, "channel_mult": [0.5, 1], "num_res_blocks": 1, "attention_resolutions": [2]}
    for name in TINY:
        with pytest.raises(ValueError, match=r"channel_mult \[0.5, 1\]. Expected whole multiples"):
            make(name, unet=unet)
    shapes = {name: tensor.shape for name, tensor in make("sdm_tiny").state_dict().items()}
    assert infer_model(shapes, MINI)["params"]["unet"]["channel_mult"] == [1, 2]
    embedding = {"model.diffusion_model.time_embed.0.weight": (128, 32)}  # that of .5, 1 of 32
    with pytest.raises(UserError, match="16, 32 wide, the first layer 16, model_channels is 32. Expected whole"):
        infer_model(shapes | embedding, MINI)


def test_edges_of_published_weights_are_what_the_flag_says(tmp_path: Path):
    prefix = "model.diffusion_model."
    weights = make("sdm_tiny", norm_groups=32, unet={
        "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2]}).state_dict()
    torch.save({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, tmp_path / "ema.pt")
    for flags, edge in (([], "semantic"), (["--edge", "instance"], "instance")):
        out = tmp_path / f"{edge}.safetensors"
        convert_checkpoint.main([str(tmp_path / "ema.pt"), str(out), "--class_table", "mini", *flags])
        assert read_model_config(out)["model"]["params"]["edge"] == edge


def test_grids_are_painted_with_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The average is swapped in for the preview only, and the trained weights are the same bits behind it."""
    module, average = pl.LightningModule(), AveragedWeights(0.5)
    module.method = make("seg_guided_tiny")
    trainer = SimpleNamespace(global_step=2, is_global_zero=True, callbacks=[average],
                              precision_plugin=SimpleNamespace(forward_context=nullcontext))  # fmt: skip
    average.on_fit_start(trainer, module)
    before = {name: value.clone() for name, value in average.average.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1
    after = {name: value.clone() for name, value in module.state_dict().items()}
    seen = []

    def preview(batch: dict) -> dict:
        seen.append({name: value.clone() for name, value in module.state_dict().items()})
        return {"image": batch["image"]}

    monkeypatch.setattr(module.method, "preview", preview)
    item = {"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "mask": torch.zeros(8, 8, dtype=torch.uint8)}
    ImageGrid(tmp_path, [item], 2).on_train_batch_end(trainer, module)
    for found, expected in ((seen[0], before), (module.state_dict(), after), (average.average, before)):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (tmp_path / "images/gs-000002.png").is_file()


def write_manifest(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_instances_and_bands_are_read_exactly(tmp_path: Path):
    random = np.random.default_rng(0)
    for name, array in (("mask", random.integers(0, 5, (8, 8), np.uint8)),
                        ("instance", random.choice(np.array([7, 24005, 26001], np.uint16), (8, 8)))):  # fmt: skip
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    bands = random.integers(0, 256, (8, 8, 5), np.uint8)
    np.save(tmp_path / "bands.npy", bands)
    manifest = write_manifest(tmp_path, [{"source": "mask.png", "target": "bands.npy", "instance": "instance.png"}])
    rows = read_manifest(manifest, tmp_path, need=("image", "instance"), table=MINI)
    (item,) = PairDataset(rows, MINI, flip=1.0, reference="none", channels=5)
    instance = np.asarray(Image.open(tmp_path / "instance.png")).astype(np.int32)
    assert np.array_equal(item["instance"].numpy(), instance[:, ::-1])
    assert np.array_equal(item["image"].numpy(), bands[:, ::-1].transpose(2, 0, 1))
    small = PairDataset(rows, MINI, size=(4, 4), reference="none", channels=5)[0]
    assert small["image"].shape == (5, 4, 4) and set(small["instance"].unique().tolist()) <= {7, 24005, 26001}
    with pytest.raises(UserError, match="5 bands.*Expected 4"):
        read_image(tmp_path / "bands.npy", 4)
    np.save(tmp_path / "bands.npy", bands.astype(np.float32))
    with pytest.raises(ManifestError, match="float32 numbers, .* Expected"):
        read_manifest(manifest, tmp_path, need=("image", "instance"), table=MINI)
    with pytest.raises(ManifestError, match="missing key 'instance'"):
        read_manifest(write_manifest(tmp_path, [{"source": "mask.png"}]), tmp_path, need=("instance",))


@pytest.fixture
def fit(toy_data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run train.py in this process on rows without prompts and references; returns the last checkpoint."""
    monkeypatch.chdir(ROOT)
    for part in ("train", "val"):
        rows = [json.loads(line) for line in (toy_data / f"{part}_set_items.json").read_text().splitlines()]
        rows = [json.dumps({key: row[key] for key in ("source", "target")}) for row in rows]
        (toy_data / f"{part}_pixel.json").write_text("\n".join(rows))

    def run(name: str, run_dir: Path, *arguments: str) -> dict:
        train.main(["--config_model", f"configs/model/{name}.yaml", "-b", str(toy_data / "train.yaml"), "-p",
                    str(run_dir), "--data_root", str(toy_data), "--train_txt_file", str(toy_data / "train_pixel.json"),
                    "--val_txt_file", str(toy_data / "val_pixel.json"), "--gpus", "", "--no-test",
                    "lightning.trainer.limit_val_batches=1", *arguments])  # fmt: skip
        return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)

    return run


EPOCHS = """
training: {schedule: cosine, ema_decay: 0.9, ema_warmup: true, patience: 9, preview_every: 3}
lightning:
  trainer: {max_steps: -1, max_epochs: 3, accumulate_grad_batches: 3}
  checkpoint: {every_n_train_steps: null, every_n_epochs: 1, monitor: loss_epoch, filename: "best-{epoch:03d}"}
"""


@pytest.mark.parametrize("name", TINY)
def test_training_by_epochs_then_finetuning_then_sampling(name: str, fit: Callable, toy_data: Path, tmp_path: Path,
                                                          caplog: pytest.LogCaptureFixture):  # fmt: skip
    """Four batches an epoch, three to a step and the rest at the end of the epoch: six steps in three epochs."""
    (tmp_path / "epochs.yaml").write_text(EPOCHS)
    last = fit(name, tmp_path / "one", "-b", str(toy_data / "train.yaml"), str(tmp_path / "epochs.yaml"))
    assert last["global_step"] == 6
    peak = 1e-2  # of the fixture's config
    rate = last["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(peak * learning_rate_factor(6, 0, "cosine", 6))  # the schedule counted steps
    files = {path.name for path in (tmp_path / "one/checkpoints").iterdir()}
    best = files - {"last.ckpt", "last.safetensors"}
    assert len(best) == 1 and next(iter(best)).startswith("best-00")
    metrics = (tmp_path / "one/csv/metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("loss_epoch")
    losses = [float(line.split(",")[column]) for line in metrics[1:] if line.split(",")[column]]
    assert next(iter(best)) == f"best-{losses.index(min(losses)):03d}.ckpt"
    assert (tmp_path / "one/images/gs-000003.png").is_file()

    start = tmp_path / "one/checkpoints/last.ckpt"
    tuned = fit(name, tmp_path / "two", "--finetune", str(start), "model.params.mask_dropout=0.2",
                "training.learning_rate=1e-9", "training.ema_decay=0.9", "lightning.trainer.max_steps=1")
    assert tuned["config"]["model"]["params"]["mask_dropout"] == 0.2 and tuned["global_step"] == 1
    # the average and the weights in training, each from its own
    assert any(not torch.equal(last["state_dict"][n], v) for n, v in last["current_model_state"].items())
    for n, value in last["current_model_state"].items():
        torch.testing.assert_close(tuned["current_model_state"][n], value, atol=1e-6, rtol=0)
        torch.testing.assert_close(tuned["state_dict"][n], 0.9 * last["state_dict"][n] + 0.1 * value, atol=1e-5,
                                   rtol=1e-6)

    method = load_method(tmp_path / "two/checkpoints/last.safetensors", {"model": tuned["config"]["model"]}, "cpu")
    caplog.set_level("INFO")
    runs = []
    for size, seed in (("2", "42"), ("1", "42")):  # another batch size, the same images
        out = tmp_path / f"out{size}"
        with pytest.raises(SystemExit) as stop:
            run_entry_point(inference.main, [
                "--ckpt", str(tmp_path / "two/checkpoints/last.safetensors"), "--data_root", str(toy_data),
                "--txt_file", str(toy_data / "val_pixel.json"), "--outdir", str(out), "--num_steps", "4", "--H", "16",
                "--W", "16", "--batch_size", size, "--seed", seed, "--device", "cpu"])  # fmt: skip
        assert stop.value.code == 0
        runs.append({path.name: path.read_bytes() for path in (out / "images").iterdir()})
    assert "does not look at the manifest's prompt and reference" in caplog.text
    assert runs[0] == runs[1] and len(runs[0]) == 2
    mask = np.asarray(Image.open(toy_data / "label/8.png").resize((16, 16), Image.Resampling.NEAREST))
    own = paint(method, {"mask": torch.from_numpy(mask.copy()).long()[None]}, [42])[0]
    painted = np.asarray(Image.open(tmp_path / "out1/images/8_seed_42.png")).astype(int)
    assert np.abs(painted - ((own + 1) * 127.5).clamp(0, 255).round().permute(1, 2, 0).numpy()).max() <= 1


def test_inference_with_instances_and_bands(tmp_path: Path):
    """Two bands go out as arrays, instance maps come in; a second run finds all done."""
    model = config("sdm_tiny", edge="instance", image_channels=2)
    save_safetensors(tmp_path / "model.safetensors", make("sdm_tiny", edge="instance", image_channels=2).state_dict(),
                     OmegaConf.create({"model": model}))
    random = np.random.default_rng(0)
    for i in (0, 1):
        Image.fromarray(random.integers(0, 5, (8, 12), np.uint8)).save(tmp_path / f"mask{i}.png")
        Image.fromarray(random.integers(0, 9, (8, 12)).astype(np.uint16) + 24000).save(tmp_path / f"object{i}.png")
    manifest = write_manifest(tmp_path, [{"source": f"mask{i}.png", "instance": f"object{i}.png"} for i in (0, 1)])
    command = ["--ckpt", str(tmp_path / "model.safetensors"), "--data_root", str(tmp_path), "--txt_file",
               str(manifest), "--outdir", str(tmp_path / "out"), "--num_steps", "3", "--device", "cpu", "--shard_size",
               "1"]  # fmt: skip
    for _ in range(2):
        assert inference.main(command) == 0
        arrays = {path.name: np.load(path) for path in (tmp_path / "out/images").iterdir()}
        assert sorted(arrays) == ["mask0_seed_42.npy", "mask1_seed_43.npy"]
        assert all(array.shape == (8, 12, 2) and array.dtype == np.uint8 for array in arrays.values())
    preview.main([str(tmp_path / "out"), "--tile", "16"])
    assert (tmp_path / "out/contact_sheet.png").is_file()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "object1.png")
    with pytest.raises(ManifestError, match="line 2: instance .* is 8x8, its mask 8x12"):
        inference.main([*command, "--outdir", str(tmp_path / "new")])


def test_finetuning_from_published_files(tmp_path: Path):
    """Weights and their average from two files of bare names."""
    networks = [make("sdm_tiny", std) for std in (0.1, 0.2)]
    prefix, files = "model.diffusion_model.", (tmp_path / "model000100.pt", tmp_path / "ema_0.9999_000100.pt")
    for network, file in zip(networks, files, strict=True):
        torch.save({k.removeprefix(prefix): v for k, v in network.state_dict().items() if k.startswith(prefix)}, file)
    args = train.parse_arguments(["--finetune", str(files[0]), "--finetune_ema", str(files[1])])
    method, average = make("sdm_tiny", std=None), AveragedWeights(0.9)
    start_finetuning(Start(method), [average], args.finetune, args.finetune_ema)
    for found, network in ((method.state_dict(), networks[0]), (average.start, networks[1])):
        assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match="--finetune: fills the whole model"):
        train.main(["--config_model", str(ROOT / "configs/model/sdm_tiny.yaml"), "--finetune_ema", str(files[1])])


def test_a_dataset_smaller_than_a_batch_trains(fit: Callable, tmp_path: Path):
    last = fit("seg_guided_tiny", tmp_path / "run", "data.params.batch_size=12", "lightning.trainer.max_steps=3")
    assert last["global_step"] == 3


def test_cached_latents_need_an_autoencoder(fit: Callable, tmp_path: Path):
    with pytest.raises(UserError, match="SegGuided has no autoencoder"):
        fit("seg_guided_tiny", tmp_path / "run", f"training.cache_latents={tmp_path}")
