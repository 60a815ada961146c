"""scripts/gpu_check.sh at test size on a CPU."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
from tiny import ROOT

from scripts import gpu_check


def test_all_steps_run_on_a_cpu(tmp_path: Path):
    command = ["sh", "scripts/gpu_check.sh", "20", "--device", "cpu", "--tiny", "--no_compile", "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = {row["step"]: row for row in json.loads((tmp_path / "gpu_check.json").read_text())["rows"]}
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-2000:]
    assert "0 failed" in done.stdout and not done.stderr
    known = {path.stem for path in (ROOT / "configs/train").glob("*.yaml")}
    assert {step.removeprefix("config ") for step in rows if step.startswith("config ")} == known  # none is forgotten
    left_out = {step for step, row in rows.items() if row["result"] != "pass"}
    assert left_out == {"config fusu_sd35", "config sd35_lora", "small model, memory that ends"}
    assert rows["small model, resumed"]["steps_a_second"] > 0 and rows["small model, samples"]["images"] == 8
    assert rows["network of SD1.5 size, one step"]["samples_a_second"] > 0


def test_what_fails_is_named_and_what_comes_too_late_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    check = gpu_check.Check(Namespace(out=str(tmp_path), device="cpu", minutes=1.0, tiny=True))

    def fail() -> None:
        raise RuntimeError("no such kernel\nand more")

    check.step("a", fail)
    check.step("b", lambda: {}, need=100.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL     a") and "RuntimeError: no such kernel" in lines[0]
    assert lines[1].startswith("left out b") and "it needs 100" in lines[1]
    assert "and more" in (tmp_path / "log.txt").read_text()


def test_missing_packages_come_from_a_folder_of_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture):  # fmt: skip
    name, version = "gpu_check_probe", "1.0"
    wheel = tmp_path / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"{name}.py", "found = True\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    monkeypatch.setattr(gpu_check, "PACKAGES", {name: name})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    with pytest.raises(SystemExit) as stopped:
        gpu_check.install_missing(Namespace(out=str(tmp_path / "out"), find_links=None))
    assert stopped.value.code == 2 and f"error: {name} missing" in capsys.readouterr().err
    gpu_check.install_missing(Namespace(out=str(tmp_path / "out"), find_links=str(tmp_path)))
    assert importlib.import_module(name).found
    assert Path(sys.modules.pop(name).__file__).parent == tmp_path / "out/packages"
