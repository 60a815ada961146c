"""The one reader of images, and the pairing of images with masks.

Bits per sample, orientation, pages, bands, alpha and nodata are looked at before anything is converted: what cannot be
turned into 8-bit channels without a choice of the user is refused, and the message names that choice.
"""
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data import rasters
from ldm.data.bands import SCALE_HINT, ImageInfo, Reading, choose_bands, to_8_bits
from ldm.util import UserError, say_once

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".jp2", ".j2k", ".bmp", ".webp", ".npy")
RASTER_SUFFIXES = (".tif", ".tiff", ".jp2", ".j2k")
RASTER_PLACES = (".tfw", ".tifw", ".tiffw", ".j2w", ".jp2w", ".wld")  # world files of them
PLACE_FILES = (*RASTER_PLACES, ".pgw", ".pngw", ".jgw", ".jpgw", ".jpegw", ".bpw", ".bmpw")
WHOLE_PIXELS = 64_000_000  # images with more are read by rows where the format allows it
ORIENTATION = 0x0112
EXIF_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow keeps what may hold the tag
# Orientation tag -> what makes the stored array (h, w, ...) upright.
UPRIGHT = {
    2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}  # fmt: skip

@dataclass(frozen=True)
class Pair:
    """An image and the files that belong to it.

    Attributes:
        image: path of the image.
        mask: path of its mask; None = unlabelled.
        name: name that both share: the stem without endings; below subfolders `folder_stem`.
        reference: path of the reference that a generated image was made with, if any.
    """

    image: Path
    mask: Path | None
    name: str = ""
    reference: Path | None = None


@dataclass(frozen=True)
class Found:
    """Images of a folder.

    Attributes:
        files: name -> path, in sorted order of the paths; the name is the stem without the ending that was cut off,
            below subfolders `folder_stem`.
        problems: two files of one name, one sentence each.
        left_out: numbers of what lies there and is not in `files`: `images in subfolders`, `hidden files`, `images of
            other names` (without the ending), `linked folders`, `.txt files` and so on; side files of a raster do not
            count.
        subfolders: number of subfolders with images that were not read.
    """

    files: dict[str, Path]
    problems: list[str]
    left_out: Counter[str]
    subfolders: int

    def describe(self, folder: Path) -> str:
        """One line on what was left out; empty when it was nothing."""
        advice = {"images in subfolders": f"images in {self.subfolders} subfolders are not read (--recursive reads "
                  "them)", "linked folders": "linked folders are not followed (copy them, or give their own path)"}
        parts = [f"{number} {advice.get(what, f'{what} left out')}" for what, number in sorted(self.left_out.items())]
        places = [ending for ending in PLACE_FILES if f"{ending} files" in self.left_out]
        parts += [f"the place on Earth in {', '.join(places)} files is not read (of PNG, JPEG and BMP): convert images "
                  "to GeoTIFF where it matters"] if places else []
        return f"{folder}: {', '.join(parts)}" if parts else ""


class OpenImage:
    """An opened image with what its header says and C of what `read` gives; for a `with` statement, in one thread."""

    def __init__(self, path: Path, source: Any, info: ImageInfo, channels: int | None, reading: Reading) -> None:
        """Choose the bands (see open_image)."""
        self.path, self.info, self.reading, self.source = path, info, reading, source
        self.numbers, self.channels = choose_bands(path, info, channels, reading)
        if info.alpha is not None and info.alpha not in self.numbers:
            self._check_alpha()
        self._whole: tuple[np.ndarray, np.ndarray | None] | None = None

    def __enter__(self) -> "OpenImage":
        return self

    def __exit__(self, *error: object) -> None:
        self.source.close()

    def read(self, top: int = 0, bottom: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Read rows from `top` to before `bottom` (None = to the end).

        Returns:
            (bottom - top, W, C) uint8, and (bottom - top, W) bool that is False where there is no data (None = data
            everywhere).
        Raises:
            UserError: naming the file, if it is damaged or its numbers do not fit in 8 bits and no scale is given.
        """
        values, valid = self.read_stored(top, bottom)
        return self.convert(values, valid), valid

    def convert(self, values: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        """Stored rows (h, w, B) as (h, w, C) uint8, of which `valid` tells where there is data; UserError as read."""
        values = to_8_bits(values, self.info, self.reading, self.path, valid)
        if values.shape[2] == self.channels:
            return np.ascontiguousarray(values)
        if values.shape[2] == 1:
            return np.repeat(values, self.channels, axis=2)
        return np.asarray(Image.fromarray(np.ascontiguousarray(values)).convert("L"))[:, :, None]

    def read_stored(self, top: int = 0, bottom: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows of the chosen bands as they are stored, (h, W, B) of any dtype, and where there is data (see read)."""
        if self.info.orientation == 1:
            values, valid = self.source.read(self.numbers, top, self.info.height if bottom is None else bottom)
        else:  # turned: the rows of the upright image are not those of the file
            if self._whole is None:
                turn = UPRIGHT[self.info.orientation]
                values, valid = self.source.read(self.numbers, 0, None)
                self._whole = turn(values), None if valid is None else turn(valid)
            values, valid = self._whole
            values, valid = values[top:bottom], None if valid is None else valid[top:bottom]
        if self.reading.nodata is not None:  # the user's number
            valid = rasters.both(valid, (values != self.reading.nodata).any(2))
        return values, valid

    def _check_alpha(self) -> None:
        """Take an alpha band of a raster that has other numbers than a mask's for an ordinary band.

        GDAL calls the fourth of four 8-bit bands alpha unless told otherwise, near-infrared too; as a mask it would
        take the pixels where it is 0 out of the data without a word.
        """
        level = self.source.soft_level()
        if level is None:
            return
        number = self.info.alpha
        what = f"{self.path}: band {number} is tagged as alpha and holds {level:g}, so it is no mask"
        if self.reading.bands is None:
            others = " ".join(str(band) for band in self.numbers)
            copied = " ".join(f"-b {band + 1}" for band in self.numbers)
            raise UserError(f"{what}. Expected 0 and 255 (or 1, 4095, 65535), or another tag; near-infrared is often "
                            f"written so. If it is a band, choose with {self.reading.flag(f'--bands {others}')}, which "
                            f"reads those with all their pixels, or tag it: gdal_edit -colorinterp_{number + 1} "
                            f"undefined FILE. If it is alpha: gdal_translate {copied} -mask {number + 1} FILE NEW.")
        say_once(f"{self.path.parent}: band {number} is tagged as alpha and holds other numbers than a mask's, so it "
                 "is taken for an ordinary band: all pixels of the bands that were chosen are data.")
        self.source.alpha = None


def open_image(path: str | Path, channels: int | None = 3, reading: Reading | None = None) -> OpenImage:
    """Open an image of any format of IMAGE_SUFFIXES; pixels are read later.

    Args:
        path: PNG, JPEG, WebP and BMP are read by Pillow; TIFF, BigTIFF, COG and JPEG 2000, and what has more than 8
            bits, by rasterio; .npy holds (H, W, bands), integers or floats.
        channels: 3 = RGB, 1 = grey, others = as many bands; None = 3, or the bands that are chosen or a .npy has.
        reading: bands, scale and nodata; None = the image's own 8-bit RGB or grey.
    Raises:
        FileNotFoundError: if there is no such file.
        UserError: naming the file, if it is no image, has several pages, or lacks the bands.
    """
    path, reading = Path(path), reading or Reading()
    source, info = open_source(path)
    if channels is None:
        channels = len(reading.bands) if reading.bands else len(info.bands) if path.suffix.lower() == ".npy" else 3
    try:
        return OpenImage(path, source, info, channels, reading)
    except UserError:
        source.close()
        raise


def read_image(path: str | Path, channels: int | None = 3, reading: Reading | None = None) -> np.ndarray:
    """Read an image (see open_image) as (H, W, C) uint8, upright; alpha is dropped."""
    with open_image(path, channels, reading) as image:
        return image.read()[0]


def first_three(image: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (H, W, 3): the first three channels, the last one repeated where there are fewer."""
    return image[:, :, np.minimum(range(3), image.shape[2] - 1)]


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the upright image, from the header alone; errors as open_image."""
    source, info = open_source(Path(path))
    source.close()
    return info.height, info.width


def open_source(path: Path) -> tuple[Any, ImageInfo]:
    """Open a file by the reader that can hold all of it; errors as open_image."""
    if not path.is_file():
        raise FileNotFoundError(f"image file not found: {path}. Check the path and --data_root.")
    with rasters.reading(path):
        if path.suffix.lower() == ".npy":
            return open_array(path)
        page = rasters.read_page(path)
        if page is None:
            return rasters.open_raster(path) if rasters.sniff(path) == "JP2OpenJPEG" else open_with_pillow(path)
        if rasters.is_cmyk(page) and page.get(ORIENTATION, 1) != 1:
            raise UserError(f"{path}: CMYK and stored turned. Expected one of the two. Convert it to upright RGB.")
        if rasters.is_cmyk(page) or (rasters.is_plain(page) and not rasters.is_installed()):
            return open_with_pillow(path)
        return rasters.open_raster(path, rasters.orientation_of(page, path))


def find_images(folder: Path, suffix: str = "", recursive: bool = False) -> Found:
    """Find the images of a folder and count what else is there; FileNotFoundError if there is no folder.

    Args:
        folder: folder of images.
        suffix: ending of the stems that counts; other images are left out, and it is cut off the name.
        recursive: read subfolders as well.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder not found: {folder}. Expected a folder of images or masks. Check the path.")
    files: dict[str, Path] = {}
    problems: list[str] = []
    left_out: Counter[str] = Counter()
    folders = set()
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        left_out["linked folders"] += sum(Path(place, name).is_symlink() for name in below)
        parts = Path(place).relative_to(folder).parts
        for path in (Path(place, name) for name in sorted(names)):
            is_image = path.suffix.lower() in IMAGE_SUFFIXES
            if parts and not recursive:
                left_out["images in subfolders"] += is_image and not path.name.startswith(".")
                folders |= {place} if is_image else set()
            elif path.name.startswith("."):
                left_out["hidden files"] += 1
            elif not is_image and is_side_file(path):
                continue
            elif not is_image:
                left_out[f"{path.suffix.lower() or 'no ending'} files"] += 1
            elif not path.stem.endswith(suffix):
                left_out["images of other names"] += 1
            else:
                name = "_".join((*parts, path.stem[: len(path.stem) - len(suffix)]))
                if name in files:
                    problems.append(f"{path}: the same name as {files[name]}; expected one file a name")
                files[name] = path
    return Found(files, problems, +left_out, len(folders))


def is_side_file(path: Path) -> bool:
    """Whether a file belongs to a TIFF or JPEG 2000 beside it and is no file of its own: mask, overviews, place."""
    name, ending = path.name, path.suffix.lower()
    if ending in (".msk", ".ovr") or name.lower().endswith(".aux.xml"):
        owners = [path.with_name(name[: -len(".aux.xml" if ending == ".xml" else ending)])]
    elif ending in RASTER_PLACES:
        owners = [path.with_suffix(suffix) for suffix in RASTER_SUFFIXES]
    else:
        return False
    return any(owner.suffix.lower() in RASTER_SUFFIXES and owner.is_file() for owner in owners)


def pair_images(images: Found, masks: Found) -> tuple[list[Pair], list[str], list[str]]:
    """Pair images with masks of the same name.

    Returns:
        The pairs in the order of the images, the names of images without a mask, those of masks without an image.
    """
    pairs = [Pair(path, masks.files[name], name) for name, path in images.files.items() if name in masks.files]
    return (pairs, [name for name in images.files if name not in masks.files],
            [name for name in masks.files if name not in images.files])  # fmt: skip


def open_array(path: Path) -> tuple["ArraySource", ImageInfo]:
    """Open a .npy of (H, W, bands), integers or floats."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 3 or array.dtype.kind not in "iuf" or 0 in array.shape:
        raise UserError(f"{path}: {array.shape} {array.dtype}. Expected (height, width, bands) of integers or floats. "
                        "scripts/prepare_dataset.py --bands writes such arrays, uint8.")
    return ArraySource(array), ImageInfo(*array.shape[:2], ("",) * array.shape[2], array.dtype.name,
                                         array.dtype.itemsize * 8, by_rows=True)  # fmt: skip


def open_with_pillow(path: Path) -> tuple[Any, ImageInfo]:
    """Open an image by Pillow, or by rasterio where Pillow would drop bits or hold too much at once."""
    try:
        image = Image.open(path)
    except Image.DecompressionBombError:
        return rasters.open_raster(path)
    try:
        mode = raw_mode(image)
        if ";16" in mode and image.format in ("PNG", "TIFF", "PPM"):
            image.close()
            return rasters.open_raster(path)
        # Pages of TIFFs were counted before; the further images of an MPO are views for its camera's display.
        if image.format not in ("MPO", "TIFF") and getattr(image, "n_frames", 1) > 1:
            raise UserError(f"{path}: {image.n_frames} pages or frames. Expected one. Write the one that is meant to "
                            "a file of its own.")
        if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"):
            raise UserError(f"{path}: an image of mode {image.mode}, which has no 8-bit colours. {SCALE_HINT}")
        turn = read_orientation(image)
        width, height = image.size
        if image.width * image.height > WHOLE_PIXELS and rasters.is_installed():
            image.close()
            return rasters.open_raster(path, orientation=turn)
    except BaseException:
        image.close()
        raise
    if turn >= 5:
        width, height = height, width
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    is_grey = image.mode in ("1", "L", "LA", "La")
    names = ("gray",) if is_grey else ("red", "green", "blue")
    alpha = len(names) if has_alpha else None
    info = ImageInfo(height, width, names + ("alpha",) * has_alpha, orientation=turn, alpha=alpha)
    target = ("LA" if has_alpha else "L") if is_grey else ("RGBA" if has_alpha else "RGB")
    return PillowSource(image, target, path, alpha), info


def read_orientation(image: Image.Image) -> int:
    """Orientation tag of an opened image, 1..8; 1 for TIFFs, of which only upright ones come here, and beyond."""
    if image.format == "TIFF" or not EXIF_KEYS & set(image.info):
        return 1
    value = image.getexif().get(ORIENTATION, 1)
    return value if value in UPRIGHT else 1


def load_upright(image: Image.Image, path: Path) -> None:
    """Decode an opened image; UserError if its orientation tag came after its pixels, as in a PNG it may."""
    turn = read_orientation(image)
    image.load()
    if read_orientation(image) != turn:
        raise UserError(f"{path}: its orientation tag stands behind the pixels. Write the file again, upright.")


def raw_mode(image: Image.Image) -> str:
    """Storage mode of an opened, not yet loaded image (Pillow's raw mode), for example `L;4` or `RGB;16B`."""
    mode = image.tile[0][3] if image.tile else ""
    return str(mode[0]) if isinstance(mode, tuple) and mode else str(mode)


@dataclass
class ArraySource:
    """Stored numbers of a .npy."""

    array: np.ndarray

    def read(self, numbers: Sequence[int], top: int, bottom: int | None) -> tuple[np.ndarray, np.ndarray | None]:
        """(h, W, B) of rows and bands as stored, and (h, W) bool where not all are NaN (None for integers)."""
        rows = np.asarray(self.array[top:bottom])
        rows = rows if list(numbers) == list(range(rows.shape[2])) else rows[:, :, list(numbers)]
        return rows, ~np.isnan(rows).all(2) if rows.dtype.kind == "f" else None

    def close(self) -> None:
        """Nothing is held open."""


@dataclass
class PillowSource:
    """An image opened by Pillow, decoded as a whole at the first read."""

    image: Image.Image
    target: str
    path: Path
    alpha: int | None
    array: np.ndarray | None = field(default=None, repr=False)

    def read(self, numbers: Sequence[int], top: int, bottom: int | None) -> tuple[np.ndarray, np.ndarray | None]:
        """(h, W, B) uint8 of rows and bands, and (h, W) bool where alpha is above 0."""
        self._decode()
        values = self.array[top:bottom]
        valid = None
        if self.alpha is not None and self.alpha not in numbers:
            valid = values[:, :, self.alpha] > 0
        wanted = list(numbers)
        return (values if wanted == list(range(values.shape[2])) else values[:, :, wanted]), valid

    def soft_level(self) -> int | None:
        """A number of a TIFF's alpha band that is no mask's, or None; other formats say themselves that it is one."""
        if self.alpha is None or self.image.format != "TIFF":
            return None
        self._decode()
        return rasters.soft_level_of([self.array[:, :, self.alpha]])

    def _decode(self) -> None:
        if self.array is None:
            with rasters.reading(self.path):
                load_upright(self.image, self.path)
                self.array = np.atleast_3d(np.asarray(self.image.convert(self.target)))

    def close(self) -> None:
        """Close the file."""
        self.image.close()
