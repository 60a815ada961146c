"""Contact sheet of an output folder of inference.py: masks, references and what was generated for them."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import positive_int
from ldm.data.classes import ClassTable, read_mask
from ldm.data.images import read_image
from ldm.files import atomic_write
from ldm.sheet import Cell, draw_sheet
from ldm.util import run_entry_point
from post_processing.run_index import Sample, read_run

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Command line of preview.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("folder", help="output folder of inference.py (with index.jsonl and run.json)")
    add("--out", help="PNG to write; default: contact_sheet.png in the folder")
    add("--rows", type=positive_int, default=8, help="most rows of the sheet")
    add("--columns", type=positive_int, default=8, help="most references (grid) or results (list) side by side")
    add("--tile", type=positive_int, default=160, help="width of a tile in pixels")
    add("--data_root", help="folder of masks and references; default: that of the run")
    add("--layout", choices=["auto", "grid", "list"], default="auto", help="grid: a row per mask, a column per "
        "reference; list: a row per pair; auto: grid if most pairs exist")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def show_mask(sample: Sample, table: ClassTable) -> Cell:
    """Mask in class colours."""
    return Cell(table.colourise(read_mask(sample.mask, table)), sample.mask.stem, is_mask=True)


def show_reference(sample: Sample) -> list[Cell]:
    """Reference as it is; none where the method takes none."""
    return [Cell(read_image(sample.reference, None), sample.reference.stem)] if sample.reference else []


def show_result(sample: Sample | None) -> Cell:
    """Generated image; an empty tile if there is none."""
    if sample is None:
        return Cell(None, "not generated")
    return Cell(read_image(sample.image, None), f"seed {sample.record['seed']}")


def list_classes(samples: Sequence[Sample], table: ClassTable) -> list[tuple[str, tuple[int, int, int]]]:
    """Names and colours of the classes in the masks of samples."""
    masks = {sample.mask for sample in samples}
    present = set().union(*(np.unique(read_mask(path, table)).tolist() for path in masks))
    rows = zip(table.ids, table.names, table.colours, strict=True)
    return [(name, colour) for index, name, colour in rows if index in present]


def plan_grid(samples: Sequence[Sample], table: ClassTable, rows: int, columns: int) -> list[list[Cell]]:
    """Masks down, references across, copies of a pair side by side."""
    masks = list({sample.mask: sample for sample in reversed(samples)}.values())[::-1][:rows]
    references = list({sample.reference: sample for sample in reversed(samples)}.values())[::-1][:columns]
    copies = sorted({sample.record["copy"] for sample in samples})
    found = {(sample.mask, sample.reference, sample.record["copy"]): sample for sample in samples}
    white = np.full((1, 1, 3), 255, np.uint8)
    head = [Cell(white, "mask / reference")]
    for sample in references:
        head += [*(show_reference(sample) or [Cell(None)]), *[Cell(white)] * (len(copies) - 1)]
    return [head, *([show_mask(mask, table), *(show_result(found.get((mask.mask, reference.reference, copy)))
                                               for reference in references for copy in copies)] for mask in masks)]


def plan_list(samples: Sequence[Sample], table: ClassTable, rows: int, columns: int) -> list[list[Cell]]:
    """A row per row of the manifest: mask, reference if it has one, then its copies."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.record["row"], []).append(sample)
    return [[show_mask(group[0], table), *show_reference(group[0]), *map(show_result, group[:columns])]
            for group in list(groups.values())[:rows]]


def main(argv: list[str] | None = None) -> int:
    """Write the contact sheet and say where; returns 0."""
    args = build_parser().parse_args(argv)
    if args.debug:
        logging.getLogger().setLevel(logging.DEBUG)
    folder = Path(args.folder)
    samples, run = read_run(folder, args.data_root, check_files=False)
    table = ClassTable.load(run["class_table"])
    pairs = {(sample.mask, sample.reference) for sample in samples}
    possible = len({mask for mask, _ in pairs}) * len({reference for _, reference in pairs})
    is_full = samples[0].reference is not None and 2 * len(pairs) > possible
    is_grid = args.layout == "grid" or (args.layout == "auto" and is_full)
    sheet = (plan_grid if is_grid else plan_list)(samples, table, args.rows, args.columns)
    shown = {line[0].label for line in sheet}
    legend = list_classes([sample for sample in samples if sample.mask.stem in shown], table)
    image = draw_sheet(sheet, args.tile, legend)
    out = Path(args.out) if args.out else folder / "contact_sheet.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, lambda file: image.save(file, format="PNG"))
    logger.info("contact sheet: %s (%d x %d)", out, *image.size)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
