"""What the header of an image says, which of its bands are read, and how their numbers become 8-bit channels."""
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.util import UserError

SCALE_HINT = ("Scale it to 8 bit: scripts/prepare_dataset.py with --scale_range MIN MAX or --scale_percentiles 2 98 "
              "writes tiles and references that every command reads.")
PREPARE_FLAGS = "--scale_range MIN MAX or --scale_percentiles 2 98"


@dataclass(frozen=True)
class Reading:
    """Choices of the user that turn images of any depth and number of bands into 8-bit channels.

    Attributes:
        bands: 0-based numbers or names of the bands to read, in order; None = the RGB or grey of the image.
        scale: (low, high) of every band, or one for all: low becomes 0, high 255. Images of 8 bits are never scaled.
        nodata: a pixel with this number in every band that is read has no data; None = only what the file says.
        scale_flags: flags of the command at hand that set the scale, named in errors; None = it takes no such flags,
            and errors name prepare_dataset.py. Not part of what was chosen.
    """

    bands: tuple[int | str, ...] | None = None
    scale: tuple[tuple[float, float], ...] | None = None
    nodata: float | None = None
    scale_flags: str | None = field(default=None, compare=False)

    @property
    def scale_hint(self) -> str:
        """What to do about an image that has not 8 bits."""
        return SCALE_HINT if self.scale_flags is None else f"Scale it to 8 bit with {self.scale_flags}."

    def flag(self, text: str) -> str:
        """A flag of add_reading_flags with the script that takes it, unless that is the command at hand."""
        return text if self.scale_flags is not None else f"{text} of scripts/prepare_dataset.py"

    def to_dict(self) -> dict[str, Any]:
        """Plain dict that from_dict takes back."""
        return {"bands": None if self.bands is None else list(self.bands), "nodata": self.nodata,
                "scale": None if self.scale is None else [list(pair) for pair in self.scale]}  # fmt: skip

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Reading":
        """Choices as to_dict gives them, for example `reading` of a summary.json."""
        bands, scale = content.get("bands"), content.get("scale")
        return Reading(None if bands is None else tuple(bands),
                       None if scale is None else tuple((float(low), float(high)) for low, high in scale),
                       content.get("nodata"))  # fmt: skip


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image says.

    Attributes:
        height, width: of the upright image, pixels.
        bands: name of every band, alpha included: its description, else its colour (`red`, `gray`, `alpha`), else ''.
        dtype: numpy name of the stored numbers.
        bits: bits of a stored number that are used.
        orientation: 1..8, as in the EXIF tag; 1 = stored upright.
        alpha: number of the alpha band, or None.
        nodata: number that means no data by the file's own word, or None.
        crs: coordinate reference system (`EPSG:32633` or WKT), or None.
        transform: (a, b, c, d, e, f) with x = a col + b row + c and y = d col + e row + f, or None.
        by_rows: rows can be read without decoding the ones before them.
    """

    height: int
    width: int
    bands: tuple[str, ...]
    dtype: str = "uint8"
    bits: int = 8
    orientation: int = 1
    alpha: int | None = None
    nodata: float | None = None
    crs: str | None = None
    transform: tuple[float, ...] | None = None
    by_rows: bool = False


def add_reading_flags(add: Callable[..., Any]) -> None:
    """Add --bands, --scale_range, --scale_percentiles, --scale_from and --nodata to a command line.

    Args:
        add: `add_argument` of a parser or of a group.
    """
    add("--bands", nargs="+", metavar="BAND", help="bands to read, in order: numbers from 0, or names as red or NIR "
        "(default: the image's RGB or grey)")
    add("--scale_range", type=float, nargs="+", metavar="NUMBER", help="MIN MAX that become 0 and 255, or a pair for "
        "every band; for images that have not 8 bits (default: such images are refused)")
    add("--scale_percentiles", type=float, nargs=2, metavar=("LOW", "HIGH"), help="the same, with percentiles of every "
        "band over the whole set, such as 2 98")
    add("--scale_from", metavar="FOLDER", help="bands, scale and nodata of a folder that prepare_dataset.py wrote")
    add("--nodata", type=float, metavar="VALUE", help="pixels with this number in every band have no data (default: "
        "what the file says by tag, mask or alpha)")


def make_reading(args: Any, scale_flags: str = PREPARE_FLAGS) -> Reading:
    """Reading of the flags of add_reading_flags, --scale_percentiles aside; UserError for flags that clash.

    Errors name `scale_flags` as what sets the scale.
    """
    flags = [name for name in ("scale_range", "scale_percentiles", "scale_from") if getattr(args, name) is not None]
    if len(flags) > 1:
        raise UserError(f"--{', --'.join(flags)}: expected one of them.")
    if args.scale_from is not None:
        if args.bands is not None:
            raise UserError("--scale_from, --bands: the bands are those of the folder. Expected one of them.")
        reading = replace(read_reading(args.scale_from), scale_flags=scale_flags)
        return reading if args.nodata is None else replace(reading, nodata=args.nodata)
    low, high = args.scale_percentiles or (0, 100)
    if not 0 <= low < high <= 100:
        raise UserError(f"--scale_percentiles {low:g} {high:g}: expected 0 <= LOW < HIGH <= 100.")
    scale = None
    if args.scale_range is not None:
        numbers = args.scale_range
        scale = tuple(zip(numbers[::2], numbers[1::2], strict=False))
        if len(numbers) % 2 or any(not (math.isfinite(a) and math.isfinite(b) and a < b) for a, b in scale):
            raise UserError(f"--scale_range {' '.join(f'{n:g}' for n in numbers)}: expected MIN MAX with MIN < MAX, or "
                            "such a pair for every band.")
    bands = None if args.bands is None else tuple(int(b) if b.isdecimal() else b for b in map(str, args.bands))
    return Reading(bands, scale, args.nodata, scale_flags)


def read_reading(folder: str | Path) -> Reading:
    """Reading that prepare_dataset.py noted in the summary.json of a folder; UserError if there is none."""
    path = Path(folder) / "summary.json"
    try:
        return Reading.from_dict(json.loads(path.read_text(encoding="utf-8"))["reading"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--scale_from {folder}: no reading in {path} ({error}). Expected a folder that "
                        "prepare_dataset.py wrote.") from error


def choose_bands(path: Path, info: ImageInfo, channels: int | None, reading: Reading) -> tuple[list[int], int]:
    """Numbers of the bands to read and the number of channels that they become.

    Raises:
        UserError: if bands are missing, or it is not clear which ones are red, green and blue.
    """
    has = f"{len(info.bands)} bands ({', '.join(name or '?' for name in info.bands)})"
    if reading.bands is not None:
        numbers = [find_band(path, info, band, has) for band in reading.bands]
        channels = channels or len(numbers)
        if len(numbers) not in (1, 3, channels) or (channels not in (1, 3) and len(numbers) != channels):
            raise UserError(f"{path}: {len(numbers)} bands chosen for {channels} channels. Expected as many.")
        return numbers, channels
    colours = [number for number in range(len(info.bands)) if number != info.alpha]
    if channels not in (1, 3):
        if len(colours) != channels:
            raise UserError(f"{path}: {has}. Expected {channels}, alpha not counted. Choose them with "
                            f"{reading.flag('--bands')}.")
        return colours, channels
    if len(colours) == 1:
        return colours, channels
    rgb = [[number for number in colours if info.bands[number].lower() == name] for name in ("red", "green", "blue")]
    if all(len(found) == 1 for found in rgb):
        return [found[0] for found in rgb], channels
    if len(colours) == 3 and not any(rgb):
        return colours, channels
    raise UserError(f"{path}: {has}, and nothing says which are red, green and blue. Choose three with "
                    f"{reading.flag('--bands 0 1 2')} (numbers from 0, or names).")


def find_band(path: Path, info: ImageInfo, band: int | str, has: str) -> int:
    """Number of a band given by number or name; UserError if the image has no such band."""
    if isinstance(band, int) or str(band).isdecimal():
        if 0 <= int(band) < len(info.bands):
            return int(band)
    else:
        found = [number for number, name in enumerate(info.bands) if name.lower() == band.lower()]
        if len(found) == 1:
            return found[0]
    raise UserError(f"{path}: no band {band}; it has {has}. Expected numbers from 0 to {len(info.bands) - 1}, or names "
                    "that one band has.")


def to_8_bits(values: np.ndarray, info: ImageInfo, reading: Reading, path: Path,
              valid: np.ndarray | None = None) -> np.ndarray:
    """Bring stored numbers (h, w, B) of any integer or float dtype to uint8; 8-bit images pass as they are.

    Numbers outside the scale of the reading become 0 and 255, NaN 0. `valid` is (h, w) bool, False where there is no
    data (None = data everywhere).

    Raises:
        UserError: if the image has not 8 bits and there is no scale; it names the numbers of the data seen.
    """
    if info.dtype == "uint8" and info.bits == 8:
        return values
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path}: numbers of type {info.dtype}. Expected integers or floats.")
    if reading.scale is None:
        seen = values if valid is None else values[valid]
        finite = seen[np.isfinite(seen)]
        span = f"{finite.min():g} to {finite.max():g}" if finite.size else "without a finite number of data"
        name = info.dtype if info.bits in (16, 32, 64) else f"{info.bits}-bit"
        raise UserError(f"{path}: {name} numbers, {span}. Expected 8-bit RGB or grey. {reading.scale_hint}")
    if len(reading.scale) not in (1, values.shape[2]):
        raise UserError(f"{path}: {len(reading.scale)} scales for {values.shape[2]} bands. Expected one for all or one "
                        "for each.")
    low, high = np.array(np.broadcast_to(reading.scale, (values.shape[2], 2)), np.float32).T
    if values.dtype in (np.uint8, np.uint16) and values.size > 65536:  # a table is faster than arithmetic
        stored = np.arange(np.iinfo(values.dtype).max + 1, dtype=np.float32)
        tables = [scale_numbers(stored, a, b) for a, b in zip(low, high, strict=True)]
        return np.stack([table[values[:, :, band]] for band, table in enumerate(tables)], 2)
    return scale_numbers(values, low, high)


def scale_numbers(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Map low..high to 0..255, rounded and clipped, uint8; NaN becomes 0."""
    scaled = (values.astype(np.float32) - low) * (255.0 / (high - low))
    return np.rint(np.clip(np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0), 0, 255)).astype(np.uint8)
