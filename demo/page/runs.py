"""The page's look into folders of finished work: what inference.py, filter.py, resample.py and the gain wrote."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask
from ldm.util import UserError

MAGENTA = np.array([255, 0, 255], np.float32)
SHOWN = 24
KINDS = {"run.json": "generated", "items.jsonl": "filtered", "summary.json": "resampled", "results.json": "gain"}


@dataclass(frozen=True)
class View:
    """What there is to see of a folder.

    Attributes:
        images: images with a caption each.
        text: Markdown.
    """

    images: list[tuple[np.ndarray, str]]
    text: str


def find_folders(root: Path, depth: int = 4) -> dict[str, Path]:
    """Folders below `root` that hold finished work, newest first, by a name that says what they are."""
    found = []
    for name, kind in KINDS.items():
        for level in range(depth):
            for file in root.glob("*/" * level + name):
                is_gain = (file.parent / "table.md").is_file()
                if (kind == "gain") == is_gain and (kind != "resampled" or (file.parent / "summary.png").is_file()):
                    found.append((file.stat().st_mtime, f"{file.parent.relative_to(root)} ({kind})", file.parent))
    return {label: folder for _, label, folder in sorted(found, reverse=True)}


def view_folder(folder: Path) -> View:
    """What to show of a folder that find_folders found; UserError where its files are damaged or have moved."""
    try:
        if (folder / "table.md").is_file():
            return View([], (folder / "table.md").read_text(encoding="utf-8"))
        if (folder / "summary.png").is_file():
            with Image.open(folder / "summary.png") as image:
                return View([(np.asarray(image.convert("RGB")), "class balance")],
                            (folder / "summary.md").read_text(encoding="utf-8"))
        if (folder / "items.jsonl").is_file():
            return view_filtered(folder)
        return view_generated(folder)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: cannot be shown ({type(error).__name__}: {error}). Expected the files that its run "
                        "wrote and read, where they were then.") from error


def view_generated(folder: Path) -> View:
    """Images of inference.py, each between its mask and its reference."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    table, root = ClassTable.load(from_json(run["class_table"])), Path(run["data_root"])
    lines = (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()
    images = []
    for record in map(json.loads, spread(lines)):
        image = read_rgb(folder / record["image"])
        size = image.shape[1::-1]
        mask = Image.fromarray(table.colourise(read_mask(root / record["mask"], table)))
        parts = [np.asarray(mask.resize(size, Image.Resampling.NEAREST)), image]
        if record["reference"]:
            parts.append(np.asarray(Image.fromarray(read_rgb(root / record["reference"])).resize(size)))
        images.append((np.concatenate(parts, axis=1), f"{Path(record['mask']).stem}, seed {record['seed']}"))
    settings = run["sampling"]
    return View(images, f"**{len(lines)} images**, of which {len(images)} are shown: mask, image, reference. "
                f"{settings['solver']}, {settings['num_steps']} steps, guidance {settings['guidance_scale']}.")


def view_filtered(folder: Path) -> View:
    """Images of filter.py: mask, image, and in magenta what was dropped."""
    lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
    settings = json.loads((folder / "filter.json").read_text(encoding="utf-8"))["settings"]
    table, images_root = ClassTable.load(from_json(settings["class_table"])), Path(settings["images"])
    images = []
    for record in map(json.loads, spread(lines)):
        mask, kept = read_mask(record["mask"], table), read_mask(folder / record["file"], table)
        image = read_rgb(images_root / record["image"])
        if mask.shape != kept.shape:
            mask = np.asarray(Image.fromarray(mask).resize(kept.shape[::-1], Image.Resampling.NEAREST))
        dropped = (kept == IGNORE_INDEX) & (mask != IGNORE_INDEX)
        marked = np.where(dropped[..., None], 0.4 * image + 0.6 * MAGENTA, image).round().astype(np.uint8)
        parts = np.concatenate([table.colourise(mask), image, marked], axis=1)
        images.append((parts, f"{record['image']}: {record['dropped']:.0%} dropped"))
    report = folder / "report.md"
    return View(images, report.read_text(encoding="utf-8") if report.is_file() else "")


def spread(lines: list[str]) -> list[str]:
    """At most SHOWN lines, evenly from all."""
    count = min(SHOWN, len(lines))
    return [lines[i * len(lines) // count] for i in range(count)]


def read_rgb(path: Path) -> np.ndarray:
    """An image, (H, W, 3) uint8."""
    from ldm.data.images import read_image

    return read_image(path)


def from_json(table: dict) -> dict:
    """A class table out of JSON, which has no whole numbers as keys."""
    if table.get("source_ids"):
        table["source_ids"] = {int(raw): own for raw, own in table["source_ids"].items()}
    return table
