"""Vectors of prompts: against the stock pipeline, a file a prompt, upstream's layout, restarts, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from ldm.data.manifest import read_manifest
from ldm.data.vectors import PromptVectors
from ldm.modules.text_hf import PromptEncoder
from ldm.util import UserError, run_entry_point
from scripts import encode_prompts, make_tiny_sd35

PROMPTS = ["a satellite image of road", "a satellite image of water, road", "a satellite image of road"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sd35")
    for name, is_json in (("lists", False), ("json", True)):
        make_tiny_sd35.write_folder(root / name, 0, is_json)
    return {name: root / name for name in ("lists", "json")}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps({"source": f"{i}.png", "prompt": prompt}) + "\n"
                            for i, prompt in enumerate(PROMPTS)))  # fmt: skip
    return path


def encode(folder: Path, manifest: Path, out: Path, *extra: str) -> int:
    with pytest.raises(SystemExit) as stop:
        run_entry_point(encode_prompts.main, ["--sd35", str(folder), "--txt_file", str(manifest), "--outdir", str(out),
                                              "--device", "cpu", *extra])  # fmt: skip
    return stop.value.code


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_vectors_are_the_stock_pipelines(folders: dict[str, Path]):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folders["lists"])
    found = {}
    for name, folder in folders.items():
        encoder = PromptEncoder(folder, dtype="fp32")
        encoder.load()
        found[name] = [encoder.encode(prompt) for prompt in ("", PROMPTS[1], "road, " * 200)]
    for prompt, (context, pooled) in zip(("", PROMPTS[1], "road, " * 200), found["lists"], strict=True):
        with torch.no_grad():
            stock, _, stock_pooled, _ = pipeline.encode_prompt(
                prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=256)
        assert context.shape == (1, 333, 64) and torch.equal(context, stock) and torch.equal(pooled, stock_pooled)
    assert all(torch.equal(a, b) for pair in zip(*found.values(), strict=True) for a, b in zip(*pair, strict=True))
    without = PromptEncoder(folders["lists"], dtype="fp32", use_t5=False)
    without.load()
    context, _ = without.encode(PROMPTS[1])
    assert torch.equal(context[:, :77], found["lists"][1][0][:, :77]) and not context[:, 77:].any()
    assert context.shape == (1, 333, 64)


def test_one_file_a_prompt_whoever_makes_it(folders: dict[str, Path], manifest: Path, tmp_path: Path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert encode(folders["lists"], manifest, whole, "--upstream_layout", "fusu/train") == 0
    assert len(list((whole / "prompts").iterdir())) == 3  # two distinct ones and the empty one
    rows = whole / "fusu/train"
    assert sorted(path.name for path in rows.iterdir()) == [*(f"{i}.safetensors" for i in range(3)), "index_.jsonl"]
    assert (rows / "0.safetensors").samefile(rows / "2.safetensors")
    assert [json.loads(line) for line in (rows / "index_.jsonl").read_text().splitlines()] == [
        {"source": f"{i}.png", "prompts": prompt, "index": i} for i, prompt in enumerate(PROMPTS)]
    for part in ("1/2", "0/2"):
        assert encode(folders["lists"], manifest, shared, "--upstream_layout", "fusu/train", "--shard", part) == 0
    assert contents(shared) == contents(whole)
    for path in list((shared / "prompts").iterdir())[:2]:  # as a killed process leaves it
        path.unlink()
    (shared / "fusu/train/index_.jsonl").unlink()
    assert encode(folders["lists"], manifest, shared, "--upstream_layout", "fusu/train") == 0
    assert contents(shared) == contents(whole)
    ours, theirs = PromptVectors(whole), PromptVectors(rows)
    for prompt in PROMPTS:
        assert all(torch.equal(a, b) for a, b in zip(ours.read(prompt), theirs.read(prompt), strict=True))
    assert ours.read("")[0].dtype == torch.bfloat16 and ours.fingerprint()["t5_tokens"] == 256


def test_manifests_of_the_public_code_are_read(tmp_path: Path):
    from PIL import Image

    rows = [{"source": f"{i}.png", "prompts": prompt, "index": 7} for i, prompt in enumerate(PROMPTS)]
    for i in range(3):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "index_.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_manifest(tmp_path / "index_.jsonl", tmp_path, need=("prompt",))
    assert [row.prompt for row in read] == PROMPTS


def test_what_does_not_belong_together_is_refused(folders: dict[str, Path], manifest: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert encode(folders["lists"], manifest, out) == 0
    assert encode(folders["lists"], manifest, out, "--without_t5") == 2
    assert "of other settings" in capsys.readouterr().err
    vectors = PromptVectors(out)
    vectors.check(PROMPTS, 64, 32)
    with pytest.raises(UserError, match=r"lacks 1 of 2 prompts \('unknown'\)"):
        vectors.check([PROMPTS[0], "unknown"], 64, 32)
    with pytest.raises(UserError, match="Expected 4096 and 2048"):
        vectors.check(PROMPTS, 4096, 2048)
    vectors.path(PROMPTS[0]).write_bytes(b"torn")
    with pytest.raises(UserError, match="no vectors of a prompt"):
        vectors.read(PROMPTS[0])
    with pytest.raises(FileNotFoundError, match="encode_prompts.py"):
        PromptVectors(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither prompts/ nor index_.jsonl"):
        PromptVectors(folders["lists"])
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "index_.jsonl").write_text('{"prompts": "a", "index": 0}\n{"prompts": "b", "index": 2}\n')
    with pytest.raises(UserError, match="line 2: has index 2. Expected 1"):
        PromptVectors(rows)


def test_damaged_folders_are_refused(folders: dict[str, Path], tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(folders["lists"], broken)
    shutil.rmtree(broken / "tokenizer")
    shutil.copytree(folders["lists"] / "tokenizer_2", broken / "tokenizer")
    (broken / "tokenizer/merges.txt").unlink()
    encoder = PromptEncoder(broken)
    with pytest.raises(UserError, match="not a tokenizer. Expected tokenizer.json, or vocab.json and merges.txt"):
        encoder.load()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (broken / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    (broken / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="a tokenizer of [0-9]+ tokens for an encoder of 64"):
        encoder.load()
    shutil.rmtree(broken / "text_encoder_3")
    with pytest.raises(UserError, match="has no text_encoder_3.*--without_t5"):
        PromptEncoder(broken)
