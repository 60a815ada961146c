"""The reader of images: bits, orientation, pages, bands, alpha and nodata; pairs by name."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import rasters
from ldm.data.images import Reading, find_images, image_size, open_image, pair_images, read_image
from ldm.data.manifest import read_manifest
from ldm.util import UserError

rasterio = pytest.importorskip("rasterio", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning", "ignore:Use `@`")


def random_pixels(*shape: int, dtype: str = "uint8", most: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, most, shape).astype(dtype)


def write_tiff(path: Path, bands: np.ndarray, **profile: object) -> Path:
    """Write (B, H, W) by rasterio."""
    count, height, width = bands.shape
    with rasterio.open(path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands.dtype,
                       **profile) as file:
        file.write(bands)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_a_turned_image_is_read_upright(tmp_path: Path, orientation: int, ending: str) -> None:
    upright = Image.fromarray(np.kron(random_pixels(3, 5, 3), np.ones((16, 16, 1), np.uint8)))  # large flat squares
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose[back[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{ending}"
    options = {"tiffinfo": {274: orientation}} if ending == "tif" else {"exif": exif}
    stored.save(file, **options, **({"quality": 100, "subsampling": 0} if ending == "jpg" else {}),
                **({"lossless": True} if ending == "webp" else {}))
    assert image_size(file) == (48, 80)
    difference = np.abs(read_image(file).astype(int) - np.asarray(upright))
    assert difference.max() <= (6 if ending == "jpg" else 0)
    with open_image(file) as image:  # rows of the upright image
        np.testing.assert_array_equal(image.read(7, 21)[0], read_image(file)[7:21])


@pytest.mark.parametrize("kind", ["rgb tiff", "grey tiff", "float tiff", "rgb png", "grey png", "4-bit tiff"])
def test_more_or_fewer_bits_need_a_scale(tmp_path: Path, kind: str) -> None:
    bands = 1 if "grey" in kind else 3
    most = 16 if kind == "4-bit tiff" else 4081
    values = random_pixels(bands, 40, 50, dtype="float32" if "float" in kind else "uint16", most=most)
    file = tmp_path / ("a.png" if "png" in kind else "a.tif")
    if "png" in kind:
        with rasterio.open(file, "w", driver="PNG", count=bands, height=40, width=50, dtype="uint16") as out:
            out.write(values)
    elif most == 16:
        write_tiff(file, values.astype("uint8"), NBITS=4)
    else:
        write_tiff(file, values)
    with pytest.raises(UserError, match=rf"0 to {values.max():g}.*--scale_range"):
        read_image(file)
    read = read_image(file, reading=Reading(scale=((0, most - 1),)))
    expected = np.rint(values.astype(float) * 255 / (most - 1)).transpose(1, 2, 0)
    assert np.abs(read - expected).max() <= 1 and read.shape == (40, 50, 3)
    assert read_image(file, reading=Reading(scale=((5, 6),))).max() == 255  # clipped


def test_pages_and_overviews(tmp_path: Path) -> None:
    one = Image.fromarray(random_pixels(40, 50, 3))
    one.save(tmp_path / "pages.tif", save_all=True, append_images=[one])
    with pytest.raises(UserError, match="2 pages"):
        read_image(tmp_path / "pages.tif")
    one.save(tmp_path / "frames.png", save_all=True, append_images=[one.rotate(180)])
    with pytest.raises(UserError, match="2 pages or frames"):
        read_image(tmp_path / "frames.png")
    file = tmp_path / "cog.tif"
    pixels = random_pixels(3, 600, 700)
    with rasterio.open(file, "w", driver="COG", count=3, height=600, width=700, dtype="uint8", blocksize=128) as out:
        out.write(pixels)
    with rasterio.open(file) as out:
        assert out.overviews(1)
    np.testing.assert_array_equal(read_image(file), pixels.transpose(1, 2, 0))


def test_bands_by_number_and_name(tmp_path: Path) -> None:
    pixels = random_pixels(5, 8, 9)
    file = write_tiff(tmp_path / "a.tif", pixels, photometric="MINISBLACK")
    with pytest.raises(UserError, match="5 bands.*--bands 0 1 2"):
        read_image(file)
    with rasterio.open(file, "r+") as out:
        out.descriptions = ("blue", "green", "red", "NIR", "SWIR")
    np.testing.assert_array_equal(read_image(file), pixels[[2, 1, 0]].transpose(1, 2, 0))
    for bands in ((3, 4, 0), ("nir", "swir", "Blue"), ("3", "4", "blue")):
        np.testing.assert_array_equal(read_image(file, reading=Reading(bands)), pixels[[3, 4, 0]].transpose(1, 2, 0))
    np.testing.assert_array_equal(read_image(file, None, Reading((3, 1))), pixels[[3, 1]].transpose(1, 2, 0))
    np.testing.assert_array_equal(read_image(file, 5), pixels.transpose(1, 2, 0))
    with pytest.raises(UserError, match="no band 7; it has 5 bands"):
        read_image(file, reading=Reading((7, 0, 1)))


@pytest.mark.parametrize("kind", ["alpha png", "palette png", "alpha tiff", "tag", "mask", "nan", "flag"])
def test_where_there_is_no_data(tmp_path: Path, kind: str) -> None:
    pixels = random_pixels(3, 30, 40) | 1
    hole = np.zeros((30, 40), bool)
    hole[:, :7] = True
    pixels[:, hole] = 0
    file, reading = tmp_path / ("a.png" if "png" in kind else "a.tif"), Reading()
    if kind == "alpha png":
        Image.fromarray(np.dstack([pixels.transpose(1, 2, 0), np.where(hole, 0, 255).astype(np.uint8)])).save(file)
    elif kind == "palette png":
        image = Image.fromarray((~hole).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 9, 8, 7])
        image.save(file, transparency=0)
    elif kind == "alpha tiff":
        write_tiff(file, np.concatenate([pixels, np.where(hole, 0, 255)[None].astype(np.uint8)]), photometric="RGB",
                   alpha="YES")
    elif kind == "tag":
        write_tiff(file, pixels, nodata=0)
    elif kind == "mask":
        write_tiff(file, pixels)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(file, "r+") as out:
            out.write_mask(~hole)
    elif kind == "nan":
        write_tiff(file, np.where(hole, np.nan, pixels).astype(np.float32))
        reading = Reading(scale=((0, 255),))
    else:
        write_tiff(file, pixels)
        reading = Reading(nodata=0)
    with open_image(file, reading=reading) as image:
        values, valid = image.read()
        np.testing.assert_array_equal(valid, ~hole)
        np.testing.assert_array_equal(image.read(3, 9)[1], ~hole[3:9])
    assert values.shape == (30, 40, 3)
    if kind != "palette png":
        np.testing.assert_array_equal(values, pixels.transpose(1, 2, 0))


@pytest.mark.parametrize("has_rasterio", [True, False])
def test_near_infrared_that_is_tagged_as_alpha_masks_nothing(tmp_path, monkeypatch, caplog, has_rasterio: bool) -> None:
    pixels = random_pixels(4, 300, 20) | 1
    pixels[3, :260] = np.where(np.arange(20) < 9, 0, 255)  # water; the first rows alone look like a mask
    file = write_tiff(tmp_path / "a.tif", pixels)
    with rasterio.open(file) as tiff:
        assert tiff.colorinterp[3].name == "alpha"  # GDAL's own choice
    monkeypatch.setattr(rasters, "is_installed", lambda: has_rasterio)
    with pytest.raises(UserError, match="band 3 is tagged as alpha and holds [0-9]+,.*--bands 0 1 2 of .*-mask 4"):
        open_image(file)
    for bands in ((0, 1, 2), (3, 1, 0), ("red", "green", "blue")):
        numbers = [{"red": 0, "green": 1, "blue": 2}.get(band, band) for band in bands]
        with open_image(file, reading=Reading(bands)) as image:
            values, valid = image.read()
        assert valid is None
        np.testing.assert_array_equal(values, pixels[numbers].transpose(1, 2, 0))
    assert caplog.text.count("taken for an ordinary band") <= 1
    pixels[3, 260:] = 255  # now a mask; the file is looked at again
    write_tiff(file, pixels)
    with open_image(file) as image:
        np.testing.assert_array_equal(image.read()[1], pixels[3] > 0)
    monkeypatch.undo()
    wide = pixels.astype("uint16")
    for top in (4095, 65535):  # of 12 and 16 bits
        wide[3] = np.where(pixels[3], top, 0)
        write_tiff(file, wide, photometric="RGB", alpha="YES")
        with open_image(file, reading=Reading(scale=((0, 255),))) as image:
            np.testing.assert_array_equal(image.read()[1], pixels[3] > 0)
    Image.fromarray(np.dstack([pixels[:3].transpose(1, 2, 0), np.full((300, 20), 128, np.uint8)])).save(
        tmp_path / "soft.png")
    with open_image(tmp_path / "soft.png") as image:  # a PNG says itself that its fourth channel is alpha
        assert image.read()[1].all()


def test_arrays_of_more_bits_are_scaled_and_need_a_scale(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4001, (12, 10, 3))
    file = tmp_path / "a.npy"
    for dtype in ("uint16", ">u2", "int32", "float32"):
        np.save(file, values.astype(dtype))
        read = read_image(file, None, Reading(scale=((0, 4000),)))
        assert np.abs(read - values * 255 / 4000).max() <= 0.51 and read.dtype == np.uint8
        with pytest.raises(UserError, match=f"{values.min()} to {values.max()}. Expected 8-bit.*--scale_range"):
            read_image(file, None)
    holes = values.astype("float32")
    holes[:4] = np.nan
    np.save(file, holes)
    with open_image(file, None, Reading(scale=((0, 4000),))) as image:
        np.testing.assert_array_equal(image.read()[1][:, 0], np.arange(12) >= 4)
    np.save(file, values > 5)
    with pytest.raises(UserError, match="bool. Expected"):
        read_image(file)


def test_numbers_seen_are_those_of_the_data(tmp_path: Path) -> None:
    values = np.full((1, 20, 20), -32768, np.int16)
    values[:, 5:] = 300
    values[:, 6:] = 412
    for options, reading in (({"nodata": -32768}, Reading()), ({}, Reading(nodata=-32768))):
        with pytest.raises(UserError, match="int16 numbers, 300 to 412"):
            read_image(write_tiff(tmp_path / "dem.tif", values, **options), 1, reading)


def test_other_colours_are_converted(tmp_path: Path) -> None:
    rgb = Image.fromarray(np.kron(random_pixels(2, 3, 3), np.ones((16, 16, 1), np.uint8)))
    rgb.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    rgb.convert("CMYK").save(tmp_path / "a.tif")
    for name in ("a.jpg", "a.tif"):
        assert np.abs(read_image(tmp_path / name).astype(int) - np.asarray(rgb)).max() <= 6
    with rasterio.open(tmp_path / "a.jp2", "w", driver="JP2OpenJPEG", count=3, height=32, width=48, dtype="uint8",
                       QUALITY=100, REVERSIBLE="YES", YCBCR420="NO") as out:
        out.write(np.asarray(rgb).transpose(2, 0, 1))
    np.testing.assert_array_equal(read_image(tmp_path / "a.jp2"), np.asarray(rgb))
    np.testing.assert_array_equal(read_image(tmp_path / "a.jp2", 1)[..., 0], np.asarray(rgb.convert("L")))


def test_georeference(tmp_path: Path) -> None:
    transform = rasterio.transform.from_origin(500_000, 5_800_000, 0.5, 0.5)
    file = write_tiff(tmp_path / "a.tif", random_pixels(3, 20, 30), crs="EPSG:32633", transform=transform)
    with open_image(file) as image:
        assert image.info.crs == "EPSG:32633" and image.info.transform == tuple(transform)[:6]
    plain = write_tiff(tmp_path / "b.tif", random_pixels(3, 20, 30))
    with open_image(plain) as image:
        assert image.info.crs is None and image.info.transform is None


def test_without_rasterio_plain_files_are_read_and_others_name_the_group(tmp_path, monkeypatch) -> None:
    pixels = random_pixels(3, 20, 30)
    files = {
        "rgb": write_tiff(tmp_path / "rgb.tif", pixels, compress="deflate"),
        "grey": write_tiff(tmp_path / "grey.tif", pixels[:1]),
        "deep": write_tiff(tmp_path / "deep.tif", pixels.astype("uint16")),
        "many": write_tiff(tmp_path / "many.tif", np.concatenate([pixels, pixels])),
    }
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "a.png")
    before = {name: read_image(files[name]) for name in ("rgb", "grey")}
    monkeypatch.setattr(rasters, "is_installed", lambda: False)
    for name, image in before.items():
        np.testing.assert_array_equal(read_image(files[name]), image)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels.transpose(1, 2, 0))
    for name in ("deep", "many"):
        with pytest.raises(UserError, match="needs rasterio.*setup_env.sh train"):
            read_image(files[name], reading=Reading((0, 1, 2)))


def test_a_file_that_leads_to_others_is_not_followed(tmp_path: Path) -> None:
    write_tiff(tmp_path / "real.tif", random_pixels(3, 20, 30))
    vrt = ('<VRTDataset rasterXSize="30" rasterYSize="20"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
           f"<SourceFilename>{tmp_path}/real.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
           "</VRTRasterBand></VRTDataset>")
    for name in ("a.tif", "a.jp2", "a.png"):
        (tmp_path / name).write_text(vrt)
        with pytest.raises(UserError, match="not readable as an image"):
            read_image(tmp_path / name)


def test_an_error_is_said_once(tmp_path: Path, caplog) -> None:
    file = write_tiff(tmp_path / "a.tif", random_pixels(3, 300, 300), compress="deflate")
    file.write_bytes(file.read_bytes()[:200_000])
    caplog.set_level("INFO")
    with pytest.raises(UserError, match="not readable.*IReadBlock failed"):
        read_image(file)
    assert "GDAL" not in caplog.text


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "jp2", "npy", "webp"])
def test_damaged_files_are_named(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    pixels = random_pixels(120, 130, 3)
    if ending == "npy":
        np.save(file, pixels)
    elif ending == "jp2":
        with rasterio.open(file, "w", driver="JP2OpenJPEG", count=3, height=120, width=130, dtype="uint8") as out:
            out.write(pixels.transpose(2, 0, 1))
    else:
        Image.fromarray(pixels).save(file)
    content = file.read_bytes()
    for part in (content[: len(content) // 3], content[:9], b"", b"no image at all"):
        file.write_bytes(part)
        with pytest.raises(UserError, match=f"a.{ending}"):
            read_image(file, None)


def test_manifests_see_what_the_reader_sees(tmp_path: Path) -> None:
    Image.fromarray(random_pixels(40, 64)).save(tmp_path / "m.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_pixels(64, 40, 3)).save(tmp_path / "turned.jpg", exif=exif)
    write_tiff(tmp_path / "deep.tif", random_pixels(3, 40, 64, dtype="uint16", most=4000))
    line = '{{"source": "m.png", "target": "{}"}}\n'
    (tmp_path / "good.json").write_text(line.format("turned.jpg"))
    assert len(read_manifest(tmp_path / "good.json", tmp_path)) == 1
    (tmp_path / "bad.json").write_text(line.format("deep.tif"))
    with pytest.raises(UserError, match="uint16 numbers, .*prepare_dataset.py"):
        read_manifest(tmp_path / "bad.json", tmp_path)


def test_folders_are_counted_and_paired(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "lima/c.png", "lima/d.png", "oslo/c.png", ".a.png", "notes.txt", "._b.jpg"):
        file = tmp_path / "img" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    found = find_images(tmp_path / "img")
    assert list(found.files) == ["a", "b"]
    assert found.left_out == {"images in subfolders": 3, "hidden files": 2, ".txt files": 1} and found.subfolders == 2
    assert "3 images in 2 subfolders are not read (--recursive reads them)" in found.describe(tmp_path / "img")
    found = find_images(tmp_path / "img", recursive=True)
    assert list(found.files) == ["a", "b", "lima_c", "lima_d", "oslo_c"]
    (tmp_path / "mask/lima").mkdir(parents=True)
    for name in ("a.png", "x.png", "lima/c.tif"):
        (tmp_path / "mask" / name).write_bytes(b"")
    pairs, without_mask, without_image = pair_images(found, find_images(tmp_path / "mask", recursive=True))
    assert [(pair.name, pair.mask.name) for pair in pairs] == [("a", "a.png"), ("lima_c", "c.tif")]
    assert (without_mask, without_image) == (["b", "lima_d", "oslo_c"], ["x"])
    (tmp_path / "img/lima_c.png").write_bytes(b"")
    assert "the same name as" in find_images(tmp_path / "img", recursive=True).problems[0]
