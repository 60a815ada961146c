"""Twenty faults that a long run meets, each injected.

| fault | test |
|---|---|
| 1 kill -9 at 20 random moments | test_scale_out: fault_1; several processes, one dies: test_several_processes_...; Ray: test_ray_... |
| 2 SIGTERM, SIGUSR1, Ctrl-C | test_scale_out: fault_2 |
| 3 other batch size, loaders, order, shards, copies | fault_3 here; test_scale_out: fault_1, test_static_shards_...; test_inference: test_a_sample_does_not_depend_..., test_more_copies_... |
| 4 two processes on one folder | test_scale_out: fault_4, test_several_processes_... |
| 5 disk full | test_scale_out: fault_5; a warning before it, and progress: fault_5 here |
| 6 output folder gone or read-only | fault_6 here; test_writer: test_a_folder_that_comes_back_... |
| 7 truncated, empty, HTML as image | faults_7_to_14 and fault_7 here |
| 8 decompression bombs | faults_7_to_14 here; memory: test_scale_out: fault_8 |
| 9 paths and links out of the data root | faults_7_to_14 here |
| 10 equal stems, case, one mask with several references | faults_10_and_11 here |
| 11 names: NFC, NFD, emoji, 255 bytes, half characters | faults_10_and_11, faults_7_to_14 here |
| 12 damaged manifests | faults_7_to_14 here; strict: test_manifest, test_inference: test_ten_kinds_... |
| 13 odd sizes | faults_7_to_14, fault_13 here |
| 14 unsuitable masks | faults_7_to_14 here; test_classes |
| 15 masks without a class, or with one | fault_15 here |
| 16 malicious weights | test_checkpoint: test_bad_files_are_refused_..., test_segmentor_refuses_...; test_evaluate: test_checkpoint_with_code_... |
| 17 NaN and infinity | fault_17 here; test_inference: test_samples_that_are_not_finite_... |
| 18 out of memory | fault_18 here |
| 19 other inputs into the same folder | fault_19 here; test_inference: test_another_setting_... |
| 20 damaged output, dead loader or writer | fault_20 here; test_scale_out: fault_20; test_writer: test_the_queue_is_bounded_... |
"""  # noqa: E501

import errno
import json
import os
import shutil
import subprocess
import sys
import zlib
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
    png,
    read_lines,
    run,
    write_rows,
)
from PIL import Image
from safetensors.torch import load_file

from ldm import files
from ldm.generation import generator as synthesis
from ldm.generation.machine import is_out_of_memory
from ldm.generation.store import ShardStore
from ldm.weights.checkpoint import save_safetensors

pytest.importorskip("tokenizers")

GOOD = {"source": "mask_0.png", "prompt": "road", "ref_image": "ref_0.png"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def finished(workspace):
    assert run(workspace, workspace / "finished") == 0
    return workspace / "finished"


@pytest.fixture
def sample(monkeypatch):
    """Replaces the function that generates; the new one gets the old one as its first argument."""
    whole = synthesis.sample_images

    def replace(function):
        monkeypatch.setattr(synthesis, "sample_images", lambda *given, **named: function(whole, *given, **named))

    return replace


def close_to(one, other):
    """Whether a run has all images of another one, up to one grey level."""
    found = pixels(one)
    return all(np.abs(found[name].astype(int) - image).max() <= 1 for name, image in pixels(other).items())


@pytest.mark.parametrize("size", [1, 3])
def test_fault_3_batches_of_another_size_change_a_pixel_by_a_level_at_most(workspace, finished, tmp_path, monkeypatch,
                                                                           size):  # fmt: skip
    monkeypatch.setattr(synthesis, "CPU_BATCH", size)
    assert run(workspace, tmp_path, "--num_per_mask", "2") == 0
    assert json.loads((tmp_path / "shards/000000.json").read_text())["batch_size"] == size
    assert close_to(tmp_path, finished)


def test_fault_5_progress_that_cannot_be_noted_is_no_error(tmp_path):
    (tmp_path / "shards").mkdir()
    with ShardStore(tmp_path).claim_shard(0) as claim, open("/dev/full", "wb") as claim.lock:
        claim.report(1, 2)


def test_fault_5_a_warning_when_the_disk_may_not_suffice(workspace, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1 << 20))
    monkeypatch.setattr("ldm.generation.worker.PNG_SHARE", 1000)
    assert run(workspace, tmp_path, "--H", "16", "--W", "16") == 0
    assert "1 MB are free, about 2 MB may be needed" in caplog.text


def test_fault_6_a_folder_that_vanishes_or_was_never_there(workspace, tmp_path, capsys, monkeypatch, sample):
    monkeypatch.setattr(files, "RETRY_DELAYS", (0.01, 0.01))
    assert run(workspace, "/proc/absent/out") == 4
    assert "--outdir: /proc/absent/out cannot be written" in capsys.readouterr().err

    def paint(whole, *arguments):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return whole(*arguments)

    sample(paint)
    assert run(workspace, tmp_path / "out") == 4
    assert "tried 3 times" in capsys.readouterr().err and not list(tmp_path.rglob("*.json"))


def test_fault_6_verify_in_a_folder_that_cannot_be_written(workspace, tmp_path, capsys, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    assert run(workspace, tmp_path) == 0
    (tmp_path / "images/mask_0_seed_42.png").write_bytes(b"damaged")
    monkeypatch.setattr(files, "RETRY_DELAYS", (0.01,))
    for where, name in (("ldm.run_folder", "take_lock"), (Path, "unlink")):
        target = (where, name) if where is Path else (f"{where}.{name}",)
        with monkeypatch.context() as patch:
            patch.setattr(*target, refuse)
            capsys.readouterr()
            assert run(workspace, tmp_path, "--verify") == 4
            text = capsys.readouterr().err
            assert text.startswith(f"error: {tmp_path}") and text.count("\n") == 1 and "Read-only file system" in text


def make_bad_rows(root):
    """Rows that cannot be generated, each with a part of the reason."""
    random = np.random.default_rng(1)
    (root / "cut.png").write_bytes((root / "ref_0.png").read_bytes()[:300])
    (root / "empty.png").touch()
    (root / "page.jpg").write_text("<html><body>404</body></html>")
    (root / "bomb169.png").write_bytes(png(13_000, 13_000))
    (root / "bomb400.png").write_bytes(png(20_000, 20_000))
    text = b"comment\0\0" + zlib.compress(bytes(200 << 20))
    (root / "bomb_text.png").write_bytes(png(8, 8, (b"zTXt", text)))
    (root.parent / "secret.png").write_bytes((root / "mask_0.png").read_bytes())
    (root / "link.png").symlink_to(root.parent / "secret.png")
    for name, size in (("odd", (10, 8)), ("dot", (1, 1))):
        Image.fromarray(np.zeros(size, np.uint8)).save(root / f"{name}.png")
    Image.fromarray(random.integers(0, 255, (8, 8, 4), np.uint8)).save(root / "clear.png")
    Image.fromarray(np.full((8, 8), 700, np.uint16)).save(root / "deep.png")
    Image.fromarray(np.full((8, 8), 5, np.uint8)).save(root / "five.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "lossy.jpg")
    mask, reference = (lambda name: GOOD | {"source": name}), (lambda name: GOOD | {"ref_image": name})
    return [
        (reference("cut.png"), "not readable"), (reference("empty.png"), "not readable"),
        (reference("page.jpg"), "not readable"), (mask("empty.png"), "not readable"),  # 7
        (mask("bomb169.png"), "13000x13000 pixels"), (reference("bomb400.png"), "20000x20000 pixels"),
        (reference("bomb_text.png"), "not readable"),  # 8
        (mask("../secret.png"), "leaves the data root"), (mask(str(root / "mask_0.png")), "absolute"),
        (mask("..\\secret.png"), "leaves the data root"), (mask("C:\\secret.png"), "absolute"),
        (mask("a\0b.png"), "zero byte"), (mask("link.png"), "a link out of the data root"),  # 9
        (GOOD | {"prompt": "\ud83d"}, "half a character"), (mask("ö" * 200 + ".png"), "file not found"),  # 11
        ("{bad", "not valid JSON"), (b"\xff\xfe{}", "not valid JSON"), ({"source": "mask_0.png"}, "missing key"),
        (GOOD | {"source": 3}, "(int)"), (GOOD | {"prompt": "x" * (10 << 20)}, "at most 1,048,576"),  # 12
        (mask("odd.png"), "multiples of 4"), (mask("dot.png"), "multiples of 4"),  # 13
        (mask("clear.png"), "transparent in part"), (mask("deep.png"), "ids 700"), (mask("five.png"), "ids 5"),
        (mask("lossy.jpg"), "a JPEG mask"),  # 14
    ]  # fmt: skip


def test_faults_7_to_14_bad_rows_are_set_aside_or_stop_the_run(workspace, tmp_path, capsys):
    bad = make_bad_rows(workspace)
    lines = [b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b""]  # a byte order mark and a blank line are no fault
    lines += [row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
              for row, _ in bad]  # fmt: skip
    (workspace / "bad.json").write_bytes(b"\n".join([*lines, json.dumps(GOOD | {"prompt": "water"}).encode()]))
    assert run(workspace, tmp_path, "--bad_rows", "skip", manifest="bad.json") == 3
    failures = {record["row"]: record["reason"] for record in read_lines(tmp_path / "failures.jsonl")}
    for number, (row, reason) in enumerate(bad, start=1):
        assert reason in failures.pop(number), (str(row)[:80], reason)
    assert not failures
    assert [record["row"] for record in read_lines(tmp_path / "index.jsonl")] == [0, len(bad) + 1]
    assert len(pixels(tmp_path)) == 2
    capsys.readouterr()
    assert run(workspace, tmp_path, "--status") == 3
    assert "(1 with failures)" in (text := capsys.readouterr().out) and f"{len(bad)} failed" in text
    assert run(workspace, tmp_path / "strict", manifest="bad.json") == 2
    text = capsys.readouterr().err
    assert all(f"line {number}: " in text for number in range(3, 3 + len(bad))) and "line 1: " not in text
    assert not (tmp_path / "strict").exists()


def test_fault_7_a_file_that_breaks_during_the_run_is_painted_once_it_is_mended(workspace, finished, tmp_path, sample):
    content = (workspace / "ref_2.png").read_bytes()

    def paint(whole, *arguments):
        (workspace / "ref_2.png").write_bytes(content[:100])
        return whole(*arguments)

    sample(paint)
    try:
        assert run(workspace, tmp_path, "--shard_size", "1") == 3
    finally:
        (workspace / "ref_2.png").write_bytes(content)
    assert [record["row"] for record in read_lines(tmp_path / "failures.jsonl")] == [2]
    sample(lambda whole, *arguments: whole(*arguments))
    assert run(workspace, tmp_path, "--shard_size", "1") == 0
    assert contents(tmp_path) == contents(finished)


def test_fault_7_a_mask_that_is_lost_during_the_run_is_painted_once_it_is_back(workspace, finished, tmp_path, sample):
    emptied, removed = workspace / "mask_1.png", workspace / "mask_2.png"
    before = {path: path.read_bytes() for path in (emptied, removed)}

    def paint(whole, *arguments):
        emptied.write_bytes(b"")
        removed.unlink(missing_ok=True)
        return whole(*arguments)

    sample(paint)
    try:
        assert run(workspace, tmp_path, "--shard_size", "1") == 3
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    failures = read_lines(tmp_path / "failures.jsonl")
    assert [record["row"] for record in failures] == [1, 2]
    assert all("cannot be read any more" in record["reason"] for record in failures)
    sample(lambda whole, *arguments: whole(*arguments))
    assert run(workspace, tmp_path, "--shard_size", "1") == 0
    assert contents(tmp_path) == contents(finished)


def test_faults_10_and_11_every_sample_has_a_file_of_its_own_whatever_its_name(workspace, tmp_path):
    names = ["a/same.png", "b/same.png", "b/Same.png", "caf\u00e9.png", "cafe\u0301.png", "\U0001f6f0 of two.png",
             "ö" * 125 + ".png"]  # fmt: skip
    for folder in "ab":
        (workspace / folder).mkdir()
    for name in names:
        shutil.copy(workspace / "mask_0.png", workspace / name)
    rows = [GOOD | {"source": name} for name in names] + [GOOD | {"source": names[0], "ref_image": "ref_1.png"}]
    write_rows(workspace / "names.json", rows)
    command = [sys.executable, "inference.py", *arguments(workspace, tmp_path, manifest="names.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, env=os.environ | {"LC_ALL": "C"}, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    index = read_lines(tmp_path / "index.jsonl")
    assert [record["mask"] for record in index] == [row["source"] for row in rows]
    assert len({record["image"].casefold() for record in index}) == len(rows) == len(pixels(tmp_path))
    assert all((tmp_path / record["image"]).is_file() for record in index)


def test_fault_13_resizing_is_recorded(workspace, tmp_path):
    Image.fromarray(np.zeros((10, 6), np.uint8)).save(workspace / "tall.png")
    write_rows(workspace / "tall.json", [GOOD | {"source": "tall.png"}, GOOD | {"source": "mask_1.png"}])
    assert run(workspace, tmp_path, "--H", "8", "--W", "16", manifest="tall.json") == 0
    tall, fitting = read_lines(tmp_path / "index.jsonl")
    assert tall["resized_from"] == [10, 6] and (tall["height"], tall["width"]) == (8, 16)
    assert "resized_from" not in fitting


def test_fault_15_masks_of_no_class_and_of_one_are_painted(workspace, tmp_path):
    for value in (255, 3):
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(workspace / f"only_{value}.png")
    write_rows(workspace / "only.json", [GOOD | {"source": f"only_{value}.png"} for value in (255, 3)])
    assert run(workspace, tmp_path, manifest="only.json") == 0
    assert len(pixels(tmp_path)) == 2


def test_fault_17_what_bfloat16_breaks_is_painted_in_float32(workspace, finished, tmp_path, sample, caplog):
    def paint(whole, batch_generator, batch, seeds, chosen, use_autocast):
        images = whole(batch_generator, batch, seeds, chosen, use_autocast)
        return torch.full_like(images, torch.inf) if use_autocast else images

    sample(paint)
    assert run(workspace, tmp_path, "--precision", "autocast") == 0
    assert "not finite in bfloat16, generated again in float32" in caplog.text
    for name, image in pixels(finished).items():
        assert np.array_equal(pixels(tmp_path)[name], image)


@pytest.mark.parametrize("precision", ["full", "autocast"])
def test_fault_17_a_poisoned_weight_leaves_no_file(workspace, tmp_path, precision):
    weights = load_file(workspace / "tiny.safetensors")
    weights["first_stage_model.decoder.conv_out.bias"][0] = torch.nan
    save_safetensors(tmp_path / "poisoned.safetensors", weights, OmegaConf.create({"model": MODEL}))
    flags = ["--ckpt", str(tmp_path / "poisoned.safetensors"), "--precision", precision]
    assert run(workspace, tmp_path / "out", *flags) == 3
    assert not list((tmp_path / "out/images").iterdir()) and not (tmp_path / "out/index.jsonl").exists()
    failures = read_lines(tmp_path / "out/failures.jsonl")
    assert [record["row"] for record in failures] == [0, 1, 2]
    assert all("NaN or infinity" in record["reason"] for record in failures)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_fault_18_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


def test_fault_18_memory_that_runs_out_halves_the_batch(workspace, finished, tmp_path, sample, caplog, capsys,
                                                        monkeypatch):  # fmt: skip
    most = 1

    def paint(whole, batch_generator, *arguments):
        if batch_generator.batch_size > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(batch_generator, *arguments)

    sample(paint)
    monkeypatch.setattr(synthesis, "CPU_BATCH", 4)
    assert run(workspace, tmp_path / "a") == 0
    sizes = [text.split("with ")[1].split(" images")[0] for text in caplog.messages if "out of memory" in text]
    assert sizes == ["2", "1"]
    assert close_to(tmp_path / "a", finished)
    most = 0
    assert run(workspace, tmp_path / "b") == 2
    assert "not even one image fits into memory" in capsys.readouterr().err


def test_fault_18_memory_that_runs_out_in_float32_halves_that_batch_only(workspace, finished, tmp_path, sample):
    sizes = []

    def paint(whole, batch_generator, batch, seeds, chosen, use_autocast):
        if use_autocast:
            sizes.append(batch_generator.batch_size)
            return torch.full((len(chosen), 3, *batch["mask"].shape[1:]), torch.nan)
        if batch_generator.batch_size > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(batch_generator, batch, seeds, chosen, use_autocast)

    sample(paint)
    assert run(workspace, tmp_path, "--precision", "autocast") == 0
    assert close_to(tmp_path, finished) and sizes == [2, 2]


def test_fault_19_what_decides_the_images_must_stay_and_nothing_else(workspace, tmp_path, capsys):
    root = make_workspace(tmp_path)
    assert run(root, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    for flags in (["--batch_size", "3"], ["--num_workers", "1"], ["--shard", "0/2"], ["--follow_links"]):
        assert run(root, tmp_path / "out", *flags) == 0
    for flags, text in ((["--seed", "1"], "seed was 42, is 1"), (["--precision", "autocast"], 'precision was "full"'),
                        (["--solver", "unipc"], "solver was"), (["--shard_size", "1"], "--shard_size: 1")):  # fmt: skip
        assert run(root, tmp_path / "out", *flags) == 2
        assert text in capsys.readouterr().err
    rows = [json.loads(line) for line in (root / "rows.json").read_text().splitlines()]
    write_rows(root / "rows.json", rows[::-1])
    assert run(root, tmp_path / "out") == 2
    write_rows(root / "rows.json", rows)
    (root / "ref_0.png").write_bytes((root / "ref_0.png").read_bytes() + b"more")
    assert run(root, tmp_path / "out") == 2
    assert capsys.readouterr().err.count("inputs_sha256 was") == 2
    assert contents(tmp_path / "out") == before


def test_fault_20_damaged_output_is_found_and_painted_again(workspace, tmp_path, capsys):
    flags = ["--shard_size", "1"]
    assert run(workspace, tmp_path, *flags) == 0
    before = contents(tmp_path)
    first, second, _ = sorted(tmp_path.glob("images/*"))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    second.unlink()
    assert run(workspace, tmp_path, "--verify") == 3
    text = capsys.readouterr().out
    assert "3 files checked, 2 damaged" in text and f"{second.name}: missing" in text
    assert f"{first.name}: other contents than were written" in text
    assert finished_shards(tmp_path) == ["000002.json"] and len(read_lines(tmp_path / "index.jsonl")) == 1
    assert run(workspace, tmp_path, *flags) == 0
    assert contents(tmp_path) == before
    assert run(workspace, tmp_path, "--verify") == 0
