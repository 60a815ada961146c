"""Situations that users of remote-sensing files reported: read right or refused with the remedy. Made by code."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm.data.classes import ClassTable, read_mask
from ldm.util import UserError
from scripts.prepare_dataset import main

rasterio = pytest.importorskip("rasterio", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning", "ignore:Use `@`")

COLOURS = np.array([[90, 140, 70], [200, 40, 40], [60, 90, 200]], np.uint8)
THREE = {"name": "three", "classes": [{"id": i, "name": name, "colour": COLOURS[i].tolist()}
                                      for i, name in enumerate(("grass", "roof", "water"))]}  # fmt: skip
TWO = {"name": "two", "classes": THREE["classes"][:2]}


class Case:
    """A source of images and masks, and what prepare_dataset.py makes of it."""

    def __init__(self, root: Path, count: int = 3, height: int = 64, width: int = 64) -> None:
        """Draw masks of rectangles, and images in the colours of the classes with noise."""
        self.root, self.ids, self.images = root, [], []
        for folder in ("img", "mask"):
            (root / folder).mkdir()
        for number in range(count):
            rng = np.random.default_rng(number)
            ids = np.zeros((height, width), np.uint8)
            for value in (1, 2):
                top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
                ids[top : top + 20, left : left + 16] = value
            self.ids.append(ids)
            noise = rng.integers(-9, 10, (height, width, 3))
            self.images.append(np.clip(COLOURS[ids] + noise, 1, 255).astype(np.uint8))

    def write_images(self, images=None, ending: str = "png", **options) -> "Case":
        for number, image in enumerate(self.images if images is None else images):
            Image.fromarray(image).save(self.root / f"img/s{number}.{ending}", **options)
        return self

    def write_tiffs(self, images, **profile) -> "Case":
        for number, bands in enumerate(images):
            count, height, width = bands.shape
            with rasterio.open(self.root / f"img/s{number}.tif", "w", driver="GTiff", count=count, height=height,
                               width=width, dtype=bands.dtype, **profile) as file:
                file.write(bands)
        return self

    def write_masks(self, masks=None, **options) -> "Case":
        for number, mask in enumerate(self.ids if masks is None else masks):
            image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
            image.save(self.root / f"mask/s{number}.png", **options)
        return self

    def prepare(self, *flags: str, table: dict = THREE, out: str = "out") -> Path:
        (self.root / "table.yaml").write_text(json.dumps(table))
        main(["--images", str(self.root / "img"), "--masks", str(self.root / "mask"), "--classes",
              str(self.root / "table.yaml"), "--tile", "64", "--val_fraction", "0", "--workers", "2", "--out",
              str(self.root / out), *flags])
        return self.root / out

    def tiles(self, out: Path) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.asarray(Image.open(out / f"img_train/s{number}_0000_0000.png")),
                 np.asarray(Image.open(out / f"label_train/s{number}_0000_0000.png"))) for number in
                range(len(self.ids))]  # fmt: skip


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def colour_error(image: np.ndarray, ids: np.ndarray) -> float:
    """Mean distance of an image's colours to those of the classes of its mask."""
    return float(np.abs(image.astype(int) - COLOURS[ids]).mean())


def summary_of(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("kind", ["grey", "three channels", "tiff"])
def test_binary_masks_of_0_and_255_are_not_taken_as_ignored(case: Case, kind: str) -> None:
    binary = [np.where(ids == 1, 255, 0).astype(np.uint8) for ids in case.ids]
    if kind == "three channels":
        binary = [np.dstack([mask] * 3) for mask in binary]
    case.write_images().write_masks(binary)
    with pytest.raises(UserError, match=r"not one pixel of roof.*source_ids: \{0: 0, 255: 1\}"):
        case.prepare(table=TWO)
    out = case.prepare(table=TWO | {"source_ids": {0: 0, 255: 1}})
    for (_, mask), ids in zip(case.tiles(out), case.ids, strict=True):
        np.testing.assert_array_equal(mask, ids == 1)
    case.prepare("--allow_empty_classes", table=TWO, out="other")
    case.prepare(table=TWO | {"source_ids": {0: 0, 255: 255}}, out="third")


def test_a_manifest_of_binary_masks_warns(tmp_path: Path, caplog) -> None:
    from ldm.data.manifest import read_manifest

    case = Case(tmp_path).write_images()
    case.write_masks([np.where(ids == 1, 255, 0).astype(np.uint8) for ids in case.ids])
    lines = [json.dumps({"source": f"mask/s{number}.png", "target": f"img/s{number}.png"}) for number in range(3)]
    (case.root / "all.json").write_text("\n".join(lines))
    table = ClassTable.load(TWO | {"name": "binary_of_a_manifest"})
    read_manifest(tmp_path / "all.json", tmp_path, table=table)
    assert "hold only 0 and 255" in caplog.text and "source_ids: {0: 0, 255: 1}" in caplog.text


def test_empty_images_are_named(tmp_path: Path, caplog) -> None:
    """One colour but for noise, or nothing but transparent pixels; halves, or one line on plain ground, are no empty
    image."""
    from ldm.data.manifest import read_manifest

    Image.new("L", (32, 32)).save(tmp_path / "mask.png")
    half = np.full((32, 32, 3), 200, np.uint8)
    half[16:] = 7
    Image.fromarray(half).save(tmp_path / "half.png")
    noise = np.random.default_rng(0).integers(0, 2, (32, 32, 3), np.uint8)
    Image.fromarray(noise + np.uint8(90)).save(tmp_path / "noise.png")
    line = np.full((32, 32, 3), 90, np.uint8)
    line[9] = 200  # in none of the rows that are looked at first
    Image.fromarray(line).save(tmp_path / "line.png")
    Image.fromarray(np.dstack([half, np.zeros((32, 32), np.uint8)])).save(tmp_path / "clear.png")
    for names, empty in ((("half.png", "line.png"), None), (("half.png", "noise.png"), "noise.png"),
                         (("half.png", "clear.png"), "clear.png")):  # fmt: skip
        caplog.clear()
        lines = [json.dumps({"source": "mask.png", "ref_image": name}) for name in names]
        (tmp_path / "all.json").write_text("\n".join(lines))
        assert len(read_manifest(tmp_path / "all.json", tmp_path, need=("reference",))) == len(names)
        named = f"1 of the images and references are empty or of one colour, such as {tmp_path / str(empty)}"
        assert (named in caplog.text) == bool(empty) == ("empty" in caplog.text)


def test_black_and_white_colours_are_the_same_kind(case: Case) -> None:
    table = {"name": "two", "classes": [{"id": 0, "name": "ground", "colour": [9, 9, 9]},
                                        {"id": 1, "name": "roof", "colour": [255, 255, 255]}]}
    case.write_images().write_masks([np.dstack([np.where(ids == 1, 255, 0).astype(np.uint8)] * 3) for ids in case.ids])
    with pytest.raises(UserError, match="not one pixel of ground.*set ignore_colour"):
        case.prepare(table=table)
    table["classes"][0]["colour"] = [0, 0, 0]
    out = case.prepare(table=table | {"ignore_colour": [1, 2, 3]})
    for (_, mask), ids in zip(case.tiles(out), case.ids, strict=True):
        np.testing.assert_array_equal(mask, ids == 1)


def test_ids_that_count_from_1_are_named(case: Case) -> None:
    case.write_images().write_masks([ids + 1 for ids in case.ids])
    with pytest.raises(UserError, match=r"ids 3 are not in.*count from 1.*source_ids: \{0: 255, 1: 0, 2: 1, 3: 2\}"):
        case.prepare()
    case.write_masks([np.minimum(ids + 1, 2) for ids in case.ids])  # the last class does not occur
    notes = summary_of(case.prepare())["notes"]
    assert any("not one pixel of grass" in note and "{1: 0, 2: 1, 3: 2}" in note for note in notes)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_turned_images_fit_their_masks(case: Case, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {3: 2, 6: 1, 8: 3}[orientation]
    case.write_images([np.ascontiguousarray(np.rot90(image, turns)) for image in case.images], "jpg", exif=exif,
                      quality=95)
    case.write_masks()
    for image, mask in case.tiles(case.prepare()):
        assert colour_error(image, mask) < 12


@pytest.mark.parametrize("kind", ["rgb16", "rgba16", "grey16", "float", "png16"])
def test_deep_images_are_scaled_or_refused(case: Case, kind: str) -> None:
    deep = [image.astype(np.uint16) * 16 for image in case.images]  # 12 bits
    bands = [image.transpose(2, 0, 1) for image in deep]
    if kind == "rgba16":
        bands = [np.concatenate([image, np.full_like(image[:1], 65535)]) for image in bands]
    elif kind == "grey16":
        bands = [image[:1] for image in bands]
    elif kind == "float":
        bands = [image.astype(np.float32) for image in bands]
    if kind == "png16":
        for number, image in enumerate(bands):
            with rasterio.open(case.root / f"img/s{number}.png", "w", driver="PNG", count=3, height=64, width=64,
                               dtype="uint16") as file:
                file.write(image)
    else:
        case.write_tiffs(bands, **({"photometric": "RGB"} if kind in ("rgb16", "rgba16") else {}))
    case.write_masks()
    with pytest.raises(UserError, match="(?s)3 problems.*--scale_range MIN MAX or --scale_percentiles"):
        case.prepare()
    out = case.prepare("--scale_range", "0", "4080")
    expected = [np.repeat(image[:, :, :1], 3, 2) if kind == "grey16" else image for image in case.images]
    for (image, _), wanted in zip(case.tiles(out), expected, strict=True):
        np.testing.assert_array_equal(image, wanted)
    assert summary_of(out)["reading"]["scale"] == [[0.0, 4080.0]]


def test_percentiles_are_those_of_the_set_and_serve_references_too(case: Case, tmp_path: Path) -> None:
    deep = [image.astype(np.uint16).transpose(2, 0, 1) * (number + 2) for number, image in enumerate(case.images)]
    case.write_tiffs(deep).write_masks()
    (tmp_path / "ref").mkdir()
    with rasterio.open(tmp_path / "ref/r.tif", "w", driver="GTiff", count=3, height=30, width=40,
                       dtype="uint16") as file:
        file.write(deep[0][:, :30, :40])
    flags = ["--pair", "folder", "--ref_dir", str(tmp_path / "ref"), "--infer_split", "train"]
    out = case.prepare("--scale_percentiles", "2", "98", *flags)
    whole = np.concatenate([image.reshape(3, -1) for image in deep], 1)
    bounds = np.percentile(whole, [2, 98], axis=1).T
    np.testing.assert_allclose(summary_of(out)["reading"]["scale"], bounds)
    low, high = bounds[:, 0, None, None], bounds[:, 1, None, None]
    scaled = np.rint(np.clip((deep[0].astype(float) - low) / (high - low), 0, 1) * 255).transpose(1, 2, 0)
    assert np.abs(case.tiles(out)[0][0] - scaled).max() <= 1
    reference = np.asarray(Image.open(out / "ref_img/r_0000_0000.png"))  # smaller than a tile: whole
    assert np.abs(reference - scaled[:30, :40]).max() <= 1
    again = case.prepare("--scale_from", str(out), out="again")
    assert summary_of(again)["reading"] == summary_of(out)["reading"]
    np.testing.assert_array_equal(case.tiles(again)[0][0], case.tiles(out)[0][0])


def test_many_bands_become_arrays_that_every_command_reads(case: Case) -> None:
    bands = [np.concatenate([image.transpose(2, 0, 1), image.transpose(2, 0, 1)[:2] // 2]) for image in case.images]
    case.write_tiffs(bands, photometric="MINISBLACK").write_masks()
    with pytest.raises(UserError, match="5 bands.*--bands 0 1 2"):
        case.prepare()
    for (image, _), wanted in zip(case.tiles(case.prepare("--bands", "3", "4", "0")), bands, strict=True):
        np.testing.assert_array_equal(image, wanted[[3, 4, 0]].transpose(1, 2, 0))
    out = case.prepare("--bands", "0", "1", "2", "3", "4", out="five")
    from ldm.data.dataset import PairDataset
    from ldm.data.manifest import read_manifest

    table = ClassTable.load(out / "classes.yaml")
    rows = read_manifest(out / "train_set_items.json", out, table=table)
    item = PairDataset(rows, table, reference="none", channels=5)[0]
    np.testing.assert_array_equal(item["image"].numpy(), bands[0])


def test_bands_by_name(case: Case) -> None:
    case.write_tiffs([np.stack([image[:, :, 2], image[:, :, 1], image[:, :, 0], image[:, :, 0] // 2])
                      for image in case.images], photometric="MINISBLACK").write_masks()
    for path in (case.root / "img").iterdir():
        with rasterio.open(path, "r+") as file:
            file.descriptions = ("B02", "B03", "B04", "B08")
    out = case.prepare("--bands", "B04", "b03", "B02")
    np.testing.assert_array_equal(case.tiles(out)[1][0], case.images[1])


def test_cmyk_is_converted(case: Case) -> None:
    for number, image in enumerate(case.images):
        Image.fromarray(image).convert("CMYK").save(case.root / f"img/s{number}.jpg", quality=95)
    case.write_masks()
    for image, mask in case.tiles(case.prepare()):
        assert colour_error(image, mask) < 12


def test_smoothed_edges_have_a_way_on(case: Case) -> None:
    smooth = [Image.fromarray(COLOURS[ids]).filter(ImageFilter.GaussianBlur(0.6)) for ids in case.ids]
    case.write_images().write_masks(smooth)
    with pytest.raises(UserError, match="colours .*--nearest_colour N and --stray_colours ignore"):
        case.prepare()
    out = case.prepare("--nearest_colour", "30", "--stray_colours", "ignore")
    counts = summary_of(out)["masks"]
    near = stray = 0
    for (_, mask), ids, image in zip(case.tiles(out), case.ids, smooth, strict=True):
        distance = np.sqrt(((np.asarray(image)[:, :, None].astype(float) - COLOURS) ** 2).sum(-1))
        taken = np.where(distance.min(-1) <= 30, distance.argmin(-1), 255)
        np.testing.assert_array_equal(mask, taken)
        near += int(((distance.min(-1) > 0) & (distance.min(-1) <= 30)).sum())
        stray += int((taken == 255).sum())
        assert (mask == ids).mean() > 0.85
    assert (counts["nearest_colour"], counts["stray_colours"]) == (near, stray) and near and stray


def test_palettes_in_another_order_are_read_by_colour(case: Case) -> None:
    masks = []
    for number, ids in enumerate(case.ids):  # indices sorted by how often a class occurs, as some programs write them
        order = [0, 2, 1] if number else [0, 1, 2]
        image = Image.fromarray(np.argsort(order)[ids].astype(np.uint8), "P")
        image.putpalette(COLOURS[order].tobytes())
        masks.append(image)
    case.write_images().write_masks(masks)
    out = case.prepare()
    for (_, mask), ids in zip(case.tiles(out), case.ids, strict=True):
        np.testing.assert_array_equal(mask, ids)
    assert summary_of(out)["masks"]["palette_by_colour"] == 2
    masks[1].putpalette(np.vstack([COLOURS[0], COLOURS[2], [1, 2, 3]]).astype(np.uint8).tobytes())
    case.write_masks(masks)
    with pytest.raises(UserError, match="palette has colours of class table three at other numbers.*--mask_kind"):
        case.prepare("--overwrite")
    case.prepare("--overwrite", "--mask_kind", "ids")


@pytest.mark.parametrize("off", [1, -2])
def test_palettes_of_near_colours_in_another_order(case: Case, off: int) -> None:
    masks = []
    for ids in case.ids:
        image = Image.fromarray(np.argsort([0, 2, 1])[ids].astype(np.uint8), "P")
        image.putpalette((COLOURS[[0, 2, 1]].astype(int) + off).astype(np.uint8).tobytes())
        masks.append(image)
    case.write_images().write_masks(masks)
    with pytest.raises(UserError, match="palette has colours.*only near.*--nearest_colour 8.*--mask_kind ids"):
        case.prepare()
    out = case.prepare("--nearest_colour", "8")
    for (_, mask), ids in zip(case.tiles(out), case.ids, strict=True):
        np.testing.assert_array_equal(mask, ids)
    out = case.prepare("--mask_kind", "ids", out="other")
    np.testing.assert_array_equal(case.tiles(out)[0][1], np.array([0, 2, 1])[case.ids[0]])


def test_grey_palettes_hold_ids_whatever_colours_are_near(case: Case) -> None:
    table = {"name": "dark", "ignore_colour": [9, 9, 9], "classes": [
        {"id": i, "name": f"c{i}", "colour": [v, v, v + 1]} for i, v in enumerate((2, 0, 1))]}  # fmt: skip
    masks = [Image.fromarray(ids, "P") for ids in case.ids]
    for mask in masks:
        mask.putpalette(np.repeat(np.arange(256, dtype=np.uint8), 3).tobytes())
    out = case.write_images().write_masks(masks).prepare("--nearest_colour", "8", table=table)
    np.testing.assert_array_equal(case.tiles(out)[0][1], case.ids[0])


def test_subfolders_are_counted_and_read_on_demand(tmp_path: Path) -> None:
    case = Case(tmp_path).write_images().write_masks()
    for folder in ("img", "mask"):
        for name in ("more", "town/east"):
            (tmp_path / folder / name).mkdir(parents=True)
        for number, place in ((1, "more"), (2, "town/east")):
            (tmp_path / folder / f"s{number}.png").rename(tmp_path / folder / place / f"s{number}.png")
    (tmp_path / "img/readme.txt").write_text("")
    (tmp_path / "img/.hidden.png").write_text("")
    summary = summary_of(case.prepare())
    assert summary["left_out"] == {"images in subfolders": 2, ".txt files": 1, "hidden files": 1}
    assert any("2 images in 2 subfolders are not read (--recursive" in note for note in summary["notes"])
    out = case.prepare("--recursive", out="all")
    names = sorted(path.name for path in (out / "img_train").iterdir())
    assert names == ["more_s1_0000_0000.png", "s0_0000_0000.png", "town_east_s2_0000_0000.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "label_train/town_east_s2_0000_0000.png")), case.ids[2])
    for folder in ("img", "mask"):
        (tmp_path / folder / "s0.png").unlink()
    with pytest.raises(UserError, match="no image in this folder; 2 lie in 2 subfolders: add --recursive"):
        case.prepare(out="none")


def test_small_images_are_padded_or_the_remedy_is_named(tmp_path: Path) -> None:
    case = Case(tmp_path, height=40, width=70).write_images().write_masks()
    with pytest.raises(UserError, match="3 images are smaller than --tile 64.*--tile 40 or less, --tile 0.*--pad"):
        case.prepare()
    out = case.prepare("--pad")
    mask = np.asarray(Image.open(out / "label_train/s0_0000_0006.png"))
    image = np.asarray(Image.open(out / "img_train/s0_0000_0006.png"))
    np.testing.assert_array_equal(mask[:40], case.ids[0][:, 6:])
    np.testing.assert_array_equal(image[:40], case.images[0][:, 6:])
    assert mask.shape == (64, 64) and (mask[40:] == 255).all() and not image[40:].any()


@pytest.mark.parametrize("kind", ["flag", "tag", "alpha"])
def test_pixels_without_data_become_255(case: Case, kind: str) -> None:
    outside = np.abs(np.arange(64)[:, None] - np.arange(64)) > 30
    images = [np.where(outside[:, :, None], 0, image).astype(np.uint8) for image in case.images]
    masks = [np.where(outside, 0, ids).astype(np.uint8) for ids in case.ids]
    if kind == "flag":
        case.write_images(images)
    elif kind == "tag":
        case.write_tiffs([image.transpose(2, 0, 1) for image in images], nodata=0)
    else:
        case.write_images([np.dstack([image, np.where(outside, 0, 255).astype(np.uint8)]) for image in images])
    case.write_masks(masks)
    if kind == "flag":
        notes = summary_of(case.prepare("--max_ignore", "1"))["notes"]
        assert any("are black" in note and "--nodata 0" in note for note in notes)
    out = case.prepare("--max_ignore", "1", "--overwrite", *(["--nodata", "0"] if kind == "flag" else []))
    for (_, mask), ids in zip(case.tiles(out), masks, strict=True):
        np.testing.assert_array_equal(mask, np.where(outside, 255, ids))


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_dark_pixels_that_a_scale_makes_0_are_not_without_data(case: Case, dtype: str) -> None:
    dark = [np.where(ids == 0, 300, 4000).astype(dtype)[None].repeat(3, 0) for ids in case.ids]
    case.write_tiffs(dark).write_masks()
    flags = ["--scale_range", "1000", "5000"]
    assert not any("black" in note for note in summary_of(case.prepare(*flags))["notes"])
    case.write_tiffs([np.where(image == 300, 0, image) for image in dark])
    assert any("--nodata 0" in note for note in summary_of(case.prepare(*flags, out="two"))["notes"])


@pytest.mark.parametrize(("shift", "epsg", "is_said"), [(0.2, 32633, False), (0.6, 32633, True), (0, 32634, True)])
def test_masks_that_lie_elsewhere_are_said(case: Case, shift: float, epsg: int, is_said: bool) -> None:
    step = 10  # metres a pixel
    profile = {"driver": "GTiff", "height": 64, "width": 64, "dtype": "uint8"}
    case.write_tiffs([image.transpose(2, 0, 1) for image in case.images], crs="EPSG:32633",
                     transform=rasterio.transform.from_origin(500_000, 5e6, step, step))
    for number, ids in enumerate(case.ids):
        moved = shift * step * (number > 0)
        with rasterio.open(case.root / f"mask/s{number}.tif", "w", count=1, crs=f"EPSG:{epsg if number else 32633}",
                           transform=rasterio.transform.from_origin(500_000 + moved, 5e6, step, step),
                           **profile) as file:
            file.write(ids, 1)
    notes = " ".join(summary_of(case.prepare("--tile", "32"))["notes"])
    assert ("2 masks lie elsewhere" in notes and "mask/s1.tif and" in notes) == is_said


def test_255_of_masks_with_an_empty_class_is_named_with_its_share(case: Case) -> None:
    case.write_images().write_masks([np.where(ids == 2, 255, ids) for ids in case.ids])
    share = np.mean([ids == 2 for ids in case.ids])
    notes = " ".join(summary_of(case.prepare())["notes"])
    assert f"not one pixel of water in all masks; 255 ({share:.1%}" in notes
    assert "source_ids: {0: 0, 1: 1, 255: 2}" in notes


def test_sets_that_mix_1_and_255_for_one_class_are_named(case: Case) -> None:
    masks = [(ids == 1).astype(np.uint8) * (255 if number else 1) for number, ids in enumerate(case.ids)]
    case.write_images().write_masks(masks)
    notes = " ".join(summary_of(case.prepare(table=TWO))["notes"])
    assert "2 masks hold only 0 and 255, others 0 and 1" in notes and "source_ids: {0: 0, 1: 1, 255: 1}" in notes
    case.prepare(table=TWO | {"source_ids": {0: 0, 1: 1, 255: 1}}, out="two")
    assert "only 0 and 255" not in " ".join(summary_of(case.root / "two")["notes"])
    masks[0][:, :3] = 255  # here 255 stands beside both classes, so it is none
    case.write_masks(masks)
    assert "only 0 and 255" not in " ".join(summary_of(case.prepare(table=TWO, out="three"))["notes"])


def test_side_files_and_links_are_told_apart(case: Case) -> None:
    case.write_tiffs([image.transpose(2, 0, 1) for image in case.images]).write_masks()
    for name in ("s0.tfw", "s0.tif.msk", "s1.tif.aux.xml", "s9.tfw", "s0.pgw", "s0.xml"):
        (case.root / "img" / name).write_text("")
    for name, text in (("s0.tfw", "1\n0\n0\n-1\n0.5\n0.5\n"), ("s1.tif.aux.xml", "<PAMDataset></PAMDataset>")):
        (case.root / "img" / name).write_text(text)
    with rasterio.open(case.root / "img/s0.tif.msk", "w", driver="GTiff", count=1, height=64, width=64, dtype="uint8",
                       ) as file:
        file.update_tags(INTERNAL_MASK_FLAGS_1="2")
        file.write(np.full((64, 64), 255, np.uint8), 1)
    (case.root / "away").mkdir()
    Image.fromarray(case.images[0]).save(case.root / "away/s7.png")
    (case.root / "img/linked").symlink_to(case.root / "away", target_is_directory=True)
    summary = summary_of(case.prepare("--recursive"))
    assert summary["left_out"] == {"linked folders": 1, ".tfw files": 1, ".pgw files": 1, ".xml files": 1}
    notes = " ".join(summary["notes"])
    assert "1 linked folders are not followed" in notes and "place on Earth in .tfw, .pgw files is not read" in notes


def test_masks_of_an_ending_that_is_not_read_are_named(case: Case) -> None:
    case.write_images()
    for number, ids in enumerate(case.ids):
        Image.fromarray(ids).save(case.root / f"mask/s{number}.gif")
    with pytest.raises(UserError, match=r"1 problem.*\n.*no mask in this folder; files of the ending .gif are"):
        case.prepare()
    Image.fromarray(case.ids[0]).save(case.root / "mask/s0.png")
    with pytest.raises(UserError, match="no mask s1.png(.|\n)*3 .gif files left out"):
        case.prepare()


def test_tiles_over_max_ignore_are_counted(case: Case) -> None:
    case.ids[1][:40] = 255
    out = case.write_images().write_masks().prepare()
    assert summary_of(out)["left_out"] == {"tiles over --max_ignore": 1}


def test_split_files_as_benchmarks_publish_them(case: Case, tmp_path: Path) -> None:
    case.write_images().write_masks()
    (tmp_path / "train.txt").write_text("s2\n")
    (tmp_path / "test.txt").write_text("img/s0.png mask/s0.png\n")
    flags = ["--split_file", f"train={tmp_path}/train.txt", f"test={tmp_path}/test.txt"]
    out = case.prepare(*flags)
    assert [path.name for path in (out / "img_train").iterdir()] == ["s2_0000_0000.png"]
    assert [path.name for path in (out / "img_test").iterdir()] == ["s0_0000_0000.png"]
    assert summary_of(out)["left_out"] == {"images in no list of --split_file": 1}
    (tmp_path / "train.txt").write_text("s2\ns7\n")
    with pytest.raises(UserError, match=r"1 of 3 names have no labelled image \(s7\)"):
        case.prepare(*flags, out="two")
    (tmp_path / "train.txt").write_text("s2\ns0\n")
    with pytest.raises(UserError, match="s0.png: in the lists of test and train"):
        case.prepare(*flags, out="two")


def names_of(out: Path, split: str) -> list[str]:
    """Names of the images of a split, without the place of their only tile."""
    return sorted(path.stem.removesuffix("_0000_0000") for path in (out / f"img_{split}").glob("*"))


@pytest.mark.parametrize("form", ["{}/{}.png", "{}_{}", "img/{}/{}.png mask/{}/{}.png"])
def test_split_files_with_folders_take_those_images_only(tmp_path: Path, form: str) -> None:
    case = Case(tmp_path, count=2)
    for town in ("lima", "oslo", "."):
        for folder, arrays in (("img", case.images), ("mask", case.ids)):
            (tmp_path / folder / town).mkdir(exist_ok=True)
            for number, array in enumerate(arrays):
                Image.fromarray(array).save(tmp_path / folder / town / f"{number}.png")
    for split, lines in (("train", [("lima", 0)]), ("test", [("lima", 1), ("oslo", 0)])):
        text = "\n".join(form.format(*line, *line) for line in lines)
        (tmp_path / f"{split}.txt").write_text(f"# those of {split}\n\n{text}\n")
    flags = ["--recursive", "--split_file", f"train={tmp_path}/train.txt", f"test={tmp_path}/test.txt"]
    out = case.prepare(*flags)
    assert (names_of(out, "train"), names_of(out, "test")) == (["lima_0"], ["lima_1", "oslo_0"])
    assert summary_of(out)["left_out"] == {"images in no list of --split_file": 3}
    (tmp_path / "train.txt").write_text("rome/0\n")
    with pytest.raises(UserError, match=r"1 of 3 names have no labelled image \(rome/0\)"):
        case.prepare(*flags, out="two")
    for folder in ("img", "mask"):
        (tmp_path / folder / "1.png").unlink()
    (tmp_path / "train.txt").write_text("1\n")
    with pytest.raises(UserError, match=r"--split_file: 1 may be 2 images \(.*lima/1.png, .*oslo/1.png\)"):
        case.prepare(*flags, out="two")


def test_split_files_name_images_with_blanks(case: Case, tmp_path: Path) -> None:
    names = ["a b", "a", "x, y"]
    for folder, arrays in (("img", case.images), ("mask", case.ids)):
        for name, array in zip(names, arrays, strict=True):
            Image.fromarray(array).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "train.txt").write_text("a b\n")
    (tmp_path / "test.txt").write_text("# comment\nx, y.png a b.png\na.png,3\n")
    out = case.prepare("--split_file", f"train={tmp_path}/train.txt", f"test={tmp_path}/test.txt")
    assert (names_of(out, "train"), names_of(out, "test")) == (["a b"], ["a", "x, y"])


def test_near_words_for_keys_of_a_class_table(case: Case) -> None:
    case.write_images().write_masks()
    table = {"name": "three", "classes": [{"id": 0, "name": "grass", "color": [1, 2, 3]}]}
    with pytest.raises(UserError, match="unknown keys color. Did you mean colour?"):
        case.prepare(table=table)


def test_one_name_for_class_tables(case: Case, tmp_path: Path) -> None:
    case.write_images().write_masks()
    for number, flag in enumerate(("--classes", "--class_table", "--dataset")):
        (tmp_path / "t.yaml").write_text(json.dumps(THREE))
        main(["--images", str(tmp_path / "img"), "--masks", str(tmp_path / "mask"), flag, str(tmp_path / "t.yaml"),
              "--tile", "64", "--out", str(tmp_path / f"o{number}")])


MASKS = {
    "float tiff": ("float32", {}), "int16 tiff": ("int16", {}), "uint32 tiff": ("uint32", {}),
    "tiled tiff": ("uint8", {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "lzw"}),
    "nodata tiff": ("int32", {"nodata": -9999}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_number(tmp_path: Path, kind: str) -> None:
    dtype, profile = MASKS[kind]
    table, file = ClassTable.load(THREE), tmp_path / "m.tif"
    ids = np.random.default_rng(0).integers(0, 3, (40, 48)).astype(dtype)
    wanted = ids.astype(np.uint8)
    ids[0, :5], wanted[0, :5] = (np.nan if dtype == "float32" else profile.get("nodata", 255)), 255
    with rasterio.open(file, "w", driver="GTiff", count=1, height=40, width=48, dtype=dtype, **profile) as out:
        out.write(ids, 1)
    np.testing.assert_array_equal(read_mask(file, table), wanted)
    with rasterio.open(file, "r+") as out:
        ids[1, 1] = 1.5 if dtype == "float32" else 77
        out.write(ids, 1)
    with pytest.raises(UserError, match="1.5" if dtype == "float32" else "ids 77"):
        read_mask(file, table)


def test_masks_that_no_one_can_read_right_are_refused(tmp_path: Path) -> None:
    table = ClassTable.load(THREE)
    ids = np.random.default_rng(0).integers(0, 3, (32, 32)).astype(np.uint8)
    with rasterio.open(tmp_path / "jpeg.tif", "w", driver="GTiff", count=1, height=32, width=32, dtype="uint8",
                       compress="jpeg") as out:
        out.write(ids, 1)
    with rasterio.open(tmp_path / "two.tif", "w", driver="GTiff", count=2, height=32, width=32, dtype="uint8") as out:
        out.write(np.stack([ids, ids]))
    with rasterio.open(tmp_path / "a.jp2", "w", driver="JP2OpenJPEG", count=1, height=32, width=32,
                       dtype="uint8") as out:
        out.write(ids, 1)
    Image.fromarray(np.dstack([COLOURS[ids], np.full((32, 32), 130, np.uint8)])).save(tmp_path / "half.png")
    for name, words in (("jpeg.tif", "with loss"), ("two.tif", "2 bands.*gdal_translate -b"), ("a.jp2", "JPEG2000|JP2"),
                        ("half.png", "transparent in part")):
        with pytest.raises(UserError, match=words):
            read_mask(tmp_path / name, table)
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[:3] = 0
    Image.fromarray(np.dstack([COLOURS[ids], alpha])).save(tmp_path / "hole.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "hole.png", table), np.where(alpha, ids, 255))


@pytest.mark.parametrize("nodata", [-3.4028234663852886e38, -9999.9, float("nan"), 1e-3])
def test_nodata_of_float_masks_need_not_be_whole(tmp_path: Path, nodata: float) -> None:
    ids = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.float32)
    ids[:4] = nodata
    for count in (1, 2):  # the second time with a fraction that is not nodata
        with rasterio.open(tmp_path / "m.tif", "w", driver="GTiff", count=1, height=20, width=30, dtype="float32",
                           nodata=nodata) as out:
            out.write(ids, 1)
        if count == 1:
            expected = np.where(np.arange(20)[:, None] < 4, 255, ids)
            np.testing.assert_array_equal(read_mask(tmp_path / "m.tif", ClassTable.load(THREE)), expected)
            ids[9, 9] = 0.5
    with pytest.raises(UserError, match="no whole numbers .0.5 and 0 more"):
        read_mask(tmp_path / "m.tif", ClassTable.load(THREE))


def test_masks_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    ids = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.uint8)
    Image.fromarray(np.ascontiguousarray(np.rot90(ids))).save(tmp_path / "m.png", exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", ClassTable.load(THREE)), ids)


def test_large_scenes_are_read_by_rows_and_keep_their_place(tmp_path: Path, monkeypatch) -> None:
    from ldm.data.bands import Reading
    from ldm.data.prepare import tiling

    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (3, 300, 400)).astype(np.uint8)
    ids = rng.integers(0, 3, (1, 300, 400)).astype(np.uint8)
    transform = rasterio.transform.from_origin(500_000, 5_800_000, 0.5, 0.5)
    place = {"crs": "EPSG:32633", "transform": transform, "tiled": True, "blockxsize": 64, "blockysize": 64}
    for folder, bands in (("img", pixels), ("mask", ids)):
        (tmp_path / folder).mkdir()
        with rasterio.open(tmp_path / folder / "scene.tif", "w", driver="GTiff", count=len(bands), height=300,
                           width=400, dtype="uint8", **place) as file:
            file.write(bands)
    seen = []
    read = tiling.OpenImage.read_stored
    monkeypatch.setattr(tiling.OpenImage, "read_stored", lambda self, *rows: seen.append(rows) or read(self, *rows))
    (tmp_path / "t.yaml").write_text(json.dumps(THREE))
    main(["--images", str(tmp_path / "img"), "--masks", str(tmp_path / "mask"), "--classes", str(tmp_path / "t.yaml"),
          "--tile", "128", "--out", str(tmp_path / "out")])
    assert sorted(seen) == [(0, 128), (128, 256), (172, 300)]
    rows = [json.loads(line) for line in (tmp_path / "out/train_set_items.json").read_text().splitlines()]
    assert len(rows) == 3 * 4
    for row in rows:
        top, left, height, width = row["window"]
        image = np.asarray(Image.open(tmp_path / "out" / row["target"]))
        np.testing.assert_array_equal(image, pixels[:, top : top + height, left : left + width].transpose(1, 2, 0))
        mask = np.asarray(Image.open(tmp_path / "out" / row["source"]))
        np.testing.assert_array_equal(mask, ids[0, top : top + height, left : left + width])
        assert (row["scene"], row["crs"]) == ("scene", "EPSG:32633")
        assert tuple(row["transform"]) == tuple(transform @ rasterio.Affine.translation(left, top))[:6]
    assert Reading.from_dict(summary_of(tmp_path / "out")["reading"]) == Reading()
