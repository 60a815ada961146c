"""The same weights in diffusers and transformers give the same numbers; all names of SD1.5 size have counterparts."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny import ROOT, randomize
from torch import Tensor, nn

from cldm.tisynth import TISynth
from ldm.modules.blocks import set_norm_groups
from ldm.modules.unet import UNet
from ldm.util import load_config
from ldm.weights.checkpoint import open_checkpoint, save_safetensors
from ldm.weights.load import build_skeleton
from ldm.weights.names import PARTS, to_our_names
from scripts import convert_checkpoint

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH = {"model_channels": 32, "channel_mult": [1, 2, 2], "num_res_blocks": 1, "attention_resolutions": [1, 2],
         "num_heads": 4, "context_dim": 24}  # fmt: skip
SIZES = [(8, 8), (8, 16), (12, 4)]
CONFIG = {"target": "cldm.tisynth.TISynth", "params": {
    "unet": WIDTH, "norm_groups": 32, "class_table": "mini", "hint_mode": "one_hot", "coupling": "upstream",
    "autoencoder": {"target": "ldm.modules.autoencoder.AutoencoderKL",
                    "params": {"ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1}},
    "text_encoder": {"target": "ldm.modules.text.ClipTextEncoder",
                     "params": {"vocab_size": 1024, "width": 24, "layers": 2, "heads": 2, "max_length": 16,
                                "tokenizer": str(ROOT / "configs/model/mini_tokenizer.json")}}}}  # fmt: skip


SHARED = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "cross_attention_dim": 24, "attention_head_dim": 4,
          "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")}  # fmt: skip
CLASSES = 5  # of the table, whose one-hot masks the control branch takes


@pytest.fixture(scope="module")
def theirs() -> dict[str, nn.Module]:
    """The four parts in diffusers and transformers, with random weights."""
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            **SHARED, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")),
        "controlnet": diffusers.ControlNetModel(**SHARED, conditioning_channels=CLASSES),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 64, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=1024, hidden_size=24, intermediate_size=96, num_attention_heads=2, num_hidden_layers=2,
            max_position_embeddings=16, hidden_act="quick_gelu", bos_token_id=1022, eos_token_id=1023)),
    }  # fmt: skip
    return {name: randomize(part, 0.15).eval() for name, part in parts.items()}


@pytest.fixture(scope="module")
def folder(theirs: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts as diffusers and transformers write them."""
    root = tmp_path_factory.mktemp("diffusers")
    for name, part in theirs.items():
        part.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def method(folder: Path) -> TISynth:
    """A TISynth filled from the folder by our reader, which must have a tensor for every one of the four parts."""
    method = randomize(TISynth(**CONFIG["params"]), 0.15).eval()
    stored = open_checkpoint(folder).tensors
    expected = {name for name in method.state_dict() if name.startswith(tuple(PARTS.values()))}
    assert set(stored) == {name for name in expected if "trainable" not in name}
    result = method.load_state_dict({name: one.read() for name, one in stored.items()}, strict=False)
    assert not result.unexpected_keys
    return method


def inputs(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 4, height, width, generator=generator), torch.tensor([3, 981]),
            torch.randn(2, 7, 24, generator=generator))  # fmt: skip


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.std() > 1e-3
    return float((ours - theirs).abs().max())


@torch.no_grad()
def test_unet(method: TISynth, theirs: dict[str, nn.Module], record_property) -> None:
    ours = UNet(in_channels=4, out_channels=4, **WIDTH).eval()
    set_norm_groups(ours, 32)
    weights = method.model.diffusion_model.state_dict()
    ours.load_state_dict({name: weights[name] for name in ours.state_dict()})
    for size in SIZES:
        latent, timestep, context = inputs(*size)
        found = difference(ours(latent, timestep, context), theirs["unet"](latent, timestep, context).sample)
        record_property(f"unet {size}", found)
        assert found <= 1e-4


@torch.no_grad()
def test_unet_of_stable_diffusion_2(tmp_path: Path, record_property) -> None:
    """Heads of one width, linear projections and a folder as diffusers writes it."""
    theirs = randomize(diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64), layers_per_block=1, cross_attention_dim=24, attention_head_dim=(2, 4, 4),
        use_linear_projection=True, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")), 0.15).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path / "unet")
    stored = open_checkpoint(tmp_path).tensors
    ours = UNet(in_channels=4, out_channels=4, **{**WIDTH, "num_head_channels": 16}).eval()
    set_norm_groups(ours, 32)
    ours.load_state_dict({name: stored[PARTS["unet"] + name].read() for name in ours.state_dict()})
    assert len(stored) == len(ours.state_dict())
    for size in SIZES:
        latent, timestep, context = inputs(*size)
        found = difference(ours(latent, timestep, context), theirs(latent, timestep, context).sample)
        record_property(f"unet of SD2 {size}", found)
        assert found <= 1e-4


def test_sd21_has_the_sizes_of_stable_diffusion_2_1() -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=1024, num_hidden_layers=23, num_attention_heads=16, intermediate_size=4096, hidden_act="gelu"))
    method = build_skeleton(load_config([ROOT / "configs/model/tisynth_sd21.yaml"]))
    plain = [name for name, _ in method.model.diffusion_model.named_parameters() if "trainable" not in name]
    own = dict(method.model.diffusion_model.named_parameters())
    assert sum(own[name].numel() for name in plain) == sum(p.numel() for p in unet.parameters()) == 865_910_724
    names, _ = to_our_names(unet.state_dict())
    assert {name.removeprefix(PARTS["unet"]) for name in names} == set(plain)
    assert sum(p.numel() for p in method.cond_stage_model.parameters()) == sum(p.numel() for p in text.parameters())
    heads = [block.attn1.heads for name, block in method.model.diffusion_model.named_modules()
             if name.endswith("transformer_blocks.0") and name.startswith("input")]  # fmt: skip
    assert heads == [5, 5, 10, 10, 20, 20] and method.prediction_type == "v"


@torch.no_grad()
def test_controlnet(method: TISynth, theirs: dict[str, nn.Module], record_property) -> None:
    for height, width in SIZES:
        latent, timestep, context = inputs(height, width)
        hint = torch.rand(2, CLASSES, 8 * height, 8 * width)
        down, middle = theirs["controlnet"](latent, timestep, context, hint, return_dict=False)
        ours = method.control_model(latent, timestep, context, hint).projected
        assert len(ours) == len(down) + 1
        found = max(difference(a, b) for a, b in zip(ours, [*down, middle], strict=True))
        record_property(f"controlnet {height, width}", found)
        assert found <= 1e-4


@torch.no_grad()
def test_autoencoder(method: TISynth, theirs: dict[str, nn.Module], record_property) -> None:
    theirs, ours = theirs["vae"], method.first_stage_model
    for height, width in [(32, 32), (32, 64), (24, 16)]:
        image = torch.rand(2, 3, height, width) * 2 - 1
        latent = ours.encode(image)
        posterior = theirs.encode(image).latent_dist
        found = max(difference(latent.mean, posterior.mean), difference(latent.logvar, posterior.logvar),
                    difference(ours.decode(latent.mean), theirs.decode(latent.mean).sample))  # fmt: skip
        record_property(f"autoencoder {height, width}", found)
        assert found <= 1e-4


@torch.no_grad()
def test_text_encoder(method: TISynth, theirs: dict[str, nn.Module], record_property) -> None:
    ids = torch.randint(0, 1000, (3, 16), generator=torch.Generator().manual_seed(0))
    found = difference(method.cond_stage_model(ids), theirs["text_encoder"](ids).last_hidden_state)
    record_property("text", found)
    assert found <= 1e-4


def test_a_folder_becomes_a_file_with_every_bit(method: TISynth, folder: Path, tmp_path: Path) -> None:
    """With `tisynth/` beside the parts, where conversions of old put what diffusers has no place for."""
    own = method.state_dict()
    shutil.copytree(folder, tmp_path / "folder")
    rest = {name: value for name, value in own.items() if name not in open_checkpoint(folder).tensors}
    save_safetensors(tmp_path / "folder/tisynth/model.safetensors", rest, OmegaConf.create({"model": CONFIG}))
    convert_checkpoint.main([str(tmp_path / "folder"), str(tmp_path / "one.safetensors")])
    back = open_checkpoint(tmp_path / "one.safetensors")
    assert set(back.tensors) == set(own) and back.config["model"]["target"] == CONFIG["target"]
    assert all(torch.equal(back.tensors[name].read(), own[name]) for name in own)


def test_old_names_of_the_autoencoder(theirs: dict[str, nn.Module], folder: Path, tmp_path: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = theirs["vae"].state_dict()
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert any(".proj_attn." in key for key in weights)
    save_safetensors(tmp_path / "vae.safetensors", weights)
    found, expected = open_checkpoint(tmp_path / "vae.safetensors").read(), open_checkpoint(folder / "vae").read()
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_sharded_and_single_parts(method: TISynth, theirs: dict[str, nn.Module], folder: Path, tmp_path: Path) -> None:
    theirs["unet"].save_pretrained(tmp_path / "unet", max_shard_size="1MB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    own = method.state_dict()
    sharded = open_checkpoint(tmp_path).tensors
    assert len(sharded) == sum(name.startswith(PARTS["unet"]) and "trainable" not in name for name in own)
    for path in (tmp_path / "unet", folder / "controlnet", folder / "vae" / "diffusion_pytorch_model.safetensors",
                 folder / "text_encoder"):  # fmt: skip
        tensors = open_checkpoint(path).tensors
        assert tensors and all(torch.equal(t.read(), own[name]) for name, t in tensors.items())
    index = next((tmp_path / "unet").glob("*.json.*")) if list((tmp_path / "unet").glob("*.json.*")) else \
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"  # fmt: skip
    content = json.loads(index.read_text())
    content["weight_map"] = {name: "../elsewhere.safetensors" for name in content["weight_map"]}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside its folder"):
        open_checkpoint(tmp_path)


# diffusers' own configurations of SD1.5; the shapes of its modules are the reference, not our mapper.
SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}


def test_sd15_names_and_shapes_are_bijective() -> None:
    rows = [line.split("\t") for line in (ROOT / "tests/data/tisynth_sd15_keys.tsv").read_text().splitlines()
            if not line.startswith("#")]  # fmt: skip
    ours = {name: tuple(int(n) for n in shape.split("x")) for name, shape in rows}
    with torch.device("meta"):
        theirs = {
            "unet": diffusers.UNet2DConditionModel(**SD15),
            "controlnet": diffusers.ControlNetModel(**SD15),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)),
        }  # fmt: skip
    for part, count in {"unet": 686, "controlnet": 340, "vae": 248, "text_encoder": 196}.items():
        found = {name: tuple(t.shape) for name, t in theirs[part].state_dict().items() if "position_ids" not in name}
        names, _ = to_our_names(found)
        own = {name for name in ours if name.startswith(PARTS[part]) and "trainable" not in name}
        assert set(names) == own and len(own) == len(found) == len(set(names.values())) == count
        for mine, other in names.items():
            shape = ours[mine]
            assert found[other] in (shape, shape[:2] if shape[2:] == (1, 1) and part == "vae" else shape)


def test_tokens_of_200_prompts_equal_open_clip() -> None:
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed")
    # Its tokenizer alone: the whole package needs torchvision.
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", Path(spec.origin).parent / "tokenizer.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    from ldm.modules.tokenizer import load_tokenizer

    words = (ROOT / "configs/model/mini_tokenizer_words.txt").read_text(encoding="utf-8").split()
    generator = torch.Generator().manual_seed(0)
    prompts = ["", "a satellite image of industrial land paddy field", "Café, naïve: 12,345 m² — «rivière»!", "x" * 500]
    while len(prompts) < 200:
        picks = torch.randint(len(words), (int(torch.randint(1, 60, (), generator=generator)),), generator=generator)
        prompts.append(" ".join(words[i].upper() if i % 7 == 0 else words[i] for i in picks.tolist()))
    ours = load_tokenizer("clip", pad=0)(prompts)
    assert torch.equal(ours, theirs.SimpleTokenizer()(prompts))
