"""Contact sheet of an output folder of inference.py: masks, references and what was painted for them."""

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.data.classes import ClassTable, read_mask
from ldm.data.images import read_for_show
from ldm.files import atomic_write, read_lines
from ldm.util import UserError, run_entry_point

logger = logging.getLogger(__name__)

GAP, TEXT_HEIGHT, FONT_SIZE = 6, 18, 13
BACKGROUND, INK, EMPTY = (255, 255, 255), (30, 30, 30), (235, 235, 235)
Record = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Command line of preview.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", help="output folder of inference.py (with index.jsonl and run.json)")
    parser.add_argument("--out", default=None, help="PNG to write; default: contact_sheet.png in the folder")
    parser.add_argument("--rows", type=int, default=8, help="most rows of the sheet")
    parser.add_argument("--columns", type=int, default=8, help="most references (grid) or results (list) side by side")
    parser.add_argument("--tile", type=int, default=160, help="width of a tile in pixels")
    parser.add_argument("--data_root", default=None, help="folder of masks and references; default: that of the run")
    parser.add_argument(
        "--layout", choices=["auto", "grid", "list"], default="auto",
        help="grid: a row per mask, a column per reference; list: a row per pair; auto: grid if most pairs exist",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@dataclass(frozen=True)
class Cell:
    """A tile of the sheet.

    Args:
        image: (H, W, 3) uint8; None = nothing was painted.
        label: one line under the tile.
        is_mask: enlarge without mixing colours.
    """

    image: np.ndarray | None
    label: str = ""
    is_mask: bool = False


class Sources:
    """Reads the pictures that an index names.

    Args:
        folder: output folder of inference.py.
        data_root: folder of masks and references; None = the one that the run used.

    Raises:
        FileNotFoundError: if the folder has no run.json.
    """

    def __init__(self, folder: Path, data_root: str | None) -> None:
        if not (folder / "run.json").is_file():
            raise FileNotFoundError(f"{folder}: no run.json. Expected a folder that inference.py wrote. Check it.")
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if run["fingerprint"].get("format") == "tar":
            raise UserError(f"{folder}: its images are in tars. Expected files. Unpack them, or use --format folder.")
        self.folder = folder
        self.data_root = Path(data_root or run["data_root"])
        spec = run["class_table"]
        if spec.get("source_ids"):  # JSON has no whole numbers as keys
            spec["source_ids"] = {int(raw): own for raw, own in spec["source_ids"].items()}
        self.table = ClassTable.load(spec)

    def mask(self, record: Record) -> Cell:
        """Mask in class colours."""
        mask = read_mask(self.data_root / record["mask"], self.table)
        return Cell(self.table.colourise(mask), Path(record["mask"]).stem, is_mask=True)

    def reference(self, record: Record) -> Cell:
        """Reference as it is; an empty tile where the method takes none."""
        if record["reference"] is None:
            return Cell(None)
        return Cell(read_for_show(self.data_root / record["reference"]), Path(record["reference"]).stem)

    def result(self, record: Record | None, label: str) -> Cell:
        """Painted image; an empty tile if there is none."""
        return Cell(None if record is None else read_for_show(self.folder / record["image"]), label)

    def legend(self, records: list[Record]) -> list[tuple[str, tuple[int, int, int]]]:
        """Names and colours of the classes in the masks of these records."""
        paths = {self.data_root / record["mask"] for record in records}
        present = set().union(*(np.unique(read_mask(path, self.table)).tolist() for path in paths))
        rows = zip(self.table.ids, self.table.names, self.table.colours, strict=True)
        return [(name, colour) for index, name, colour in rows if index in present]


def plan_grid(records: list[Record], sources: Sources, rows: int, columns: int) -> list[list[Cell]]:
    """Masks down, references across, copies of a pair side by side."""
    masks = list({record["mask"]: record for record in reversed(records)}.values())[::-1][:rows]
    references = list({record["reference"]: record for record in reversed(records)}.values())[::-1][:columns]
    copies = sorted({record["copy"] for record in records})
    found = {(record["mask"], record["reference"], record["copy"]): record for record in records}
    blank = [Cell(np.full((1, 1, 3), 255, np.uint8))] * (len(copies) - 1)
    head = [Cell(np.full((1, 1, 3), 255, np.uint8), "mask / reference")]
    for record in references:
        head += [sources.reference(record), *blank]
    sheet = [head]
    for mask in masks:
        line = [sources.mask(mask)]
        for reference in references:
            for copy in copies:
                record = found.get((mask["mask"], reference["reference"], copy))
                line.append(sources.result(record, f"seed {record['seed']}" if record else "not painted"))
        sheet.append(line)
    return sheet


def plan_list(records: list[Record], sources: Sources, rows: int, columns: int) -> list[list[Cell]]:
    """A row per row of the manifest: mask, reference if it has one, then its copies."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["row"], []).append(record)
    sheet = []
    for group in list(groups.values())[:rows]:
        results = [sources.result(record, f"seed {record['seed']}") for record in group[:columns]]
        references = [sources.reference(group[0])] if group[0]["reference"] else []
        sheet.append([sources.mask(group[0]), *references, *results])
    return sheet


def draw_sheet(sheet: list[list[Cell]], legend: list[tuple[str, tuple[int, int, int]]], tile: int) -> Image.Image:
    """Draw the tiles with their labels, and the class colours below.

    Args:
        sheet: rows of cells; the first column is set apart.
        legend: class names and (r, g, b).
        tile: width of a tile; the height follows from the first painted image.

    Returns:
        RGB picture.
    """
    shape = next(cell.image.shape for cell in reversed(sheet[-1]) if cell.image is not None)
    height = max(1, round(tile * shape[0] / shape[1]))
    step_x, step_y = tile + GAP, height + TEXT_HEIGHT + GAP
    width = GAP + step_x * max(len(line) for line in sheet) + GAP
    font = ImageFont.load_default(FONT_SIZE)
    legend_lines = _wrap_legend(legend, width, font)
    canvas = Image.new("RGB", (width, GAP + step_y * len(sheet) + TEXT_HEIGHT * len(legend_lines) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for j, line in enumerate(sheet):
        for i, cell in enumerate(line):
            x, y = GAP + i * step_x + (GAP if i else 0), GAP + j * step_y
            if cell.image is None:
                draw.rectangle((x, y, x + tile - 1, y + height - 1), fill=EMPTY)
            else:
                method = Image.Resampling.NEAREST if cell.is_mask else Image.Resampling.LANCZOS
                canvas.paste(ImageOps.pad(Image.fromarray(cell.image), (tile, height), method, BACKGROUND), (x, y))
            draw.text((x, y + height + 1), _shorten(cell.label, tile, font), fill=INK, font=font)
    y = GAP + step_y * len(sheet)
    for line in legend_lines:
        for x, name, colour in line:
            draw.rectangle((x, y + 3, x + 11, y + 14), fill=colour, outline=INK)
            draw.text((x + 16, y), name, fill=INK, font=font)
        y += TEXT_HEIGHT
    return canvas


def _wrap_legend(legend: list[tuple[str, tuple[int, int, int]]], width: int, font: Any) -> list[list[tuple]]:
    lines: list[list[tuple]] = [[]]
    x = GAP
    for name, colour in legend:
        needed = 16 + round(font.getlength(name)) + 14
        if x + needed > width and lines[-1]:
            lines.append([])
            x = GAP
        lines[-1].append((x, name, colour))
        x += needed
    return lines


def _shorten(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def main(argv: list[str] | None = None) -> int:
    """Write the contact sheet and say where; returns 0.

    Args:
        argv: arguments without the program name; None = sys.argv[1:].
    """
    args = build_parser().parse_args(argv)
    if args.debug:
        logging.getLogger().setLevel(logging.DEBUG)
    if min(args.rows, args.columns, args.tile) < 1:
        raise UserError(f"--rows {args.rows} --columns {args.columns} --tile {args.tile}: expected at least 1 each.")
    folder = Path(args.folder)
    records = list(read_lines(folder / "index.jsonl", "row", "copy").values())
    if not records:
        raise UserError(f"{folder}: index.jsonl is missing or empty. Expected the output of a finished inference.py.")
    sources = Sources(folder, args.data_root)
    pairs = {(record["mask"], record["reference"]) for record in records}
    possible = len({mask for mask, _ in pairs}) * len({reference for _, reference in pairs})
    has_references = any(record["reference"] for record in records)
    is_grid = args.layout == "grid" or (args.layout == "auto" and has_references and 2 * len(pairs) > possible)
    plan = plan_grid if is_grid else plan_list
    sheet = plan(records, sources, args.rows, args.columns)
    shown = {line[0].label for line in sheet}
    legend = sources.legend([record for record in records if Path(record["mask"]).stem in shown])
    picture = draw_sheet(sheet, legend, args.tile)
    out = Path(args.out) if args.out else folder / "contact_sheet.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, lambda file: picture.save(file, format="PNG"))
    logger.info("contact sheet: %s (%d x %d)", out, *picture.size)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
