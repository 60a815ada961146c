"""Random files: what the reader gives equals what rasterio or Pillow read independently, or the file is refused."""
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ldm.data.bands import Reading
from ldm.data.classes import ClassTable, read_mask
from ldm.data.images import image_size, open_image, read_image
from ldm.util import UserError

rasterio = pytest.importorskip("rasterio", exc_type=ImportError)
hypothesis = pytest.importorskip("hypothesis", exc_type=ImportError)
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from rasterio.enums import ColorInterp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
settings.register_profile("reader", derandomize=True, deadline=None, max_examples=80, database=None,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("reader")

HEIGHT, WIDTH = 21, 34
DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "float32", "float64")
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # fmt: skip
COLOURS = ("red", "green", "blue", "alpha", "undefined", "gray")


@st.composite
def tiffs(draw) -> tuple[np.ndarray, dict, list[str] | None]:
    """Pixels (B, H, W), a profile, and colour interpretations."""
    count, dtype = draw(st.integers(1, 6)), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    most = 255 if dtype == "uint8" else draw(st.sampled_from((1, 255, 4000, 30000)))
    pixels = rng.integers(0, most + 1, (count, HEIGHT, WIDTH)).astype(dtype)
    pixels[:, rng.random((HEIGHT, WIDTH)) < 0.2] = draw(st.sampled_from((0, 1, 7)))
    profile = {"compress": draw(st.sampled_from(("none", "lzw", "deflate", "packbits"))),
               "interleave": draw(st.sampled_from(("pixel", "band"))), "nodata": draw(st.sampled_from((None, 0, 7))),
               "bigtiff": draw(st.sampled_from(("yes", "no"))), "endianness": draw(st.sampled_from(("little", "big")))}
    if draw(st.booleans()):
        profile |= {"tiled": True, "blockxsize": 16, "blockysize": 16}
    names = draw(st.one_of(st.none(), st.permutations(COLOURS)))
    return pixels, profile, None if names is None else list(names)[:count]


def write_tiff(file: Path, pixels: np.ndarray, profile: dict, names: list[str] | None) -> None:
    with rasterio.open(file, "w", driver="GTiff", count=len(pixels), height=HEIGHT, width=WIDTH, dtype=pixels.dtype,
                       **profile) as out:
        out.write(pixels)
        if names is not None:
            out.colorinterp = [ColorInterp[name] for name in names]


def expected_of(file: Path, bands: tuple[int, ...] | None, scale: tuple[float, float] | None,
                ) -> tuple[np.ndarray, np.ndarray] | None:
    """What a reader written for the test makes of a TIFF by rasterio: RGB and where there is data; None = refuse."""
    with rasterio.open(file) as source:
        names = [interpretation.name for interpretation in source.colorinterp]
        colours = [number for number, name in enumerate(names) if name != "alpha"]
        if bands is not None:
            if max(bands) >= source.count or len(bands) not in (1, 3):
                return None
            chosen = list(bands)
        elif len(colours) == 1:
            chosen = colours
        elif all(names.count(name) == 1 for name in ("red", "green", "blue")):
            chosen = [names.index(name) for name in ("red", "green", "blue")]
        elif len(colours) == 3 and not {"red", "green", "blue"} & set(names):
            chosen = colours
        else:
            return None
        values = source.read([number + 1 for number in chosen])
        valid = np.ones(values.shape[1:], bool)
        if source.nodata is not None:
            valid &= (values != source.nodata).any(0)
        if "alpha" in names and names.index("alpha") not in chosen:
            alpha = source.read(names.index("alpha") + 1)
            is_mask = any(np.isin(alpha, (0, 2**bits - 1)).all() for bits in (1, *range(8, 33)))
            if not is_mask and bands is None:
                return None
            valid &= (alpha > 0) | (not is_mask)
    if values.dtype != np.uint8:
        if scale is None:
            return None
        values = np.clip((values.astype(np.float64) - scale[0]) * 255 / (scale[1] - scale[0]), 0, 255)
    return np.broadcast_to(values, (3, HEIGHT, WIDTH)).transpose(1, 2, 0), valid


@given(tiff=tiffs(), bands=st.one_of(st.none(), st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple)),
       scale=st.sampled_from((None, (0.0, 4000.0), (-5.0, 260.0))), top=st.integers(0, HEIGHT - 1))
def test_tiffs_are_read_as_rasterio_reads_them_or_refused(tmp_path_factory, tiff, bands, scale, top) -> None:
    file = tmp_path_factory.mktemp("t") / "a.tif"
    write_tiff(file, *tiff)
    wanted = expected_of(file, bands, scale)
    reading = Reading(bands, None if scale is None else (scale,))
    try:
        with open_image(file, 3, reading) as image:
            values, valid = image.read()
            part, part_valid = image.read(top, min(top + 5, HEIGHT))
    except UserError as error:
        assert wanted is None, error
        return
    assert wanted is not None
    assert np.abs(values - wanted[0]).max() <= (0 if tiff[0].dtype == np.uint8 else 0.51)
    np.testing.assert_array_equal(np.ones((HEIGHT, WIDTH), bool) if valid is None else valid, wanted[1])
    np.testing.assert_array_equal(part, values[top : top + 5])
    if valid is not None and part_valid is not None:
        np.testing.assert_array_equal(part_valid, valid[top : top + 5])


@given(mode=st.sampled_from(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")), orientation=st.integers(0, 9),
       ending=st.sampled_from(("png", "jpg", "tif", "webp", "bmp")), seed=st.integers(0, 20))
def test_images_are_read_as_pillow_reads_them(tmp_path_factory, mode, orientation, ending, seed) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8), "RGBA")
    image = image.convert("RGB").convert(mode) if mode in ("1", "P", "CMYK", "L", "RGB") else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"tif": {"tiffinfo": {274: max(orientation, 1)}}, "bmp": {},
               "webp": {"lossless": True, "exact": True}}.get(ending)  # fmt: skip
    file = tmp_path_factory.mktemp("p") / f"a.{ending}"
    try:
        image.save(file, **({"exif": exif} if options is None else options | (
            {"exif": exif} if ending == "webp" else {})))  # fmt: skip
    except (OSError, ValueError):
        return  # a format that has no such mode
    with Image.open(file) as again:
        wanted = np.asarray(ImageOps.exif_transpose(again).convert("RGB"))
    if ending == "tif":  # which Pillow turns at loading, some of them twice
        if mode == "CMYK" and 2 <= orientation <= 8:
            with pytest.raises(UserError, match="CMYK and stored turned"):
                read_image(file)
            return
        turn = TURNS.get(orientation)
        wanted = np.asarray((image if turn is None else image.transpose(turn)).convert("RGB"))
    assert image_size(file) == wanted.shape[:2]
    if ending == "tif" and "A" in mode:  # of a TIFF only 0 and 255 are alpha
        with pytest.raises(UserError, match="is tagged as alpha and holds"):
            read_image(file)
        return
    np.testing.assert_array_equal(read_image(file), wanted)


@st.composite
def mask_files(draw) -> tuple[ClassTable, np.ndarray, Image.Image]:
    """A table, the ids that a mask means, and the mask as some program writes it."""
    count = draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    colours = rng.choice(np.arange(1, 2**24), count, replace=False)
    colours = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1).astype(np.uint8)
    content = {"name": "t", "classes": [{"id": i, "name": f"c{i}", "colour": colours[i].tolist()}
                                        for i in range(count)]}  # fmt: skip
    ids = rng.integers(0, count, (HEIGHT, WIDTH)).astype(np.uint8)
    ids[rng.random(ids.shape) < 0.1] = 255
    kind = draw(st.sampled_from(("ids", "palette", "ordered", "colours", "source_ids", "16", "three", "float")))
    if kind == "ordered":
        order = rng.permutation(count)
        place = np.full(256, count, np.uint8)
        place[order] = np.arange(count)
        image = Image.fromarray(place[ids], "P")
        image.putpalette(np.vstack([colours[order], [[0, 0, 0]]]).astype(np.uint8).tobytes())
    elif kind == "palette":
        image = Image.fromarray(ids, "P")
        image.putpalette(rng.integers(1, 255, (256, 3)).astype(np.uint8).tobytes())
    elif kind == "colours":
        image = Image.fromarray(ClassTable.load(content).colourise(ids))
    elif kind == "source_ids":
        numbers = rng.choice(np.arange(0, 60000), count + 1, replace=False)
        content["source_ids"] = {int(numbers[i]): i for i in range(count)} | {int(numbers[-1]): 255}
        lookup = np.full(256, numbers[-1], np.uint16)
        lookup[:count] = numbers[:count]
        image = Image.fromarray(lookup[ids])
    elif kind == "three":
        image = Image.fromarray(np.dstack([ids] * 3))
    else:
        image = Image.fromarray(ids.astype({"16": np.uint16, "float": np.float32}.get(kind, np.uint8)))
    return ClassTable.load(content), ids, image


@given(mask=mask_files(), ending=st.sampled_from(("png", "tif")))
def test_masks_mean_what_was_drawn(tmp_path_factory, mask, ending) -> None:
    table, ids, image = mask
    file = tmp_path_factory.mktemp("m") / f"m.{'tif' if image.mode == 'F' else ending}"
    image.save(file)
    np.testing.assert_array_equal(read_mask(file, table), ids)


TABLE = ClassTable.load({"name": "t", "classes": [{"id": i, "name": f"c{i}", "colour": [i + 1, 2, 3]}
                                                  for i in range(4)]})  # fmt: skip


@given(ending=st.sampled_from(("png", "jpg", "tif", "jp2", "webp", "bmp")), seed=st.integers(0, 10_000))
def test_damaged_files_end_in_a_sentence(tmp_path_factory, ending, seed) -> None:
    rng = np.random.default_rng(seed)
    file, buffer = tmp_path_factory.mktemp("d") / f"a.{ending}", io.BytesIO()
    pixels = rng.integers(0, 4, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    if ending == "jp2":
        with rasterio.open(file, "w", driver="JP2OpenJPEG", count=3, height=HEIGHT, width=WIDTH, dtype="uint8") as out:
            out.write(pixels.transpose(2, 0, 1))
        content = bytearray(file.read_bytes())
    else:
        Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()))
        content = bytearray(buffer.getvalue())
    for _ in range(rng.integers(1, 6)):
        content[rng.integers(0, len(content))] = rng.integers(0, 256)
    file.write_bytes(content[: rng.integers(len(content) // 2, len(content) + 1)])
    try:
        height, width = image_size(file)
        if height * width > 10**7:
            return
        assert read_image(file).shape == (height, width, 3)
    except UserError as error:
        assert file.name in str(error)
    try:
        read_mask(file, TABLE)
    except UserError as error:
        assert file.name in str(error)
