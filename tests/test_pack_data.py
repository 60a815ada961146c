"""A data set in one small file, and what train_mini.sh makes of it."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ROOT

import train
from ldm.data.classes import ClassTable
from ldm.data.manifest import read_manifest
from ldm.modules.perceptual import VGG16, PerceptualLoss
from ldm.util import UserError
from scripts import pack_data

MINI = ClassTable.load("mini")


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the form of demo/make/convert_lpips.py."""
    generator = torch.Generator().manual_seed(0)
    widths = [3, *(w for w in VGG16 if w != "pool")]
    tensors = {f"heads.{i}": torch.rand(1, w, 1, 1, generator=generator) for i, w in
               enumerate((64, 128, 256, 512, 512))}  # fmt: skip
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        tensors[f"convs.{i}.weight"] = torch.randn(b, a, 3, 3, generator=generator) * (2 / (9 * a)) ** 0.5
        tensors[f"convs.{i}.bias"] = torch.zeros(b)
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(tensors, path)
    return path


def test_a_pack_holds_the_same_rows_and_masks(toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    lines = (data / "train_set_items.json").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "weight": 2})
    (data / "train_set_items.json").write_text("\n".join(lines))
    (data / "ground_set_items.json").write_text(lines[1])
    pack_data.main([str(data), str(tmp_path / "pack.zip")])
    assert ("8 of 8 rows in train_set_items.json, 1 of 1 rows in ground_set_items.json, 2 of 2 rows in "
            "val_set_items.json") in capsys.readouterr().out  # fmt: skip
    with zipfile.ZipFile(tmp_path / "pack.zip") as file:
        file.extractall(tmp_path / "unpacked")
    for name in ("train_set_items.json", "ground_set_items.json", "val_set_items.json"):
        own, packed = (read_manifest(root / name, root, need=("image", "reference", "prompt"), table=MINI)
                       for root in (data, tmp_path / "unpacked"))  # fmt: skip
        for a, b in zip(own, packed, strict=True):
            assert (a.prompt, a.weight, a.mask.stem) == (b.prompt, b.weight, b.mask.stem)
            assert np.array_equal(*(np.asarray(Image.open(row.mask)) for row in (a, b)))
            image, other = (np.asarray(Image.open(row.image).convert("RGB")).astype(int) for row in (a, b))
            assert 0 < np.abs(image - other).mean() < 16  # WebP is not exact, but near
    assert packed[0].image.suffix == ".webp"


def test_a_pack_stays_below_its_limit(toy_data: Path, tmp_path: Path):
    pack_data.main([str(toy_data), str(tmp_path / "all.zip")])
    limit = (tmp_path / "all.zip").stat().st_size * 0.7 / 1e6
    pack_data.main([str(toy_data), str(tmp_path / "some.zip"), "--limit_mb", str(limit)])
    assert (tmp_path / "some.zip").stat().st_size <= limit * 1e6
    with zipfile.ZipFile(tmp_path / "some.zip") as file:
        rows = [json.loads(line) for line in file.read("train_set_items.json").splitlines()]
        names = set(file.namelist())
    assert 1 <= len(rows) < 8 and all(row[key] in names for row in rows for key in ("source", "target", "ref_image"))
    with pytest.raises(UserError, match="not one row of"):
        pack_data.main([str(toy_data), str(tmp_path / "none.zip"), "--limit_mb", "0.0001"])
    assert not (tmp_path / "none.zip").exists()


def test_the_packed_loss_is_the_first_four_stages_of_the_whole(perceptual: Path, tmp_path: Path):
    (tmp_path / "small.safetensors").write_bytes(pack_data.shrink_perceptual(perceptual))
    assert (tmp_path / "small.safetensors").stat().st_size < 0.27 * perceptual.stat().st_size
    whole, small = PerceptualLoss(perceptual), PerceptualLoss(tmp_path / "small.safetensors")
    images = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        whole.heads[4].zero_()
        torch.testing.assert_close(small(*images), whole(*images), rtol=5e-3, atol=1e-5)
    save_file({k: v for k, v in load_file(perceptual).items() if k.startswith("convs")}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="0 heads of LPIPS"):
        PerceptualLoss(tmp_path / "none.safetensors")


STUB = """#!/bin/sh
echo "$*" >>"$LOG"
case "$1 $2" in
"-m zipfile") exec "$REAL" "$@" ;;
"train.py -p") mkdir -p "$3/checkpoints"; touch "$3/checkpoints/last.ckpt" "$3/checkpoints/last.safetensors" ;;
*select_rows*) head -2 "$2" >"$3" ;;
esac
"""


@pytest.fixture
def train_mini(tmp_path: Path) -> Callable[..., list[str]]:
    """Runs train_mini.sh DATA OUT with settings; what its Python was called with, a line a call."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)

    def run(data: Path, out: Path, **settings: str) -> list[str]:
        log = tmp_path / "log"
        log.write_text("")
        environment = {"PYTHON": str(tmp_path / "python"), "REAL": sys.executable, "LOG": str(log), **settings}
        subprocess.run(["sh", "scripts/train_mini.sh", data, out], cwd=ROOT, env={**os.environ, **environment},
                       check=True, capture_output=True)  # fmt: skip
        return log.read_text().splitlines()

    return run


def test_train_mini_divides_its_minutes(toy_data: Path, tmp_path: Path, perceptual: Path, train_mini):
    pack, out = tmp_path / "pack.zip", tmp_path / "out"
    pack_data.main([str(toy_data), str(pack), "--perceptual", str(perceptual)])
    settings = {"MINUTES": "9", "ARGS": "data.params.batch_size=7"}
    log = [line for line in train_mini(pack, out, **settings) if line.startswith("train.py")]
    assert len(log) == 6 and all(line.endswith("data.params.batch_size=7") for line in log)
    budgets = [float(line.partition("training.max_minutes=")[2].split()[0]) for line in log]  # nothing takes time here
    assert budgets[0] == pytest.approx(0.1 * 8.52, abs=0.1)
    assert budgets[1:] == pytest.approx([8.52 * share for share in (0.2, 0.3, 0.5, 0.9, 1)], abs=0.3)
    assert f"perceptual_weights={out}/data/lpips_vgg16.safetensors" in log[5]
    assert (out / "data/val_set_items.json").is_file() and (out / "data/lpips_vgg16.safetensors").is_file()
    assert not any(line.startswith("train.py") for line in train_mini(pack, out, **settings))  # finished: skipped


def test_train_mini_goes_on_from_a_whole_model_or_begins_anew(tmp_path: Path, train_mini):
    """Rich labelled tiles and every second unlabelled one; from a model no windows, nothing that it has already."""
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    rows = [*(f"dubai/{n}" for n in range(4)), *(f"unlabelled/{n}" for n in range(5))]
    (out / "data/ground_set_items.json").write_text('{"source": "ground/0"}\n')
    lines = [json.dumps({"source": name, "target": name}) + "\n" for name in rows]
    (out / "data/train_set_items.json").write_text("".join(lines))
    with pytest.raises(subprocess.CalledProcessError) as failure:  # the join was cut off: it is prepared again
        train_mini("prepared", out, START="whole.safetensors")
    assert b"prepare_mini_data.sh" in failure.value.stderr and b"prepared" in failure.value.stderr
    (out / "data/val_set_items.json").touch()
    log = train_mini("prepared", out, START="whole.safetensors")
    assert (out / "mixed_set_items.json").read_text().splitlines(keepends=True) == [*lines[:2], *lines[4::2]]
    assert (out / "late_set_items.json").read_text().splitlines(keepends=True) == [*lines[:2], lines[8]]
    looks = [json.loads(line) for line in (out / "looks_set_items.json").read_text().splitlines()]
    assert [row.get("weight") for row in looks] == [3, 3, 3, None, None, None]
    assert [row["source"] for row in looks[1:4]] == ["dubai/1", "ground/0", "unlabelled/0"]
    assert "mixed_set_items.json" in log[1] and "late_set_items.json" in log[2]
    assert [line.split()[0] for line in log] == ["scripts/select_rows.py", *["train.py"] * 4,
                                                 "scripts/convert_checkpoint.py"]  # fmt: skip
    assert "--pretrain_path whole.safetensors init=null" in log[1] and "mini_references.yaml" in log[1]
    made = f"{out}/tisynth_mini.safetensors --dtype fp16 --overwrite"
    assert f"--finetune {out}/tiles/checkpoints/last.ckpt init=null" in log[2]
    assert f"--finetune {out}/decay/checkpoints/last.ckpt init=null" in log[3] and "late_set_items.json" in log[3]
    assert f"--finetune {out}/again/checkpoints/last.ckpt init=null" in log[4] and "recolour_share=0.55" in log[4]
    assert "looks_set_items.json" in log[4] and "late_set_items.json" not in log[4]
    assert log[5].endswith(f"{out}/looks/checkpoints/last.safetensors {made}")

    for other in ({"data": "others", "START": "whole.safetensors"}, {"data": "prepared", "START": ""}):
        with pytest.raises(subprocess.CalledProcessError) as failure:  # their stages would pass for finished
            train_mini(out=out, **other)
        assert failure.value.returncode == 2 and b"holds stages of DATA=prepared START=whole" in failure.value.stderr

    for stage in ("tiles", "decay", "again", "looks"):
        shutil.rmtree(out / stage)
    (out / "made_of").unlink()
    (out / "lpips_vgg16.safetensors").touch()
    (out / "data/ground_set_items.json").unlink()  # prepared before there was one
    log = train_mini("prepared", out)
    assert "ground/0" not in (out / "looks_set_items.json").read_text()
    assert [line.split()[0] for line in log] == ["demo/make/fit_patches.py", *["train.py"] * 6,
                                                 *["scripts/convert_checkpoint.py"] * 2]  # fmt: skip
    assert f"init.first_stage_model={out}/patches.safetensors data.params.size=[64,64]" in log[1]
    assert f"--finetune {out}/windows/checkpoints/last.ckpt init=null" in log[2] and "patch_autoencoder" in log[6]
    assert log[8].endswith(f"{out}/whole/checkpoints/last.safetensors {made}")


PREPARE_STUB = """#!/bin/sh
echo "$*" >>"$LOG"
while [ "$1" != --out ]; do shift; done
mkdir -p "$2"
row='{"source": "label_train/a.png", "target": "img_train/a.png", "ref_image": "ref_img/a.png"}'
for name in summary.json train_set_items.json inference_items.json; do echo "$row" >"$2/$name"; done
"""


def test_prepare_mini_data_goes_on_and_keeps_to_its_data(tmp_path: Path):
    """Again: parts that are there stay, the join is made anew, since one of them may be new; other data is refused."""
    (tmp_path / "python").write_text(PREPARE_STUB)
    (tmp_path / "python").chmod(0o755)
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
    out, log = tmp_path / "out", tmp_path / "log"
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "LOG": str(log)}

    def prepare(data: str, **settings: str) -> subprocess.CompletedProcess:
        log.write_text("")
        return subprocess.run(["sh", "scripts/prepare_mini_data.sh", tmp_path / data, out], cwd=ROOT, text=True,
                              env={**environment, **settings}, capture_output=True)  # fmt: skip

    assert prepare("data").returncode == 0 and len(log.read_text().splitlines()) == 6
    assert json.loads((out / "ground_set_items.json").read_text())["source"] == "kampala_ground/label_train/a.png"
    row = json.loads((out / "inference_items_ucmerced.json").read_text())
    assert row == {"source": "dubai/label_test/a.png", "target": "dubai/img_test/a.png",
                   "ref_image": "ucmerced/ref_img/a.png"}  # fmt: skip
    shutil.rmtree(out / "unlabelled")
    assert prepare("data").returncode == 0
    assert [f"--out {out}/unlabelled" in log.read_text(), "--overwrite --merge" in log.read_text()] == [True, True]
    assert len(log.read_text().splitlines()) == 2
    for done in (prepare("other"), prepare("data", SEED="7")):
        assert done.returncode == 2 and f"{out} holds tiles of DATA_DIR={tmp_path}/data SEED=23" in done.stderr
    assert not log.read_text()


def test_train_mini_refuses_the_name_of_a_recipe(tmp_path: Path):
    command = ["sh", "scripts/train_mini.sh", "data", tmp_path / "out", "tisynth_references"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Run: sh scripts/train_mini.sh DATA OUT" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_packed_set_trains_the_autoencoder(toy_data: Path, tmp_path: Path, perceptual: Path,
                                             monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    monkeypatch.chdir(ROOT)
    pack_data.main([str(toy_data), str(tmp_path / "pack.zip"), "--perceptual", str(perceptual)])
    with zipfile.ZipFile(tmp_path / "pack.zip") as file:
        file.extractall(tmp_path / "data")
    assert train.main([
        "--config_model", "configs/model/autoencoder_mini.yaml", "-b", "configs/train/mini_autoencoder.yaml", "-p",
        str(tmp_path / "run"), "--data_root", str(tmp_path / "data"), "--gpus", "", "--no-test",
        f"model.params.perceptual_weights={tmp_path}/data/lpips_vgg16.safetensors", "model.params.crop=16",
        "model.params.autoencoder.params.ch=8", "data.params.batch_size=2", "data.params.size=[16,16]",
        "data.params.num_workers=0", "data.params.cache=memory", "lightning.trainer.max_steps=2",
        "lightning.trainer.limit_val_batches=0"]) == 0  # fmt: skip
    assert (tmp_path / "run/checkpoints/last.safetensors").is_file()
