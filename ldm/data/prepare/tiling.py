"""From folders of images and masks to tiles on disk: finding pairs, reading pictures, cutting windows."""
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask
from ldm.data.images import Reading, find_images, read_image
from ldm.util import UserError

OFFSET_PATTERN = r"_y(?P<y>\d+)_x(?P<x>\d+)$"
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Picture:
    """One image of the source data, with its mask when it has one.

    Attributes:
        split: `train`, `val`, `test`, or `ref` for an image that only serves as a reference.
        name: stem, shared with the mask.
        image: path of the image.
        mask: path of the mask; None = unlabelled.
        group: tiles of one group stay in one split and may be references of each other.
        scene: pictures of one scene are windows of the same larger picture.
        offset: (top, left) of this window in its scene, pixels.
    """

    split: str
    name: str
    image: Path
    mask: Path | None
    group: str
    scene: str
    offset: tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """One written tile.

    Attributes:
        picture: the picture that it was cut from.
        image: file name below the output folder, with forward slashes.
        mask: likewise; None for a reference.
        prompt: text for the classes present.
        box: (top, left, height, width) in the scene, pixels.
        counts: (K + 1,) int64 pixels of each class, ignored pixels last.
    """

    picture: Picture
    image: str
    mask: str | None
    prompt: str
    box: tuple[int, int, int, int]
    counts: np.ndarray = field(compare=False)

    @property
    def is_labelled(self) -> bool:
        """True when at least one pixel has a class."""
        return bool(self.counts[:-1].any())

    def overlaps(self, other: "Tile") -> bool:
        """True when both tiles show common ground (the same scene and windows that intersect)."""
        if self.picture.scene != other.picture.scene:
            return False
        (top, left, height, width), (top2, left2, height2, width2) = self.box, other.box
        return top < top2 + height2 and top2 < top + height and left < left2 + width2 and left2 < left + width


@dataclass(frozen=True)
class TileSettings:
    """How pictures are cut.

    Attributes:
        root: folder that the tiles are written under.
        source_table: classes of the masks on disk.
        table: classes of the masks to write.
        tile: edge of a tile in pixels; 0 keeps whole pictures.
        strides: pixels between neighbouring tiles, for each split.
        max_ignore: labelled tiles with a larger share of ignored pixels are left out, 0..1.
        bands: three 0-based channels to use as red, green, blue; None = the picture's own RGB or grey.
        ext: `png` (lossless) or `jpg` (quality 95, 4:4:4), for images; masks are always PNG.
    """

    root: Path
    source_table: ClassTable
    table: ClassTable
    tile: int
    strides: dict[str, int]
    max_ignore: float
    bands: tuple[int, int, int] | None = None
    ext: str = "png"


def find_pictures(
    split: str,
    images: Path,
    masks: Path | None,
    suffixes: tuple[str, str] = ("", ""),
    group_pattern: str | None = None,
    offset_pattern: str = OFFSET_PATTERN,
) -> tuple[list[Picture], list[str]]:
    """Pair the images of a folder with the masks of another by equal stems.

    Args:
        split: split of the pictures.
        images: folder of images.
        masks: folder of masks; None = unlabelled.
        suffixes: endings of the image and the mask stems that do not belong to the common name.
        group_pattern: regular expression searched in the name; its first group (or whole match) is the group. None =
            the scene.
        offset_pattern: regular expression with groups y and x at the end of names that are windows of a scene.
    Returns:
        The pictures in sorted order and the problems found, one sentence each.
    Raises:
        FileNotFoundError: if a folder does not exist.
    """
    found = find_images(images, suffixes[0])
    image_files, problems = found.files, found.problems
    mask_files: dict[str, Path] = {}
    if masks is not None:
        found = find_images(masks, suffixes[1])
        mask_files = found.files
        problems += found.problems
        problems += [f"{path}: no mask {name}{suffixes[1]}.png in {masks}"
                     for name, path in image_files.items() if name not in mask_files]
        problems += [f"{path}: no image of this name in {images}"
                     for name, path in mask_files.items() if name not in image_files]
    if not image_files:
        problems.append(f"{images}: no image {'with the suffix ' + suffixes[0] if suffixes[0] else 'in this folder'}")
    pictures = []
    for name, path in image_files.items():
        window = re.search(offset_pattern, name)
        scene = name[: window.start()] if window else name
        offset = (int(window["y"]), int(window["x"])) if window else (0, 0)
        group = scene
        if group_pattern is not None:
            match = re.search(group_pattern, name)
            if match is None:
                problems.append(f"{path}: the name does not match --group_regex {group_pattern}")
            else:
                group = match.group(1) if match.re.groups else match.group()
        pictures.append(Picture(split, name, path, mask_files.get(name), group, scene, offset))
    return pictures, problems


def window_starts(length: int, tile: int, stride: int) -> list[int]:
    """Starts of windows of `tile` pixels every `stride` along `length` pixels; a last one ends at the border."""
    starts = list(range(0, length - tile + 1, stride))
    if starts[-1] + tile < length:
        starts.append(length - tile)
    return starts


def cut_picture(picture: Picture, settings: TileSettings) -> list[Tile]:
    """Write the tiles of one picture.

    Args:
        picture: what to cut. Unlabelled pictures of `train` get masks in which every pixel is ignored.
        settings: see TileSettings.
    Returns:
        The tiles that were kept.
    Raises:
        UserError: naming the file, for an unreadable file, ids outside the table, or sizes that do not fit.
    """
    image = read_image(picture.image, 3, Reading(settings.bands))
    height, width = image.shape[:2]
    if picture.mask is None:
        mask = np.full((height, width), IGNORE_INDEX, np.uint8)
    else:
        mask = settings.table.map_from(settings.source_table)[read_mask(picture.mask, settings.source_table)]
    if mask.shape != (height, width):
        raise UserError(f"{picture.mask}: {mask.shape[1]}x{mask.shape[0]} pixels, but its image "
                        f"{picture.image.name} has {width}x{height}")
    if settings.tile and min(height, width) < settings.tile:
        raise UserError(f"{picture.image}: {width}x{height} pixels, smaller than --tile {settings.tile}")
    tile_h, tile_w = (settings.tile, settings.tile) if settings.tile else (height, width)
    stride = settings.strides[picture.split]
    tiles = []
    for top in window_starts(height, tile_h, stride or tile_h):
        for left in window_starts(width, tile_w, stride or tile_w):
            window = (slice(top, top + tile_h), slice(left, left + tile_w))
            name = f"{picture.name}_{top:04d}_{left:04d}" if settings.tile else picture.name
            tile = write_tile(picture, name, (top, left), image[window], mask[window], settings)
            if tile is not None:
                tiles.append(tile)
    return tiles


def write_tile(picture: Picture, name: str, corner: tuple[int, int], image: np.ndarray, mask: np.ndarray,
               settings: TileSettings) -> Tile | None:
    """Write one tile, image (h, w, 3) uint8 and mask (h, w) uint8; None when too much of it is ignored."""
    num_classes = settings.table.num_classes
    counts = np.bincount(mask.reshape(-1), minlength=256)[[*range(num_classes), IGNORE_INDEX]]
    if picture.mask is not None and counts[-1] > settings.max_ignore * mask.size:
        return None
    image_folder = "ref_img" if picture.split == "ref" else f"img_{picture.split}"
    image_name = f"{image_folder}/{name}.{settings.ext}"
    mask_name = None if picture.split == "ref" else f"label_{picture.split}/{name}.png"
    options = {"compress_level": 1} if settings.ext == "png" else {"quality": JPEG_QUALITY, "subsampling": 0}
    Image.fromarray(image).save(settings.root / image_name, **options)
    if mask_name is not None:
        Image.fromarray(mask).save(settings.root / mask_name)
    box = (picture.offset[0] + corner[0], picture.offset[1] + corner[1], *mask.shape)
    return Tile(picture, image_name, mask_name, settings.table.prompt(mask), box, counts)


def cut_pictures(pictures: Sequence[Picture], settings: TileSettings, workers: int) -> list[Tile]:
    """Write the tiles of all pictures, with a progress bar.

    Args:
        pictures: pictures whose split folders exist below settings.root.
        settings: see TileSettings.
        workers: threads.
    Returns:
        Tiles in the order of the pictures.
    Raises:
        UserError: one error that lists every bad file.
    """
    def attempt(picture: Picture) -> list[Tile] | UserError:
        try:
            return cut_picture(picture, settings)
        except UserError as error:
            return error

    results = run_threaded(attempt, pictures, workers)
    raise_problems([str(result) for result in results if isinstance(result, UserError)])
    return [tile for result in results for tile in result]


def run_threaded(function: Callable, items: Sequence, workers: int) -> list:
    """Map a function over items in threads, results in order, with a progress bar."""
    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), unit="image", desc="tiling"))


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one UserError that lists all problems; do nothing when there are none."""
    problems = list(problems)
    if problems:
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in the input data; nothing was written. "
                        "Correct these files and run again:\n  " + "\n  ".join(problems))
