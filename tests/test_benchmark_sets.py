"""Potsdam, Vaihingen and WHU-OPT-SAR: drawn miniatures with the names of the real files, through prepare_dataset.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.classes import ClassTable, read_mask
from ldm.data.prepare import layouts
from ldm.data.prepare.tiling import window_starts
from ldm.util import UserError
from scripts.prepare_dataset import main

TILE = 16


def draw(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def draw_pair(image: Path, label: Path, table: ClassTable, number: int, size: int = 2 * TILE) -> None:
    """An image whose bands are (number, class, 200), and its mask in the colours of the table."""
    mask = np.random.default_rng(number).integers(0, table.num_classes, (size, size)).astype(np.uint8)
    draw(label, table.colourise(mask))
    bands = [np.full_like(mask, number), mask * 20, np.full_like(mask, 200)]
    draw(image, np.stack(bands, -1))


def prepare(preset: str, root: Path, out: Path, *flags: str) -> dict[str, list[dict]]:
    main(["--preset", preset, "--root", str(root), "--out", str(out), "--tile", str(TILE), "--pair", "none",
          "--val_fraction", "0", "--allow_empty_classes", *flags])  # fmt: skip
    return {split: [json.loads(line) for line in (out / f"{split}_set_items.json").read_text().splitlines()]
            for split in ("train", "test") if (out / f"{split}_set_items.json").is_file()}  # fmt: skip


def check_tiles(out: Path, rows: list[dict], table: ClassTable) -> set[int]:
    """Masks are the classes that the images were drawn with, bands as stored; returns the numbers of the images."""
    numbers = set()
    for row in rows:
        image, mask = np.asarray(Image.open(out / row["target"])), read_mask(out / row["source"], table)
        assert image.shape == (TILE, TILE, 3) and (image[..., 2] == 200).all()
        assert np.array_equal(image[..., 1], mask * 20)
        numbers.add(int(image[0, 0, 0]))
    return numbers


@pytest.mark.parametrize("product", ["RGB", "IRRG"])
def test_potsdam(tmp_path, product):
    table, root = ClassTable.load("potsdam"), tmp_path / "potsdam"
    names = {"2_10": 1, "7_12": 2, "2_13": 3, "7_13": 4}  # two of each split
    folder = {"RGB": "2_Ortho_RGB", "IRRG": "3_Ortho_IRRG"}[product]
    for name, number in names.items():
        draw_pair(root / f"{folder}/top_potsdam_{name}_{product}.tif",
                  root / f"5_Labels_all/top_potsdam_{name}_label.tif", table, number)  # fmt: skip
    rows = prepare("potsdam", root, tmp_path / "out", "--product", product)
    assert [len(rows[split]) for split in ("train", "test")] == [8, 8]
    assert [check_tiles(tmp_path / "out", rows[split], table) for split in ("train", "test")] == [{1, 2}, {3, 4}]


def test_a_stray_colour_stops_or_is_counted(tmp_path):
    table, root = ClassTable.load("potsdam"), tmp_path / "potsdam"
    label = root / "5_Labels_all/top_potsdam_4_12_label.tif"
    draw_pair(root / "2_Ortho_RGB/top_potsdam_4_12_RGB.tif", label, table, 1)
    colours = np.asarray(Image.open(label)).copy()
    colours[0, :3] = (252, 255, 0)
    draw(label, colours)
    with pytest.raises(UserError, match="252, 255, 0"):
        prepare("potsdam", root, tmp_path / "a")
    rows = prepare("potsdam", root, tmp_path / "b", "--stray_colours", "ignore")
    masks = [read_mask(tmp_path / "b" / row["source"], table) for row in rows["train"]]
    assert sum((mask == 255).sum() for mask in masks) == 3


def test_an_image_of_no_list_is_an_error(tmp_path):
    table, root = ClassTable.load("potsdam"), tmp_path / "potsdam"
    draw_pair(root / "2_Ortho_RGB/top_potsdam_9_99_RGB.tif", root / "5_Labels_all/top_potsdam_9_99_label.tif", table, 1)
    with pytest.raises(UserError, match="top_potsdam_9_99_RGB.tif: in no list of the benchmark"):
        prepare("potsdam", root, tmp_path / "out")


def test_vaihingen(tmp_path):
    table, root = ClassTable.load("vaihingen"), tmp_path / "vaihingen"
    for number in (1, 37, 2, 38):
        name = f"top_mosaic_09cm_area{number}.tif"
        draw_pair(root / "top" / name, root / "gt" / name, table, number)
    rows = prepare("vaihingen", root, tmp_path / "out")
    assert [check_tiles(tmp_path / "out", rows[split], table) for split in ("train", "test")] == [{1, 37}, {2, 38}]


def test_whu_opt_sar(tmp_path):
    table, root = ClassTable.load("whu_opt_sar"), tmp_path / "whu"
    mask = np.random.default_rng(0).integers(0, 8, (2 * TILE, 2 * TILE)).astype(np.uint8)
    draw(root / "lbl/NH49E001013.tif", mask * 10)
    optical = np.stack([mask, mask * 2, mask * 3, mask * 4], -1)
    draw(root / "optical/NH49E001013.tif", np.ascontiguousarray(optical[..., :3]))
    draw(root / "sar/NH49E001013.tif", mask * 5)
    for product in ("optical", "sar"):
        rows = prepare("whu_opt_sar", root, tmp_path / product, "--product", product)["train"]
        assert len(rows) == 4
        for row in rows:
            found = read_mask(tmp_path / product / row["source"], table.without_source_ids())
            image = np.asarray(Image.open(tmp_path / product / row["target"]))
            band = image[..., 0] // (1 if product == "optical" else 5)
            assert np.array_equal(found, np.where(band == 0, 255, band - 1))  # 0 has no label


def test_splits_and_tiles_are_the_published_ones():
    train, test = layouts.POTSDAM_TRAIN, layouts.POTSDAM_TEST
    assert len(train) == 24 and len(test) == 14 and not train & test
    train, test = layouts.VAIHINGEN_TRAIN, layouts.VAIHINGEN_TEST
    assert len(train) == 16 and len(test) == 17 and not train & test
    assert len(window_starts(6000, 512, 512)) ** 2 == 144 and len(window_starts(6000, 512, 256)) ** 2 == 529
    assert window_starts(6000, 512, 512)[-1] == 6000 - 512  # the last one is shifted inward
