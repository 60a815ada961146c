"""Mask files: the numbers, colours and palettes that they hold, read without any conversion.

What these mean by a class table is said by classes.py.
"""
import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data import rasters
from ldm.data.images import UPRIGHT, WHOLE_PIXELS, load_upright, raw_mode, read_orientation
from ldm.util import UserError

LOSSLESS_FORMATS = ("PNG", "TIFF", "BMP")
# Pillow stretches 2- and 4-bit grey PNGs to 0..255 when it unpacks them; ids need the stored number back.
GREY_STRETCH = {"L;2": 85, "L;4": 17}
EXPECTED = "Expected grey or palette ids (up to 16 bit), or 8-bit RGB in the colours of the class table"


@dataclass(frozen=True)
class Stored:
    """Rows of a mask as they are stored.

    Attributes:
        values: (h, w) integer ids or palette indices, or (h, w, 3) uint8 colours.
        valid: (h, w) bool, False where the file says that there is no data; None = data everywhere.
        palette: (N, 3) uint8 colours of the indices, or None.
        nodata: the number that the file calls no data, or None.
    """

    values: np.ndarray
    valid: np.ndarray | None = None
    palette: np.ndarray | None = None
    nodata: float | None = None

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Stored":
        """The same of rows that a function turned or chose."""
        return replace(self, values=function(self.values), valid=None if self.valid is None else function(self.valid))


class OpenMask:
    """An opened mask file; use it in a `with` statement, in one thread.

    Attributes:
        path: the file.
        height, width: of the upright mask, pixels.
        by_rows: rows can be read without decoding the ones before them.
        crs, transform: its place, as in ImageInfo.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a mask; pixels are read later.

        Raises:
            FileNotFoundError: if there is no such file.
            UserError: for JPEG and other lossy or unsuitable formats and for damaged files.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"mask file not found: {path}. Check the path and --data_root.")
        self._image: Image.Image | None = None
        self._raster: Any = None
        self._whole: Stored | None = None
        self.turn = 1
        try:
            with rasters.reading(self.path):
                page = rasters.read_page(self.path)
                if page is not None and (rasters.is_installed() or not rasters.is_plain(page)):
                    self.turn = rasters.orientation_of(page, self.path)
                    self._raster = rasters.open_dataset(self.path)
                    check_lossless_raster(self._raster, self.path)
                else:
                    self._open_with_pillow()
        except UserError:
            self.close()
            raise
        width, height = self._image.size if self._image else (self._raster.width, self._raster.height)
        self.height, self.width = (width, height) if self.turn >= 5 else (height, width)
        self.by_rows = self._raster is not None and self.turn == 1 and self._raster.driver == "GTiff"
        self.crs, self.transform = (None, None) if self._raster is None else rasters.place_of(self._raster)

    def __enter__(self) -> "OpenMask":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        for source in (self._image, self._raster):
            if source is not None:
                source.close()

    def read(self, top: int = 0, bottom: int | None = None) -> Stored:
        """Read rows top..bottom - 1 of the upright mask (None = to the end); UserError for a damaged file."""
        if self._raster is not None and self.turn == 1:
            return self._read_raster(top, self.height if bottom is None else bottom)
        if self._whole is None:
            whole = self._read_raster(0, self._raster.height) if self._raster is not None else self._read_pillow()
            self._whole = whole.map(UPRIGHT.get(self.turn, lambda array: array))
        return self._whole.map(lambda array: array[top:bottom])

    def _open_with_pillow(self) -> None:
        with suppress(Image.DecompressionBombError):
            self._image = Image.open(self.path)
        if self._image is not None:
            check_lossless(self._image, self.path)
            if getattr(self._image, "n_frames", 1) > 1 and self._image.format != "TIFF":
                raise UserError(f"{self.path}: {self._image.n_frames} frames. Expected one mask a file.")
            self.turn = read_orientation(self._image)
            width, height = self._image.size
            if width * height <= WHOLE_PIXELS or self._image.format != "PNG" or not rasters.is_installed():
                return
            self._image.close()
            self._image = None
        self._raster = rasters.open_dataset(self.path)
        check_lossless_raster(self._raster, self.path)

    def _read_pillow(self) -> Stored:
        image, path = self._image, self.path
        with rasters.reading(path):
            raw = raw_mode(image)
            stretch = GREY_STRETCH.get(raw, 1) if image.format == "PNG" else 1
            load_upright(image, path)
            if image.mode == "RGB" and ";16" in raw:
                raise UserError(f"{path}: RGB of 16 bits. {EXPECTED}. Write the mask again.")
            palette = None
            if image.mode in ("P", "PA"):
                palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            alpha = alpha_of(image)
            if image.mode in ("LA", "PA", "RGBA", "RGBX"):
                image = image.convert("RGB") if len(image.getbands()) == 4 else image.getchannel(0)
            mode, values = image.mode, np.asarray(image)
        if mode == "F":
            return Stored(*whole_numbers(values, path))
        if mode not in ("1", "L", "P", "I", "RGB") and not mode.startswith("I;16"):
            raise UserError(f"{path}: a mask of mode {mode}. {EXPECTED}.")
        values = values.astype(np.uint8) if mode == "1" else values // stretch
        return Stored(values, opaque(alpha, path), palette)

    def _read_raster(self, top: int, bottom: int) -> Stored:
        dataset, path = self._raster, self.path
        names = [interpretation.name for interpretation in dataset.colorinterp]
        alpha = names.index("alpha") if "alpha" in names else None
        bands = [number for number in range(dataset.count) if number != alpha]
        if len(bands) not in (1, 3):
            raise UserError(f"{path}: a mask of {len(bands)} bands. {EXPECTED}. Write the band of the classes to a "
                            f"file of its own: gdal_translate -b N {path.name} OUT.tif.")
        values, valid = rasters.RasterSource(dataset, path, None, None).read(bands, top, bottom)
        if alpha is not None:
            level = rasters.RasterSource(dataset, path, None, None).read([alpha], top, bottom)[0][:, :, 0]
            valid = rasters.both(valid if valid is not None else np.ones(level.shape, bool), opaque(level, path))
            valid = None if valid.all() else valid
        if len(bands) == 3:
            if values.dtype != np.uint8:
                raise UserError(f"{path}: three bands of {values.dtype}. {EXPECTED}. Write the mask again.")
            return Stored(np.ascontiguousarray(values), valid, None, dataset.nodata)
        values = values[:, :, 0]
        if values.dtype.kind == "f":
            # A number that the file calls no data need not be whole.
            values, whole = whole_numbers(values if valid is None else np.where(valid, values, 0), path)
            valid = whole if valid is None else valid if whole is None else valid & whole
        elif values.dtype.kind not in "iu":
            raise UserError(f"{path}: numbers of type {values.dtype}. {EXPECTED}.")
        palette = None
        if names[0] == "palette":
            colours = dataset.colormap(1)
            palette = np.zeros((max(colours) + 1, 3), np.uint8)
            for number, colour in colours.items():
                palette[number] = colour[:3]
        return Stored(np.ascontiguousarray(values), valid, palette, dataset.nodata)


def alpha_of(image: Image.Image) -> np.ndarray | None:
    """Alpha of a loaded image, (h, w) uint8, or None if it has none."""
    if image.mode in ("LA", "PA", "RGBA"):
        return np.asarray(image.getchannel(len(image.getbands()) - 1))
    if "transparency" in image.info:
        return np.asarray(image.convert("RGBA").getchannel(3))
    return None


def opaque(alpha: np.ndarray | None, path: Path) -> np.ndarray | None:
    """Where alpha says that there is a class, (h, w) bool, None = everywhere; UserError for half-transparent pixels."""
    if alpha is None:
        return None
    levels = np.unique(alpha)
    if not set(levels.tolist()) <= {0, np.iinfo(alpha.dtype).max}:
        raise UserError(f"{path}: transparent in part (alpha {levels[0]} to {levels[-1]}). Expected every pixel to be "
                        "opaque (a class) or fully transparent (no class). Write the mask again without alpha.")
    return None if levels[0] else alpha > 0


def whole_numbers(values: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Floats (h, w) as int32, and where they are numbers at all (None = everywhere); UserError for fractions."""
    is_number = np.isfinite(values)
    whole = np.where(is_number, values, 0)
    if (np.abs(whole) > 2**31 - 1).any() or (whole != np.rint(whole)).any():
        wrong = whole[(whole != np.rint(whole)) | (np.abs(whole) > 2**31 - 1)]
        raise UserError(f"{path}: floats that are no whole numbers ({wrong[0]:g} and {wrong.size - 1} more pixels). "
                        f"{EXPECTED}. Write the mask again with its ids as integers.")
    return whole.astype(np.int32), None if is_number.all() else is_number


def check_lossless(image: Image.Image, path: Path) -> None:
    """Raise UserError unless the opened image is stored without loss."""
    is_jpeg = image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression", "")).lower()
    if is_jpeg:
        raise UserError(f"{path}: a JPEG mask. JPEG changes pixel values, so class ids get lost. Expected a lossless "
                        "PNG; export the mask again from its source.")
    if image.format not in LOSSLESS_FORMATS:
        raise UserError(f"{path}: a mask in {image.format} format. Expected {', '.join(LOSSLESS_FORMATS)}.")


def check_lossless_raster(dataset: Any, path: Path) -> None:
    """Raise UserError unless the opened raster is stored without loss."""
    if dataset.driver not in ("GTiff", "PNG"):
        raise UserError(f"{path}: a mask in {dataset.driver} format. Expected {', '.join(LOSSLESS_FORMATS)}.")
    tags = dataset.tags(ns="IMAGE_STRUCTURE")
    kind = tags.get("COMPRESSION", "")
    is_lossy = tags.get("COMPRESSION_REVERSIBILITY", "") == "LOSSY" or float(tags.get("MAX_Z_ERROR", 0)) > 0
    if "JPEG" in kind or is_lossy:
        raise UserError(f"{path}: compressed with loss ({kind}), like a JPEG mask. That changes pixel values, so class "
                        "ids get lost. Expected a lossless file; export the mask again from its source.")


def count_ids(raw: np.ndarray) -> np.ndarray:
    """Pixels of every number 0..65535, (65536,) or fewer; numbers outside are not counted."""
    if raw.dtype not in (np.uint8, np.uint16):
        raw = raw[(raw >= 0) & (raw < 65536)]
    return np.bincount(raw.reshape(-1), minlength=256)


def colour_codes(colours: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> (...) int32, 65536 r + 256 g + b."""
    wide = colours.astype(np.int32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


@functools.lru_cache(maxsize=2)
def colour_lookup(colours: tuple[tuple[int, int, int], ...], ignore: tuple[int, int, int]) -> np.ndarray:
    """Number in `colours` of every colour code, (2**24,) int16; 255 = the ignore colour, -1 = none of them."""
    lookup = np.full(1 << 24, -1, np.int16)
    lookup[colour_codes(np.array(ignore, np.uint8))] = 255
    lookup[colour_codes(np.array(colours, np.uint8))] = np.arange(len(colours))
    return lookup


@functools.lru_cache(maxsize=8)
def id_lookup(source_ids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Id of every number on disk, (65536,) int32; -1 = not of the table."""
    lookup = np.full(65536, -1, np.int32)
    lookup[255] = 255
    for number, target in source_ids:
        lookup[number] = target
    return lookup


def short_list(values: list) -> str:
    """First eight values as text, with the number of the others."""
    text = ", ".join(str(value) for value in values[:8])
    return text if len(values) <= 8 else f"{text} and {len(values) - 8} more"
