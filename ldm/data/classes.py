"""Class tables (ids, names, colours, wording of prompts) and the exact reading of masks."""
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ldm.util import UserError

IGNORE_INDEX = 255
TABLE_DIR = Path(__file__).resolve().parents[2] / "configs" / "classes"
LOSSLESS_FORMATS = ("PNG", "TIFF", "BMP")
TABLE_KEYS = {"name", "classes", "ignore_index", "ignore", "ignore_colour", "source_ids", "mappings", "note",
              "prompt_template", "prompt_joiner", "prompt_empty"}
CLASS_KEYS = {"id", "name", "colour", "prompt"}
# Pillow stretches 2- and 4-bit grey PNGs to 0..255 when it unpacks them; ids need the stored number back.
GREY_STRETCH = {"L;2": 85, "L;4": 17}


@dataclass(frozen=True)
class ClassTable:
    """Classes of one data set; the only home of their count, names, colours and wording.

    Attributes:
        name: name of the table, for example `dubai`.
        ids: class ids, always 0..K-1 in order.
        names: K distinct class names.
        colours: K distinct (r, g, b), each 0..255; used to show masks, to read RGB masks and for palette hints.
        prompt_names: K wordings for prompts (default: the name with spaces for underscores).
        ignore_index: 255, the id of pixels without a class.
        ignore_colour: (r, g, b) of ignored pixels; no class may have it.
        prompt_template: text with the placeholder `{classes}`.
        prompt_joiner: string between the class names in a prompt.
        prompt_empty: prompt of a mask in which every pixel is ignored.
        source_ids: id on disk -> table id (or 255); None = the ids on disk are the table's.
        mappings: {source table name: {source class name: class name of this table or `ignore`}}, see map_from.
    """

    name: str
    ids: tuple[int, ...]
    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    prompt_names: tuple[str, ...]
    ignore_index: int = IGNORE_INDEX
    ignore_colour: tuple[int, int, int] = (0, 0, 0)
    prompt_template: str = "a satellite image of {classes}"
    prompt_joiner: str = ", "
    prompt_empty: str = "a satellite image"
    source_ids: Mapping[int, int] | None = None
    mappings: Mapping[str, Mapping[str, str]] | None = None

    def __post_init__(self) -> None:
        problems = find_table_problems(self)
        if problems:
            raise UserError(f"class table {self.name}: " + "; ".join(problems) + ". See configs/classes/ for examples.")

    def without_source_ids(self) -> "ClassTable":
        """The same table for masks that already hold its ids 0..K-1, such as prepared tiles."""
        return replace(self, source_ids=None)

    @property
    def num_classes(self) -> int:
        """Number of classes K, ignore not counted."""
        return len(self.ids)

    def find(self, name: str) -> int | None:
        """Id of the class of this name, else of the one that differs in spelling only (see name_key), else None."""
        if name in self.names:
            return self.names.index(name)
        wanted = name_key(name)
        return next((index for index, own in enumerate(self.names) if name_key(own) == wanted), None)

    @staticmethod
    def load(spec: "str | Path | Mapping | ClassTable") -> "ClassTable":
        """Build a class table.

        Args:
            spec: a name in configs/classes/ (`dubai`), a path to a .yaml or .json file, a mapping as to_dict gives it,
                or a class table (returned as it is).
        Returns:
            The checked table.
        Raises:
            FileNotFoundError: if there is no such table or file.
            UserError: for unreadable yaml/json, unknown keys, ids that are not 0..K-1, doubled names or colours.
        """
        if isinstance(spec, ClassTable):
            return spec
        if isinstance(spec, Mapping):
            return table_from_mapping(to_plain(spec), where="class table")
        path = find_table_file(spec)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is a subset of yaml
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable as yaml or json ({error}). Expected a class table.") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: a {type(content).__name__} at the top. Expected the keys name and classes.")
        content.setdefault("name", path.parent.name if path.stem == "classes" else path.stem)
        return table_from_mapping(content, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain dict (yaml- and json-ready) that load takes back."""
        rows = zip(self.ids, self.names, self.colours, self.prompt_names, strict=True)
        result: dict[str, Any] = {
            "name": self.name,
            "classes": [{"id": i, "name": n, "colour": list(c), "prompt": p} for i, n, c, p in rows],
            "ignore_index": self.ignore_index,
            "ignore_colour": list(self.ignore_colour),
            "prompt_template": self.prompt_template,
            "prompt_joiner": self.prompt_joiner,
            "prompt_empty": self.prompt_empty,
        }
        if self.source_ids is not None:
            result["source_ids"] = dict(self.source_ids)
        if self.mappings is not None:
            result["mappings"] = {source: dict(names) for source, names in self.mappings.items()}
        return result

    def prompt(self, mask: np.ndarray) -> str:
        """Word a prompt from the classes present.

        Args:
            mask: (H, W) integer, 0..K-1 or 255.
        Returns:
            The template filled with the names in ascending id, ignored pixels left out.
        """
        present = [self.prompt_names[i] for i in np.unique(mask) if i != self.ignore_index]
        if not present:
            return self.prompt_empty
        return self.prompt_template.replace("{classes}", self.prompt_joiner.join(present))

    def palette(self) -> np.ndarray:
        """Colour of every mask value, (256, 3) uint8; row 255 and unused rows hold the ignore colour."""
        palette = np.empty((256, 3), np.uint8)
        palette[:] = self.ignore_colour
        palette[: self.num_classes] = self.colours
        return palette

    def colourise(self, mask: np.ndarray) -> np.ndarray:
        """Paint a mask (H, W) of 0..K-1 or 255 in the table's colours: (H, W, 3) uint8."""
        return self.palette()[mask]

    def map_from(self, source: "ClassTable") -> np.ndarray:
        """Make the lookup that turns masks of another table into masks of this one.

        Args:
            source: table of the masks at hand. `mappings[source.name]` says where its classes go; a class it does not
                list goes to the class of the same name here.
        Returns:
            (256,) uint8 such that `lookup[mask]` has ids of this table; 255 stays 255.
        Raises:
            UserError: listing the source classes that have no target, or names that do not exist.
        """
        names = dict((self.mappings or {}).get(source.name, {}))
        given = {source.find(name): target for name, target in names.items()}
        unknown = sorted(name for name in names if source.find(name) is None)
        if unknown:
            raise UserError(f"class table {self.name}, mappings.{source.name}: no such classes in {source.name}: "
                            f"{', '.join(unknown)}. Its classes are {', '.join(source.names)}.")
        targets = {index: self.ignore_index if given.get(index) == "ignore" else self.find(given.get(index, name))
                   for index, name in zip(source.ids, source.names, strict=True)}
        missing = [source.names[index] for index, target in targets.items() if target is None]
        if missing:
            raise UserError(f"class table {self.name}: no class for {', '.join(missing)} of {source.name}. Expected a "
                            f"class name or `ignore` for each. Add them under mappings.{source.name}.")
        lookup = np.full(256, self.ignore_index, np.uint8)
        lookup[list(targets)] = list(targets.values())
        return lookup


def name_key(name: str) -> str:
    """What two spellings of a class name have in common: case, spaces, `_` and `-` do not count."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def same_names(names: Iterable[str], others: Iterable[str]) -> bool:
    """Whether two lists name the same classes in the same order (see name_key)."""
    return [name_key(name) for name in names] == [name_key(name) for name in others]


def to_plain(spec: Mapping) -> dict[str, Any]:
    """Copy a mapping to plain dicts and lists (OmegaConf nodes resolved)."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(spec, resolve=True) if OmegaConf.is_config(spec) else dict(spec)


def find_table_file(spec: str | Path) -> Path:
    """Path of a table given by name or path; FileNotFoundError naming the known tables when there is none."""
    path = Path(spec)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        path = TABLE_DIR / f"{spec}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem for file in TABLE_DIR.glob("*.yaml"))
    near = difflib.get_close_matches(str(spec), known, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise FileNotFoundError(f"class table not found: {spec}. {hint}Expected one of {', '.join(known)}, or a path to a "
                            ".yaml or .json file.")


def table_from_mapping(content: dict[str, Any], where: str) -> ClassTable:
    """Turn the content of a table file into a ClassTable; UserError naming `where` when its form is wrong.

    `classes` is a list of {id, name, colour, prompt (optional)} or a mapping id -> {name, colour, prompt}.
    """
    check_keys(content, TABLE_KEYS, {"name", "classes"}, where)
    classes = content["classes"]
    if isinstance(classes, dict):
        classes = [{"id": key, **value} if isinstance(value, dict) else value for key, value in classes.items()]
    if not isinstance(classes, list) or not classes:
        raise UserError(f"{where}: classes is {classes!r}. Expected a list of {{id, name, colour}}.")
    for position, entry in enumerate(classes):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: class number {position} is {entry!r}. Expected {{id, name, colour}}.")
        check_keys(entry, CLASS_KEYS, {"id", "name", "colour"}, f"{where}: class number {position}")
    optional = {key: content[key] for key in ("prompt_template", "prompt_joiner", "prompt_empty") if key in content}
    try:
        classes = sorted(classes, key=lambda entry: int(entry["id"]))
        source_ids = content.get("source_ids")
        return ClassTable(
            name=str(content["name"]),
            ids=tuple(int(entry["id"]) for entry in classes),
            names=tuple(str(entry["name"]) for entry in classes),
            colours=tuple(tuple(int(value) for value in entry["colour"]) for entry in classes),
            prompt_names=tuple(str(entry.get("prompt", str(entry["name"]).replace("_", " "))) for entry in classes),
            ignore_index=int(content.get("ignore_index", content.get("ignore", IGNORE_INDEX))),
            ignore_colour=tuple(int(value) for value in content.get("ignore_colour", (0, 0, 0))),
            source_ids=None if source_ids is None else {int(raw): int(to) for raw, to in dict(source_ids).items()},
            mappings=None if content.get("mappings") is None else {k: dict(v) for k, v in content["mappings"].items()},
            **optional,
        )
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: a value has the wrong form ({error}). See configs/classes/ for examples.") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}. Expected integers for ids and colours.") from error


def check_keys(content: dict[str, Any], known: set[str], needed: set[str], where: str) -> None:
    """Raise UserError when a dict has unknown keys or lacks needed ones."""
    unknown = sorted(str(key) for key in set(content) - known)
    if unknown:
        raise UserError(f"{where}: unknown keys {', '.join(unknown)}. Expected some of {', '.join(sorted(known))}.")
    missing = sorted(needed - set(content))
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}. Expected the keys {', '.join(sorted(needed))}.")


def find_table_problems(table: ClassTable) -> list[str]:
    """List what is wrong with the values of a table; empty when it is sound."""
    problems = []
    count = len(table.ids)
    if table.ids != tuple(range(count)) or not 1 <= count <= IGNORE_INDEX:
        problems.append(f"ids are {list(table.ids)}, expected 0..K-1 without gaps or repeats, at most 255 classes")
    for word, values in (("name", table.names), ("colour", table.colours)):
        doubled = sorted({str(value) for value in values if values.count(value) > 1})
        if doubled:
            problems.append(f"{word} used by more than one class: {', '.join(doubled)}")
        if len(values) != count:
            problems.append(f"{len(values)} {word}s for {count} ids")
    if len(table.prompt_names) != count or not all(name.strip() for name in table.prompt_names + table.names):
        problems.append("every class needs a name and a prompt wording that are not empty")
    for name, colour in (*zip(table.names, table.colours, strict=False), ("ignore_colour", table.ignore_colour)):
        if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
            problems.append(f"colour of {name} is {list(colour)}, expected three values 0..255")
    if table.ignore_colour in table.colours:
        problems.append(f"a class has the ignore colour {list(table.ignore_colour)}; set ignore_colour to another one")
    if table.ignore_index != IGNORE_INDEX:
        problems.append(f"ignore_index is {table.ignore_index}, expected 255; map other values with source_ids")
    if "ignore" in table.names:
        problems.append("a class is called ignore, which is the word for pixels without a class")
    if "{classes}" not in table.prompt_template:
        problems.append(f"prompt_template is {table.prompt_template!r}, expected the placeholder {{classes}} in it")
    allowed = {*table.ids, IGNORE_INDEX}
    for raw, target in (table.source_ids or {}).items():
        if target not in allowed or not 0 <= raw <= 65535:
            problems.append(f"source_ids has {raw}: {target}, expected 0..65535 -> 0..{count - 1} or 255")
    for source, names in (table.mappings or {}).items():
        wrong = sorted({str(name) for name in names.values() if name != "ignore" and table.find(str(name)) is None})
        if wrong:
            problems.append(f"mappings.{source} leads to unknown classes {', '.join(wrong)}")
    return problems


def read_mask(path: str | Path, table: ClassTable) -> np.ndarray:
    """Read a mask exactly, as ids of a class table.

    Args:
        path: 1- to 16-bit grey or palette image (palette: the indices are the ids), or an RGB image in the table's
            colours; PNG, BMP or lossless TIFF.
        table: the classes; its source_ids, if any, turn ids on disk into ids of the table.
    Returns:
        (H, W) uint8, 0..K-1, or 255 where there is no class.
    Raises:
        FileNotFoundError: if there is no such file.
        UserError: for lossy or unreadable files, and for ids or colours outside the table (all are named).
    """
    raw = read_raw_mask(path)
    return decode_colours(raw, table, path) if raw.ndim == 3 else decode_ids(raw, table, path)


def read_raw_mask(path: str | Path) -> np.ndarray:
    """Read the numbers stored in a mask file: (H, W) uint8, uint16 or int32 ids, or (H, W, 3) uint8 colours.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: for JPEG and other lossy or unsuitable formats and for damaged files.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"mask file not found: {path}. Check the path and --data_root.")
    try:
        with Image.open(path) as picture:
            check_lossless(picture, path)
            stretch = GREY_STRETCH.get(raw_mode(picture), 1) if picture.format == "PNG" else 1
            picture.load()
            if picture.mode == "RGBA" and picture.getextrema()[3] == (255, 255):
                picture = picture.convert("RGB")
            mode, values = picture.mode, np.asarray(picture)
    except UserError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, zlib.error, bomb errors ...
        raise UserError(f"{path}: not readable as an image ({error}). Write the mask again.") from error
    if mode not in ("1", "L", "P", "I", "RGB") and not mode.startswith("I;16"):
        raise UserError(f"{path}: a mask of mode {mode}. Expected grey or palette ids (up to 16 bit) or opaque RGB.")
    return values.astype(np.uint8) if mode == "1" else values // stretch


def raw_mode(picture: Image.Image) -> str:
    """Storage mode of an opened, not yet loaded PNG (Pillow's raw mode), for example `L;4`."""
    mode = picture.tile[0][3] if picture.tile else ""
    return mode[0] if isinstance(mode, tuple) else str(mode)


def check_lossless(picture: Image.Image, path: str | Path) -> None:
    """Raise UserError unless the opened picture is stored without loss."""
    is_jpeg = picture.format in ("JPEG", "MPO") or "jpeg" in str(picture.info.get("compression", "")).lower()
    if is_jpeg:
        raise UserError(f"{path}: a JPEG mask. JPEG changes pixel values, so class ids get lost. Expected a lossless "
                        "PNG; export the mask again from its source.")
    if picture.format not in LOSSLESS_FORMATS:
        raise UserError(f"{path}: a mask in {picture.format} format. Expected {', '.join(LOSSLESS_FORMATS)}.")


def decode_ids(raw: np.ndarray, table: ClassTable, path: str | Path) -> np.ndarray:
    """Turn ids on disk (H, W) into ids of the table, uint8; UserError naming file and ids outside it."""
    lookup = np.full(65536, -1, np.int32)
    lookup[IGNORE_INDEX] = IGNORE_INDEX
    for raw_id, target in (table.source_ids or {index: index for index in table.ids}).items():
        lookup[raw_id] = target
    values = np.unique(raw)
    outside = [int(value) for value in values if not 0 <= value < 65536 or lookup[value] < 0]
    if outside:
        allowed = table.source_ids or table.ids
        raise UserError(f"{path}: ids {short_list(outside)} are not in class table {table.name}. Expected "
                        f"{min(allowed)}..{max(allowed)} or 255 (ignore). Choose the right table (--classes) or add "
                        "source_ids to it.")
    return lookup[raw].astype(np.uint8)


def decode_colours(raw: np.ndarray, table: ClassTable, path: str | Path) -> np.ndarray:
    """Turn RGB colours (H, W, 3) uint8 into ids of the table, uint8; UserError naming file and unknown colours."""
    codes = (raw.astype(np.int32) * (65536, 256, 1)).sum(-1)
    known = {(65536 * r + 256 * g + b): index for index, (r, g, b) in zip(table.ids, table.colours, strict=True)}
    r, g, b = table.ignore_colour
    known[65536 * r + 256 * g + b] = IGNORE_INDEX
    values, inverse = np.unique(codes, return_inverse=True)
    outside = [(int(v) >> 16, int(v) >> 8 & 255, int(v) & 255) for v in values if int(v) not in known]
    if outside:
        raise UserError(f"{path}: colours {short_list(outside)} are not in class table {table.name}. Expected its "
                        f"colours, or {table.ignore_colour} for ignored pixels. Choose the right table (--classes).")
    ids = np.array([known[int(value)] for value in values], np.uint8)
    return ids[inverse].reshape(codes.shape)


def short_list(values: list) -> str:
    """First eight values as text, with the number of the others."""
    text = ", ".join(str(value) for value in values[:8])
    return text if len(values) <= 8 else f"{text} and {len(values) - 8} more"
