"""Class tables (ids, names, colours, wording of prompts) and the exact reading of masks."""
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.masks import OpenMask, Stored, colour_codes, colour_lookup, count_ids, id_lookup, short_list
from ldm.data.tables import IGNORE_INDEX, find_table_problems, read_table, suggest_source_ids
from ldm.util import UserError, say_once

NEAR_PALETTE = 8  # colours of a palette that are so near to the table's (Euclidean, 0..441) look like them


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
        Raises:
            FileNotFoundError: if there is no such table or file.
            UserError: for unreadable yaml/json, unknown keys, ids that are not 0..K-1, doubled names or colours.
        """
        return spec if isinstance(spec, ClassTable) else ClassTable(**read_table(spec))

    def to_dict(self) -> dict[str, Any]:
        """Plain dict (yaml- and json-ready) that load takes back."""
        rows = zip(self.ids, self.names, self.colours, self.prompt_names, strict=True)
        result: dict[str, Any] = {
            "name": self.name, "classes": [{"id": i, "name": n, "colour": list(c), "prompt": p} for i, n, c, p in rows],
            "ignore_index": self.ignore_index, "ignore_colour": list(self.ignore_colour),
            "prompt_template": self.prompt_template, "prompt_joiner": self.prompt_joiner,
            "prompt_empty": self.prompt_empty,
        }  # fmt: skip
        if self.source_ids is not None:
            result["source_ids"] = dict(self.source_ids)
        if self.mappings is not None:
            result["mappings"] = {source: dict(names) for source, names in self.mappings.items()}
        return result

    def ignored_value(self) -> int:
        """Number in mask files that the table reads as ignored; UserError if source_ids gives all to classes."""
        ids = self.source_ids or {}
        if ids.get(IGNORE_INDEX, IGNORE_INDEX) == IGNORE_INDEX:
            return IGNORE_INDEX
        free = [number for number, target in ids.items() if target == IGNORE_INDEX]
        if not free:
            raise UserError(f"class table {self.name}: source_ids gives every number on disk, 255 included, to a "
                            "class. Expected one for ignored pixels. Add it to source_ids, such as 256: 255.")
        return min(free)

    def prompt(self, mask: np.ndarray) -> str:
        """Word a prompt for a mask (H, W), 0..K-1 or 255: the template with the names present in ascending id."""
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
        """Colour a mask (H, W) of 0..K-1 or 255 by the table: (H, W, 3) uint8."""
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


@dataclass(frozen=True)
class MaskRules:
    """How masks are decoded where their files leave a choice.

    Attributes:
        kind: `ids`, `colours`, or `auto` = palette and RGB masks by colour where all their colours are the table's.
        nearest_colour: RGB colours at most so far (Euclidean, 0..441) from one of the table are taken as that one.
        ignore_strays: pixels of other colours become 255; False = they are an error.
    """

    kind: str = "auto"
    nearest_colour: float = 0
    ignore_strays: bool = False


AS_STORED = MaskRules()


def read_mask(path: str | Path, table: ClassTable, notes: Counter | None = None) -> np.ndarray:
    """Read a mask exactly, as ids of a class table.

    Args:
        path: PNG, BMP or lossless TIFF: grey of 1 to 32 bits or floats that are whole numbers (the ids), a palette
            image (the indices are the ids, unless its colours are the table's in another order), or RGB in the table's
            colours, or with ids in three equal channels.
        table: the classes; its source_ids, if any, turn ids on disk into ids of the table.
        notes: if given, gets counts (see decode_values).
    Returns:
        (H, W) uint8, 0..K-1, or 255 where there is no class: by number, nodata tag, alpha 0 or NaN.
    Raises:
        FileNotFoundError: if there is no such file.
        UserError: for lossy or unreadable files, and for ids or colours outside the table (all are named).
    """
    with OpenMask(path) as mask:
        return decode(mask.read(), table, path, notes=notes)


def read_raw_mask(path: str | Path, table: ClassTable | None = None) -> np.ndarray:
    """Read the numbers stored in a mask file (see read_mask), (H, W) ids, or (H, W, 3) uint8 colours.

    With a table the result is what decode_values takes: colours for a palette mask that is read by colour, ids for
    three equal channels, and the table's number for ignored pixels where there is no data.
    """
    with OpenMask(path) as mask:
        stored = mask.read()
    return stored.values if table is None else settle(stored, table, path, AS_STORED, Counter())


def decode(stored: Stored, table: ClassTable, path: str | Path, rules: MaskRules = AS_STORED,
           notes: Counter | None = None) -> np.ndarray:
    """Turn rows of a mask file, from OpenMask.read, into ids of a table (see decode_values)."""
    notes = Counter() if notes is None else notes
    return decode_values(settle(stored, table, path, rules, notes), table, path, rules, notes)


def decode_values(raw: np.ndarray, table: ClassTable, path: str | Path, rules: MaskRules = AS_STORED,
                  notes: Counter | None = None) -> np.ndarray:
    """Turn ids on disk (h, w), or colours (h, w, 3) uint8, into ids of a table, (h, w) uint8.

    Args:
        raw: as read_raw_mask gives it for the table.
        table: the classes.
        path: named in errors.
        rules: choices.
        notes: if given, gets counts: pixels of every id on disk under that number and of every class read by colour
            under `class N`; pixels `nearest_colour`, `stray_colours`, `nodata`; files `palette_by_colour`,
            `ids_in_three_channels`, `grey_by_colour` (colour masks without a colour), `palette_by_id`.
    Raises:
        UserError: naming the ids or colours that are not the table's.
    """
    notes = Counter() if notes is None else notes
    return decode_colours(raw, table, path, rules, notes) if raw.ndim == 3 else decode_ids(raw, table, path, notes)


def settle(stored: Stored, table: ClassTable, path: str | Path, rules: MaskRules, notes: Counter) -> np.ndarray:
    """Numbers (h, w) or colours (h, w, 3) to decode; pixels without data get the table's number for ignored ones."""
    raw, palette = stored.values, stored.palette
    if palette is not None and rules.kind != "ids":
        used = np.flatnonzero(count_ids(raw))
        by_colour = rules.kind == "colours" or is_palette_of(table, palette, used, path, rules.nearest_colour)
        notes["palette_by_colour" if by_colour else "palette_by_id"] += 1
        if by_colour:
            raw = np.concatenate([palette, np.zeros((256, 3), np.uint8)])[raw]
    elif raw.ndim == 3 and rules.kind != "colours":
        is_grey = bool((raw[..., 0] == raw[..., 1]).all() and (raw[..., 0] == raw[..., 2]).all())
        known = colour_lookup(table.colours, table.ignore_colour)
        likely = {*(table.source_ids or table.ids), table.num_classes, IGNORE_INDEX}  # one more: ids from 1
        if is_grey and (rules.kind == "ids" or ((known[colour_codes(raw)] < 0).any() and likely.issuperset(
                np.flatnonzero(count_ids(raw[..., 0])).tolist()))):
            raw = raw[..., 0]
            notes["ids_in_three_channels"] += 1
        elif is_grey:
            notes["grey_by_colour"] += 1
        elif rules.kind == "ids":
            raise UserError(f"{path}: three channels that differ. Expected ids, by --mask_kind ids. Leave the flag "
                            "away for masks in colours.")
    if stored.valid is None:
        return raw
    without = ~stored.valid
    if stored.nodata in (table.source_ids or table.ids):  # the table knows the number that the file calls no data
        say_once(f"{path}: the file calls {stored.nodata:g} no data, class table {table.name} has a class of this "
                 "number; it is read as that class. If it means no class, map it to 255 with source_ids.")
        without &= raw != stored.nodata
    notes["nodata"] += int(without.sum())
    if raw.ndim == 2 and raw.dtype == np.uint8 and table.ignored_value() > 255:
        raw = raw.astype(np.int32)
    return np.where(without[..., None] if raw.ndim == 3 else without,
                    np.array(table.ignore_colour if raw.ndim == 3 else table.ignored_value(), raw.dtype), raw)


def is_palette_of(table: ClassTable, palette: np.ndarray, used: np.ndarray, path: str | Path,
                  nearest_colour: float = 0) -> bool:
    """Whether the indices of a palette mask mean the table's colours, not its ids.

    The palette is compared with the table: where every colour in use is one of the table's (or at most nearest_colour
    from it), the colours decide; where none of a class is, or each stands at its own id, the indices are the ids.

    Raises:
        UserError: if only some colours are the table's, and those stand at other ids; or if without nearest_colour all
            are within NEAR_PALETTE of the table's, at other ids.
    """
    exact, named = find_classes(table, palette), used[used < len(palette)]
    is_clear = (exact[named] >= 0).all() or (palette[named] == named[:, None]).all()  # a grey ramp is no choice
    if is_clear or nearest_colour:
        classes = exact if is_clear else find_classes(table, palette, nearest_colour)
        return has_colours(table, palette, classes, used, path)
    near = find_classes(table, palette, NEAR_PALETTE)
    is_alike = len(named) == len(used) and (near[named] >= 0).all() and len(set(near[named])) == len(named)
    if is_alike and has_colours(table, palette, near, used, path):
        unknown = [tuple(map(int, palette[i])) for i in named if exact[i] < 0]
        raise UserError(f"{path}: its palette has colours of class table {table.name} at other numbers, but "
                        f"{short_list(unknown)} are only near to the table's. It is not clear whether numbers or "
                        f"colours count. Correct the table's colours, or choose --nearest_colour {NEAR_PALETTE} "
                        "(colours) or --mask_kind ids (numbers) in scripts/prepare_dataset.py.")
    return has_colours(table, palette, exact, used, path)


def find_classes(table: ClassTable, colours: np.ndarray, nearest_colour: float = 0) -> np.ndarray:
    """Class of colours (N, 3) uint8 that are the table's or near to one, (N,); 255 = ignored, -1 = none.

    Half way between two of the table's is near neither.
    """
    classes = colour_lookup(table.colours, table.ignore_colour)[colour_codes(colours)]
    known = np.array([*table.colours, table.ignore_colour])
    distance = np.sqrt(((colours[:, None].astype(int) - known[None]) ** 2).sum(-1))
    least, second = np.sort(distance, 1)[:, :2].T
    nearest = np.append(np.arange(table.num_classes), IGNORE_INDEX)[distance.argmin(1)]
    return np.where((classes < 0) & (least <= nearest_colour) & (least < second), nearest, classes)


def has_colours(table: ClassTable, palette: np.ndarray, classes: np.ndarray, used: np.ndarray,
                path: str | Path) -> bool:
    """Whether the colours decide (see is_palette_of), from the class of every index (-1 = none)."""
    named = used[used < len(palette)]
    ids = table.source_ids or {index: index for index in table.ids}
    is_class = (classes[named] >= 0) & (classes[named] != IGNORE_INDEX)
    elsewhere = [int(i) for i in named[is_class] if ids.get(int(i), IGNORE_INDEX) != classes[i]]
    if not is_class.any():
        # In use is nothing but the ignore colour, or colours of no class: the rest of the palette tells.
        others = {int(i): int(c) for i, c in enumerate(classes) if 0 <= c < IGNORE_INDEX}
        is_own = len(set(others.values())) > table.num_classes // 2 and all(ids.get(i) != c for i, c in others.items())
        return is_own and bool((classes[named] == IGNORE_INDEX).all())
    all_known = len(named) == len(used) and bool((classes[named] >= 0).all())
    if not elsewhere:  # ids and colours agree; an index that is no id may have the ignore colour
        return all_known and not set(used.tolist()) <= {*ids, IGNORE_INDEX}
    if all_known:
        return True
    unknown = [tuple(map(int, palette[i])) for i in named if classes[i] < 0]
    raise UserError(f"{path}: its palette has colours of class table {table.name} at other numbers (index "
                    f"{short_list(elsewhere)}) and others that the table lacks ({short_list(unknown)}). It is not "
                    "clear whether numbers or colours count. Correct the table's colours, or choose --mask_kind ids "
                    "(or colours) in scripts/prepare_dataset.py.")


def decode_ids(raw: np.ndarray, table: ClassTable, path: str | Path, notes: Counter) -> np.ndarray:
    """Turn ids on disk into ids of the table (see decode_values)."""
    lookup = id_lookup(tuple((table.source_ids or {index: index for index in table.ids}).items()))
    counts = count_ids(raw)
    present = np.flatnonzero(counts)
    outside = [int(value) for value in present if lookup[value] < 0]
    if counts.sum() < raw.size:
        outside += [int(value) for value in np.unique(raw[(raw < 0) | (raw > 65535)])]
    if outside:
        allowed = table.source_ids or table.ids
        raise UserError(f"{path}: ids {short_list(outside)} are not in class table {table.name}. Expected "
                        f"{min(allowed)}..{max(allowed)} or 255 (ignore). "
                        f"{suggest_source_ids(table, present, outside)}")
    notes.update({int(value): int(counts[value]) for value in present})
    return lookup.astype(np.uint8)[raw]


def decode_colours(raw: np.ndarray, table: ClassTable, path: str | Path, rules: MaskRules,
                   notes: Counter) -> np.ndarray:
    """Turn RGB colours into ids of the table (see decode_values)."""
    codes = colour_codes(raw)
    ids = colour_lookup(table.colours, table.ignore_colour)[codes]
    is_unknown = ids < 0
    if is_unknown.any():
        values, inverse, counts = np.unique(codes[is_unknown], return_inverse=True, return_counts=True)
        colours = np.stack([values >> 16, values >> 8 & 255, values & 255], 1)
        taken = find_classes(table, colours.astype(np.uint8), rules.nearest_colour)
        is_near = taken >= 0
        if not is_near.all() and not rules.ignore_strays:
            outside = [tuple(map(int, colour)) for colour in colours[~is_near]]
            raise UserError(
                f"{path}: colours {short_list(outside)} are not in class table {table.name} ({counts[~is_near].sum()} "
                f"pixels). Expected its colours, or {table.ignore_colour} for ignored pixels. Choose the right table "
                "(--classes); for edges that were smoothed, scripts/prepare_dataset.py has --nearest_colour "
                "N and --stray_colours ignore."
            )
        notes["nearest_colour"] += int(counts[is_near].sum())
        notes["stray_colours"] += int(counts[~is_near].sum())
        ids[is_unknown] = np.where(is_near, taken, IGNORE_INDEX)[inverse.reshape(-1)]
    ids = ids.astype(np.uint8)
    counts = np.bincount(ids.reshape(-1), minlength=256)
    notes.update({f"class {index}": int(counts[index]) for index in np.flatnonzero(counts)})
    return ids
