"""The page's look into folders of finished work: what inference.py, filter.py, resample.py and the gain wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask
from ldm.data.images import read_image
from ldm.run_folder import RunFolder
from ldm.util import UserError
from post_processing.run_index import read_mask_at, read_run

MAGENTA = np.array([255, 0, 255], np.float32)
SHOWN = 24
KINDS = {"run.json": "generated", "items.jsonl": "filtered", "summary.json": "resampled", "results.json": "gain"}


@dataclass(frozen=True)
class View:
    """What there is to see of a folder: images with a caption each, and Markdown."""

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
    samples, run = read_run(folder, check_files=False)
    table, images = ClassTable.load(run["class_table"]), []
    for sample in spread(samples):
        image = read_image(sample.image)
        parts = [table.colourise(read_mask_at(sample.mask, table, sample.size)), image]
        if sample.reference:
            parts.append(np.asarray(Image.fromarray(read_image(sample.reference)).resize(sample.size[::-1])))
        images.append((np.concatenate(parts, axis=1), f"{sample.mask.stem}, seed {sample.record['seed']}"))
    settings = run["sampling"]
    return View(images, f"**{len(samples)} images**, of which {len(images)} are shown: mask, image, reference. "
                f"{settings['solver']}, {settings['num_steps']} steps, guidance {settings['guidance_scale']}.")


def view_filtered(folder: Path) -> View:
    """Images of filter.py: mask, image, and in magenta what was dropped."""
    run = RunFolder(folder, record="filter.json")
    settings, images = run.read()["settings"], []
    table = ClassTable.load(settings["class_table"])
    for record in spread(list(run.done().values())):
        kept, image = read_mask(folder / record["file"], table), read_image(Path(settings["images"]) / record["image"])
        mask = read_mask_at(Path(record["mask"]), table, kept.shape)
        dropped = (kept == IGNORE_INDEX) & (mask != IGNORE_INDEX)
        marked = np.where(dropped[..., None], 0.4 * image + 0.6 * MAGENTA, image).round().astype(np.uint8)
        parts = np.concatenate([table.colourise(mask), image, marked], axis=1)
        images.append((parts, f"{record['image']}: {record['dropped']:.0%} dropped"))
    report = folder / "report.md"
    return View(images, report.read_text(encoding="utf-8") if report.is_file() else "")


def spread(items: Sequence[Any]) -> list[Any]:
    """At most SHOWN items, evenly from all."""
    count = min(SHOWN, len(items))
    return [items[i * len(items) // count] for i in range(count)]
