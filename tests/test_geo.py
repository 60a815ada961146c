"""Scenes by windows, masks and images with their place on Earth, held against rasterio and whole-image predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.classes import ClassTable, read_mask
from ldm.data.images import open_image
from ldm.data.manifest import read_manifest
from ldm.util import UserError
from post_processing.segmentation.scenes import predict_classes, predict_scene, window_spans, window_weights

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("mmseg")

from rasterio.transform import from_origin  # noqa: E402
from segmentors import make_segmentor, table_of  # noqa: E402

from post_processing.geo import PlacedTile, write_mosaic, write_polygons  # noqa: E402
from post_processing.segmentation.segmentor import load_segmentor  # noqa: E402
from scripts import predict_masks, write_geotiff  # noqa: E402

PLACE = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_200_000, 0.5, 0.5)}


def smooth(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (height // 12 + 1, width // 12 + 1, 3)).astype(np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def write_scene(path: Path, image: np.ndarray, **options: object) -> Path:
    settings = {"driver": "GTiff", "height": image.shape[0], "width": image.shape[1], "count": image.shape[2],
                "dtype": image.dtype, **PLACE}  # fmt: skip
    with rasterio.open(path, "w", **settings | options) as file:
        file.write(image.transpose(2, 0, 1))
    return path


@pytest.fixture(scope="module")
def segmentor_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_segmentor(tmp_path_factory.mktemp("segmentor"), table_of(3))


def run(tmp_path: Path, segmentor_files: tuple[Path, Path], *flags: object) -> Path:
    predict_masks.main([str(part) for part in ("--segmentor", *segmentor_files, "--images", tmp_path / "img",
                                               "--outdir", tmp_path / "out", "--device", "cpu", *flags)])  # fmt: skip
    return tmp_path / "out"


def test_a_scene_by_windows_is_the_whole_image_and_keeps_its_place(tmp_path: Path, segmentor_files):
    """The round trip of the issue, on a scene of which neither the windows nor the network's stride are even parts."""
    (tmp_path / "img").mkdir()
    image = smooth(447, 709)
    write_scene(tmp_path / "img/scene.tif", image)
    out = run(tmp_path, segmentor_files, "--window", 192, "--overlap", 64, "--batch_size", 3)
    segmentor = load_segmentor(*segmentor_files)
    whole = predict_classes(segmentor, torch.from_numpy(image.transpose(2, 0, 1).copy())[None])[0]
    assert len(np.unique(whole)) == 3
    with rasterio.open(out / "masks/scene.tif") as mask, rasterio.open(tmp_path / "img/scene.tif") as scene:
        assert (mask.crs, mask.transform, mask.shape) == (scene.crs, scene.transform, scene.shape)
        found, table = mask.read(1), table_of(3)
        assert mask.nodata == 255 and mask.tags(1)["CLASS_2"] == "class 2"
        assert [mask.colormap(1)[i][:3] for i in range(3)] == list(table.colours)
    assert (found != whole).mean() < 0.001
    assert (read_mask(out / "masks/scene.tif", ClassTable.load(out / "classes.yaml")) == found).all()
    root = out.parent
    rows = read_manifest(out / "items.json", root, table=ClassTable.load(out / "classes.yaml"), need=("image",))
    assert rows[0].mask_name == "out/masks/scene.tif"


def test_the_border_of_a_window_does_not_show(segmentor_files, tmp_path: Path):
    """What overlap is for: without it, predictions at the borders of windows differ."""
    segmentor, image = load_segmentor(*segmentor_files), smooth(256, 256)
    path = write_scene(tmp_path / "a.tif", image)
    whole = predict_classes(segmentor, torch.from_numpy(image.transpose(2, 0, 1).copy())[None])[0]

    def wrong(overlap: int) -> float:
        with open_image(path) as opened:
            parts = list(predict_scene(segmentor, opened, 64, overlap, 4))
        assert [top for top, _ in parts] == [sum(len(m) for _, m in parts[:i]) for i in range(len(parts))]
        return (np.concatenate([mask for _, mask in parts]) != whole).mean()

    assert wrong(32) < wrong(0) / 2 and wrong(0) > 0.001


@pytest.mark.parametrize("length", [1, 63, 64, 65, 95, 96, 97, 200, 1000])
@pytest.mark.parametrize(("window", "overlap"), [(64, 0), (64, 32), (96, 33), (128, 64)])
def test_windows_cover_every_pixel_with_some_weight(length: int, window: int, overlap: int):
    spans = window_spans(length, window, overlap)
    total = torch.zeros(length)
    for start, end in spans:
        weights = window_weights(end - start, overlap, start == 0, end == length)
        assert start % 32 == 0 and end - start < window + 32 and ((weights >= 0) & (weights <= 1)).all()
        total[start:end] += weights
    assert spans[-1][1] == length and (total > 1e-6).all()
    assert all(before[1] - after[0] >= overlap for before, after in zip(spans, spans[1:], strict=False))


def test_no_data_stays_no_data_in_small_and_in_large_images(tmp_path: Path, segmentor_files):
    (tmp_path / "img").mkdir()
    image = smooth(100, 130)
    image[:40, :50] = 0
    write_scene(tmp_path / "img/tag.tif", image, nodata=0)
    alpha = np.full((100, 130, 1), 255, np.uint8)
    alpha[60:] = 0
    write_scene(tmp_path / "img/alpha.tif", np.concatenate([image, alpha], 2), photometric="RGB", alpha="yes")
    Image.fromarray(image).save(tmp_path / "img/plain.png")
    nowhere = np.zeros((100, 130), bool)
    expected = {"tag.tif": (image == 0).all(2), "alpha.tif": alpha[:, :, 0] == 0, "plain.png": nowhere}
    for window in (64, 256):
        out = run(tmp_path, segmentor_files, "--window", window, "--overlap", 32)
        for name, ignored in expected.items():
            assert ((read_mask(out / "masks" / name, table_of(3)) == 255) == ignored).all()
        out.rename(tmp_path / f"out{window}")


def test_scenes_of_16_bits_need_the_scale_of_the_training(tmp_path: Path, segmentor_files):
    (tmp_path / "img").mkdir()
    image = smooth(96, 96)
    write_scene(tmp_path / "img/s.tif", image.astype(np.uint16) * 16 + 100)
    with pytest.raises(UserError, match="1 of 1 images cannot be taken:\n.*--scale_from and .*--scale_range") as found:
        run(tmp_path, segmentor_files)
    assert "scripts/prepare_dataset.py" not in str(found.value) and "percentiles" not in str(found.value)
    with pytest.raises(UserError, match="--scale_percentiles: the segmentor needs the scale of its training"):
        run(tmp_path, segmentor_files, "--scale_percentiles", 2, 98)
    out = run(tmp_path, segmentor_files, "--scale_range", 100, 100 + 255 * 16)
    pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    expected = predict_classes(load_segmentor(*segmentor_files), pixels)
    assert (read_mask(out / "masks/s.tif", table_of(3)) == expected[0]).all()
    (tmp_path / "prepared").mkdir()
    reading = {"bands": None, "scale": [[0, 255]], "nodata": None}
    (tmp_path / "prepared/summary.json").write_text(json.dumps({"reading": reading}))
    with pytest.raises(FileExistsError, match="other settings .reading.scale was"):
        run(tmp_path, segmentor_files, "--scale_from", tmp_path / "prepared")


def test_from_a_scene_through_tiles_back_to_the_map(tmp_path: Path):
    """Tiles that prepare_dataset.py cut, taken for generated images, lie where the scene is."""
    from scripts import prepare_dataset

    for name in ("img", "mask"):
        (tmp_path / name).mkdir()
    image = smooth(96, 160)
    write_scene(tmp_path / "img/city.tif", image)
    write_scene(tmp_path / "mask/city.tif", (image[:, :, :1] > 128).astype(np.uint8))
    (tmp_path / "two.yaml").write_text(json.dumps(table_of(2).to_dict()))
    prepare_dataset.main([str(part) for part in (
        "--images", tmp_path / "img", "--masks", tmp_path / "mask", "--classes", tmp_path / "two.yaml", "--tile", 32,
        "--out", tmp_path / "data", "--workers", 1)])  # fmt: skip
    manifest = tmp_path / "data/train_set_items.json"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert len(rows) > 5
    lines = [{"row": i, "copy": 0, "image": f"../data/{row['target']}", "mask": row["source"]}
             for i, row in enumerate(rows)]  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run/index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_geotiff.main(["--run", str(tmp_path / "run"), "--txt_file", str(manifest), "--out", str(tmp_path / "geo")])
    with rasterio.open(tmp_path / "geo/city.tif") as mosaic, rasterio.open(tmp_path / "img/city.tif") as scene:
        assert mosaic.crs == scene.crs
        window = rasterio.windows.from_bounds(*mosaic.bounds, scene.transform).round()
        seen = mosaic.dataset_mask() > 0
        assert (mosaic.read()[:, seen] == scene.read(window=window)[:, seen]).all()
        assert seen.sum() == 32 * 32 * len(rows)


def area_of(ring: np.ndarray) -> float:
    """Area inside a closed ring, by the shoelace formula."""
    x, y = ring[:, 0], ring[:, 1]
    return abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2


def test_polygons_cover_what_the_mask_shows(tmp_path: Path, segmentor_files):
    (tmp_path / "img").mkdir()
    image = smooth(120, 100)
    image[:30, :30] = 0
    write_scene(tmp_path / "img/s.tif", image, nodata=0)
    out = run(tmp_path, segmentor_files, "--polygons", "gpkg")
    with rasterio.open(out / "masks/s.tif") as dataset:
        mask = dataset.read(1)
    pyogrio = pytest.importorskip("pyogrio")
    meta, _, shapes, (ids, names) = pyogrio.raw.read(out / "polygons/s.gpkg")
    assert meta["crs"] == "EPSG:32633" and set(names) == {f"class {i}" for i in ids}
    covered = np.zeros(3)
    for shape, value in zip(shapes, ids, strict=True):
        rings, place = [], 9
        for _ in range(int.from_bytes(shape[5:9], "little")):
            count = int.from_bytes(shape[place : place + 4], "little")
            rings.append(np.frombuffer(shape, "<f8", 2 * count, place + 4).reshape(-1, 2))
            place += 4 + 16 * count
        covered[value] += area_of(rings[0]) - sum(map(area_of, rings[1:]))
    assert covered == pytest.approx(np.bincount(mask[mask != 255], minlength=3)[:3] * 0.25)

    count = write_polygons(out / "masks/s.tif", tmp_path / "s.geojson", table_of(3))
    content = json.loads((tmp_path / "s.geojson").read_text())
    assert count == len(content["features"]) == len(ids)
    assert {one["properties"]["name"] for one in content["features"]} == set(names)
    rings = [ring for one in content["features"] for ring in one["geometry"]["coordinates"]]
    points = np.concatenate([np.array(ring) for ring in rings])
    west, south, east, north = rasterio.warp.transform_bounds("EPSG:32633", "EPSG:4326", 500_000, 5_199_940, 500_050,
                                                              5_200_000)  # fmt: skip
    corners = [*points.min(0), *points.max(0)]
    assert corners == pytest.approx([west, south, east, north], abs=1e-5)
    write_scene(tmp_path / "no_crs.tif", mask[:, :, None], crs=None)
    with pytest.raises(UserError, match="no coordinate system, which GeoJSON needs.*Choose gpkg"):
        write_polygons(tmp_path / "no_crs.tif", tmp_path / "x.geojson", table_of(3))


def test_geojson_needs_a_place_before_anything_is_predicted(tmp_path: Path, segmentor_files, capsys, caplog):
    import logging
    import warnings

    (tmp_path / "img").mkdir()
    write_scene(tmp_path / "img/a.tif", smooth(64, 64))
    for name in ("b", "c"):
        write_scene(tmp_path / f"img/{name}.tif", smooth(64, 64), crs=None)
    write_scene(tmp_path / "img/d.tif", smooth(64, 64), crs='LOCAL_CS["site",UNIT["metre",1]]')
    with pytest.raises(UserError, match="(?s)3 of 4 images.*img/b.tif: no coordinate system.*img/c.tif.*gpkg") as found:
        run(tmp_path, segmentor_files, "--polygons", "geojson")
    assert "d.tif: a coordinate system without longitudes" in str(found.value)
    assert not (tmp_path / "out/masks").exists()
    pytest.importorskip("pyogrio")
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*crs.*")
        out = run(tmp_path, segmentor_files, "--polygons", "gpkg")
    assert len(list(out.glob("polygons/*.gpkg"))) == 4 and "Created" not in caplog.text


def write_run(folder: Path, image: np.ndarray, corners: list[tuple[int, int]], scale: int = 1) -> None:
    """A run of inference.py on tiles of 32 x 32 pixels of a scene, whose images are those of the scene."""
    (folder / "run/images").mkdir(parents=True)
    rows, lines = [], []
    for number, (top, left) in enumerate(corners):
        a, b, c, d, e, f = tuple(PLACE["transform"])[:6]
        rows.append({"source": f"label/{number}.png", "prompt": "", "scene": "s", "window": [top, left, 32, 32],
                     "crs": "EPSG:32633", "transform": [a, b, a * left + c, d, e, e * top + f]})  # fmt: skip
        tile = Image.fromarray(image[top : top + 32, left : left + 32])
        tile = tile.resize((32 * scale, 32 * scale), Image.Resampling.NEAREST)
        tile.save(folder / f"run/images/{number}.png")
        record = {"row": number, "copy": 0, "image": f"images/{number}.png", "mask": f"label/{number}.png"}
        lines.append(record | ({"resized_from": [32, 32]} if scale > 1 else {}))
    (folder / "items.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run/index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run/run.json").write_text(json.dumps({"arguments": {"txt_file": str(folder / "items.json")}}))


@pytest.mark.parametrize("scale", [1, 2])
def test_tiles_of_a_scene_become_one_image_on_the_map(scale: int, tmp_path: Path):
    image = smooth(100, 140)
    corners = [(40, 32), (0, 0), (16, 20), (60, 100)]  # overlapping, apart, and not from the scene's corner on
    write_run(tmp_path, image, corners, scale)
    write_geotiff.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "geo")])
    covered = np.zeros((100, 140), bool)
    for top, left in corners:
        covered[top : top + 32, left : left + 32] = True
    with rasterio.open(tmp_path / "geo/s.tif") as mosaic:
        assert mosaic.crs == "EPSG:32633" and mosaic.transform == PLACE["transform"] * rasterio.Affine.scale(1 / scale)
        found, seen = mosaic.read().transpose(1, 2, 0), mosaic.dataset_mask() > 0
    assert found.shape == (92 * scale, 132 * scale, 3)
    expected = np.kron(image[:92, :132], np.ones((scale, scale, 1), np.uint8))
    covered = np.kron(covered[:92, :132], np.ones((scale, scale), bool))
    assert (seen == covered).all() and (found[covered] == expected[covered]).all()

    before = (tmp_path / "geo/s.tif").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="1 of 1 files are there .s.tif.*--overwrite"):
        write_geotiff.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "geo")])
    assert (tmp_path / "geo/s.tif").stat().st_mtime_ns == before
    write_geotiff.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "geo"), "--overwrite"])
    assert (tmp_path / "geo/s.tif").stat().st_mtime_ns > before
    write_geotiff.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "single"), "--single"])
    with rasterio.open(tmp_path / "single/3.tif") as tile:
        assert tile.transform.c == 500_050 and tile.transform.f == 5_199_970


def test_what_cannot_be_put_on_the_map_is_refused(tmp_path: Path):
    write_run(tmp_path, smooth(100, 140), [(0, 0), (10, 10)])
    rows = [json.loads(line) for line in (tmp_path / "items.json").read_text().splitlines()]

    def refused(change: dict, message: str) -> None:
        changed = [rows[0], {key: value for key, value in (rows[1] | change).items() if value is not None}]
        (tmp_path / "items.json").write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(UserError, match=message):
            write_geotiff.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "geo")])
        assert not list(tmp_path.glob("geo/*"))

    refused({"transform": [0.5, 0, 500_000.2, 0, -0.5, 5_200_000]}, "1.png: lies on another grid")
    refused({"transform": [0.25, 0, 500_000, 0, -0.25, 5_200_000]}, "1.png: lies on another grid")
    refused({"crs": "EPSG:3857"}, "several coordinate systems")
    refused({"source": "label/other.png"}, "row 1 is label/other.png, in the run label/1.png")
    (tmp_path / "items.json").write_text(json.dumps({"source": "label/0.png"}) + "\n")
    with pytest.raises(UserError, match="no image of copy 0 has a place"):
        write_geotiff.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "geo")])
    tile = PlacedTile(tmp_path / "run/images/0.png", (32, 32), None, (1, 0, 0, 0, 1, 0))
    write_mosaic(tmp_path / "plain.tif", [tile])
    with rasterio.open(tmp_path / "plain.tif") as found:
        assert found.crs is None
