"""Masks that a person corrects, as a measure of how often labels are wrong: a folder to generate in, and its reading.

`images/` and `masks/` show what was synthesized and what the masks say, in the colours of the class table; in
`corrected/` lie empty copies, in the colour of ignored pixels. A person generates what the image shows where that is
clear; what stays empty does not count.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask
from ldm.data.images import Pair, read_image
from ldm.files import write_json
from ldm.util import UserError
from post_processing.segmentation.noise import count_corrections, estimate_from_counts, make_safe

FOLDERS = ("images", "masks", "corrected")


def write_audit(folder: Path, pairs: Sequence[Pair], table: ClassTable, count: int, seed: int) -> list[str]:
    """Draw `count` pairs, or all, and lay them out to be corrected; returns their names.

    Raises:
        UserError: if the folder holds something: corrections must not be lost.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--audit {folder}: is not empty. Expected a new folder. Delete it, or read it with --read.")
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    chosen = np.random.default_rng([seed, 0]).permutation(len(pairs))[:count]
    names = []
    for number, place in enumerate(sorted(map(int, chosen))):
        pair = pairs[place]
        given = read_mask(pair.mask, table)
        name = f"{number:02d}_{pair.image.stem}.png"
        Image.fromarray(read_image(pair.image)).save(folder / "images" / name)
        Image.fromarray(table.colourise(given)).save(folder / "masks" / name)
        Image.fromarray(table.colourise(np.full_like(given, IGNORE_INDEX))).save(folder / "corrected" / name)
        names.append(name)
    write_json(folder / "audit.json", {"class_table": table.to_dict(), "names": names, "seed": seed})
    return names


def read_audit(folder: str | Path, table: ClassTable) -> np.ndarray:
    """Count what the generated copies and the masks say.

    Returns:
        (K, K) int64: pixels that show i (as corrected) and are labelled j.
    Raises:
        FileNotFoundError: if the folder is no audit, or a copy is missing.
        UserError: if it is of other classes, nothing is generated, or copies have other sizes, colours or formats.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    names = [entry["name"] for entry in facts["class_table"]["classes"]]
    if names != list(table.names):
        raise UserError(f"--audit {folder}: of classes {names}. Expected {list(table.names)} of {table.name}.")
    table = ClassTable.load(facts["class_table"]).without_source_ids()
    counts, problems = np.zeros((table.num_classes,) * 2, np.int64), []
    for name in facts["names"]:
        try:
            corrected, given = (read_mask(folder / part / name, table) for part in ("corrected", "masks"))
        except UserError as error:
            problems.append(str(error))
            continue
        if corrected.shape != given.shape:
            problems.append(f"corrected/{name}: {corrected.shape} pixels, the mask {given.shape}")
            continue
        counts += count_corrections(corrected, given, table.num_classes)
    if problems:
        raise UserError(f"--audit {folder}: {'; '.join(problems)}. Paint with the exact colours and save as PNG.")
    if not counts.sum():
        raise UserError(f"--audit {folder}: nothing is drawn in corrected/. Paint what the images show, in the "
                        "colours of the classes; leave empty what is not clear.")
    return counts


def estimate_audit(folder: str | Path, table: ClassTable) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    """T of an audit's counts, (K, K) float64, the counts, and which rows were taken to be free of noise and why."""
    counts = read_audit(folder, table)
    transition, notes = make_safe(estimate_from_counts(counts), torch.from_numpy(counts.sum(1)), table.names)
    return transition, counts, notes


def read_facts(folder: Path) -> dict[str, Any]:
    """Contents of audit.json; FileNotFoundError or UserError if there is none."""
    path = folder / "audit.json"
    if not path.is_file():
        raise FileNotFoundError(f"--audit {folder}: no audit.json there. Give a folder that audit_masks.py wrote.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {"class_table": dict(facts["class_table"]), "names": list(facts["names"])}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not the record of an audit ({type(error).__name__}). Write it anew.") from error
