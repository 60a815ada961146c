"""Files of class tables: where they lie, which keys they have, and what can be wrong with their values."""
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.util import UserError, nearest

IGNORE_INDEX = 255
TABLE_DIR = Path(__file__).resolve().parents[2] / "configs" / "classes"
TABLE_KEYS = {"name", "classes", "ignore_index", "ignore", "ignore_colour", "source_ids", "mappings", "note",
              "prompt_template", "prompt_joiner", "prompt_empty"}
CLASS_KEYS = {"id", "name", "colour", "prompt"}


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


def check_keys(content: dict[str, Any], known: set[str], needed: set[str], where: str) -> None:
    """Raise UserError when a dict has unknown keys or lacks needed ones."""
    unknown = sorted(str(key) for key in set(content) - known)
    if unknown:
        hints = "".join(nearest(key, sorted(known)) for key in unknown)
        raise UserError(f"{where}: unknown keys {', '.join(unknown)}.{hints} Expected some of "
                        f"{', '.join(sorted(known))}.")
    missing = sorted(needed - set(content))
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}. Expected the keys {', '.join(sorted(needed))}.")


def find_table_problems(table: Any) -> list[str]:
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
