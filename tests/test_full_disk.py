"""A disk that is full, and other trouble with files: one sentence and exit code 4, at every entry point."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.files import describe_failure
from ldm.util import UserError, run_entry_point

ROOT = Path(__file__).resolve().parents[1]
NOISE = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)


def save_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(100_000)}, path)


def save_raster(path: Path) -> None:
    import rasterio

    with rasterio.open(path, "w", driver="GTiff", width=300, height=300, count=3, dtype="uint8") as file:
        file.write(NOISE.transpose(2, 0, 1))


WRITES = {
    "torch": lambda path: torch.save({"a": torch.zeros(100_000)}, path),
    "safetensors": save_safetensors,
    "png": lambda path: Image.fromarray(NOISE).save(path, "PNG"),
    "tiff": lambda path: Image.fromarray(NOISE).save(path, "TIFF"),
    "npy": lambda path: np.save(path.open("wb"), NOISE),
    "text": lambda path: path.write_text("a" * 10_000),
    "raster": save_raster,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITES)
def test_what_libraries_say_of_a_full_disk_is_understood(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    """In a child process, for the limit on the length of its files can only be lowered."""

    def main(_: list[str]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        WRITES[kind](tmp_path / "x")

    if kind == "raster":
        pytest.importorskip("rasterio")
    child = os.fork()
    if child == 0:
        try:
            run_entry_point(main, [])
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    text = capfd.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ") and "the disk is full" in text


def raises(error: BaseException, cause: BaseException | None = None) -> Callable[[list[str]], None]:
    def main(_: list[str]) -> None:
        raise error from cause

    return main


@pytest.mark.parametrize(
    ("main", "code", "text"),
    [
        (raises(PermissionError(13, "Permission denied", "o/x.png")), 4, "error: o/x.png: Permission denied. Expected"),
        (raises(IsADirectoryError(21, "Is a directory", b"out")), 4, "error: out: Is a directory. Expected"),
        (raises(RuntimeError("worker"), OSError(28, "No space left on device", "a")), 4, "error: a: the disk is full"),
        (raises(UserError("a: cannot be written"), OSError(122, "Disk quota exceeded")), 4, "error: the disk is full"),
        (raises(RuntimeError("Caught OSError in worker\n[Errno 28] No space left on device")), 4, "error: the disk is"),
        (raises(FileNotFoundError("--x: not there")), 2, "error: --x: not there"),
        (raises(FileExistsError("--x: is there")), 2, "error: --x: is there"),
        (raises(OSError("image file is truncated")), 2, "error: image file is truncated"),
        (raises(UserError("--x 1: wrong")), 2, "error: --x 1: wrong"),
        (raises(KeyError("name")), 2, "error: name"),
    ],
)  # fmt: skip
def test_exit_codes(main: Callable, code: int, text: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        run_entry_point(main, [])
    err = capsys.readouterr().err
    assert end.value.code == code and err.startswith(text) and err.count("\n") == 1


def test_mistakes_of_ours_keep_their_traceback():
    with pytest.raises(RuntimeError, match="of ours"):
        run_entry_point(raises(RuntimeError("of ours")), [])
    assert describe_failure(RuntimeError("of ours")) is None


def run_limited(size: int, *command: object) -> subprocess.CompletedProcess:
    """Run a script of this repository that cannot write a file longer than `size` bytes."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip


def test_real_commands_on_a_disk_that_fills_up(tmp_path: Path):
    for name in ("img", "mask"):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = NOISE[:128, :128] if name == "img" else NOISE[:128, :128, 0] % 3
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    classes = [{"id": i, "name": name, "colour": [i, i, 9]} for i, name in enumerate("abc")]
    (tmp_path / "three.yaml").write_text(json.dumps({"name": "three", "classes": classes}))
    torch.save({"state_dict": {"a": torch.zeros(1000, 100)}}, tmp_path / "w.ckpt")
    commands = [
        ["scripts/prepare_dataset.py", "--images", tmp_path / "img", "--masks", tmp_path / "mask", "--classes",
         tmp_path / "three.yaml", "--tile", "64", "--workers", "1", "--out", tmp_path / "out"],
        ["scripts/convert_checkpoint.py", tmp_path / "w.ckpt", tmp_path / "w.safetensors"],
    ]  # fmt: skip
    for command in commands:
        done = run_limited(3000, *command)
        assert done.returncode == 4, done.stderr
        lines = done.stderr.strip().splitlines()
        assert "Traceback" not in done.stderr and lines[-1].startswith("error: ") and "the disk is full" in lines[-1]
    assert not (tmp_path / "w.safetensors").exists()
    assert run_limited(1 << 30, *commands[0]).returncode == 0  # goes on, or starts anew, where the disk has space
