"""From source images to tiles on disk, by rows of the source where its format allows it."""
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.bands import ImageInfo, Reading
from ldm.data.classes import IGNORE_INDEX, ClassTable, MaskRules, decode
from ldm.data.images import RASTER_SUFFIXES, OpenImage, open_image
from ldm.data.masks import OpenMask
from ldm.data.prepare.sources import Source, raise_problems
from ldm.data.rasters import same_place
from ldm.util import UserError

JPEG_QUALITY = 95
SHOWN = 10  # problems of one kind that are shown in full
MEMORY = 400_000_000  # bytes that rows of large scenes may take in all threads together


@dataclass(frozen=True)
class Tile:
    """One written tile.

    Attributes:
        source: the image that it was cut from.
        image: file name below the output folder, with forward slashes.
        mask: likewise; None for a reference.
        prompt: text for the classes present.
        box: (top, left, height, width) in the scene, pixels.
        counts: (K + 1,) int64 pixels of each class, ignored pixels last.
        place: keys of the manifest that tell where it lies: scene, window, and crs and transform if known.
    """

    source: Source
    image: str
    mask: str | None
    prompt: str
    box: tuple[int, int, int, int]
    counts: np.ndarray = field(compare=False)
    place: dict[str, Any] = field(compare=False, default_factory=dict)

    @property
    def is_labelled(self) -> bool:
        """True when at least one pixel has a class."""
        return bool(self.counts[:-1].any())

    def overlaps(self, other: "Tile") -> bool:
        """True when both tiles show common ground (the same scene and windows that intersect)."""
        if self.source.ground != other.source.ground:
            return False
        (top, left, height, width), (top2, left2, height2, width2) = self.box, other.box
        return top < top2 + height2 and top2 < top + height and left < left2 + width2 and left2 < left + width


@dataclass(frozen=True)
class TileSettings:
    """How images are cut.

    Attributes:
        root: folder that the tiles are written under.
        source_table: classes of the masks on disk.
        table: classes of the masks to write.
        tile: edge of a tile in pixels; 0 keeps whole images.
        strides: pixels between neighbouring tiles, for each split.
        max_ignore: labelled tiles with a larger share of ignored pixels are left out, 0..1.
        max_nodata: tiles without labels with a larger share of pixels without data are left out, 0..1: as a reference
            a tile with a hole asks for black ground.
        reading: bands, scale and nodata of the images.
        rules: how masks are decoded.
        pad: fill images smaller than a tile with black and 255, to the right and below.
        ext: `png` (lossless) or `jpg` (quality 95, 4:4:4), for images; masks are always PNG. Images of other numbers
            of bands than 1 and 3 become .npy.
    """

    root: Path
    source_table: ClassTable
    table: ClassTable
    tile: int
    strides: dict[str, int]
    max_ignore: float
    max_nodata: float
    reading: Reading = Reading()
    rules: MaskRules = MaskRules()
    pad: bool = False
    ext: str = "png"

    @property
    def channels(self) -> int:
        """Number of channels of the tiles."""
        return len(self.reading.bands) if self.reading.bands else 3


@dataclass
class Cut:
    """What cutting gave: tiles, counts of the masks (see classes.decode) and of tiles that were left out.

    `misplaced` names masks that do not lie where their image does. The whole has the note `only_0_and_255`: masks of no
    other ids, see count_binary.
    """

    tiles: list[Tile] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)
    misplaced: list[str] = field(default_factory=list)


def window_starts(length: int, tile: int, stride: int) -> list[int]:
    """Starts of windows of `tile` pixels every `stride` along `length` pixels; a last one ends at the border."""
    starts = list(range(0, length - tile + 1, stride)) or [0]
    if starts[-1] + tile < length:
        starts.append(length - tile)
    return starts


@dataclass(frozen=True)
class Job:
    """Part of the work: tiles of a source whose first row is in `tops` (None = all of them)."""

    source: Source
    tops: tuple[int, ...] | None = None
    memory: int = 0


def plan_jobs(source: Source, settings: TileSettings) -> list[Job]:
    """One job an image, or one a row of tiles where any rows can be read without the others."""
    if not settings.tile or source.pair.image.suffix.lower() not in RASTER_SUFFIXES:
        return [Job(source)]
    with open_image(source.pair.image, settings.channels, settings.reading) as image:
        info, channels = image.info, image.channels
    size = min(settings.tile, info.height)
    starts = window_starts(info.height, size, settings.strides[source.split] or size)
    item = np.dtype(info.dtype).itemsize
    memory = size * info.width * (channels * (item + 1 + 4 * (item > 2)) + 4)
    mask_by_rows = source.pair.mask is None or source.pair.mask.suffix.lower() in RASTER_SUFFIXES
    if not (info.by_rows and info.orientation == 1 and mask_by_rows):
        return [Job(source, None, memory * len(starts))]
    return [Job(source, (top,), memory) for top in starts]


def cut_job(job: Job, settings: TileSettings) -> Cut:
    """Write the tiles of a job.

    Raises:
        UserError: naming the file, for an unreadable file, ids outside the table, or sizes that do not fit.
    """
    cut, pair = Cut(), job.source.pair
    with (open_image(pair.image, settings.channels, settings.reading) as image,
          OpenMask(pair.mask) if pair.mask else nullcontext() as mask):
        cut_rows(job, image, mask, settings, cut)
    return cut


def cut_rows(job: Job, image: OpenImage, mask: OpenMask | None, settings: TileSettings, cut: Cut) -> None:
    """Write the tiles of a job from its opened image and mask (None = unlabelled)."""
    source, info = job.source, image.info
    height, width = info.height, info.width
    tile_h, tile_w = check_sizes(source, info, mask, settings)
    stride = settings.strides[source.split]
    lookup = settings.table.map_from(settings.source_table)
    if mask is not None and 0 in (job.tops or (0,)) and not same_place(info, mask.crs, mask.transform):
        cut.misplaced.append(f"{mask.path} and {source.pair.image}")
    for top in job.tops or window_starts(height, tile_h, stride or tile_h):
        stored, valid = image.read_stored(top, top + tile_h)
        rows = image.convert(stored, valid)
        ids = np.full(rows.shape[:2], IGNORE_INDEX, np.uint8)
        if mask is not None:
            ids = lookup[decode(mask.read(top, top + tile_h), settings.source_table, mask.path, settings.rules,
                                cut.notes)]
        if valid is not None:
            cut.notes["image_nodata"] += int((~valid).sum())
            ids = np.where(valid, ids, np.uint8(IGNORE_INDEX))
        elif mask is not None:
            cut.notes["black"] += count_black(stored, ids)
        else:
            cut.notes["unlabelled_black"] += count_black(stored)
        cut.notes["unlabelled"] += ids.size if mask is None else 0
        for left in window_starts(width, tile_w, stride or tile_w):
            columns = slice(left, left + tile_w)
            hole = 0.0 if valid is None else 1 - valid[:, columns].mean()
            if hole == 1 and (mask is None or settings.max_ignore < 1):
                cut.left_out["tiles without data"] += 1
                continue
            if mask is None and hole > settings.max_nodata:
                cut.left_out["unlabelled tiles over --max_nodata"] += 1
                continue
            name = f"{source.pair.name}_{top:04d}_{left:04d}" if settings.tile else source.pair.name
            tile = write_tile(source, name, (top, left), rows[:, columns], ids[:, columns], info, settings)
            if tile is None:
                cut.left_out["tiles over --max_ignore"] += 1
            else:
                cut.tiles.append(tile)


def count_black(rows: np.ndarray, ids: np.ndarray | None = None) -> int:
    """Number of pixels that are 0 in every band, of (h, w, B) as stored; with ids (h, w) uint8 of the labelled ones."""
    if rows.dtype == np.uint8 and rows.min():
        return 0
    is_black = rows[:, :, 0] == 0
    for channel in range(1, rows.shape[2]):
        is_black &= rows[:, :, channel] == 0
    return int((is_black if ids is None else is_black & (ids != IGNORE_INDEX)).sum())


def check_sizes(source: Source, info: ImageInfo, mask: OpenMask | None, settings: TileSettings) -> tuple[int, int]:
    """Size of the tiles of a source before padding, (height, width); UserError if mask or tile do not fit it."""
    height, width = info.height, info.width
    if mask is not None and (mask.height, mask.width) != (height, width):
        raise UserError(f"{mask.path}: {mask.width}x{mask.height} pixels, but its image {source.pair.image.name} has "
                        f"{width}x{height}")
    if not settings.tile:
        return height, width
    if min(height, width) < settings.tile and not settings.pad and source.split != "ref":
        raise UserError(f"{source.pair.image}: {width}x{height} pixels, smaller than --tile {settings.tile}")
    return min(settings.tile, height), min(settings.tile, width)


def write_tile(source: Source, name: str, corner: tuple[int, int], image: np.ndarray, mask: np.ndarray,
               info: ImageInfo, settings: TileSettings) -> Tile | None:
    """Write one tile, image (h, w, C) uint8 and mask (h, w) uint8; None when too much of it is ignored."""
    counts = np.bincount(mask.reshape(-1), minlength=256)[[*range(settings.table.num_classes), IGNORE_INDEX]]
    if source.pair.mask is not None and counts[-1] > settings.max_ignore * mask.size:
        return None
    box = (source.offset[0] + corner[0], source.offset[1] + corner[1], *mask.shape)
    if settings.pad and settings.tile and source.split != "ref":
        missing = [(0, settings.tile - side) for side in mask.shape]
        counts[-1] += settings.tile**2 - mask.size
        image = np.pad(image, [*missing, (0, 0)])
        mask = np.pad(mask, missing, constant_values=IGNORE_INDEX)
    is_array = image.shape[2] not in (1, 3)
    folder = "ref_img" if source.split == "ref" else f"img_{source.split}"
    image_name = f"{folder}/{name}.{'npy' if is_array else settings.ext}"
    mask_name = None if source.split == "ref" else f"label_{source.split}/{name}.png"
    if is_array:
        np.save(settings.root / image_name, np.ascontiguousarray(image))
    else:
        options = {"compress_level": 1} if settings.ext == "png" else {"quality": JPEG_QUALITY, "subsampling": 0}
        Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0]).save(settings.root / image_name, **options)
    if mask_name is not None:
        Image.fromarray(mask).save(settings.root / mask_name)
    return Tile(source, image_name, mask_name, settings.table.prompt(mask), box, counts, place_of(source, box, info,
                                                                                                corner))


def place_of(source: Source, box: tuple[int, int, int, int], info: ImageInfo,
             corner: tuple[int, int]) -> dict[str, Any]:
    """Keys of the manifest that tell where a tile lies."""
    place: dict[str, Any] = {"scene": source.scene, "window": [int(side) for side in box]}
    if info.transform is not None:
        a, b, c, d, e, f = info.transform
        top, left = corner
        place["transform"] = [a, b, a * left + b * top + c, d, e, d * left + e * top + f]
        if info.crs:
            place["crs"] = info.crs
    return place


def cut_images(sources: Sequence[Source], settings: TileSettings, workers: int) -> Cut:
    """Write the tiles of all sources, whose split folders exist below settings.root, with a progress bar.

    Args:
        sources: in the order of the tiles.
        settings: see TileSettings.
        workers: threads; fewer work at once where rows of large scenes would not fit in MEMORY.
    Raises:
        UserError: one error that lists every bad file.
    """
    def attempt(function: Callable[[Any, TileSettings], Any], item: Any) -> Any:
        try:
            return item if isinstance(item, UserError) else function(item, settings)
        except (UserError, FileNotFoundError) as error:
            return UserError(str(error))

    with ThreadPoolExecutor(workers) as pool:
        plans = list(pool.map(partial(attempt, plan_jobs), sources))
    jobs = [job for planned in plans for job in (planned if isinstance(planned, list) else [planned])]
    largest = max((job.memory for job in jobs if isinstance(job, Job)), default=0)
    with ThreadPoolExecutor(min(workers, max(1, MEMORY // max(largest, 1)))) as pool:
        results = list(tqdm(pool.map(partial(attempt, cut_job), jobs), total=len(jobs), unit="job", desc="tiling"))
    raise_problems(list_problems([result for result in results if isinstance(result, UserError)], settings.tile))
    whole = Cut()
    for result in results:
        whole.tiles += result.tiles
        whole.notes.update(result.notes)
        whole.left_out.update(result.left_out)
        whole.misplaced += result.misplaced
    whole.notes["only_0_and_255"] = count_binary(jobs, results)
    return whole


def count_binary(jobs: Sequence[Job], cuts: Sequence[Cut]) -> int:
    """Number of masks that hold 0 and 255 alone, in a set where others hold 0 and 1 and none 1 and 255; else 0.

    In such a set 255 may stand for the class that the other masks call 1.
    """
    numbers: dict[Path, set[int]] = {}
    for job, cut in zip(jobs, cuts, strict=True):
        numbers.setdefault(job.source.pair.image, set()).update(
            key for key, count in cut.notes.items() if isinstance(key, int) and count)
    kinds = Counter(map(frozenset, numbers.values()))
    if set().union(*kinds) != {0, 1, IGNORE_INDEX} or any({1, IGNORE_INDEX} <= kind for kind in kinds):
        return 0
    return kinds[frozenset({0, IGNORE_INDEX})]


def list_problems(errors: Sequence[UserError], tile: int) -> list[str]:
    """Texts of errors, each once; what many files have in common is said once, with their names."""
    texts = list(dict.fromkeys(str(error) for error in errors))
    ending = f"smaller than --tile {tile}"
    small = [text for text in texts if text.endswith(ending)]
    problems = [text for text in texts if text not in small]
    if small:
        sides = [int(side) for text in small for side in re.search(r": (\d+)x(\d+) pixels", text).groups()]
        problems.append(f"{len(small)} images are {ending}, the smallest side has {min(sides)} pixels (the first: "
                        f"{', '.join(text.partition(': ')[0] for text in small[:3])}). Take --tile {min(sides)} or "
                        "less, --tile 0 for whole images, or --pad to fill them up (black, 255 in masks)")
    alike: dict[str, list[str]] = {}
    for text in problems:
        file, _, reason = text.partition(": ")
        alike.setdefault(re.sub(r"[-\d.]+", "#", reason.replace(Path(file).name, "")), []).append(text)
    result = []
    for group in alike.values():
        result += group if len(group) <= SHOWN else group[:3] + [
            f"and {len(group) - 3} more files like the last: "
            + ", ".join(Path(text.partition(": ")[0]).name for text in group[3:])]
    return result
