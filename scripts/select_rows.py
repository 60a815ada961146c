r"""Keep the rows of a manifest whose masks are rich: much of a wanted class, or many classes.

    python scripts/select_rows.py DATA/train_set_items.json DATA/rich.json --data_root DATA \
        --classes DATA/classes.yaml --min_share building=0.15,road=0.2 --min_classes 3

A row stays if it has the share of one of the classes of --min_share, or --min_classes classes of more than 5 % each.
So a generator trains, or generates, where there is something to learn: in many data sets most tiles are bare land.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.cli import add_classes  # noqa: E402
from ldm.data.classes import ClassTable, read_mask  # noqa: E402
from ldm.data.manifest import read_manifest  # noqa: E402
from ldm.files import atomic_write  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402

COUNTED = 0.05  # share from which a class counts for --min_classes


def read_shares(text: str, table: ClassTable) -> np.ndarray:
    """Wanted shares by class, infinity where nothing is wanted, (K,) float64; from `name=share,name=share`.

    Raises:
        UserError: for a class that the table does not have, or a share outside (0, 1].
    """
    shares = np.full(table.num_classes, np.inf)
    for part in filter(None, text.split(",")):
        name, _, share = part.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if table.find(name.strip()) is None or not 0 < value <= 1:
            raise UserError(f"--min_share {part}: expected CLASS=SHARE, the share in (0, 1], the class one of "
                            f"{', '.join(table.names)}.")  # fmt: skip
        shares[table.find(name.strip())] = value
    return shares


def main(argv: list[str] | None = None) -> None:
    """Read all masks, write the rows that stay as they are, and print how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="JSON-lines manifest to choose from")
    parser.add_argument("out", type=Path, help="manifest to write")
    parser.add_argument("--data_root", default=".", help="folder that the manifest's paths are relative to")
    add_classes(parser.add_argument, "of the masks", is_required=True)
    parser.add_argument("--min_share", default="", help="building=0.15,road=0.2: pixels of the class, of all")
    parser.add_argument("--min_classes", type=int, default=0, help="0 = their number does not count")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    table = ClassTable.load(args.classes)
    wanted = read_shares(args.min_share, table)
    rows = read_manifest(args.manifest, args.data_root, need=(), table=table)
    rich: dict[Path, bool] = {}
    for mask in {row.mask for row in rows}:
        ids = read_mask(mask, table)
        shares = np.bincount(ids.ravel(), minlength=256)[: table.num_classes] / ids.size
        has_many = 0 < args.min_classes <= np.count_nonzero(shares > COUNTED)
        rich[mask] = bool((shares >= wanted).any() or has_many)
    lines = args.manifest.read_bytes().splitlines()
    kept = [lines[row.line - 1].decode("utf-8-sig") for row in rows if rich[row.mask]]
    if not kept:
        raise UserError(f"{args.manifest}: none of {len(rows)} rows is rich enough. Ask for smaller shares.")
    atomic_write(args.out, "".join(f"{line}\n" for line in kept))
    print(f"{len(kept)} of {len(rows)} rows, {sum(rich.values())} of {len(rich)} masks: {args.out}")


if __name__ == "__main__":
    run_entry_point(main)
