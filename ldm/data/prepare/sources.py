"""Source images of a data set: found in folders, paired with masks, and given to splits."""
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.images import IMAGE_SUFFIXES, Found, Pair, find_images, pair_images
from ldm.util import UserError

OFFSET_PATTERN = r"_y(?P<y>\d+)_x(?P<x>\d+)$"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SourceFolder:
    """A folder of images with the folder of their masks.

    Attributes:
        split: `train`, `val`, `test`, or `ref` for images that only serve as references.
        images: folder of images.
        masks: folder of masks; None = unlabelled.
        image_suffix, mask_suffix: endings of stems that do not belong to the common name.
        may_lack_masks: images without a mask are left out (and counted), not an error.
    """

    split: str
    images: Path
    masks: Path | None
    image_suffix: str = ""
    mask_suffix: str = ""
    may_lack_masks: bool = False


@dataclass(frozen=True)
class Source:
    """One image of the source data.

    Attributes:
        split: see SourceFolder.
        pair: the image and its mask; the name is shared.
        group: tiles of one group stay in one split and may be references of each other.
        scene: name of the scene: that of the image without its offset.
        ground: sources of equal ground are windows of the same larger image; images of equal names without offsets in
            two folders are not.
        offset: (top, left) of this window in its scene, pixels.
    """

    split: str
    pair: Pair
    group: str
    scene: str
    ground: str
    offset: tuple[int, int]


@dataclass
class Sources:
    """What was found: sources in a fixed order, problems (sentences), what was left out by reason, lines to show."""

    images: list[Source] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def count(self, folder: Path, found: Found, is_mask: bool = False) -> None:
        """Add what a folder holds beside the images that were taken; counts are of folders of images."""
        self.problems += found.problems
        if not is_mask:
            self.left_out.update(found.left_out)
        line = found.describe(folder)
        if line and line not in self.notes:
            self.notes.append(line)


def find_sources(folders: Sequence[SourceFolder], recursive: bool = False, group_pattern: str | None = None,
                 offset_pattern: str = OFFSET_PATTERN) -> Sources:
    """Find the images of all folders and their masks, paired by names.

    Args:
        folders: where to look.
        recursive: read subfolders; names keep the folder (`city_tile`).
        group_pattern: regular expression searched in the names of labelled and unlabelled training images; its first
            group (or whole match) is the group. None = the scene.
        offset_pattern: regular expression with groups y and x at the end of names that are windows of a scene.
    Returns:
        The sources with all problems: missing partners, doubled names, names without a group.
    Raises:
        FileNotFoundError: if a folder does not exist.
    """
    result = Sources()
    for folder in folders:
        add_folder(result, folder, recursive, group_pattern if folder.split != "ref" else None, offset_pattern)
    seen: dict[tuple[str, str], Source] = {}
    for source in result.images:
        first = seen.setdefault((source.split, source.pair.name), source)
        if first is not source:
            result.problems.append(f"{source.pair.image}: the same stem as {first.pair.image}, which goes to the same "
                                   "folder")
    return result


def add_folder(result: Sources, folder: SourceFolder, recursive: bool, group_pattern: str | None,
               offset_pattern: str) -> None:
    """Add the images of one folder (see find_sources)."""
    found = find_images(folder.images, folder.image_suffix, recursive)
    result.count(folder.images, found)
    if folder.masks is None:
        pairs = [Pair(path, None, name) for name, path in found.files.items()]
    else:
        masks = find_images(folder.masks, folder.mask_suffix, recursive)
        if folder.masks != folder.images:
            result.count(folder.masks, masks, is_mask=True)
        pairs, without_mask, without_image = pair_images(found, masks)
        if folder.masks == folder.images:  # endings tell images from masks there
            result.left_out["images of other names"] -= len(masks.files)
        if folder.may_lack_masks:
            result.left_out["images without a mask"] += len(without_mask)
            without_mask = []
        if not masks.files:
            result.problems.append(describe_empty(folder.masks, masks, folder.mask_suffix, "mask"))
        else:
            result.problems += [f"{found.files[name]}: no mask {name}{folder.mask_suffix}.png in {folder.masks}"
                                for name in without_mask]
            result.problems += [line for line in [masks.describe(folder.masks)] if line and without_mask]
        result.problems += [f"{masks.files[name]}: no image of this name in {folder.images}" for name in without_image]
    if not found.files:
        result.problems.append(describe_empty(folder.images, found, folder.image_suffix, "image"))
    for pair in pairs:
        window = re.search(offset_pattern, pair.name)
        scene = pair.name[: window.start()] if window else pair.name
        offset = (int(window["y"]), int(window["x"])) if window else (0, 0)
        group = scene
        if group_pattern is not None:
            match = re.search(group_pattern, pair.name)
            if match is None:
                result.problems.append(f"{pair.image}: the name does not match --group_regex {group_pattern}")
            else:
                group = match.group(1) if match.re.groups else match.group()
        ground = scene if window else str(pair.image.resolve())
        result.images.append(Source(folder.split, pair, group, scene, ground, offset))


def describe_empty(folder: Path, found: Found, suffix: str, kind: str) -> str:
    """What is wrong with a folder without an image (or mask, as `kind` says) that counts."""
    text = f"{folder}: no {kind} " + (f"with the suffix {suffix}" if suffix else "in this folder")
    if images := found.left_out["images in subfolders"]:
        text += f"; {images} lie in {found.subfolders} subfolders: add --recursive"
    if links := found.left_out["linked folders"]:
        text += f"; {links} linked folders are not followed: give their own path"
    endings = [what.removesuffix(" files") for what in found.left_out if what.startswith(".")]
    if endings:
        readable = IMAGE_SUFFIXES if kind == "image" else (".png", ".tif", ".tiff", ".bmp")
        text += f"; files of the ending {', '.join(sorted(endings))} are not read, {', '.join(readable)} are"
    return text


def read_split_files(items: Sequence[str]) -> dict[str, str]:
    """Read lists of names, one a line, as benchmarks publish them.

    Args:
        items: `train=FILE`, `val=FILE`, `test=FILE`.
    Returns:
        {line: split}, without blank lines and those that start with #.
    Raises:
        UserError: for other splits, a file that is not there or empty, or a line in two lists.
    """
    result: dict[str, str] = {}
    for item in items:
        split, _, file = item.partition("=")
        if split not in SPLITS or not file:
            raise UserError(f"--split_file {item}: expected train=FILE, val=FILE or test=FILE.")
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--split_file {item}: not readable ({error}). Expected a list of names.") from error
        names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not names:
            raise UserError(f"--split_file {item}: no names. Expected one a line.")
        for name in names:
            if result.setdefault(name, split) != split:
                raise UserError(f"--split_file: {name} is in the lists of {result[name]} and {split}. Expected it in "
                                "one.")
    return result


def read_line(line: str) -> list[str]:
    """What a line of a list may name, likeliest first: all of it, its part up to the first file ending, its first word.

    Names are given without file ending, with forward slashes.
    """
    ending = rf"\.(?:{'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)})"
    first_file = re.match(rf"(.+?){ending}[\s,]", line, flags=re.IGNORECASE)
    parts = [line, first_file[1] if first_file else line, re.split(r"[\s,]", line, maxsplit=1)[0]]
    names = [re.sub(rf"{ending}$", "", part.replace("\\", "/"), flags=re.IGNORECASE) for part in parts]
    return list(dict.fromkeys(re.sub(r"^(\.?/)+", "", name) for name in names))


def paths_of(pair: Pair) -> set[str]:
    """Every end of the paths of a pair without file endings: `0`, `lima/0`, `img/lima/0` ..., and with short stems."""
    stem = pair.image.stem
    short = next((stem[:n] for n in range(len(stem), 0, -1) if pair.name.endswith(stem[:n])), stem)
    result = set()
    for folder, name in ((pair.image, stem), (pair.image, short), (pair.mask, pair.mask.stem)):
        parts = (*folder.absolute().parts[1:-1], name)
        result |= {"/".join(parts[start:]) for start in range(len(parts))}
    return result


def split_by_lists(found: Sources, lists: Mapping[str, str]) -> None:
    """Give labelled training images the split of the list that they are in; the others are left out, counted.

    A line of a list (see read_line) means the image whose path below the folder of images it is, with / or _ between
    folder and name; else the one whose path (or whose mask's) ends with it. Two such images are a problem.
    """
    of_name, of_path = defaultdict(set), defaultdict(set)
    for number, source in enumerate(found.images):
        if source.split == "train" and source.pair.mask is not None:
            of_name[source.pair.name].add(number)
            for end in paths_of(source.pair):
                of_path[end].add(number)
    splits: dict[int, set[str]] = defaultdict(set)
    lacking = []
    for line, split in lists.items():
        names = read_line(line)
        numbers = next(filter(None, (of_name.get(name.replace("/", "_")) or of_path.get(name) for name in names)), ())
        if len(numbers) > 1:
            paths = ", ".join(str(found.images[number].pair.image) for number in sorted(numbers)[:5])
            found.problems.append(f"--split_file: {line} may be {len(numbers)} images ({paths}). Expected one. Write "
                                  "their folders into the list")
        elif not numbers:
            lacking.append(line)
        for number in numbers:
            splits[number].add(split)
    kept = []
    for number, source in enumerate(found.images):
        if source.split != "train" or source.pair.mask is None:
            kept.append(source)
        elif not splits[number]:
            found.left_out["images in no list of --split_file"] += 1
        else:
            if len(splits[number]) > 1:
                found.problems.append(f"{source.pair.image}: in the lists of {' and '.join(sorted(splits[number]))}, "
                                      "expected one")
            kept.append(replace(source, split=min(splits[number])))
    if lacking:
        hint = ". Folders in a list are those on disk: correct or remove them" if any("/" in n for n in lacking) else ""
        found.problems.append(f"--split_file: {len(lacking)} of {len(lists)} names have no labelled image "
                              f"({', '.join(lacking[:5])}){hint}")
    found.images = kept


def split_by_names(found: Sources, split_of: Callable[[str], str | None]) -> None:
    """Give labelled training images the fixed split of a benchmark; a name outside its lists is a problem."""
    for number, source in enumerate(found.images):
        if source.split == "train" and source.pair.mask is not None:
            split = split_of(source.pair.name)
            if split is None:
                found.problems.append(f"{source.pair.image}: in no list of the benchmark. Give lists of your own with "
                                      "--split_file, or use --preset folders")
            else:
                found.images[number] = replace(source, split=split)


def split_by_groups(sources: list[Source], val_fraction: float | None, test_fraction: float,
                    seed: int) -> list[Source]:
    """Move whole groups from train to test and val; unlabelled images of those groups are left out.

    Args:
        sources: in their order.
        val_fraction: share of the labelled training images that becomes val; None = 0.05, or 0 where the source has
            its own val or only one group is left.
        test_fraction: the same for test.
        seed: of the draw.
    Raises:
        UserError: if a share is asked for of a split that the source has, or there are too few groups.
    """
    own = {source.split for source in sources}
    if "val" in own and val_fraction:
        raise UserError(f"--val_fraction {val_fraction}: the source has its own val images. Leave the flag away.")
    labelled = [source for source in sources if source.split == "train" and source.pair.mask is not None]
    share = val_fraction or 0.0
    rng = np.random.default_rng([seed, 0])
    moved = dict.fromkeys(choose_groups(labelled, test_fraction, rng), "test")
    rest = [source for source in labelled if source.group not in moved]
    if val_fraction is None and "val" not in own and len({source.group for source in rest}) > 1:
        share = 0.05
    share = share * len(labelled) / max(len(rest), 1)
    moved.update(dict.fromkeys(choose_groups(rest, min(share, 1.0), rng), "val"))
    result = []
    for source in sources:
        if source.split != "train" or source.group not in moved:
            result.append(source)
        elif source.pair.mask is not None:
            result.append(replace(source, split=moved[source.group]))
    return result


def choose_groups(images: Sequence[Any], fraction: float, rng: np.random.Generator) -> set[str]:
    """Draw whole groups that together hold about a fraction, 0..1 (exclusive), of the labelled images.

    Returns:
        Names of the drawn groups: at least one, never all; empty for fraction 0. Groups larger than what is still
        wanted are passed over, so large groups seldom make the split much larger than asked.
    Raises:
        UserError: if there are fewer than two groups.
    """
    if fraction == 0:
        return set()
    sizes: dict[str, int] = defaultdict(int)
    for image in images:
        sizes[image.group] += 1
    if len(sizes) < 2:
        raise UserError(f"--val_fraction/--test_fraction {fraction}: the {len(images)} training images form "
                        f"{len(sizes)} group. Expected two or more. Set the fraction to 0 or change --group_regex.")
    order = [sorted(sizes)[i] for i in rng.permutation(len(sizes))]
    wanted = fraction * len(images)
    chosen: set[str] = set()
    total = 0
    for group in order:
        if total + sizes[group] <= wanted and len(chosen) < len(sizes) - 1:
            chosen.add(group)
            total += sizes[group]
    return chosen or {min(order, key=lambda group: sizes[group])}


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one UserError that lists all problems, what is wrong with many files once; nothing when there are none."""
    if not problems:
        return
    raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in the input data; nothing was written. "
                    "Correct these files and run again:\n  " + "\n  ".join(problems))
