"""TIFF, BigTIFF, COG, JPEG 2000 and images of more than 8 bits, by rasterio; the package is optional.

Only images.py and masks.py use this file.
"""
import functools
import importlib.util
import logging
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldm.data.bands import ImageInfo
from ldm.util import UserError

# First bytes -> GDAL's driver. It is named at opening, so that no file is opened as a kind that leads to other files
# (VRT, descriptions of web services).
DRIVERS = {
    b"II*\0": "GTiff", b"MM\0*": "GTiff", b"II+\0": "GTiff", b"MM\0+": "GTiff", b"\x89PNG": "PNG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG", b"\0\0\0\x0c": "JP2OpenJPEG", b"\xff\xd8\xff": "JPEG",
}  # fmt: skip
SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES = 254, 258, 259, 262, 274, 277
EXTRA, GEO_SCALE, GEO_TRANSFORM = 338, 33550, 34264
INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # field types of a TIFF
GREY_FROM_WHITE, GREY, RGB, PALETTE, SEPARATED, LAB = 0, 1, 2, 3, 5, 8
OPTIONS = {"GDAL_DISABLE_READDIR_ON_OPEN": "YES", "GDAL_CACHEMAX": 64}  # look for side files by name; megabytes


@functools.cache
def is_installed() -> bool:
    """Whether rasterio can be imported."""
    return importlib.util.find_spec("rasterio") is not None


@functools.cache
def load_rasterio() -> Any:
    """Import rasterio; silent about images without a place on Earth, and about errors that are raised as well."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)
    logging.getLogger("rasterio").setLevel(logging.WARNING)
    return rasterio


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What libraries raise about a damaged file becomes a UserError that names it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error, bomb errors; rasterio's have a cause
        raise UserError(f"{path}: not readable as an image ({error.__cause__ or error}). Write the file again."
                        ) from error


def sniff(path: Path) -> str:
    """GDAL's driver for a file by its first bytes, or ''."""
    with path.open("rb") as file:
        start = file.read(4)
    return next((driver for first, driver in DRIVERS.items() if start.startswith(first)), "")


def read_pages(path: Path) -> list[dict[int, Any]]:
    """Tags of every page of a TIFF, numbers or tuples of numbers; overviews and masks are no pages.

    Pillow and GDAL show one page each and hide orientation or sample layout; a damaged directory ends the list.
    """
    pages: list[dict[int, Any]] = []
    with path.open("rb") as file:
        header = file.read(16)
        order = "<" if header[:2] == b"II" else ">"
        is_big = 43 in header[2:4]
        count_form, entry_form, next_form = ("Q", "HHQ8s", "Q") if is_big else ("H", "HHI4s", "I")
        try:
            offset = struct.unpack_from(order + next_form, header, 8 if is_big else 4)[0]
            seen: set[int] = set()
            while offset and offset not in seen:
                seen.add(offset)
                file.seek(offset)
                count = read_numbers(file, order + count_form)[0]
                if count > 4096:
                    break
                size = struct.calcsize(order + entry_form)
                entries = file.read(count * size)
                offset = read_numbers(file, order + next_form)[0]
                tags = read_tags(file, order, list(struct.iter_unpack(order + entry_form, entries)))
                if not int(tags.get(SUBFILE, 0)) & 0b101:
                    pages.append(tags)
        except (struct.error, OSError, OverflowError):
            return pages
    return pages


def read_numbers(file: IO[bytes], form: str) -> tuple[int, ...]:
    """Numbers at the position of a file."""
    return struct.unpack(form, file.read(struct.calcsize(form)))


def read_tags(file: IO[bytes], order: str, entries: Sequence[tuple[int, int, int, bytes]]) -> dict[int, Any]:
    """Values of the tags that matter here; True for those of which only the presence does."""
    tags: dict[int, Any] = {}
    for tag, kind, count, value in entries:
        if tag in (GEO_SCALE, GEO_TRANSFORM):
            tags[tag] = True
        elif tag in (SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES, EXTRA) and kind in INTEGERS:
            form = f"{order}{min(count, 64)}{INTEGERS[kind]}"
            if struct.calcsize(form) > len(value):
                file.seek(struct.unpack(order + ("Q" if len(value) == 8 else "I"), value)[0])
                numbers = read_numbers(file, form)
            else:
                numbers = struct.unpack_from(form, value)
            tags[tag] = numbers[0] if len(numbers) == 1 else numbers
    return tags


def read_page(path: Path) -> dict[int, Any] | None:
    """Tags of a TIFF (see read_pages), None for others; UserError for several pages or a kind that nothing converts."""
    pages = read_pages(path) if sniff(path) == "GTiff" else []
    if not pages:
        return None
    if len(pages) > 1:
        raise UserError(f"{path}: {len(pages)} pages. Expected one. Write the one that is meant to a file of its own, "
                        "for example with gdal_translate GTIFF_DIR:1:IN.tif OUT.tif.")
    if pages[0].get(PHOTOMETRIC) == GREY_FROM_WHITE:
        raise UserError(f"{path}: stored with 0 as white (MINISWHITE), which programs read in different ways. Expected "
                        "0 as black. Write it again with inverted numbers.")
    if pages[0].get(PHOTOMETRIC) == LAB:
        raise UserError(f"{path}: CIELab colours. Expected RGB, grey or bands. Convert it to RGB.")
    return pages[0]


def is_cmyk(page: dict[int, Any]) -> bool:
    """Whether a TIFF holds CMYK, which rasterio would give as four bands."""
    return page.get(PHOTOMETRIC) == SEPARATED and page.get(SAMPLES) == 4


def is_plain(page: dict[int, Any]) -> bool:
    """Whether Pillow loses nothing of a TIFF: upright grey, palette or RGB of 8 bits, at most an alpha band beside."""
    bits = page.get(BITS, 1)
    colours = {GREY: 1, RGB: 3, PALETTE: 1}.get(page.get(PHOTOMETRIC), 0)
    samples, extra = page.get(SAMPLES, 1), page.get(EXTRA, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    is_alpha = len(extra) == 1 and extra[0] in (1, 2)
    is_upright = page.get(ORIENTATION, 1) == 1
    return is_upright and set(bits if isinstance(bits, tuple) else (bits,)) == {8} and samples == colours + is_alpha


def orientation_of(page: dict[int, Any], path: Path) -> int:
    """Orientation tag of a TIFF, 1..8; UserError for a turned one that is georeferenced, whose place is unclear."""
    value = int(page.get(ORIENTATION, 1))
    value = value if 1 <= value <= 8 else 1
    if value != 1 and (GEO_SCALE in page or GEO_TRANSFORM in page):
        raise UserError(f"{path}: georeferenced and stored turned (orientation {value}). Expected one of the two. "
                        "Write it again upright, for example with gdalwarp.")
    return value


def open_dataset(path: Path) -> Any:
    """Open a file by rasterio; UserError if that is not installed or cannot read it."""
    if not is_installed():
        raise UserError(f"{path}: reading it needs rasterio, which is not installed. Install it: sh "
                        "scripts/setup_env.sh train (or seg), or pip install rasterio. Or convert it to 8-bit PNG.")
    rasterio, driver = load_rasterio(), sniff(path)
    if not driver:
        raise UserError(f"{path}: too large or of a kind that only TIFF, JPEG 2000, PNG and JPEG are read for. Convert "
                        "it to TIFF.")
    with reading(path), rasterio.Env(**OPTIONS):
        return rasterio.open(path, driver=driver)


def open_raster(path: Path, orientation: int = 1) -> tuple["RasterSource", ImageInfo]:
    """Open an image by rasterio (see images.open_encoded)."""
    dataset = open_dataset(path)
    names = [interpretation.name for interpretation in dataset.colorinterp]
    alpha = names.index("alpha") if "alpha" in names else None
    colours = ["" if name in ("undefined", "palette") else name for name in names]
    bands = tuple(text or colour for text, colour in zip(dataset.descriptions, colours, strict=True))
    palette = None
    if dataset.count == 1 and names[0] == "palette":
        palette = np.zeros((1 << 16, 4), np.uint8)
        for number, colour in dataset.colormap(1).items():
            palette[number] = colour
        bands, alpha = ("red", "green", "blue"), None
    bits = [int(dataset.tags(number, ns="IMAGE_STRUCTURE").get("NBITS", 0)) for number in dataset.indexes]
    dtype = np.result_type(*dataset.dtypes).name
    height, width = (dataset.width, dataset.height) if orientation >= 5 else (dataset.height, dataset.width)
    crs, transform = place_of(dataset)
    info = ImageInfo(
        height, width, bands, "uint8" if palette is not None else dtype,
        8 if palette is not None else max(bits) or np.dtype(dtype).itemsize * 8, orientation, alpha, dataset.nodata,
        crs, transform, by_rows=dataset.driver in ("GTiff", "JP2OpenJPEG"),
    )  # fmt: skip
    return RasterSource(dataset, path, palette, alpha), info


def place_of(dataset: Any) -> tuple[str | None, tuple[float, ...] | None]:
    """Coordinate reference system and transform of an opened dataset (see ImageInfo)."""
    if dataset.transform.is_identity:
        return None, None
    return dataset.crs.to_string() if dataset.crs else None, tuple(dataset.transform)[:6]


def same_place(info: ImageInfo, crs: str | None, transform: tuple[float, ...] | None) -> bool:
    """Whether an image of the same size lies where `info` says, to half a pixel; True where one does not tell."""
    if info.transform is None or transform is None:
        return True
    if info.crs and crs and info.crs != crs:
        systems = load_rasterio().crs.CRS
        if systems.from_string(info.crs) != systems.from_string(crs):
            return False
    (a, b, c, d, e, f), other = info.transform, np.array(transform).reshape(2, 3)
    if a * e == b * d:  # no map at all
        return tuple(transform) == info.transform
    corners = np.array([(0, 0, 1), (info.width, 0, 1), (0, info.height, 1), (info.width, info.height, 1)], float).T
    shift = other @ corners - np.array([[a, b, c], [d, e, f]]) @ corners
    return bool((np.abs(np.linalg.solve([[a, b], [d, e]], shift)) <= 0.5).all())


class RasterSource:
    """An image opened by rasterio; reads rows without the others."""

    def __init__(self, dataset: Any, path: Path, palette: np.ndarray | None, alpha: int | None) -> None:
        """Keep the open dataset; palette: (65536, 4) uint8 colours of an image of indices, or None."""
        self.dataset, self.path, self.palette, self.alpha = dataset, path, palette, alpha

    def soft_level(self) -> int | float | None:
        """A number of the alpha band that is no mask's, or None; a PNG says itself that its alpha is one."""
        if self.alpha is None or self.dataset.driver == "PNG":
            return None
        return find_soft_level(self.path, self.alpha, self.path.stat().st_mtime_ns)

    def read(self, numbers: Sequence[int], top: int, bottom: int | None) -> tuple[np.ndarray, np.ndarray | None]:
        """(h, W, B) of rows and bands as stored (a palette's colours), and (h, W) bool where there is data or None."""
        rasterio = load_rasterio()
        from rasterio.enums import MaskFlags
        from rasterio.windows import Window

        bottom = self.dataset.height if bottom is None else bottom
        window = Window(0, top, self.dataset.width, bottom - top)
        stored = [1] if self.palette is not None else [number + 1 for number in numbers]
        flags = self.dataset.mask_flag_enums[stored[0] - 1]
        with reading(self.path), rasterio.Env(**OPTIONS):
            values = self.dataset.read(stored, window=window)
            valid = None
            if self.alpha is not None and self.alpha not in numbers:
                valid = self.dataset.read(self.alpha + 1, window=window) > 0
            elif MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
                valid = self.dataset.read_masks(stored[0], window=window) > 0
        nodata = self.dataset.nodata
        if nodata is not None and not np.isnan(nodata):
            valid = both(valid, (values != nodata).any(0))
        if values.dtype.kind in "fc":
            valid = both(valid, ~np.isnan(values).all(0))
        if self.palette is not None:
            colours = self.palette[values[0]]
            if (colours[:, :, 3] == 0).any():
                valid = both(valid, colours[:, :, 3] > 0)
            return colours[:, :, list(numbers)], valid
        return np.moveaxis(values, 0, 2), valid

    def close(self) -> None:
        """Close the file."""
        self.dataset.close()


@functools.lru_cache(maxsize=4096)
def find_soft_level(path: Path, alpha: int, stamp: int) -> int | float | None:
    """A number of an alpha band that is no mask's, or None (see soft_level_of).

    Args:
        path: the file; read by blocks, up to the first such number.
        alpha: number of the band, from 0.
        stamp: time of its last change, so that a changed file is looked at again.
    """
    rasterio = load_rasterio()
    with reading(path), rasterio.Env(**OPTIONS), open_dataset(path) as dataset:
        rows = max(dataset.block_shapes[alpha][0], 256)
        windows = (rasterio.windows.Window(0, top, dataset.width, min(rows, dataset.height - top))
                   for top in range(0, dataset.height, rows))
        return soft_level_of(dataset.read(alpha + 1, window=window) for window in windows)


def soft_level_of(blocks: Iterable[np.ndarray]) -> int | float | None:
    """First number of an alpha band, given by blocks, that is no mask's, or None.

    A mask holds 0 and one other number: 1, or all bits of a depth from 8 on (255, 4095 of 12 bits, 65535).
    """
    top = None
    for levels in blocks:
        others = levels[levels != 0]
        if top is None and others.size:
            top = others[0].item()
            if not np.isfinite(top) or top != int(top) or (top != 1 and (top < 255 or int(top) & (int(top) + 1))):
                return top
        others = others[others != top]
        if others.size:
            return others[0].item()
    return None


def both(valid: np.ndarray | None, more: np.ndarray) -> np.ndarray:
    """Where two maps of data agree that there is some."""
    return more if valid is None else valid & more
