"""CRFM on a tiny SD3.5: conditions, sampler against the stock pipeline, all ways to train, the chain up to the gain."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG
from omegaconf import OmegaConf
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import inference
import train
from cldm.crfm import CRFM
from ldm.data.classes import ClassTable
from ldm.data.transforms import encode_mask
from ldm.data.vectors import PromptVectors
from ldm.util import UserError, instantiate_from_config, run_entry_point
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.load import fill, load_method, read_model_config
from scripts import encode_prompts, make_tiny_sd35

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3.5 `sd35`, twelve pairs of 32 x 32 whose colours are their classes, the vectors of their prompts."""
    root = tmp_path_factory.mktemp("crfm")
    make_tiny_sd35.write_folder(root / "sd35", 0, False)
    random, table, rows = np.random.default_rng(0), ClassTable.load("mini"), []
    for folder in ("img", "label"):
        (root / folder).mkdir()
    for number in range(12):
        mask = np.kron(random.integers(0, 5, (2, 2)), np.ones((16, 16), int)).astype(np.uint8)
        image = (mask[..., None] * 45 + random.integers(0, 20, (32, 32, 3))).astype(np.uint8)
        name = f"scene{number // 2}_0000_{32 * (number % 2):04}.png"
        Image.fromarray(mask).save(root / "label" / name)
        Image.fromarray(image).save(root / "img" / name)
        rows.append({"source": f"label/{name}", "target": f"img/{name}", "prompt": table.prompt(mask)})
    for name, part in (("train", rows[:8]), ("test", rows[8:]), ("val", rows[6:8])):
        (root / f"{name}_set_items.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    (root / "train.yaml").write_text(CONFIG.replace("[16, 16]", "[32, 32]").replace("reference: manifest",
                                                                                    "reference: none"))
    encode_prompts.main(["--sd35", str(root / "sd35"), "--outdir", str(root / "vectors"), "--device", "cpu", "--dtype",
                         "fp32", "--txt_file", *map(str, root.glob("*_set_items.json"))])  # fmt: skip
    return root


def params(root: Path, **changes: object) -> dict:
    loaded = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/model/sd35_tiny.yaml"))["model"]["params"]
    return {**loaded, "vectors_dir": str(root / "vectors"), **changes}


def make(root: Path, **changes: object) -> CRFM:
    """A CRFM with the weights of the folder, the mask stream started from the image stream."""
    torch.manual_seed(0)
    method = CRFM(**params(root, **changes))
    fill(method, [open_checkpoint(root / "sd35")], lambda name: not name.startswith("network.mask_"))
    method.start_training()
    return method


def make_batch(root: Path, count: int = 2) -> dict:
    rows = [json.loads(line) for line in (root / "train_set_items.json").read_text().splitlines()[:count]]
    mask = np.stack([np.asarray(Image.open(root / row["source"])) for row in rows])
    image = np.stack([np.asarray(Image.open(root / row["target"])) for row in rows]).transpose(0, 3, 1, 2)
    return {"mask": torch.from_numpy(mask).long(), "image": torch.from_numpy(image).float() / 127.5 - 1,
            "prompt": [row["prompt"] for row in rows]}  # fmt: skip


def run_train(root: Path, folder: Path, *extra: str) -> Path:
    arguments = ["--config_model", "configs/model/sd35_tiny.yaml", "-b", str(root / "train.yaml"), "--data_root",
                 str(root), "--gpus", "", "-p", str(folder), f"model.params.vectors_dir={root / 'vectors'}"]
    train.main([*arguments, *extra])
    return folder / "checkpoints"


def read_state(path: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in open_checkpoint(path).tensors.items()}


@pytest.mark.parametrize("mode", ["palette", "levels"])
@pytest.mark.parametrize("name", ["fusu", "loveda"])
def test_ignored_pixels_have_a_colour_of_their_own(mode: str, name: str):
    table = ClassTable.load(name)
    ids = torch.tensor([[[*table.ids, 255]]])
    colours = encode_mask(ids, mode, table)[0, :, 0].T  # (K + 1, 3)
    assert len(colours.unique(dim=0)) == table.num_classes + 1
    assert (colours[-1] == torch.tensor(table.ignore_colour if mode == "palette" else (255,) * 3) / 255).all()


def test_greys_of_the_public_code():
    table = ClassTable.load("fusu")
    ids = torch.tensor([[[*range(7), 16, 255]]])
    greys = (encode_mask(ids, "grey_upstream", table)[0, :, 0] * 255).round().int()
    assert greys.tolist() == [[0, 14, 28, 42, 56, 70, 85, 226, 28]] * 3  # ignored pixels look like class 2


def test_conditions_follow_mask_and_prompt(root: Path):
    method, batch = make(root).eval(), make_batch(root)
    assert method.size_factor == 16 and method.takes == ("prompt",)
    found = method.conditions(batch)
    assert found["context"].shape == (2, 333, 64) and found["pooled"].shape == (2, 32)
    vectors = PromptVectors(root / "vectors")
    assert torch.equal(found["context"][1], vectors.read(batch["prompt"][1])[0])
    image = encode_mask(batch["mask"], "palette", method.class_table) * 2 - 1
    with torch.no_grad():
        expected = (method.first_stage_model.encode(image).mean - 0.0609) * 1.5305
    assert torch.equal(found["mask_latent"], expected)
    null = method.null_conditions(found, ("prompt", "mask"))
    assert torch.equal(null["context"][0], vectors.read("")[0])
    ignored = method.conditions(batch | {"mask": torch.full_like(batch["mask"], 255)})["mask_latent"]
    assert torch.allclose(null["mask_latent"], ignored, atol=1e-6)
    assert not torch.allclose(ignored, found["mask_latent"], atol=1e-2)
    dropping = make(root, prompt_dropout=1.0, mask_dropout=1.0).train()
    lost = dropping.conditions(batch)
    assert torch.equal(lost["context"], null["context"]) and torch.allclose(lost["mask_latent"], ignored, atol=1e-6)


@torch.no_grad()
def test_without_a_mask_it_samples_as_the_stock_pipeline(root: Path):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(root / "sd35")
    pipeline.set_progress_bar_config(disable=True)
    method, batch = make(root).eval(), make_batch(root)
    sampling = replace(method.own_sampling, guidance_scale=4.5)
    levels = method.levels(sampling)
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 28))
    # The scheduler computes in float32, and steps along the velocity; here a step mixes x and its clean latent.
    assert torch.allclose(torch.tensor([level.noise for level in levels]), pipeline.scheduler.sigmas, atol=2e-7)
    method.network.forward, forward = (lambda *args: forward(*args[:4])), method.network.forward  # drop the mask
    noise = torch.randn(2, 4, 8, 4, generator=torch.Generator().manual_seed(1))
    found = method.sample_latent(batch, noise, sampling)
    vectors = PromptVectors(root / "vectors")
    pairs = [vectors.read(prompt) for prompt in batch["prompt"]]
    context, pooled = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    empty, empty_pooled = (part[None].repeat(2, *[1] * part.ndim) for part in vectors.read(""))
    expected = pipeline(prompt_embeds=context, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
                        negative_pooled_prompt_embeds=empty_pooled, height=64, width=32, guidance_scale=4.5,
                        latents=noise, sigmas=np.linspace(1, 1 / 1000, 28), output_type="latent").images  # fmt: skip
    assert torch.allclose(found, expected, atol=1e-4) and expected.std() > 0.5
    vae = pipeline.vae
    decoded = vae.decode(expected / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert torch.allclose(method.decode_latent(found), decoded, atol=1e-3)


def test_the_loss_is_that_of_rectified_flow(root: Path):
    method, batch = make(root, prompt_dropout=0.0, mask_dropout=0.0).train(), make_batch(root)
    seen = []
    method.network.forward = lambda latent, time, *rest: seen.append((latent, time)) or torch.zeros_like(latent)
    torch.manual_seed(5)
    loss, _ = method.training_loss(batch)
    torch.manual_seed(5)
    with torch.no_grad():
        clean = (method.first_stage_model.encode(batch["image"]).sample() - 0.0609) * 1.5305
        u = (torch.randint(1000, (2,)) + 1) / 1000
        noise = torch.randn_like(clean)
    s = 3 * u / (1 + 2 * u)
    expected = (1 - s)[:, None, None, None] * clean + s[:, None, None, None] * noise
    assert torch.allclose(seen[0][0], expected, atol=1e-6) and torch.allclose(seen[0][1], 1000 * s)
    assert loss.item() == pytest.approx((noise - clean).square().mean().item(), rel=1e-5)
    draws = torch.cat([method.path.draw_times(1000, "cpu") for _ in range(20)]) / 1000
    assert draws.mean().item() == pytest.approx(0.676, abs=0.01)
    assert (draws > 0.9).float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("groups", [["image", "mask"], ["lora", "mask"], ["mask"]])
def test_training_moves_what_it_names(root: Path, tmp_path: Path, groups: list[str], monkeypatch: pytest.MonkeyPatch):
    if "lora" in groups:
        pytest.importorskip("peft")
    monkeypatch.chdir(ROOT)
    extra = ["--pretrain_path", str(root / "sd35"), f"model.params.train={groups}", "training.preview_every=2",
             "model.params.frozen_dtype=bfloat16", "lightning.trainer.precision=bf16-mixed"]  # fmt: skip
    folder = run_train(root, tmp_path / "run", *extra)
    start = {name: value for name, value in make(root).state_dict().items()}
    end = read_state(folder / "last.safetensors")
    assert set(end) == set(start)
    network = CRFM(**params(root)).network
    image = {f"network.base.{name}" for name in network.image_parameters()}
    mask = {name for name in start if name.startswith("network.mask_")}
    adapted = {name for name in image if (".attn" in name and ".norm_" not in name and name.endswith("weight"))
               or ".ff.net." in name and name.endswith("weight")}
    expected = {"image": image | mask, "lora": adapted | mask, "mask": mask}[groups[0]]
    moved = {name for name in start if not torch.equal(end[name].float(), start[name].to(end[name].dtype).float())}
    assert moved <= expected and len(moved) > 0.8 * len(expected)  # bfloat16 hides the smallest steps
    assert {name.split(".")[0] for name, value in end.items() if value.dtype == torch.bfloat16} == {"network"}
    whole = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    kinds = {name: value.dtype for name, value in whole.items() if name.startswith("method.network.")}
    frozen = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    assert "method.network.base.context_embedder.weight" in frozen
    assert not any("mask_" in name or ".lora_" in name for name in frozen)
    assert (folder.parent / "images/gs-000002.png").is_file()
    run_train_again = ["-r", str(folder.parent), "--gpus", "", "lightning.trainer.max_steps=3"]
    train.main(run_train_again)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3
    again = read_state(folder / "last.safetensors")
    assert any(not torch.equal(again[name], end[name]) for name in mask)
    method = load_method(folder / "last.safetensors", read_model_config(folder / "last.safetensors"), "cpu", None)
    assert method.network.mask_proj.weight.dtype == torch.bfloat16
    batch = make_batch(root)
    image = method.sample(batch, torch.randn(2, 4, 4, 4), replace(method.own_sampling, num_steps=2))
    assert image.isfinite().all()


def test_frozen_weights_stay_in_the_folder_of_sd35(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("ldm.training.build.WHOLE_BELOW", 0)
    folder = run_train(root, tmp_path / "run", "--pretrain_path", str(root / "sd35"), "model.params.train=[lora,mask]",
                       "training.ema_decay=0.9")  # fmt: skip
    exported, own = read_state(folder / "last.safetensors"), make(root).state_dict()
    changed = {name for name in exported if not name.startswith("network.mask_")}
    assert changed < set(own) and not any("norm1_context" in name or "context_embedder" in name for name in changed)
    assert all(".attn" in name or ".ff.net." in name for name in changed)  # adapters are in them
    method = load_method(folder / "last.safetensors", read_model_config(folder / "last.safetensors"), "cpu")
    loaded = method.state_dict()
    assert all(torch.equal(loaded[name], exported.get(name, own[name])) for name in own)
    train.main(["-r", str(folder.parent), "--gpus", "", "lightning.trainer.max_steps=3"])
    (root / "sd35").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="holds only what was trained"):
        read_model_config(folder / "last.safetensors")
    (tmp_path / "gone").rename(root / "sd35")
    train.main(["--config_model", "configs/model/sd35_tiny.yaml", "-b", str(root / "train.yaml"), "--data_root",
                str(root), "--gpus", "", "-p", str(tmp_path / "on"), f"model.params.vectors_dir={root / 'vectors'}",
                "model.params.train=[lora,mask]", "training.ema_decay=0.9", "--finetune",
                str(folder / "last.safetensors")])  # fmt: skip
    assert (tmp_path / "on/checkpoints/last.safetensors").is_file()


def test_published_weights_are_one_file_with_the_folder(root: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch):
    from safetensors.torch import save_file
    from test_sd3 import make_inputs, make_network, upstream_state

    from scripts import convert_checkpoint

    monkeypatch.chdir(ROOT)
    network, method = make_network(), make(root)
    published = {name: value.detach().contiguous() for name, value in upstream_state(network).items()}
    save_file(published, tmp_path / "up.safetensors")
    convert_checkpoint.main([str(root / "sd35"), str(tmp_path / "up.safetensors"), str(tmp_path / "crfm.safetensors"),
                             "--config", "configs/model/sd35_tiny.yaml"])  # fmt: skip
    loaded = load_method(tmp_path / "crfm.safetensors", read_model_config(tmp_path / "crfm.safetensors"), "cpu")
    trained = {f"base.{name}" for name in network.image_parameters()} | {
        name for name, _ in network.named_parameters() if name.startswith("mask_")}
    published = {name: value for name, value in network.state_dict().items() if name in trained}
    method.network.load_state_dict(method.network.state_dict() | published)
    with torch.no_grad():
        inputs = make_inputs()
        found, expected = loaded.network.state_dict(), method.network.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        # Not to the bit: where copies lie in memory decides how some processors add.
        torch.testing.assert_close(loaded.network(*inputs), method.network.eval()(*inputs))


@pytest.mark.slow
def test_two_processes_train_and_latents_are_kept(root: Path, tmp_path: Path):
    script = tmp_path / "two.py"
    arguments = ["--config_model", "configs/model/sd35_tiny.yaml", "-b", str(root / "train.yaml"), "--data_root",
                 str(root), "--gpus", "", "-p", str(tmp_path / "run"), "--pretrain_path", str(root / "sd35"),
                 f"model.params.vectors_dir={root / 'vectors'}", "lightning.trainer.devices=2",
                 f"training.cache_latents={tmp_path / 'latents'}", "lightning.trainer.strategy=ddp"]  # fmt: skip
    script.write_text(f"import train\ntrain.main({arguments!r})\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert list((tmp_path / "latents").glob("latents-*.npy"))


def generate(root: Path, checkpoint: Path, out: Path, *extra: str, code: int = 0) -> dict[str, bytes]:
    with pytest.raises(SystemExit) as stop:
        run_entry_point(inference.main, [
            "--ckpt", str(checkpoint), "--data_root", str(root), "--txt_file", str(root / "test_set_items.json"),
            "--outdir", str(out), "--device", "cpu", "--num_steps", "3", *extra])  # fmt: skip
    assert stop.value.code == code
    return {path.name: path.read_bytes() for path in (out / "images").glob("*")}


def test_tiles_become_a_generator_images_and_a_gain(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    checkpoint = run_train(root, tmp_path / "run", "--pretrain_path", str(root / "sd35")) / "last.safetensors"
    whole = generate(root, checkpoint, tmp_path / "whole", "--scale", "2")
    assert len(whole) == 4 and len(set(whole.values())) == 4
    for part in ("1/2", "0/2"):
        parts = generate(root, checkpoint, tmp_path / "parts", "--scale", "2", "--shard", part, "--shard_size", "2")
    assert parts == whole
    assert generate(root, checkpoint, tmp_path / "half", "--strength", "0.5").keys() == whole.keys()
    moved = tmp_path / "moved"  # vectors lie elsewhere, a run goes on all the same; other vectors are another run
    (root / "vectors").rename(moved)
    assert "vectors of prompts" in (generate(root, checkpoint, tmp_path / "lost", code=2), capsys.readouterr().err)[1]
    assert generate(root, checkpoint, tmp_path / "whole", "--scale", "2", "--vectors", str(moved)) == whole
    other = tmp_path / "other"
    encode_prompts.main(["--sd35", str(root / "sd35"), "--outdir", str(other), "--device", "cpu", "--without_t5",
                         "--txt_file", *map(str, root.glob("*_set_items.json"))])  # fmt: skip
    generate(root, checkpoint, tmp_path / "whole", "--scale", "2", "--vectors", str(other), code=2)
    assert "vectors_sha256" in capsys.readouterr().err
    moved.rename(root / "vectors")
    generate(root, checkpoint, tmp_path / "turbo", "--mode", "turbo", code=2)

    pytest.importorskip("mmseg")
    import contextlib

    from test_gain import in_this_process

    from post_processing.gain.stages import StageRunner
    from scripts import measure_gain

    monkeypatch.setattr(StageRunner, "run_command", in_this_process)
    monkeypatch.setattr("ldm.generation.machine.stop_on_signals", contextlib.nullcontext)
    flags = ["--class_table", "mini", "--data_root", root, "--ckpt", checkpoint, "--outdir", tmp_path / "gain",
             "--seeds", "1", "--steps", "2", "--batch_size", "2", "--num_masks", "3", "--num_per_mask", "1", "--arms",
             "joint", "--inference_args", "--num_steps 2 --device cpu", "--resample_args",
             "--valid-ratio 0 --rare none", "--train_args", "--init_backbone=none", "--filter_args",
             "--device=cpu"]  # fmt: skip
    measure_gain.main([str(flag) for flag in flags])
    assert list(json.loads((tmp_path / "gain/results.json").read_text())["summary"]) == ["real", "joint"]
    assert len(list((tmp_path / "gain/synthesis/images").iterdir())) == 3


def test_a_guide_rectifies_as_published_and_as_we_do(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mmseg")
    from segmentors import make_segmentor

    monkeypatch.chdir(ROOT)
    guide = make_segmentor(tmp_path / "guide", ClassTable.load("mini"))
    checkpoint = run_train(root, tmp_path / "run", "--pretrain_path", str(root / "sd35")) / "last.safetensors"
    plain = generate(root, checkpoint, tmp_path / "plain", "--num_steps", "6")
    flags = ["--num_steps", "6", "--guide", *map(str, guide)]
    found = {name: generate(root, checkpoint, tmp_path / name, *flags, *extra) for name, extra in (
        ("upstream", ["--rectify_preset", "upstream"]), ("ours", ["--rectify_log"]))}  # fmt: skip
    assert found["upstream"].keys() == found["ours"].keys() == plain.keys()
    assert all(found[name][image] != plain[image] for name in found for image in plain)
    for part in ("1/2", "0/2"):
        parts = generate(root, checkpoint, tmp_path / "parts", *flags, "--rectify_preset", "upstream", "--shard", part)
    assert parts == found["upstream"]
    records = {name: [record for file in sorted((tmp_path / name / "shards").glob("*.json"))
                      for record in json.loads(file.read_text())["rectified"]] for name in found}  # fmt: skip
    upstream, ours = records["upstream"], records["ours"]
    assert [record["time"] for record in upstream] == [pytest.approx(1000 * 3 * u / (1 + 2 * u)) for u in
                                                       np.linspace(1, 0.001, 6)[:4]]
    assert [record["scale"] for record in upstream] == [pytest.approx(0.1 * (1 - (i + 1) / 6)) for i in range(4)]
    assert all(0 < record["clamped"] < 1 and record["skipped"] == 0 for record in upstream)
    assert ours and all(record["loss_after"] < record["loss"] for record in ours)


def test_mistakes_are_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="both image and lora"):
        CRFM(**params(root, train=["image", "lora"]))
    with pytest.raises(UserError, match="'one_hot' makes no image"):
        CRFM(**params(root, hint_mode="one_hot"))
    with pytest.raises(UserError, match="frozen_dtype: 'float16'"):
        CRFM(**params(root, frozen_dtype="float16"))
    method = make(root, frozen_dtype="bfloat16", train=["mask"])
    with pytest.raises(UserError, match="precision=bf16-mixed"):
        method.training_loss(make_batch(root))
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="lacks 1 of .* prompts .*'a satellite image of nothing'"):
        rows = [json.loads(line) for line in (root / "train_set_items.json").read_text().splitlines()]
        rows[0]["prompt"] = "a satellite image of nothing"
        (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_train(root, tmp_path / "run", f"data.params.train_manifest={tmp_path / 'rows.json'}")
    with pytest.raises(UserError, match="wrong shape|another shape"):
        run_train(root, tmp_path / "run", "--pretrain_path", str(root / "sd35"),
                  "model.params.transformer.attention_head_dim=16",
                  "model.params.transformer.caption_projection_dim=64")  # fmt: skip


def test_the_benchmark_runs_to_its_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    pytest.importorskip("peft")
    from benchmarks import bench_sd35

    monkeypatch.chdir(ROOT)
    bench_sd35.main(["--device", "cpu", "--config", "configs/model/sd35_tiny.yaml", "--sizes", "32", "--batches", "1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("work") for line in lines[1:]] == ["pass without mask", "pass with mask", "decode",
                                                        "decode with gradient", *["training step"] * 2]
    assert all(line["seconds"] > 0 for line in lines[1:])


def test_configs_build_and_say_how_large_they_are():
    config = OmegaConf.to_container(OmegaConf.merge(
        OmegaConf.load(ROOT / "configs/model/sd35_crfm.yaml"), OmegaConf.load(ROOT / "configs/train/fusu_sd35.yaml")))
    with torch.device("meta"):
        method = instantiate_from_config(config["model"])
    groups = {name: sum(p.numel() for p in group) for name, group in method.trainable_groups().items()}
    assert groups == {"image": 1_239_529_152, "mask": 986_824_640} and method.size_factor == 16
    assert sum(p.numel() for p in method.first_stage_model.parameters()) == 83_819_683
    assert method.latent_shape(512, 512) == (16, 64, 64)
