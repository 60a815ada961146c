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
from omegaconf import OmegaConf
from painting import (
    MODEL,
    REPOSITORY,
    arguments,
    contents,
    finished_shards,
    make_workspace,
    pixels,
    read_lines,
    run,
    write_rows,
)
from PIL import Image
from pixel import TINY, config, make

import inference
from ldm.data.classes import ClassTable
from ldm.generation.generator import BatchGenerator, generate
from ldm.generation.machine import compile_blocks
from ldm.generation.plan import make_plan
from ldm.sampling.modes import METHOD_SETTINGS, Rectify, Sampling
from ldm.util import UserError
from ldm.weights.checkpoint import save_safetensors
from ldm.weights.load import load_method
from post_processing.run_index import read_run
from scripts import preview

pytest.importorskip("tokenizers")

@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Tiny random checkpoint, and a manifest of three masks of two sizes with references of a third."""
    return make_workspace(tmp_path_factory.mktemp("inference"))


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
    assert len(details["settings"]["checkpoint_sha256"]) == 64
    assert details["arguments"]["num_per_mask"] == 2 and details["config"]["model"]["target"] == MODEL["target"]
    assert sorted(path.name for path in finished.iterdir() if not path.name.startswith(".")) == [
        "images", "index.jsonl", "run.json", "shards",
    ]  # fmt: skip
    assert finished_shards(finished) == ["000000.json"]
    names = sorted(images)
    assert not np.array_equal(images[names[0]], images[names[1]])  # copies differ


def test_a_sample_does_not_depend_on_batch_loader_or_shard(workspace, finished, tmp_path):
    flags = ["--num_per_mask", "2", "--batch_size", "3", "--num_workers", "1", "--shard_size", "1"]
    for part in ("1/2", "0/2"):
        assert run(workspace, tmp_path, *flags, "--shard", part) == 0
    assert finished_shards(tmp_path) == ["000000.json", "000001.json", "000002.json"]
    assert contents(tmp_path) == contents(finished)


def test_an_interrupted_run_is_completed_and_finished_images_stay(workspace, finished, tmp_path, monkeypatch):
    from ldm.generation import generator as synthesis

    whole = synthesis.sample_images
    calls = []

    def interrupted(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return whole(*arguments, **options)

    monkeypatch.setattr(synthesis, "sample_images", interrupted)
    flags = ["--num_per_mask", "2", "--batch_size", "2"]
    with pytest.raises(KeyboardInterrupt):
        run(workspace, tmp_path, *flags)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert len(before) == 4 and not (tmp_path / "index.jsonl").exists()
    torn = next(iter(before))
    torn.write_bytes(torn.read_bytes()[:50])  # what a power cut may leave of it
    monkeypatch.setattr(synthesis, "sample_images", whole)
    assert run(workspace, tmp_path, *flags) == 0
    assert contents(tmp_path) == contents(finished)
    assert {path for path, time in before.items() if path.stat().st_mtime_ns != time} == {torn}
    assert run(workspace, tmp_path, *flags, "--overwrite") == 0
    assert all(path.stat().st_mtime_ns != time for path, time in before.items())
    assert contents(tmp_path) == contents(finished)


def test_more_copies_are_added_to_a_finished_run(workspace, finished, tmp_path):
    for copies in ("1", "2", "1"):
        assert run(workspace, tmp_path, "--num_per_mask", copies) == 0
    assert contents(tmp_path) == contents(finished)


def test_copies_stay_when_damage_is_repaired_without_asking_for_them(workspace, finished, tmp_path):
    assert run(workspace, tmp_path, "--num_per_mask", "2") == 0
    next((tmp_path / "images").iterdir()).write_bytes(b"damaged")
    assert run(workspace, tmp_path, "--verify") == 3
    assert run(workspace, tmp_path) == 0
    assert contents(tmp_path) == contents(finished)


def test_tars_of_older_runs_are_refused(workspace, finished, tmp_path, capsys):
    assert run(workspace, tmp_path, "--format", "folder") == 0 and run(workspace, tmp_path, "--format", "tar") == 2
    record = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(record.replace('"format": "folder"', '"format": "tar"'))
    with pytest.raises(UserError, match="images are in tars. Expected files. Generate them again"):
        read_run(tmp_path)
    assert run(workspace, tmp_path) == 2
    assert 'format was "tar", is "folder"' in capsys.readouterr().err


def test_a_plan_is_generated_without_a_folder(workspace, finished, tmp_path):
    argv = arguments(workspace, tmp_path / "none", "--num_per_mask", "2")
    results = [result for batch in generate(make_plan(inference.build_parser().parse_args(argv))) for result in batch]
    expected = pixels(finished)
    assert {Path(result.job.record["image"]).name for result in results} == set(expected) and len(expected) == 6
    for result in results:
        assert np.array_equal(result.pixels, expected[Path(result.job.record["image"]).name])
    assert not (tmp_path / "none").exists()


def test_another_setting_is_refused_in_the_same_folder(workspace, finished, capsys):
    assert run(workspace, finished, "--scale", "2") == 2
    assert "guidance_scale was 9.0, is 2.0" in capsys.readouterr().err


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


def test_a_sample_may_start_from_its_own_image(workspace, tmp_path):
    rows = read_lines(workspace / "rows.json")
    random = np.random.default_rng(1)
    for index, row in enumerate(rows):
        height, width = np.asarray(Image.open(workspace / row["source"])).shape
        row["target"] = f"start_{index}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(workspace / row["target"])
    write_rows(workspace / "started.json", rows)
    other = [{**row, "target": "start_2.png" if index == 0 else row["target"]} for index, row in enumerate(rows)]
    write_rows(workspace / "other.json", other)
    weak = ["--strength", "0.6"]
    for name, manifest, flags in (("half", "started", weak), ("swapped", "other", weak), ("unstarted", "started", []),
                                  ("again", "started", [*weak, "--shard_size", "1", "--num_workers", "1"]),
                                  ("plain", "rows", [])):  # fmt: skip
        assert run(workspace, tmp_path / name, *flags, manifest=f"{manifest}.json") == 0
    half, swapped, plain = (pixels(tmp_path / name) for name in ("half", "swapped", "plain"))
    changed = [not np.array_equal(half[name], swapped[name]) for name in sorted(half)]
    assert changed == [True, False, False]  # the image arrives, each at its row
    assert contents(tmp_path / "again") == contents(tmp_path / "half")
    assert contents(tmp_path / "unstarted") == contents(tmp_path / "plain")  # without the flag nobody looks at it
    assert all(not np.array_equal(half[name], plain[name]) for name in half)
    assert "strength" not in json.loads((tmp_path / "plain/run.json").read_text())["settings"]
    assert run(workspace, tmp_path / "half", "--strength", "0.5", manifest="started.json") == 2
    assert run(workspace, tmp_path / "half", manifest="started.json") == 2


def test_the_start_may_take_on_the_colours_of_the_reference(workspace, tmp_path, capsys):
    rows = read_lines(workspace / "rows.json")
    for name in ("plain", "tinted"):
        for index, row in enumerate(rows):
            height, width = np.asarray(Image.open(workspace / row["source"])).shape
            noise = np.random.default_rng(index).normal(120, 40, (height, width, 3)).clip(0, 255)
            changed = noise if name == "plain" else 0.5 * noise + [120, 20, 60]
            Image.fromarray(changed.astype(np.uint8)).save(workspace / f"{name}_{index}.png")
        write_rows(workspace / f"{name}.json",
                   [{**row, "target": f"{name}_{index}.png"} for index, row in enumerate(rows)])
    flags = ["--strength", "0.3", "--recolour_start", "--scale", "1"]
    for name in ("plain", "tinted"):
        assert run(workspace, tmp_path / name, *flags, manifest=f"{name}.json") == 0
        assert run(workspace, tmp_path / f"own_{name}", "--strength", "0.3", "--scale", "1",
                   manifest=f"{name}.json") == 0  # fmt: skip
    settings = json.loads((tmp_path / "plain/run.json").read_text())["settings"]
    assert settings["recolour_start"] is True
    assert "recolour_start" not in json.loads((tmp_path / "own_plain/run.json").read_text())["settings"]
    images = {name: [image.astype(float) for _, image in sorted(pixels(tmp_path / name).items())]
              for name in ("plain", "tinted", "own_plain", "own_tinted")}  # fmt: skip
    for plain, tinted, own, other in zip(*images.values(), strict=True):  # the tint is gone
        assert np.abs(plain - tinted).mean() < 0.2 * np.abs(own - other).mean()
        assert np.abs(plain - own).mean() > 0.2 * np.abs(own - other).mean()
    assert run(workspace, tmp_path / "plain", "--strength", "0.3", "--scale", "1", manifest="plain.json") == 2
    assert run(workspace, tmp_path / "none", "--recolour_start") == 2
    assert "recolour_start is True. Expected false with strength 1" in capsys.readouterr().err


def test_starting_from_an_image_needs_one_of_the_masks_size(workspace, tmp_path, capsys):
    assert run(workspace, tmp_path / "none", "--strength", "0.5") == 2
    assert "target" in capsys.readouterr().err and not (tmp_path / "none").exists()
    rows = [{**row, "target": "ref_0.png"} for row in read_lines(workspace / "rows.json")]
    write_rows(workspace / "large.json", rows)
    assert run(workspace, tmp_path / "none", "--strength", "0.5", manifest="large.json") == 2
    assert "Expected equal sizes" in capsys.readouterr().err


def test_samples_that_are_not_finite_are_listed_not_written(workspace, tmp_path, monkeypatch):
    from ldm.generation import generator as synthesis

    whole = synthesis.sample_images

    def broken(batch_generator, batch, seeds, chosen, use_autocast):
        images = whole(batch_generator, batch, seeds, chosen, use_autocast)
        images[[batch["job"][i].row.index == 2 for i in chosen], 0, 0, 0] = torch.nan
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
    monkeypatch.setattr("ldm.generation.generator.load_method", lambda *_: pytest.fail("the model was loaded"))
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
        (["--classes", "gid24"], "24 classes"),
    ],
)
def test_settings_that_do_not_fit_are_errors(workspace, tmp_path, capsys, flags, message):
    assert run(workspace, tmp_path / "out", *flags) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and message in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("flags", [["--mode", "turbo"], ["--reuse_every", "2"], ["--share_control"]])
def test_savings_that_a_method_has_not_are_refused_before_it_is_loaded(tmp_path, capsys, monkeypatch, name, flags):
    save_safetensors(tmp_path / "tiny.safetensors", make(name).state_dict(), OmegaConf.create({"model": config(name)}))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "rows.json").write_text('{"source": "mask.png"}\n')
    monkeypatch.setattr("ldm.generation.generator.load_method", lambda *_: pytest.fail("the model was loaded"))
    assert run(tmp_path, tmp_path / "out", *flags) == 2
    assert "has no share_control" in (text := capsys.readouterr().err) or "has no reuse_every" in text
    assert not (tmp_path / "out").exists()


def make_batch(count):
    """What a loader gives for so many samples."""
    random = torch.Generator().manual_seed(count)
    return {"mask": torch.randint(0, 5, (count, 8, 8), generator=random, dtype=torch.uint8),
            "reference": torch.randint(0, 256, (count, 3, 8, 8), generator=random, dtype=torch.uint8),
            "prompt": ["road"] * count, "reference_key": [f"{count} {i}" for i in range(count)]}  # fmt: skip


def test_blocks_are_compiled_once_and_a_batch_that_is_not_full_adds_nothing(workspace):
    graphs, most = [], 1000

    def backend(graph, _):
        graphs.append(graph)
        assert len(graphs) <= most, "compiled again"
        return graph.forward

    torch._dynamo.reset()
    method = load_method(workspace / "tiny.safetensors", {"model": MODEL}, "cpu")
    sampling = Sampling(num_steps=2, guidance_scale=2.0)
    compile_blocks(method, backend=backend)
    batch_generator = BatchGenerator(method, sampling, torch.device("cpu"), False, 2, is_compiled=True)
    batch_generator.generate(make_batch(2), [1, 2])
    most = len(graphs)
    assert most > 10
    painted = batch_generator.generate(make_batch(3), [1, 2, 3])
    eager = BatchGenerator(load_method(workspace / "tiny.safetensors", {"model": MODEL}, "cpu"), sampling,
                    torch.device("cpu"), False, 2)  # fmt: skip
    torch.testing.assert_close(painted, eager.generate(make_batch(3), [1, 2, 3]), rtol=1e-4, atol=1e-4)
    assert len(graphs) == most
    batch_generator.is_padded = False
    with pytest.raises(RuntimeError, match="compiled again"):  # so the count sees what filling up avoids
        batch_generator.generate(make_batch(1), [1])
    torch._dynamo.reset()


@pytest.mark.parametrize(("device", "is_compiled", "expected"),
                         [("cpu", False, [2, 2]), ("cuda", True, [2, 2]), ("cuda", False, [2, 1])])  # fmt: skip
def test_batches_are_filled_up_on_a_cpu_and_where_blocks_are_compiled(workspace, device, is_compiled, expected):
    method = load_method(workspace / "tiny.safetensors", {"model": MODEL}, "cpu")
    batch_generator = BatchGenerator(method, Sampling(num_steps=1), torch.device(device), False, 2, is_compiled)
    batch_generator.device, sizes, whole = torch.device("cpu"), [], method.sample
    method.sample = lambda conditions, noise, *rest: sizes.append(len(noise)) or whole(conditions, noise, *rest)
    assert len(batch_generator.generate(make_batch(3), [1, 2, 3])) == 3 and sizes == expected


def test_checkpoint_without_config_needs_one_and_ckpt_files_work(workspace, finished, tmp_path, capsys):
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
    files = ["inference.py", *(f"ldm/generation/{name}.py" for name in ("plan", "generator", "worker"))]
    read = {
        node.attr for file in files for node in ast.walk(ast.parse((REPOSITORY / file).read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in ("args", "settings")
    }  # fmt: skip
    read |= {field.name for field in fields(Sampling)} - {"method", "rectify"} | set(METHOD_SETTINGS) | {"mode"}
    read |= {f"rectify_{field.name}" for field in fields(Rectify)} - {"rectify_rule"} | {"guide", "rectify_preset"}
    actions = [action for action in parser._actions if action.dest != "help"]
    assert {action.dest for action in actions} <= read
    assert all(action.help for action in actions)
    assert not any(action.required for action in actions)  # --status needs neither weights nor rows


def test_the_command_line_is_checked_without_importing_torch():
    code = (
        "import sys, inference\n"
        "try: inference.main(['--ckpt', 'a', '--txt_file', 'b', '--shard', '2/2'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "assert 'torch' not in sys.modules\n"
        "try: inference.main(['--ckpt', 'a', '--txt_file', 'b', '--ddim_step', '2'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "try: inference.main(['--ckpt', 'a'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "required: --txt_file" in done.stderr and "Expected i/n" in done.stderr
    assert "unrecognized arguments: --ddim_step" in done.stderr


@pytest.mark.parametrize("layout", ["auto", "grid"])
def test_contact_sheet_shows_every_result(finished, tmp_path, layout):
    out = tmp_path / "sheet.png"
    assert preview.main([str(finished), "--out", str(out), "--layout", layout, "--tile", "64"]) == 0
    sheet = np.asarray(Image.open(out))
    columns = 7 if layout == "grid" else 4  # grid: mask and 3 references x 2 copies; list: mask, reference, 2 copies
    assert sheet.shape[1] == 12 + 70 * columns
    # The first mask, enlarged, in class colours near the left edge.
    top = 6 + (70 + 18 if layout == "grid" else 0)
    samples, record = read_run(finished)
    palette = {colour for _, colour in preview.list_classes(samples, ClassTable.load(record["class_table"]))}
    corner = sheet[top : top + 64, 6:70].reshape(-1, 3)
    assert palette & set(map(tuple, corner.tolist()))
