"""inference.py, really run on a tiny TISynth: what it writes, what it skips, what it refuses."""

import ast
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
from ldm.checkpoint import save_safetensors
from ldm.sampling.modes import Sampling
from ldm.util import instantiate_from_config, run_entry_point
from scripts import preview

pytest.importorskip("tokenizers")

REPOSITORY = Path(inference.__file__).parent
MODEL = {
    "target": "cldm.tisynth.TISynth",
    "params": {
        "unet": {
            "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [1, 2], "channel_mult": [1, 2],
            "num_heads": 4, "context_dim": 32,
        },
        "autoencoder": {
            "target": "ldm.modules.autoencoder.AutoencoderKL",
            "params": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1},
        },
        "text_encoder": {
            "target": "ldm.modules.text.ClipTextEncoder",
            "params": {
                "vocab_size": 1024, "width": 32, "layers": 1, "heads": 2, "max_length": 16,
                "tokenizer": "configs/model/mini_tokenizer.json",
            },
        },
        "class_table": "mini",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Tiny random checkpoint, and a manifest of three masks of two sizes with references of a third."""
    from omegaconf import OmegaConf

    root = tmp_path_factory.mktemp("inference")
    torch.manual_seed(0)
    method = instantiate_from_config(MODEL)
    for parameter in method.parameters():  # zero-initialised layers would hide conditions that do not arrive
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():  # random conditions say little: raise their voice above the rounding of pixels
        for name, parameter in method.named_parameters():
            if any(part in name for part in (".attn2.", "input_hint_block", "zero_convs")):
                parameter *= 4
    save_safetensors(root / "tiny.safetensors", method.state_dict(), OmegaConf.create({"model": MODEL}))
    random = np.random.default_rng(0)
    rows = []
    for index, (height, width) in enumerate([(8, 8), (8, 16), (8, 8)]):
        Image.fromarray(random.integers(0, 5, (height, width), np.uint8)).save(root / f"mask_{index}.png")
        Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8)).save(root / f"ref_{index}.png")
        rows.append({"source": f"mask_{index}.png", "prompt": "a satellite image of road",
                     "ref_image": f"ref_{index}.png"})  # fmt: skip
    (root / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(workspace, outdir, *extra, manifest="rows.json"):
    """Run inference.py's main in this process; returns the exit code."""
    paths = {"--ckpt": workspace / "tiny.safetensors", "--data_root": workspace, "--txt_file": workspace / manifest}
    argv = [str(part) for pair in paths.items() for part in pair]
    argv += ["--outdir", str(outdir), "--ddim_steps", "2", "--device", "cpu", *extra]
    with pytest.raises(SystemExit) as stop:
        run_entry_point(inference.main, argv)
    return stop.value.code


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in (folder / "images").iterdir()}


@pytest.fixture(scope="module")
def finished(workspace):
    """A complete run: three rows, two copies each."""
    outdir = workspace / "finished"
    assert run(workspace, outdir, "--num_per_mask", "2") == 0
    return outdir


def test_a_run_writes_images_index_and_record(workspace, finished):
    records = read_lines(finished / "index.jsonl")
    assert [(record["row"], record["copy"]) for record in records] == [(r, c) for r in range(3) for c in range(2)]
    assert records[3]["image"] == "images/mask_1_seed_10000043.png" and records[3]["seed"] == 10_000_043
    assert records[3]["mask"] == "mask_1.png" and records[3]["reference"] == "ref_1.png"
    images = pixels(finished)
    assert set(images) == {Path(record["image"]).name for record in records}
    for record in records:
        assert images[Path(record["image"]).name].shape == (record["height"], record["width"], 3)
    details = json.loads((finished / "run.json").read_text())
    assert len(details["fingerprint"]["checkpoint_sha256"]) == 64
    assert details["arguments"]["num_per_mask"] == 2 and details["config"]["model"]["target"] == MODEL["target"]
    assert sorted(path.name for path in finished.iterdir() if not path.name.startswith(".")) == [
        "images", "index.jsonl", "run.json",
    ]  # fmt: skip
    names = sorted(images)
    assert not np.array_equal(images[names[0]], images[names[1]])  # copies differ


def test_a_sample_does_not_depend_on_batch_or_shard(workspace, finished, tmp_path):
    for part in ("1/2", "0/2"):
        assert run(workspace, tmp_path, "--num_per_mask", "2", "--batch_size", "1", "--shard", part) == 0
    assert (tmp_path / "index.jsonl").read_text() == (finished / "index.jsonl").read_text()
    expected = pixels(finished)
    for name, image in pixels(tmp_path).items():
        # Another batch size sums in another order: at most the last bit of rounding may differ.
        assert np.abs(image.astype(int) - expected[name]).max() <= 1


def test_an_interrupted_run_is_completed_and_finished_images_stay(workspace, finished, tmp_path, monkeypatch):
    from ldm.models import synthesis

    whole = synthesis.sample_images
    calls = []

    def interrupted(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(len(arguments[2]))
        return whole(*arguments)

    monkeypatch.setattr(synthesis, "sample_images", interrupted)
    flags = ["--num_per_mask", "2", "--batch_size", "2"]
    with pytest.raises(KeyboardInterrupt):
        run(workspace, tmp_path, *flags)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert len(before) == 2
    index = tmp_path / "index.jsonl"
    index.write_text(index.read_text()[:-20])  # a line that the killed process could not finish
    monkeypatch.setattr(synthesis, "sample_images", whole)
    assert run(workspace, tmp_path, *flags) == 0
    assert index.read_text() == (finished / "index.jsonl").read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run(workspace, tmp_path, *flags, "--overwrite") == 0
    assert all(path.stat().st_mtime_ns != time for path, time in before.items())


def test_another_setting_is_refused_in_the_same_folder(workspace, finished, capsys):
    assert run(workspace, finished, "--scale", "2") == 2
    assert "scale was 9.0, is 2.0" in capsys.readouterr().err


def test_size_fixed_noise_and_jpeg(workspace, tmp_path):
    flags = ["--H", "16", "--W", "12", "--ext", "jpg", "--fixed_code", "--num_per_mask", "2", "--num_workers", "1"]
    assert run(workspace, tmp_path, *flags) == 0
    images = pixels(tmp_path)
    assert len(images) == 6 and all(image.shape == (16, 12, 3) for image in images.values())
    first, second = (images[f"mask_0_seed_{number}.jpg"] for number in (42, 10_000_042))
    assert np.abs(first.astype(int) - second).max() <= 3
    with Image.open(tmp_path / "images" / "mask_0_seed_42.jpg") as image:
        assert image.layer[0][1:3] == (1, 1)  # luma is sampled like chroma: 4:4:4


def test_mask_reference_prompt_seed_and_eta_all_arrive(workspace, tmp_path):
    base = {"source": "mask_0.png", "prompt": "a satellite image of road", "ref_image": "ref_0.png"}
    changes = [{}, {"source": "mask_2.png"}, {"prompt": "water"}, {"ref_image": "ref_1.png"}]
    (workspace / "changes.json").write_text("".join(json.dumps(base | change) + "\n" for change in changes))
    assert run(workspace, tmp_path / "a", "--fixed_code", manifest="changes.json") == 0
    assert run(workspace, tmp_path / "b", "--fixed_code", "--ddim_eta", "1", manifest="changes.json") == 0
    results = [image.tobytes() for image in (pixels(tmp_path / "a") | {
        "b" + name: image for name, image in pixels(tmp_path / "b").items()
    }).values()]  # fmt: skip
    assert len(set(results)) == 8


def test_samples_that_are_not_finite_are_listed_not_written(workspace, tmp_path, monkeypatch):
    from ldm.models import synthesis

    whole = synthesis.sample_images

    def broken(method, batch, *rest):
        images = whole(method, batch, *rest).clone()
        images[[index == 2 for index in batch["job"].tolist()], 0, 0, 0] = torch.nan
        return images

    monkeypatch.setattr(synthesis, "sample_images", broken)
    assert run(workspace, tmp_path) == 3
    assert [record["row"] for record in read_lines(tmp_path / "failures.jsonl")] == [2]
    assert [record["row"] for record in read_lines(tmp_path / "index.jsonl")] == [0, 1]
    assert sorted(pixels(tmp_path)) == ["mask_0_seed_42.png", "mask_1_seed_43.png"]
    monkeypatch.setattr(synthesis, "sample_images", whole)
    assert run(workspace, tmp_path) == 0
    assert not (tmp_path / "failures.jsonl").exists() and len(read_lines(tmp_path / "index.jsonl")) == 3


def test_ten_kinds_of_bad_rows_are_one_error_before_the_model_loads(workspace, tmp_path, capsys, monkeypatch):
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(workspace / "unknown_id.png")
    Image.fromarray(np.zeros((8, 10), np.uint8)).save(workspace / "odd_size.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(workspace / "lossy.jpg")
    (workspace / "torn.png").write_bytes((workspace / "ref_0.png").read_bytes()[:200])
    good = {"source": "mask_0.png", "prompt": "road", "ref_image": "ref_0.png"}
    bad = [
        "{not json", "[1]", {"source": "mask_0.png", "prompt": "road"}, good | {"source": 5}, good | {"prompt": " "},
        good | {"source": "../mask_0.png"}, good | {"source": "absent.png"}, good | {"source": "lossy.jpg"},
        good | {"ref_image": "torn.png"}, good | {"source": "unknown_id.png"}, good | {"source": "odd_size.png"},
    ]  # fmt: skip
    lines = [row if isinstance(row, str) else json.dumps(row) for row in [good, *bad]]
    (workspace / "bad.json").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("ldm.models.loading.load_method", lambda *_: pytest.fail("the model was loaded"))
    assert run(workspace, tmp_path / "out", manifest="bad.json") == 2
    text = capsys.readouterr().err
    assert text.count("error:") == 1
    assert all(f"line {number}:" in text for number in range(2, 13)) and "line 1:" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt", "absent.safetensors"], "file not found: absent.safetensors"),
        (["--txt_file", "absent.json"], "absent.json"),
        (["--C", "3"], "--C: 3"),
        (["--f", "8"], "--f: 8"),
        (["--H", "16"], "--H 16 --W None"),
        (["--H", "18", "--W", "16"], "multiples of 4"),
        (["--ddim_steps", "1000"], "1000 steps"),
        (["--device", "abacus"], "--device: abacus"),
        (["--dataset", "gid24"], "24 classes"),
    ],
)
def test_settings_that_do_not_fit_are_errors(workspace, tmp_path, capsys, flags, message):
    assert run(workspace, tmp_path / "out", *flags) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and message in text
    assert not (tmp_path / "out").exists()


def test_checkpoint_without_config_needs_one_and_ckpt_files_work(workspace, finished, tmp_path, capsys):
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(workspace / "tiny.safetensors")}, tmp_path / "tiny.ckpt")
    OmegaConf.save(OmegaConf.create({"model": MODEL}), tmp_path / "tiny.yaml")
    assert run(workspace, tmp_path / "out", "--ckpt", str(tmp_path / "tiny.ckpt")) == 2
    assert "Add --config" in capsys.readouterr().err
    flags = ["--ckpt", str(tmp_path / "tiny.ckpt"), "--config", str(tmp_path / "tiny.yaml")]
    assert run(workspace, tmp_path / "out", *flags) == 0
    expected = pixels(finished)
    for name, image in pixels(tmp_path / "out").items():
        assert np.abs(image.astype(int) - expected[name]).max() <= 1


def test_every_flag_is_read_has_help_and_a_default():
    parser = inference.build_parser()
    read = {
        node.attr
        for node in ast.walk(ast.parse((REPOSITORY / "inference.py").read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    read |= {field.name for field in fields(Sampling)} | {"mode"}  # by choose_sampling
    actions = [action for action in parser._actions if action.dest != "help"]
    assert {action.dest for action in actions} == read - {"error"}
    assert all(action.help for action in actions)
    assert {action.dest for action in actions if action.required} == {"ckpt", "txt_file"}


def test_the_command_line_is_checked_without_importing_torch():
    code = (
        "import sys, inference\n"
        "try: inference.main(['--ckpt', 'a', '--txt_file', 'b', '--shard', '2/2'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "assert 'torch' not in sys.modules\n"
        "try: inference.main(['--ckpt', 'a', '--txt_file', 'b', '--ddim_step', '2'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Expected i/n" in done.stderr and "unrecognized arguments: --ddim_step" in done.stderr


@pytest.mark.parametrize("layout", ["auto", "grid"])
def test_contact_sheet_shows_every_result(finished, tmp_path, layout):
    out = tmp_path / "sheet.png"
    assert preview.main([str(finished), "--out", str(out), "--layout", layout, "--tile", "64"]) == 0
    sheet = np.asarray(Image.open(out))
    columns = 7 if layout == "grid" else 4  # grid: mask and 3 references x 2 copies; list: mask, reference, 2 copies
    assert sheet.shape[1] == 12 + 70 * columns
    # The first mask, enlarged, in class colours near the left edge.
    top = 6 + (70 + 18 if layout == "grid" else 0)
    palette = {colour for _, colour in preview.Sources(finished, None).legend(read_lines(finished / "index.jsonl"))}
    corner = sheet[top : top + 64, 6:70].reshape(-1, 3)
    assert palette & set(map(tuple, corner.tolist()))
