"""Layouts of published data sets on miniatures with the real names of folders and files."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.classes import ClassTable
from ldm.data.prepare.layouts import (
    LAYOUTS,
    POTSDAM_TEST,
    POTSDAM_TRAIN,
    VAIHINGEN_TEST,
    VAIHINGEN_TRAIN,
)
from ldm.util import UserError
from scripts.prepare_dataset import main

SIZE = 16


def write_image(path: Path, bands: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(1, 256, (SIZE, SIZE, bands)).astype(np.uint8)
    if bands == 3:
        Image.fromarray(pixels).save(path)
        return
    rasterio = pytest.importorskip("rasterio", exc_type=ImportError)
    with rasterio.open(path, "w", driver="GTiff", count=bands, height=SIZE, width=SIZE, dtype="uint8") as file:
        file.write(pixels.transpose(2, 0, 1))


def write_mask(path: Path, value: int | tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, tuple):
        Image.fromarray(np.broadcast_to(np.array(value, np.uint8), (SIZE, SIZE, 3)).copy()).save(path)
    else:
        Image.fromarray(np.full((SIZE, SIZE), value, np.uint8)).save(path)


def prepare(root: Path, preset: str, *flags: str, out: str = "out") -> dict[str, dict[str, int]]:
    """{split: {name of the image: the one id of its mask}} of what a preset makes."""
    folder = root.parent / out
    main(["--preset", preset, "--root", str(root), "--tile", "0", "--val_fraction", "0", "--max_ignore", "1",
          "--allow_empty_classes", "--out", str(folder), *flags])
    result = {}
    for split in ("train", "val", "test"):
        manifest = folder / f"{split}_set_items.json"
        rows = [json.loads(line) for line in manifest.read_text().splitlines()] if manifest.exists() else []
        masks = {Path(row["target"]).stem: np.unique(np.asarray(Image.open(folder / row["source"]))) for row in rows}
        assert all(len(ids) == 1 for ids in masks.values())
        result |= {split: {name: int(ids[0]) for name, ids in masks.items()}} if masks else {}
    return result


def test_potsdam(tmp_path: Path) -> None:
    assert (len(POTSDAM_TRAIN), len(POTSDAM_TEST)) == (24, 14) and not POTSDAM_TRAIN & POTSDAM_TEST
    root = tmp_path / "Potsdam"
    for number in ("2_10", "7_8", "3_14"):
        write_image(root / f"2_Ortho_RGB/top_potsdam_{number}_RGB.tif")
        write_image(root / f"3_Ortho_IRRG/top_potsdam_{number}_IRRG.tif")
        (root / f"2_Ortho_RGB/top_potsdam_{number}_RGB.tfw").write_text("0.05\n0\n0\n-0.05\n0\n0\n")
        write_mask(root / f"5_Labels_all/top_potsdam_{number}_label.tif", (0, 255, 0))
    found = prepare(root, "potsdam")
    assert found == {"train": {"top_potsdam_2_10": 3, "top_potsdam_7_8": 3}, "test": {"top_potsdam_3_14": 3}}
    assert prepare(root, "potsdam", "--product", "IRRG", out="irrg") == found
    for name in ("2_Ortho_RGB/top_potsdam_9_9_RGB.tif", "5_Labels_all/top_potsdam_9_9_label.tif"):
        write_image(root / name)
    with pytest.raises(UserError, match="top_potsdam_9_9_RGB.tif: in no list of the benchmark"):
        prepare(root, "potsdam", out="other")


def test_vaihingen(tmp_path: Path) -> None:
    assert (len(VAIHINGEN_TRAIN), len(VAIHINGEN_TEST)) == (16, 17) and not VAIHINGEN_TRAIN & VAIHINGEN_TEST
    root = tmp_path / "Vaihingen"
    for area in (1, 37, 2, 38):
        write_image(root / f"top/top_mosaic_09cm_area{area}.tif")
        write_mask(root / f"ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE/top_mosaic_09cm_area{area}.tif",
                   (255, 255, 0))
    found = prepare(root, "vaihingen")
    assert found == {"train": {"top_mosaic_09cm_area1": 4, "top_mosaic_09cm_area37": 4},
                     "test": {"top_mosaic_09cm_area2": 4, "top_mosaic_09cm_area38": 4}}


def test_whu_building(tmp_path: Path) -> None:
    root = tmp_path / "WHU"
    for split, value in (("train", 255), ("val", 0), ("test", 255)):
        write_image(root / f"{split}/image/0.tif")
        write_mask(root / f"{split}/label/0.tif", value)
    assert prepare(root, "whu_building") == {"train": {"0": 1}, "val": {"0": 0}, "test": {"0": 1}}


def test_whu_opt_sar(tmp_path: Path) -> None:
    root = tmp_path / "WHU-OPT-SAR"
    for number, value in enumerate((10, 70, 0)):
        write_image(root / f"optical/NH49E00101{number}.tif", bands=4)
        write_image(root / f"sar/NH49E00101{number}.tif", bands=1)
        write_mask(root / f"lbl/NH49E00101{number}.tif", value)
    (tmp_path / "train.txt").write_text("NH49E001010.tif\nNH49E001012.tif\n")
    (tmp_path / "test.txt").write_text("NH49E001011.tif\n")
    lists = ["--split_file", f"train={tmp_path}/train.txt", f"test={tmp_path}/test.txt"]
    found = prepare(root, "whu_opt_sar", "--bands", "2", "1", "0", *lists)
    assert found == {"train": {"NH49E001010": 0, "NH49E001012": 255}, "test": {"NH49E001011": 6}}
    assert prepare(root, "whu_opt_sar", "--product", "sar", *lists, out="sar") == found


@pytest.mark.parametrize("nested", [False, True])
def test_isaid(tmp_path: Path, nested: bool) -> None:
    root, below = tmp_path / "iSAID", "images/" if nested else ""
    for split in ("train", "val"):
        write_image(root / f"{split}/images/{below}P0000.png")
        write_mask(root / f"{split}/Semantic_masks/images/{below}P0000_instance_color_RGB.png", (0, 127, 255))
    write_image(root / "test/images/P0006.png")
    plane = ClassTable.load("isaid").names.index("plane")
    assert prepare(root, "isaid") == {"train": {"P0000": plane}, "val": {"P0000": plane}}


def test_deepglobe(tmp_path: Path) -> None:
    root = tmp_path / "deepglobe"
    for number, colour in ((119, (255, 255, 0)), (606, (3, 252, 1))):  # its masks are not of pure colours
        write_image(root / f"train/{number}_sat.jpg")
        write_mask(root / f"train/{number}_mask.png", colour)
    write_image(root / "valid/10452_sat.jpg")
    assert prepare(root, "deepglobe") == {"train": {"119": 1, "606": 3}}
    assert json.loads((tmp_path / "out/summary.json").read_text())["left_out"] == {}


def test_open_earth_map(tmp_path: Path) -> None:
    root = tmp_path / "OpenEarthMap"
    for name, value in (("aachen_1", 8), ("aachen_2", 1), ("kitsap_3", 0)):
        region = name.split("_")[0]
        write_image(root / f"{region}/images/{name}.tif")
        write_mask(root / f"{region}/labels/{name}.tif", value)
    write_image(root / "tokyo/images/tokyo_1.tif")  # test regions have no labels
    (root / "train.txt").write_text("aachen_1.tif\nkitsap_3.tif\n")
    (root / "val.txt").write_text("aachen_2.tif\n")
    found = prepare(root, "open_earth_map", "--split_file", f"train={root}/train.txt", f"val={root}/val.txt")
    assert found == {"train": {"aachen_1": 7, "kitsap_3": 255}, "val": {"aachen_2": 0}}


def test_inria(tmp_path: Path) -> None:
    root = tmp_path / "AerialImageDataset"
    for name, value in (("austin1", 255), ("austin6", 0), ("tyrol-w36", 255), ("vienna5", 0)):
        write_image(root / f"train/images/{name}.tif")
        write_mask(root / f"train/gt/{name}.tif", value)
    write_image(root / "test/images/bellingham1.tif")
    found = {"train": {"austin6": 0, "tyrol-w36": 1}, "val": {"austin1": 1, "vienna5": 0}}
    assert prepare(root, "inria") == found


@pytest.mark.parametrize("has_splits", [False, True])
def test_fusu(tmp_path: Path, has_splits: bool) -> None:
    root = tmp_path / "FUSU"
    for split in ("train", "test") if has_splits else ("",):
        write_image(root / split / "images/a_1.png")
        write_mask(root / split / "labels/a_1.png", 16)
    expected = {"train": {"a_1": 16}} | ({"test": {"a_1": 16}} if has_splits else {})
    assert prepare(root, "fusu") == expected


def test_layouts_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, layout in LAYOUTS.items():
        if layout.takes == ("root",) and name not in ("gid", "shared", "images_masks"):
            with pytest.raises((UserError, FileNotFoundError), match="Expected|Check the path"):
                prepare(tmp_path / "empty", name)
        if layout.table:
            ClassTable.load(layout.table)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--product sar: --preset potsdam has RGB, IRRG, RGBIR"):
        prepare(tmp_path / "empty", "potsdam", "--product", "sar")
    with pytest.raises(UserError, match="--images: not used by --preset loveda"):
        prepare(tmp_path / "empty", "loveda", "--images", str(tmp_path))
