"""Weights of every origin: what is read, under which names, what is accounted for, what is refused."""

import argparse
import json
import logging
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny import ROOT, model_params, randomize
from torch import Tensor

import train
from cldm.tisynth import TISynth
from ldm.generation.plan import set_text_encoder
from ldm.training.build import build_method
from ldm.util import UserError
from ldm.weights.checkpoint import open_checkpoint, save_safetensors
from ldm.weights.files import Checkpoint, StoredTensor
from ldm.weights.load import fill, load_method, read_model_config
from scripts import convert_checkpoint

CONFIG = {"target": "cldm.tisynth.TISynth", "params": model_params("tisynth_tiny")}
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."
PAYLOAD = Path("payload_was_run")


def build(**changes: object) -> TISynth:
    return randomize(TISynth(**{**CONFIG["params"], **changes}), 0.1)


@pytest.fixture(scope="module")
def method() -> TISynth:
    return build().eval()


@pytest.fixture(scope="module")
def weights(method: TISynth) -> dict[str, Tensor]:
    return dict(method.state_dict())


def stable_diffusion(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint of Stable Diffusion has: no branches, no all-in-attention, no logvar."""
    return {k: v for k, v in weights.items() if "stage_model" in k and not k.startswith("ssl") or
            k.startswith(UNET) and "trainable" not in k or "." not in k and k != "logvar"}  # fmt: skip


def pretrain(paths: list[Path], *extra: str, **changes: object) -> TISynth:
    """What train.py builds with --pretrain_path flags."""
    config = OmegaConf.create({"model": {**CONFIG, "params": {**CONFIG["params"], **changes}}})
    torch.manual_seed(3)
    return build_method(config, None, list(map(str, paths)), allow_partial="--allow_partial" in extra).method


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- layouts


def ema(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {k: v for k, v in weights.items() if k.startswith("model.")}
    averaged = {"model_ema." + k.removeprefix("model.").replace(".", ""): v for k, v in named.items()}
    return averaged | {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict]] = {
    "flat": lambda w: w,
    "wrapped": lambda w: {"state_dict": w, "epoch": 3},
    "lightning module": lambda w: {"state_dict": {f"method.{k}": v for k, v in w.items()}},
    "position ids": lambda w: w | {TEXT + "text_model.embeddings.position_ids": torch.arange(16)[None]},
    "transformers 5": lambda w: {k.replace(TEXT + "text_model.", TEXT): v for k, v in w.items()},
    "averages beside": lambda w: w | {k: v + 1 for k, v in ema(w).items()},
    "averages only": lambda w: {k: v for k, v in w.items() if not k.startswith("model.")} | ema(w),
}


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(weights: dict[str, Tensor], tmp_path: Path, layout: str, ending: str):
    content, path = LAYOUTS[layout](weights), tmp_path / f"x.{ending}"
    if ending == "ckpt":
        torch.save(content, path)
    else:
        save_safetensors(path, content.get("state_dict", content))
    found = open_checkpoint(path, weights)
    assert_equal(found.read(), weights)


def test_legacy_torch_format_and_averages_on_request(weights: dict[str, Tensor], tmp_path: Path):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal(open_checkpoint(tmp_path / "old.pth").read(), weights)
    torch.save(weights | {k: v + 1 for k, v in ema(weights).items()}, tmp_path / "both.ckpt")
    found = open_checkpoint(tmp_path / "both.ckpt", use_ema=True).read()
    assert_equal(found, {k: v + 1 if k.startswith("model.") else v for k, v in weights.items()})
    with pytest.raises(UserError, match="there are none"):
        open_checkpoint(tmp_path / "old.pth", use_ema=True)


def test_single_networks_get_their_prefix(weights: dict[str, Tensor], tmp_path: Path):
    for prefix in ("control_model.", UNET, "first_stage_model.", TEXT + "text_model.", TEXT):
        part = {k: v for k, v in weights.items() if k.startswith(prefix)}
        save_safetensors(tmp_path / "bare.safetensors", {k[len(prefix):]: v.half() for k, v in part.items()})
        found = open_checkpoint(tmp_path / "bare.safetensors").read()
        assert_equal(found, {k: v.half() for k, v in part.items()})


def test_lightning_1_5_file(weights: dict[str, Tensor], tmp_path: Path):
    callbacks = pytest.importorskip("pytorch_lightning").callbacks
    import numpy as np

    content = {
        "epoch": 3, "global_step": 9, "pytorch-lightning_version": "1.5.0", "state_dict": weights,
        "callbacks": {callbacks.ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "dirpath": Path("/x")}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": np.float64(0.1)}]}],
        "hyper_parameters": argparse.Namespace(seed=23), "hparams_name": "kwargs",
        "hparams": OmegaConf.create({"a": [1, {"b": 2}]}),
    }  # fmt: skip
    torch.save(content, tmp_path / "GID_model.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "GID_model.ckpt", weights_only=True)
    assert_equal(open_checkpoint(tmp_path / "GID_model.ckpt").read(), weights)


# --- the account


def test_stable_diffusion_then_a_controlnet(weights: dict[str, Tensor], tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    torch.save({"state_dict": stable_diffusion(weights)}, tmp_path / "sd.ckpt")
    control = {k.removeprefix("control_model."): v.half() for k, v in weights.items() if k.startswith("control_model.")}
    save_safetensors(tmp_path / "control.safetensors", control)
    changes = {"train": ["all_in_attention", "control", "reference"]}
    own = pretrain([tmp_path / "sd.ckpt"], **changes).state_dict()
    for branch in ("control_model.", "ssl_stage_model."):
        assert torch.equal(own[branch + "input_blocks.1.0.in_layers.2.weight"],
                           weights[UNET + "input_blocks.1.0.in_layers.2.weight"])  # fmt: skip
        assert not own[branch + "zero_convs.0.0.weight"].any()
    assert "the mask has no effect yet" in caplog.text and "copied from the U-Net" in caplog.text
    caplog.clear()
    own = pretrain([tmp_path / "sd.ckpt", tmp_path / "control.safetensors"], **changes).state_dict()
    for name in control:
        torch.testing.assert_close(own[f"control_model.{name}"], control[name].float(), rtol=0, atol=0)
    assert "the mask has no effect yet" not in caplog.text and "the reference image has no effect" in caplog.text
    table = next(record.getMessage() for record in caplog.records if "group" in record.getMessage())
    line = next(line for line in table.splitlines() if line.startswith("mask branch"))
    assert line.split()[2:7] == [str(len(control)), "0", "0", "0", "0"] and line.endswith("control.safetensors")


def test_later_files_win(weights: dict[str, Tensor], tmp_path: Path):
    torch.save(weights, tmp_path / "a.ckpt")
    other = {k: v + 1 for k, v in weights.items() if k.startswith("first_stage_model.")}
    torch.save(other, tmp_path / "b.ckpt")
    own = pretrain([tmp_path / "a.ckpt", tmp_path / "b.ckpt"]).state_dict()
    assert_equal(own, weights | other)


def test_another_shape_is_no_fault_where_a_later_file_has_the_tensor(method: TISynth, weights: dict[str, Tensor]):
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    other = torch.arange(float(len(weights[name])))
    stored = {key: StoredTensor(tuple(value.shape), value.dtype, lambda value=value: value)
              for key, value in (weights | {name: torch.zeros(3)}).items()}
    later = {name: StoredTensor(tuple(other.shape), other.dtype, lambda: other)}
    filled = build()
    account = fill(filled, [Checkpoint("first", stored), Checkpoint("later", later)])
    assert torch.equal(filled.state_dict()[name], other) and not account.wrong
    assert any("first: 1 tensors of another shape are left out" in note for note in account.notes)
    with pytest.raises(UserError, match="first: 1 tensors have another shape"):
        fill(filled, [Checkpoint("later", later), Checkpoint("first", stored)])


def test_a_hint_stem_for_other_channels_stays_fresh(weights: dict[str, Tensor], tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    three = build(hint_mode="rgb_id").state_dict()
    torch.save(three, tmp_path / "rgb.ckpt")
    own = pretrain([tmp_path / "rgb.ckpt"]).state_dict()
    stem = "control_model.input_hint_block."
    last = max(int(k[len(stem):].split(".")[0]) for k in own if k.startswith(stem))
    assert not own[f"{stem}{last}.weight"].any() and "stem starts fresh" in caplog.text
    assert all(torch.equal(own[k], three[k]) for k in own if not k.startswith(stem))
    torch.save(weights, tmp_path / "own.ckpt")
    mixed = pretrain([tmp_path / "own.ckpt", tmp_path / "rgb.ckpt"]).state_dict()
    assert not mixed[f"{stem}{last}.weight"].any()  # not the stem of one file before the branch of another


def test_what_does_not_fit_stops(weights: dict[str, Tensor], tmp_path: Path):
    frozen = {"train": ["all_in_attention", "control", "reference"], "text_encoder": json.loads(json.dumps(
        CONFIG["params"]["text_encoder"]))}  # fmt: skip
    frozen["text_encoder"]["params"]["frozen"] = True
    path = tmp_path / "x.ckpt"
    torch.save({k: v for k, v in weights.items() if not k.startswith("cond_stage")}, path)
    with pytest.raises(UserError, match="weights_dir to a local folder of CLIP"):
        pretrain([path], **frozen)
    pretrain([path], "--allow_partial", **frozen)
    torch.save(weights | {f"extra.{i}": torch.ones(1) for i in range(200)}, path)
    with pytest.raises(UserError, match="tensors have a place in the model"):
        pretrain([path])
    torch.save(weights | {"first_stage_model.quant_conv.weight": torch.ones(2, 2, 1, 1)}, path)
    with pytest.raises(UserError, match=r"quant_conv.weight: file \(2, 2, 1, 1\), model"):
        pretrain([path])
    torch.save(weights | {"alphas_cumprod": weights["alphas_cumprod"] ** 2}, path)
    with pytest.raises(UserError, match="another noise schedule"):
        pretrain([path])
    torch.save(stable_diffusion(weights), path)
    with pytest.raises(UserError, match="mask branch"):
        load_method(path, {"model": CONFIG}, "cpu")


def test_loading_takes_no_second_copy_and_keeps_precision(weights: dict[str, Tensor], tmp_path: Path):
    path = tmp_path / "half.safetensors"
    config = OmegaConf.create({"model": CONFIG})
    save_safetensors(path, {k: v.half() if "." in k else v for k, v in weights.items()}, config)
    own = load_method(path, read_model_config(path), "cpu", dtype=None).state_dict()
    assert {v.dtype for k, v in own.items() if "." in k} == {torch.float16}
    assert own["betas"].dtype == torch.float32 and torch.equal(own["betas"], weights["betas"])
    full = load_method(path, read_model_config(path), "cpu")
    assert all(torch.equal(v, weights[k].half().float()) for k, v in full.state_dict().items() if "." in k)
    assert not any(p.requires_grad or p.is_meta for p in full.parameters())


def test_local_folders_of_clip_by_flag(weights: dict[str, Tensor], tmp_path: Path):
    save_safetensors(tmp_path / "model.safetensors", {
        k.removeprefix(TEXT): v + 1 for k, v in weights.items() if k.startswith(TEXT)})  # fmt: skip
    own = pretrain([], **{"text_encoder": {**CONFIG["params"]["text_encoder"], "params": {
        **CONFIG["params"]["text_encoder"]["params"], "weights_dir": str(tmp_path)}}}).state_dict()  # fmt: skip
    assert all(torch.equal(own[k], weights[k] + 1) for k in weights if k.startswith(TEXT))
    parser = train.build_parser()
    args = parser.parse_args(["--config_model", str(ROOT / "configs/model/tisynth_tiny.yaml"), "--clip_dir", "folder",
                              "--data_root", "x", "-b", str(ROOT / "configs/train/mini.yaml")])  # fmt: skip
    args.overrides = ["init.first_stage_model=x"]
    assert train.merge_config(args).model.params.text_encoder.params.weights_dir == "folder"
    config = {"model": {"target": "x", "params": {"text_encoder": {"target": "y"}}}}
    set_text_encoder(config, "tokenizer_dir", "tokenizer_dir", "folder")
    assert config["model"]["params"]["text_encoder"]["params"] == {"tokenizer_dir": "folder"}


# --- files that must be refused


class Payload:
    def __reduce__(self):
        return Path.touch, (PAYLOAD,)


def write_header(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(begin: int, end: int, shape: list[int]) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def write_bad(kind: str, path: Path) -> None:
    """A file of each kind that must be refused."""
    good = {"state_dict": {"weight": torch.ones(1000)}}
    if kind == "payload in a torch file":
        torch.save(good | {"callbacks": Payload()}, path)
    elif kind == "payload in an old torch file":
        torch.save(good | {"callbacks": Payload()}, path, _use_new_zipfile_serialization=False)
    elif kind == "payload in a bare pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif kind == "truncated torch file":
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:-700])
    elif kind == "web page":
        path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>" + " " * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zip of something else":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "x")
    elif kind == "wrong shapes":
        write_header(path, {"a": entry(0, 16, [5])}, bytes(16))
    elif kind == "overlapping tensors":
        write_header(path, {"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, bytes(24))
    elif kind == "truncated safetensors":
        write_header(path, {"a": entry(0, 16, [4])}, bytes(10))
    elif kind == "header beyond the end":
        path.write_bytes(struct.pack("<Q", 10**12) + b'{"a"')
    elif kind == "100,000 tensors":
        write_header(path, {f"k{i}": entry(4 * i, 4 * i + 4, [1]) for i in range(100_000)}, bytes(400_000))
    else:
        raise AssertionError(kind)


BAD = {
    "payload in a torch file": "holds more than tensors: .*convert_checkpoint.py .* --drop_objects",
    "payload in an old torch file": "cannot be read as tensors .*Nothing of it was run",
    "payload in a bare pickle": "cannot be read as tensors .*Nothing of it was run",
    "truncated torch file": "cannot be read as tensors",
    "web page": "is a web page, not weights",
    "empty": "is empty",
    "zip of something else": "cannot be read as tensors",
    "wrong shapes": "damaged or cut short",
    "overlapping tensors": "damaged or cut short",
    "truncated safetensors": "damaged or cut short",
    "header beyond the end": "damaged or cut short",
    "100,000 tensors": "has 100,000 tensors. Expected at most 20,000",
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_and_never_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.ckpt"
    write_bad(kind, path)
    with pytest.raises(UserError, match=BAD[kind]) as error:
        read_model_config(path)
    assert str(path) in str(error.value) and not PAYLOAD.exists()


@pytest.mark.parametrize("kind", BAD)
def test_segmentor_refuses_the_same_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from post_processing.segmentation.segmentor import read_checkpoint

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pth"
    write_bad(kind, path)
    with pytest.raises(ValueError, match="segmentor checkpoint .*bad.pth"):
        read_checkpoint(path)
    assert not PAYLOAD.exists()


def test_a_config_inside_a_file_may_only_name_our_networks(weights: dict[str, Tensor], tmp_path: Path):
    path = tmp_path / "x.safetensors"
    for target in ("os.system", "ldm.util.run_entry_point", "ldm.weights.checkpoint.Path", "torch.nn.Linear"):
        text_encoder = {"target": target, "params": {}}
        config = {"model": {**CONFIG, "params": {**CONFIG["params"], "text_encoder": text_encoder}}}
        save_safetensors(path, weights, OmegaConf.create(config))
        with pytest.raises(UserError, match=f"would call {target}"):
            read_model_config(path)
    save_safetensors(path, weights, metadata={"config": "model: {target: '${oc.env:HOME}'}"})
    with pytest.raises(UserError, match="interpolations"):
        read_model_config(path)


# --- conversion


def convert(*arguments: object) -> None:
    convert_checkpoint.main([str(argument) for argument in arguments])


def test_ckpt_to_safetensors_and_back(weights: dict[str, Tensor], tmp_path: Path):
    config = {"model": CONFIG}
    torch.save({"state_dict": weights, "config": config}, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.ckpt")
    found = open_checkpoint(tmp_path / "c.ckpt")
    assert_equal(found.read(), weights)
    assert OmegaConf.to_container(found.config) == config
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors")


def test_deltas_and_precision(method: TISynth, weights: dict[str, Tensor], tmp_path: Path):
    config = {**CONFIG, "params": {**CONFIG["params"], "train": ["all_in_attention", "reference"]}}
    save_safetensors(tmp_path / "all.safetensors", weights, OmegaConf.create({"model": config}))
    convert(tmp_path / "all.safetensors", tmp_path / "delta.safetensors", "--only_trainable")
    delta = open_checkpoint(tmp_path / "delta.safetensors").read()
    trained = ("ssl_stage_model.", "reference_statistics.")
    expected = {k: v for k, v in weights.items() if "trainable" in k or k.startswith(trained)}
    assert_equal(delta, expected)
    base = {k: torch.zeros_like(v) if k in expected else v for k, v in weights.items()}
    torch.save(base, tmp_path / "base.ckpt")
    convert(tmp_path / "base.ckpt", tmp_path / "delta.safetensors", tmp_path / "whole.safetensors")
    assert_equal(open_checkpoint(tmp_path / "whole.safetensors").read(), weights)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        convert(tmp_path / "all.safetensors", tmp_path / f"{name}.safetensors", "--dtype", name)
        found = open_checkpoint(tmp_path / f"{name}.safetensors").read()
        assert_equal(found, {k: v.to(dtype) if "." in k else v for k, v in weights.items()})
    save_safetensors(tmp_path / "large.safetensors", {"model.diffusion_model.out.2.bias": torch.tensor([1e6])})
    with pytest.raises(UserError, match="too large for fp16"):
        convert(tmp_path / "large.safetensors", tmp_path / "large16.safetensors", "--dtype", "fp16")


def test_weights_may_be_read_by_all_who_may_read_other_files_and_reach_the_disk(tmp_path: Path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(os.fstat(number).st_ino))
    (tmp_path / "other").touch()
    save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    stat = os.stat(tmp_path / "x.safetensors")
    assert stat.st_mode == os.stat(tmp_path / "other").st_mode
    assert synced == [stat.st_ino]


def test_safetensors_whose_header_begins_like_a_pickle(tmp_path: Path):
    for padding in range(0, 256, 8):  # among these is a header of 0x..80 bytes
        save_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(1)}, metadata={"note": "x" * padding})
        if (tmp_path / "a.safetensors").read_bytes()[0] == 0x80:
            break
    assert (tmp_path / "a.safetensors").read_bytes()[0] == 0x80
    assert open_checkpoint(tmp_path / "a.safetensors").metadata == {"note": "x" * padding}


def test_dropping_objects_keeps_the_tensors_and_runs_nothing(weights: dict[str, Tensor], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": weights, "callbacks": Payload()}, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", "--drop_objects")
    assert_equal(open_checkpoint(tmp_path / "b.safetensors").read(), weights)
    assert not PAYLOAD.exists()


def test_a_folder_is_read_and_not_written(weights: dict[str, Tensor], tmp_path: Path):
    save_safetensors(tmp_path / "a.safetensors", weights, OmegaConf.create({"model": CONFIG}))
    with pytest.raises(UserError, match="folder: its ending '' is unknown. Expected one of .safetensors"):
        convert(tmp_path / "a.safetensors", tmp_path / "folder")
    with pytest.raises(UserError, match="folder without weights"):
        open_checkpoint(ROOT / "configs")


def test_an_account_of_a_skeleton_reads_nothing(weights: dict[str, Tensor]):
    def fail() -> Tensor:
        raise AssertionError("read")

    with torch.device("meta"):
        skeleton = TISynth(**CONFIG["params"])
    tensors = {k: StoredTensor(tuple(v.shape), v.dtype, fail) for k, v in weights.items() if "." in k}
    assert "unexpected" in str(fill(skeleton, [Checkpoint("x", tensors)]))
