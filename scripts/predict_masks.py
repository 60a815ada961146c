r"""Predict land-cover masks for images that have none, so that a generator can be trained on them or paint from them.

    python scripts/predict_masks.py --segmentor logs/loveda/config.json logs/loveda/segmentor.pth \
        --images begc/train --buildings data/buildings --max_background 0.55 --outdir data/begc

Writes masks/{stem}.png (ids of the class table), classes.yaml, run.json and items.json, a manifest of the pairs that
are kept. Started again with the same settings, it predicts what is missing. Images are predicted whole: cut large ones
into tiles first (scripts/prepare_dataset.py).
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask  # noqa: E402
from ldm.data.images import find_images  # noqa: E402
from ldm.data.manifest import read_manifest, write_manifest  # noqa: E402
from ldm.files import atomic_write, file_sha256  # noqa: E402
from ldm.run_folder import RunFolder  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402
from post_processing.evaluation.buildings import find_class, repeated_stems  # noqa: E402

if TYPE_CHECKING:
    from post_processing.segmentation.segmentor import Segmentor


def build_parser() -> argparse.ArgumentParser:
    """Command line of predict_masks.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--segmentor", nargs=2, required=True, metavar=("CONFIG", "CKPT"), help="as train_segmentor.py wrote")
    add("--class_table", help="classes of the segmentor, when they are not stored with it")
    add("--map_to", help="class table to write; its `mappings` say where the segmentor's classes go (default: those)")
    add("--images", type=Path, help="folder of images")
    add("--txt_file", type=Path, help="manifest whose images (target) get masks, instead of --images")
    add("--data_root", type=Path, help="where the paths of --txt_file start (default: its folder)")
    add("--outdir", type=Path, required=True, help="output folder")
    add("--threshold", type=float, default=0.0, help="pixels of a lower probability are ignored (default: all count)")
    add("--buildings", type=Path, help="output of convert_buildings.py coco_to_masks: predicted buildings become "
        "--background, these are painted over (by stems)")
    add("--building", default="building", help="name of the class of buildings (default: %(default)s)")
    add("--background", default="background", help="name of the background class (default: %(default)s)")
    add("--max_background", type=float, help="keep masks with a smaller share of background only (default: all)")
    add("--batch_size", type=int, default=8, help="images at once (default: %(default)s)")
    add("--num_threads", type=int, default=4, help="threads that read files (default: %(default)s)")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("-d", "--debug", action="store_true", help="show the traceback of an error")
    return parser


def list_inputs(args: argparse.Namespace) -> list[Path]:
    """Images to predict, sorted; UserError if none or both sources are given, or two images have one stem."""
    if (args.images is None) == (args.txt_file is None):
        raise UserError("--images, --txt_file: expected one of the two.")
    if args.images:
        found = find_images(args.images)
        paths, problems = list(found.files.values()), found.problems
        if left_out := found.describe(args.images):
            print(left_out)
    else:
        root = args.data_root or args.txt_file.parent
        rows = read_manifest(args.txt_file, root, need=("image",), check_files=False)
        paths = sorted({row.image for row in rows})
        problems = [f"--txt_file: several images have the stem {stem}. Expected one. Rename the others."
                    for stem in repeated_stems(paths)]  # fmt: skip
    if problems or not paths:
        raise UserError("; ".join(problems[:5]) or f"--images {args.images}: no images. Check the path.")
    return paths


def read_known(args: argparse.Namespace, paths: Sequence[Path]) -> dict[Path, Path]:
    """Building mask of every image, {} without --buildings; FileNotFoundError naming those that are missing."""
    if not args.buildings:
        return {}
    known = {path: args.buildings / "masks" / f"{path.stem}.png" for path in paths}
    missing = [file.name for file in known.values() if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"--buildings: {len(missing)} of {len(known)} masks are missing in {args.buildings}/"
                                f"masks ({', '.join(missing[:3])}). Expected one an image, empty ones included.")
    return known


def open_folder(args: argparse.Namespace, table: ClassTable) -> None:
    """Note in run.json what decides about the masks; FileExistsError if the folder was begun with something else."""
    settings = {
        "segmentor_sha256": file_sha256(args.segmentor[1]), "class_table": table.to_dict(),
        "threshold": args.threshold, "buildings": str(args.buildings.resolve()) if args.buildings else None,
        "building": args.building, "background": args.background,
    }  # fmt: skip
    RunFolder(args.outdir, settings, results="masks/*").open()
    (args.outdir / "masks").mkdir(exist_ok=True)
    atomic_write(args.outdir / "classes.yaml", yaml.safe_dump(table.to_dict(), sort_keys=False))


def predict_missing(
    args: argparse.Namespace, segmentor: "Segmentor", table: ClassTable, targets: dict[Path, Path]
) -> None:
    """Write the masks (image -> file) that do not exist yet."""
    from post_processing.evaluation.pseudo_masks import burn_in, predict_classes
    from post_processing.segmentation.loading import image_batches

    known = read_known(args, list(targets))
    if known:
        building = find_class(table, args.building, "--building")
        background = find_class(table, args.background, "--background")
        known_table = ClassTable.load(args.buildings / "classes.yaml")
        known_building = find_class(known_table, args.building, "--building")
    lookup = table.map_from(segmentor.class_table) if args.map_to else np.arange(256, dtype=np.uint8)
    missing = [image for image, target in targets.items() if not target.is_file()]

    def finish(image: Path, mask: np.ndarray) -> None:
        mask = lookup[mask]
        if known:
            buildings = read_mask(known[image], known_table)
            if buildings.shape != mask.shape:
                raise UserError(f"{known[image]}: {buildings.shape} pixels, its image {mask.shape} (height, width). "
                                "Expected equal sizes.")  # fmt: skip
            mask = burn_in(mask, buildings == known_building, building, background)
        content = io.BytesIO()
        Image.fromarray(mask).save(content, "PNG")
        atomic_write(targets[image], content.getvalue(), is_synced=False)

    with ThreadPoolExecutor(args.num_threads) as pool, tqdm(total=len(missing), disable=None) as bar:
        for batch, images in image_batches(missing, args.batch_size, args.num_threads):
            list(pool.map(finish, batch, predict_classes(segmentor, images, args.threshold)))
            bar.update(len(batch))


def choose_pairs(args: argparse.Namespace, table: ClassTable, targets: dict[Path, Path]) -> tuple[list[dict], Path]:
    """Rows of the manifest and the folder that their paths start at: the deepest one above images and masks."""
    root = Path(os.path.commonpath([*(path.resolve().parent for path in targets), args.outdir.resolve()]))
    rows = []
    background = find_class(table, args.background, "--background") if args.max_background is not None else None
    with ThreadPoolExecutor(args.num_threads) as pool:
        masks = pool.map(lambda path: read_mask(path, table), targets.values())
        for (image, target), mask in zip(targets.items(), masks, strict=True):
            is_kept = background is None or (mask == background).mean() < args.max_background
            if is_kept and (mask != IGNORE_INDEX).any():
                names = [path.resolve().relative_to(root).as_posix() for path in (target, image)]
                rows.append({"source": names[0], "target": names[1], "prompt": table.prompt(mask)})
    return rows, root


def main(argv: list[str] | None = None) -> None:
    """Predict what is missing, write the manifest and say what was kept."""
    args = build_parser().parse_args(argv)
    for flag in ("threshold", "max_background"):
        if not 0 <= (getattr(args, flag) or 0) <= 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected 0..1.")
    if min(args.batch_size, args.num_threads) < 1:
        raise UserError("--batch_size, --num_threads: expected 1 or more.")
    from ldm.cli import choose_device
    from post_processing.segmentation.segmentor import load_segmentor

    targets = {path: args.outdir / "masks" / f"{path.stem}.png" for path in list_inputs(args)}
    given = ClassTable.load(args.class_table) if args.class_table else None
    segmentor = load_segmentor(*args.segmentor, device=choose_device(args.device), class_table=given)
    table = (ClassTable.load(args.map_to) if args.map_to else segmentor.class_table).without_source_ids()
    open_folder(args, table)
    predict_missing(args, segmentor, table, targets)
    rows, root = choose_pairs(args, table, targets)
    write_manifest(args.outdir / "items.json", rows)
    print(f"{len(rows)} of {len(targets)} pairs kept; {args.outdir / 'items.json'} (--data_root {root})")


if __name__ == "__main__":
    run_entry_point(main)
