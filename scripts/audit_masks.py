"""Measure how often the masks of synthesized pairs are wrong: draw some, let a person correct them, count.

Writes --outdir with images, masks and empty copies in corrected/. Paint in the copies, with any editor and the colours
that are listed, what the images show; leave empty what is not clear. `--read --outdir DIR` then prints the transition
matrix and writes noise.json, which train_segmentor.py takes as --noise_matrix (or the folder as --audit).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.cli import add_classes, positive_int  # noqa: E402
from ldm.data.classes import ClassTable  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402
from post_processing.segmentation.audit import estimate_audit, read_facts, write_audit  # noqa: E402
from post_processing.segmentation.dataset import list_pairs  # noqa: E402
from post_processing.segmentation.dlc import SYNTHETIC  # noqa: E402
from post_processing.segmentation.noise import make_noise_table, write_noise  # noqa: E402


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the audit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--outdir", required=True, help="folder of the audit")
    add("--synthetic_txt_file", help="manifest of synthesized pairs")
    add("--synthetic_root", help="where its paths start (default: its folder)")
    add_classes(add, "of the masks")
    add("--count", type=positive_int, default=8, help="pairs to draw")
    add("-s", "--seed", type=int, default=23, help="of the draw")
    add("--read", action="store_true", help="count the corrections in --outdir")
    add("-d", "--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write an audit, or read one."""
    args = parse_arguments(argv)
    folder = Path(args.outdir)
    if args.read:
        table = ClassTable.load(read_facts(folder)["class_table"])
        transition, counts, notes = estimate_audit(folder, table)
        facts = {"counts": counts.tolist(), "notes": notes}
        write_noise(folder / "noise.json", {SYNTHETIC: transition}, table.names, "audit", **facts)
        print(make_noise_table(transition, table.names))
        print("\n".join([*notes, f"{counts.sum()} pixels; wrote {folder / 'noise.json'}"]))
        return
    if not args.synthetic_txt_file or not args.classes:
        raise UserError("--synthetic_txt_file, --classes: expected both, or --read. See --help.")
    table = ClassTable.load(args.classes)
    root = args.synthetic_root or Path(args.synthetic_txt_file).parent
    pairs = list_pairs(table, manifest=args.synthetic_txt_file, data_root=root)
    names = write_audit(folder, pairs, table, args.count, args.seed)
    colours = [f"  {name}: {colour}" for name, colour in zip(table.names, table.colours, strict=True)]
    print("\n".join([f"{len(names)} masks to correct in {folder / 'corrected'}; colours (r, g, b):", *colours,
                     f"  not clear: {table.ignore_colour}, as it is"]))  # fmt: skip


if __name__ == "__main__":
    run_entry_point(main)
