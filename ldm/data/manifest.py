"""Manifests: JSON-lines files that pair masks with images, prompts and references."""
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask, read_raw_mask
from ldm.data.images import image_size, open_image
from ldm.files import atomic_write
from ldm.util import UserError, nearest, say_once

# The names on disk are those of existing data sets; this table is the only place that translates them.
DISK_KEYS = {"mask": "source", "image": "target", "prompt": "prompt", "reference": "ref_image", "instance": "instance"}
WEIGHT, MOST_WEIGHT = "weight", 1000  # how often a training sees the row in an epoch
# Where a tile lies: name of its scene, (top, left, height, width) in it, coordinate reference system, and the affine
# transform (a, b, c, d, e, f) of the tile's own pixels.
PLACE_KEYS = ("scene", "window", "crs", "transform")
KEYS = (*DISK_KEYS.values(), WEIGHT, *PLACE_KEYS)
NEEDS = ("image", "reference", "prompt", "instance")
# The public code of CRFM writes its manifests anew: `prompts` for `prompt`, and `index`, the row's number, which is not
# used, since it is wrong as soon as rows are left out.
CRFM_KEYS = ("prompts", "index")
SHOWN_PROBLEMS = 100
Reader = Callable[[Path], np.ndarray]
LONGEST_LINE = 1 << 20  # bytes
MOST_PIXELS = 64_000_000  # of a mask or reference; some kilobytes of a damaged or malicious file can claim far more


class ManifestError(UserError):
    """All that is wrong with a manifest.

    Attributes:
        problems: every (line number, text), in line order; the message shows the first 100 and the lines of the others.
    """

    def __init__(self, path: str | Path, data_root: str | Path, problems: list[tuple[int, str]]) -> None:
        self.problems = problems
        lines = sorted({line for line, _ in problems})
        text = [f"{path}: {len(problems)} problems in {len(lines)} lines (data_root={data_root}):"]
        text += [f"  line {line}: {problem}" for line, problem in problems[:SHOWN_PROBLEMS]]
        if len(problems) > SHOWN_PROBLEMS:
            others = sorted({line for line, _ in problems[SHOWN_PROBLEMS:]})
            text.append(f"  and {len(problems) - SHOWN_PROBLEMS} more, in lines {format_ranges(others)}")
        text.append("Correct these lines, or check --data_root and --classes.")
        super().__init__("\n".join(text))


@dataclass(frozen=True)
class Row:
    """One row of a manifest; image and reference are None unless they were asked for.

    Attributes:
        index: number of the row, 0-based, blank lines not counted.
        line: line in the file, 1-based.
        mask: path of the mask.
        image: path of the real image.
        prompt: the prompt; empty when the manifest has none and none was needed.
        reference: path of the reference.
        mask_name: the mask as the manifest writes it, relative to the data root.
        instance: path of the map of object numbers; None unless it was asked for.
        weight: how often a training sees the row in an epoch.
        place: those of PLACE_KEYS that the row has.
    """

    index: int
    line: int
    mask: Path
    image: Path | None
    prompt: str
    reference: Path | None
    mask_name: str
    instance: Path | None = None
    weight: int = 1
    place: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def files(self) -> dict[str, tuple[str, Path]]:
        """Kind (`mask`, `image` or `instance`) and path of the files that its reader asked for, by what they are."""
        named = (("mask", "mask", self.mask), ("image", "image", self.image), ("reference", "image", self.reference),
                 ("instance", "instance", self.instance))
        return {word: (kind, file) for word, kind, file in named if file}


def read_manifest(path: str | Path, data_root: str | Path, *, need: Collection[str] = ("image",),
                  table: ClassTable | None = None, check_files: bool = True, size_factor: int | None = None,
                  size: tuple[int, int] | None = None, decode: Callable[[int], bool] = lambda index: True,
                  problems: list[tuple[int, str]] | None = None, follow_links: bool = True) -> list[Row]:
    """Read a manifest and check everything in it before any work starts.

    Args:
        path: JSON-lines file with the keys source (mask), target (image), prompt, ref_image (reference).
        data_root: folder that the paths in the manifest are relative to.
        need: which of image, reference, prompt, instance every row must have; files that are not needed are not
            looked at.
        table: if given, every mask may hold only its ids.
        check_files: open and decode every file once (threaded); False = only look whether they exist.
        size_factor: if given, heights and widths must be multiples of it.
        size: (height, width) that rows are brought to later; None = masks keep their own size, which is then checked.
        decode: of which rows (by index) files are decoded; those of the others need only exist.
        problems: if given, bad rows are left out and what is wrong with them, (line, text), is added here.
        follow_links: let links below the data root lead out of it.
    Returns:
        The rows in file order, at least one.
    Raises:
        FileNotFoundError: if the manifest or the data root does not exist.
        ManifestError: listing all bad rows with their line numbers.
        UserError: for an empty manifest, an unknown name in `need`, or a `size` that size_factor does not divide.
    """
    unknown = sorted(set(need) - set(NEEDS))
    if unknown:
        raise UserError(f"read_manifest: need={unknown} is unknown. Expected some of {', '.join(NEEDS)}.")
    if size is not None and size_factor and (size[0] % size_factor or size[1] % size_factor):
        raise UserError(f"size: {size[0]}x{size[1]} (height x width). Expected multiples of {size_factor}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"manifest not found: {path}. Expected a JSON-lines file. Check --txt_file.")
    if not Path(data_root).is_dir():
        raise FileNotFoundError(f"data root not found: {data_root}. Expected a folder. Check --data_root.")
    found: list[tuple[int, str]] = []
    rows = parse_rows(Path(path), Path(data_root), set(need), found)
    if not follow_links:
        rows = leave_out_links(rows, Path(data_root), found)
    decode = decode if check_files else lambda index: False
    check_rows(rows, table, decode, size_factor if size is None else None, found)
    if found and problems is None:
        raise ManifestError(path, data_root, sorted(found))
    if found:
        problems += sorted(found)
        bad = {line for line, _ in found}
        rows = [row for row in rows if row.line not in bad]
    if not rows:
        raise UserError(f"{path}: no rows. Expected one JSON object per line.")
    return rows


def parse_rows(path: Path, data_root: Path, need: set[str], problems: list[tuple[int, str]]) -> list[Row]:
    """Parse all lines; rows that cannot be parsed go to `problems` and are left out."""
    rows: list[Row] = []
    entries: list[tuple[int, dict[str, str]]] = []
    index = 0
    for line, content in enumerate(path.read_bytes().splitlines(), start=1):
        if not content.strip():
            continue
        try:
            if len(content) > LONGEST_LINE:
                raise UnicodeError(f"{len(content):,} bytes, at most {LONGEST_LINE:,}")
            entry = json.loads(content.decode("utf-8-sig"))
        except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
            problems.append((line, f"not valid JSON ({error}). Expected one object per line."))
        else:
            if isinstance(entry, dict) and "prompts" in entry and "prompt" not in entry:
                entry = {key: value for key, value in entry.items() if key not in CRFM_KEYS} | {
                    "prompt": entry["prompts"]}
            found = find_entry_problems(entry, need)
            problems += [(line, text) for text in found]
            if not found:
                files = {word: data_root / entry[DISK_KEYS[word]] if word in ("mask", *need) else None
                         for word in ("mask", "image", "reference", "instance")}  # fmt: skip
                place = {key: entry[key] for key in PLACE_KEYS if key in entry}
                rows.append(Row(index, line, prompt=entry.get("prompt", ""), mask_name=entry["source"],
                                weight=entry.get(WEIGHT, 1), place=place, **files))
                entries.append((line, entry))
        index += 1
    find_duplicates(entries, problems)
    return rows


def find_entry_problems(entry: Any, need: set[str]) -> list[str]:
    """List what is wrong with one parsed line, files not considered."""
    if not isinstance(entry, dict):
        return [f"a JSON {type(entry).__name__}. Expected an object with the keys source, target, prompt, ref_image."]
    problems = find_place_problems(entry)
    weight = entry.get(WEIGHT, 1)
    if type(weight) is not int or not 1 <= weight <= MOST_WEIGHT:
        problems.append(f"{WEIGHT} is {str(weight)[:80]!a}. Expected a whole number, 1 to {MOST_WEIGHT}.")
    problems += [f"unknown key {key!r}. Expected {', '.join(KEYS)}.{nearest(key, KEYS)}"
                 for key in entry if key not in KEYS]  # fmt: skip
    for word, key in DISK_KEYS.items():
        is_needed = word == "mask" or word in need
        if key not in entry:
            if is_needed:
                problems.append(f"missing key {key!r} (the {word}).")
        elif not isinstance(entry[key], str):
            problems.append(f"{key} is {str(entry[key])[:80]!s} ({type(entry[key]).__name__}). Expected a string.")
        elif not is_text(entry[key]):
            problems.append(f"{key} {entry[key][:80]!a} has half a character or a zero byte. Expected text.")
        elif is_needed and not entry[key].strip():
            problems.append(f"{key} is empty. Expected the {word}.")
        elif key != "prompt" and is_needed and is_outside(entry[key]):
            problems.append(f"{key} {entry[key]!r} is absolute or leaves the data root. Expected a path below it.")
    return problems


def find_place_problems(entry: dict[str, Any]) -> list[str]:
    """List what is wrong with the keys that tell where a tile lies."""
    problems = [f"{key} is {str(entry[key])[:80]}. Expected a string." for key in ("scene", "crs")
                if key in entry and not isinstance(entry[key], str)]
    for key, length, kinds in (("window", 4, int), ("transform", 6, (int, float))):
        value = entry.get(key)
        if key in entry and not (isinstance(value, list) and len(value) == length and all(
                isinstance(number, kinds) and not isinstance(number, bool) for number in value)):
            problems.append(f"{key} is {str(value)[:80]}. Expected {length} numbers.")
    return problems


def is_text(text: str) -> bool:
    """True if a string can be written to a file and used as a path: no zero bytes, no halves of surrogate pairs."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def is_outside(name: str) -> bool:
    """True if a path of a manifest is absolute (on any system) or climbs out of the folder it is relative to."""
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return True
    return any(os.path.normpath(part).split(os.sep)[0] == ".." for part in (name, name.replace("\\", "/")))


def leave_out_links(rows: list[Row], data_root: Path, problems: list[tuple[int, str]]) -> list[Row]:
    """Rows whose files, links followed, lie below the data root; the others go to `problems`."""
    root = data_root.resolve()
    files = {file for row in rows for _, file in row.files.values()}
    outside = {file: target for file in files if not (target := file.resolve()).is_relative_to(root)}
    found = [(row.line, f"{file} is a link out of the data root, to {outside[file]}. Expected a file below it. Copy "
                        "it, or add --follow_links.")
             for row in rows for _, file in row.files.values() if file in outside]
    problems += found
    bad = {line for line, _ in found}
    return [row for row in rows if row.line not in bad]


def find_duplicates(entries: list[tuple[int, dict[str, str]]], problems: list[tuple[int, str]]) -> None:
    """Report lines that repeat an earlier one in every field, those that this run does not use included."""
    first: dict[tuple, int] = {}
    for line, entry in entries:
        key = tuple(sorted((name, str(value)) for name, value in entry.items() if name != WEIGHT))
        if key in first:
            problems.append((line, f"the same row as line {first[key]}. Expected each row once; remove one (the other "
                                   f'may have "{WEIGHT}": 2 to be trained on twice as often).'))
        first.setdefault(key, line)


def check_rows(rows: list[Row], table: ClassTable | None, decode: Callable[[int], bool], size_factor: int | None,
               problems: list[tuple[int, str]]) -> None:
    """Check the files of all rows, each distinct file once, and add what is wrong to `problems`.

    Files of rows for which `decode` is false need only exist.
    """
    is_decoded: dict[tuple[str, Path], bool] = {}  # by kind (a reference is an image) and file
    for row in rows:
        is_whole = decode(row.index)
        for key in row.files.values():
            is_decoded[key] = is_decoded.get(key, False) or is_whole
    notes = {file: Counter() for kind, file in is_decoded if kind == "mask"}  # threads must not share a counter
    plain: set[Path] = set()
    readers = {"mask": lambda file: read_raw_mask(file) if table is None else read_mask(file, table, notes=notes[file]),
               "instance": read_raw_mask, "image": partial(read_and_note, plain=plain)}  # fmt: skip
    keys = sorted(is_decoded)
    results_of = probe_files((file, readers[kind] if is_decoded[kind, file] else None) for kind, file in keys)
    found = dict(zip(keys, results_of, strict=True))
    if table is not None:
        warn_of_binary(sum(notes.values(), Counter()), table)
    if plain:
        say_once(f"{len(plain)} of the images and references are empty or of one colour, such as {min(plain)}. Leave "
                 "them out, unless they are meant: an empty reference gives its brightness to what is generated.")
    for row in rows:
        results = {word: found[key] for word, key in row.files.items()}
        problems += [(row.line, f"{word}: {result}") for word, result in results.items() if isinstance(result, str)]
        if not isinstance(results["mask"], tuple):
            continue
        height, width = results["mask"]
        for word, file in (("image", row.image), ("instance", row.instance)):
            size = results.get(word)
            if isinstance(size, tuple) and size != (height, width):
                problems.append((row.line, f"{word} {file} is {size[0]}x{size[1]}, its mask {height}x{width} (height x "
                                           "width). Expected equal sizes."))
        if size_factor and (height % size_factor or width % size_factor):
            problems.append((row.line, f"mask {row.mask} is {height}x{width} (height x width). Expected multiples of "
                                       f"{size_factor}; cut it, or give --H and --W."))


def probe_files(files: Iterable[tuple[Path, Reader | None]]) -> list[tuple[int, int] | str | None]:
    """What probe_file says of each file with its reader; Pillow decodes in parallel."""
    with ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) + 2)) as pool:
        return list(pool.map(lambda pair: probe_file(*pair), files))


def probe_file(file: Path, read: Reader | None) -> tuple[int, int] | str | None:
    """Size (height, width) of what `read` decodes, None where it need only exist, or what is wrong as text."""
    try:
        if not file.is_file():
            return f"file not found: {file}."
    except OSError as error:  # a name that is too long, a folder that must not be read
        return f"file not found: {file} ({error.strerror})."
    if read is None:
        return None
    with warnings.catch_warnings(), suppress(UserError):  # of no image: `read` says so
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
        height, width = image_size(file)
        if width * height > MOST_PIXELS:
            return f"{file}: {height}x{width} pixels. Expected at most {MOST_PIXELS:,}; cut it into tiles."
    try:
        return read(file).shape[:2]
    except UserError as error:
        return str(error)


def read_and_note(file: Path, plain: set[Path]) -> np.ndarray:
    """Read an image; it is added to `plain` if it has no data, or one colour but for a level of noise, as JPEG has."""
    with open_image(file, None) as source:
        image, valid = source.read()
    is_empty = valid is not None and not valid.any()
    if is_empty or all(part.std((0, 1)).max() < 1 for part in (image[::8, ::8], image)):  # of most a part is enough
        plain.add(file)
    return image


def warn_of_binary(notes: Counter, table: ClassTable) -> None:
    """Warn where all masks together hold only 0 and 255: the second number may be a class, and is read as none."""
    numbers = {key: count for key, count in notes.items() if isinstance(key, int) and count}
    if set(numbers) == {0, IGNORE_INDEX} and table.num_classes > 1 and IGNORE_INDEX not in (table.source_ids or {}):
        share = numbers[IGNORE_INDEX] / sum(numbers.values())
        say_once(f"all masks hold only 0 and 255 ({share:.1%} of the pixels), and 255 is read as no class. If it is a "
                 f"class of table {table.name}, add source_ids: {{0: 0, 255: 1}} to the table.")


def format_ranges(numbers: list[int]) -> str:
    """Write ascending numbers as ranges: 1-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def write_manifest(path: str | Path, rows: Iterable[dict[str, str]]) -> None:
    """Write a manifest; the file appears complete or not at all.

    Args:
        path: file to write (replaced if it exists).
        rows: dicts with the on-disk keys source, target, prompt, ref_image (those that the row has), and PLACE_KEYS.
    Raises:
        UserError: for an unknown key, before anything is written.
    """
    lines = []
    for row in rows:
        unknown = sorted(set(row) - set(KEYS))
        if unknown:
            raise UserError(f"{path}: keys {unknown} to be written. Expected {', '.join(DISK_KEYS.values())}, "
                            f"{WEIGHT}.")
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(lines))
