"""Files of class tables: where they lie, which keys they have, and what can be wrong with their values."""
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ldm.util import UserError, nearest

IGNORE_INDEX = 255
TABLE_DIR = Path(__file__).resolve().parents[2] / "configs" / "classes"
TABLE_KEYS = {"name", "classes", "ignore_index", "ignore", "ignore_colour", "source_ids", "mappings", "note",
              "prompt_template", "prompt_joiner", "prompt_empty"}
CLASS_KEYS = {"id", "name", "colour", "prompt"}


def read_table(spec: str | Path | Mapping) -> dict[str, Any]:
    """Arguments of a ClassTable from a name, a file or a mapping; errors as ClassTable.load, naming where it is from.

    `classes` is a list of {id, name, colour, prompt (optional)} or a mapping id -> {name, colour, prompt}.
    """
    if isinstance(spec, Mapping):
        where = "class table"
        content = OmegaConf.to_container(spec, resolve=True) if OmegaConf.is_config(spec) else spec
    else:
        path = find_table_file(spec)
        where = str(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is a subset of yaml
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: not readable as yaml or json ({error}). Expected a class table.") from error
        if not isinstance(content, dict):
            raise UserError(f"{where}: a {type(content).__name__} at the top. Expected the keys name and classes.")
        content.setdefault("name", path.parent.name if path.stem == "classes" else path.stem)
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
    words = {key: content[key] for key in ("prompt_template", "prompt_joiner", "prompt_empty") if key in content}
    source_ids, mappings = content.get("source_ids"), content.get("mappings")
    try:
        if wrong := [key for key, value in words.items() if not isinstance(value, str)]:
            raise TypeError(f"{wrong[0]} is no text")
        classes = sorted(classes, key=lambda entry: int(entry["id"]))
        return words | {
            "name": str(content["name"]),
            "ids": tuple(int(entry["id"]) for entry in classes),
            "names": tuple(str(entry["name"]) for entry in classes),
            "colours": tuple(tuple(int(value) for value in entry["colour"]) for entry in classes),
            "prompt_names": tuple(str(entry.get("prompt", str(entry["name"]).replace("_", " "))) for entry in classes),
            "ignore_index": int(content.get("ignore_index", content.get("ignore", IGNORE_INDEX))),
            "ignore_colour": tuple(int(value) for value in content.get("ignore_colour", (0, 0, 0))),
            "source_ids": None if source_ids is None else {int(raw): int(to) for raw, to in dict(source_ids).items()},
            "mappings": None if mappings is None else {source: dict(names) for source, names in mappings.items()},
        }
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: a value has the wrong form ({error}). See configs/classes/ for examples.") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}. Expected integers for ids and colours.") from error


def find_table_file(spec: str | Path) -> Path:
    """Path of a table given by name or path; FileNotFoundError naming the known tables when there is none."""
    path = Path(spec)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        path = TABLE_DIR / f"{spec}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem for file in TABLE_DIR.glob("*.yaml"))
    raise FileNotFoundError(f"class table not found: {spec}.{nearest(str(spec), known)} Expected one of "
                            f"{', '.join(known)}, or a path to a .yaml or .json file.")


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


def suggest_source_ids(table: Any, present: Iterable[int], outside: Sequence[int]) -> str:
    """What may be wrong with ids on disk that the table lacks: ids from 1, grey levels, or another table."""
    levels = sorted({int(value) for value in present} | set(outside) - {IGNORE_INDEX})
    guess = None
    if table.source_ids is None and outside == [table.num_classes]:
        guess = {0: 255} | {index + 1: index for index in table.ids}
        start = "The ids seem to count from 1. If so, add this to the table"
    elif table.source_ids is None and min(levels) >= 0 and len(levels) <= table.num_classes:
        guess = dict(zip(levels, table.ids, strict=False))
        start = "If these numbers stand for the classes in order, add this to the table"
    if guess is None:
        return "Choose the right table (--classes) or add source_ids to it."
    return f"{start}: source_ids: {guess}. Or choose another table (--classes)."
