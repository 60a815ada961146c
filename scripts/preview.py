"""Contact sheet of an output folder of inference.py: masks, references and what was generated for them."""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import positive_int
from ldm.data.classes import ClassTable, read_mask
from ldm.data.images import read_image
from ldm.files import Record, atomic_write, read_lines
from ldm.run_folder import RunFolder
from ldm.sheet import Cell, draw_sheet
from ldm.util import UserError, run_entry_point

logger = logging.getLogger(__name__)



def build_parser() -> argparse.ArgumentParser:
    """Command line of preview.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", help="output folder of inference.py (with index.jsonl and run.json)")
    parser.add_argument("--out", default=None, help="PNG to write; default: contact_sheet.png in the folder")
    parser.add_argument("--rows", type=positive_int, default=8, help="most rows of the sheet")
    parser.add_argument(
        "--columns", type=positive_int, default=8, help="most references (grid) or results (list) side by side"
    )
    parser.add_argument("--tile", type=positive_int, default=160, help="width of a tile in pixels")
    parser.add_argument("--data_root", default=None, help="folder of masks and references; default: that of the run")
    parser.add_argument(
        "--layout", choices=["auto", "grid", "list"], default="auto",
        help="grid: a row per mask, a column per reference; list: a row per pair; auto: grid if most pairs exist",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class Sources:
    """Reads the images that an index names.

    Args:
        folder: output folder of inference.py.
        data_root: folder of masks and references; None = the one that the run used.

    Raises:
        FileNotFoundError: if the folder has no run.json.
    """

    def __init__(self, folder: Path, data_root: str | None) -> None:
        run = RunFolder(folder).read()
        if not run:
            raise FileNotFoundError(f"{folder}: no run.json. Expected a folder that inference.py wrote. Check it.")
        self.folder = folder
        self.data_root = Path(data_root or run["data_root"])
        self.table = ClassTable.load(run["class_table"])

    def mask(self, record: Record) -> Cell:
        """Mask in class colours."""
        mask = read_mask(self.data_root / record["mask"], self.table)
        return Cell(self.table.colourise(mask), Path(record["mask"]).stem, is_mask=True)

    def reference(self, record: Record) -> Cell:
        """Reference as it is; an empty tile where the method takes none."""
        if record["reference"] is None:
            return Cell(None)
        return Cell(read_image(self.data_root / record["reference"], None), Path(record["reference"]).stem)

    def result(self, record: Record | None, label: str) -> Cell:
        """Generated image; an empty tile if there is none."""
        return Cell(None if record is None else read_image(self.folder / record["image"], None), label)

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
                line.append(sources.result(record, f"seed {record['seed']}" if record else "not generated"))
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


def main(argv: list[str] | None = None) -> int:
    """Write the contact sheet and say where; returns 0.

    Args:
        argv: arguments without the program name; None = sys.argv[1:].
    """
    args = build_parser().parse_args(argv)
    if args.debug:
        logging.getLogger().setLevel(logging.DEBUG)
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
    image = draw_sheet(sheet, args.tile, legend)
    out = Path(args.out) if args.out else folder / "contact_sheet.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, lambda file: image.save(file, format="PNG"))
    logger.info("contact sheet: %s (%d x %d)", out, *image.size)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
