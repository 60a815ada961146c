r"""Predict land-cover masks for images that have none, so that a generator can train on them or use them.

    python scripts/predict_masks.py --segmentor logs/loveda/config.json logs/loveda/segmentor.pth \
        --images begc/train --buildings data/buildings --max_background 0.55 --outdir data/begc

Writes masks/{stem}.png (ids of the class table), classes.yaml, run.json and items.json, a manifest of the pairs that
are kept. Started again with the same settings, it predicts what is missing. The mask of a GeoTIFF is a GeoTIFF in the
same place, with 255 as its nodata and the table's colours; --polygons writes outlines as well. Images larger than
--window, of any size, are predicted by windows whose borders are blended.
"""

import argparse
import io
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.cli import add_classes, fraction, natural, positive_int  # noqa: E402
from ldm.data.bands import add_reading_flags, make_reading  # noqa: E402
from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask  # noqa: E402
from ldm.data.images import ImageInfo, find_images, open_image  # noqa: E402
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
    add_classes(add, "of the segmentor, when none is stored with it")
    add("--map_to", help="class table to write; its `mappings` say where the segmentor's classes go (default: those)")
    add("--images", type=Path, help="folder of images")
    add("--txt_file", type=Path, help="manifest whose images (target) get masks, instead of --images")
    add("--data_root", type=Path, help="where the paths of --txt_file start (default: its folder)")
    add("--outdir", type=Path, required=True, help="output folder")
    add("--threshold", type=fraction, default=0.0, help="pixels of a lower probability are ignored (default: none)")
    add("--buildings", type=Path, help="output of convert_buildings.py coco_to_masks: predicted buildings become "
        "--background, these are drawn over (by stems)")
    add("--building", default="building", help="name of the class of buildings (default: %(default)s)")
    add("--background", default="background", help="name of the background class (default: %(default)s)")
    add("--max_background", type=fraction, help="keep masks with a smaller share of background only (default: all)")
    add("--window", type=positive_int, default=1024, help="side of the windows that larger images are predicted by, "
        "pixels (default: %(default)s)")  # fmt: skip
    add("--overlap", type=natural, default=128, help="pixels that neighbouring windows share (default: %(default)s)")
    add("--polygons", choices=("geojson", "gpkg"), help="write the outlines of the classes of every GeoTIFF, too")
    add("--batch_size", type=positive_int, default=8, help="images at once (default: %(default)s)")
    add("--num_threads", type=positive_int, default=4, help="threads that read files (default: %(default)s)")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ... (default: %(default)s)")
    add_reading_flags(parser.add_argument_group("images that are not 8-bit RGB").add_argument)
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


def list_targets(args: argparse.Namespace) -> tuple[dict[Path, Path], dict[Path, ImageInfo]]:
    """The mask of every image, and what the images' headers say; georeferenced images have georeferenced masks."""
    from post_processing.geo import to_geographic

    paths = list_inputs(args)

    def look(path: Path) -> ImageInfo | str:
        try:
            with open_image(path, 3, args.choices) as image:
                info = image.info
                if info.dtype != "uint8" or info.bits != 8:
                    middle = info.height // 2
                    image.read(max(0, middle - 64), middle + 64)  # says what it needs to become 8 bits
            if args.polygons == "geojson" and info.transform:
                corner = {"type": "Point", "coordinates": [info.transform[2], info.transform[5]]}
                to_geographic([corner], info.crs, path)  # says what it needs before anything is predicted
            return info
        except (UserError, FileNotFoundError) as error:
            return str(error)

    with ThreadPoolExecutor(args.num_threads) as pool:
        infos = dict(zip(paths, pool.map(look, paths), strict=True))
    problems = [info for info in infos.values() if isinstance(info, str)]
    if problems:
        more = f"\nand {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"{len(problems)} of {len(paths)} images cannot be taken:\n" + "\n".join(problems[:10]) + more)
    return {path: args.outdir / "masks" / f"{path.stem}.{'tif' if info.transform else 'png'}"
            for path, info in infos.items()}, infos  # fmt: skip


def open_folder(args: argparse.Namespace, table: ClassTable) -> None:
    """Note in run.json what decides about the masks; FileExistsError if the folder was begun with something else."""
    settings = {
        "segmentor_sha256": file_sha256(args.segmentor[1]), "class_table": table.to_dict(),
        "threshold": args.threshold, "buildings": str(args.buildings.resolve()) if args.buildings else None,
        "building": args.building, "background": args.background, "window": args.window, "overlap": args.overlap,
        "reading": args.choices.to_dict(),
    }  # fmt: skip
    old = RunFolder(args.outdir).read().get("settings", settings)
    settings = {key: value for key, value in settings.items() if key in old}  # older folders have no word on windows
    RunFolder(args.outdir, settings, results="masks/*").open()
    (args.outdir / "masks").mkdir(exist_ok=True)
    atomic_write(args.outdir / "classes.yaml", yaml.safe_dump(table.to_dict(), sort_keys=False))


def predict_missing(args: argparse.Namespace, segmentor: "Segmentor", table: ClassTable, targets: dict[Path, Path],
                    infos: dict[Path, ImageInfo]) -> None:
    """Write the masks (image -> file) that do not exist yet."""
    from post_processing.segmentation.loading import stream_batches
    from post_processing.segmentation.scenes import predict_classes, predict_scene

    known = read_known(args, list(targets))
    if known:
        building = find_class(table, args.building, "--building")
        background = find_class(table, args.background, "--background")
        known_table = ClassTable.load(args.buildings / "classes.yaml")
        known_building = find_class(known_table, args.building, "--building")
    lookup = table.map_from(segmentor.class_table) if args.map_to else np.arange(256, dtype=np.uint8)
    missing = [image for image, target in targets.items() if not target.is_file()]
    large = [image for image in missing if max(infos[image].height, infos[image].width) > args.window]
    small = [image for image in missing if image not in set(large)]

    def finish(image: Path, rows: Iterable[tuple[int, np.ndarray]]) -> None:
        info, buildings = infos[image], None
        if known:
            buildings = read_mask(known[image], known_table) == known_building
            if buildings.shape != (info.height, info.width):
                raise UserError(f"{known[image]}: {buildings.shape} pixels, its image {(info.height, info.width)} "
                                "(height, width). Expected equal sizes.")  # fmt: skip
        done = ((top, lookup[mask]) for top, mask in rows)
        if buildings is not None:
            done = ((top, burn_in(mask, buildings[top : top + len(mask)], building, background)) for top, mask in done)
        write_target(targets[image], info, done, table)

    def read(image: Path) -> tuple[np.ndarray, np.ndarray | None]:
        with open_image(image, 3, args.choices) as opened:
            return opened.read()

    with ThreadPoolExecutor(args.num_threads) as pool, tqdm(total=len(missing), disable=None) as bar:
        for part in stream_batches(small, read, lambda found: found[0].shape[:2], args.batch_size, args.num_threads):
            batch = [image for image, _ in part]
            images, valid = zip(*(found for _, found in part), strict=True)
            masks = predict_classes(segmentor, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), args.threshold)
            for mask, has_data in zip(masks, valid, strict=True):
                if has_data is not None:
                    mask[~has_data] = IGNORE_INDEX
            list(pool.map(finish, batch, ([(0, mask)] for mask in masks)))
            bar.update(len(batch))
        for path in large:
            with open_image(path, 3, args.choices) as image:
                finish(path, predict_scene(segmentor, image, args.window, args.overlap, args.batch_size,
                                           args.threshold))  # fmt: skip
            bar.update()


def burn_in(mask: np.ndarray, known: np.ndarray, building: int, background: int) -> np.ndarray:
    """Replace predicted buildings by known ones: predicted ones become background first.

    Args:
        mask: (H, W) uint8 class ids.
        known: (H, W) bool, true where a building is known to be.
        building, background: their class ids; background may be 255.
    """
    return np.where(known, building, np.where(mask == building, background, mask)).astype(np.uint8)


def write_target(target: Path, info: ImageInfo, rows: Iterable[tuple[int, np.ndarray]], table: ClassTable) -> None:
    """Write a mask from its rows (first row, (h, W) uint8): GeoTIFF with the place of its image, else PNG."""
    if target.suffix == ".tif":
        from post_processing.geo import write_mask

        write_mask(target, (info.height, info.width), rows, table, info.crs, info.transform)
        return
    content = io.BytesIO()
    Image.fromarray(np.concatenate([mask for _, mask in rows])).save(content, "PNG")
    atomic_write(target, content.getvalue(), is_synced=False)


def write_outlines(folder: Path, masks: Iterable[Path], ending: str, table: ClassTable) -> None:
    """Write the polygons of the GeoTIFFs among the masks that have none yet, and say how many."""
    from post_processing.geo import write_polygons

    folder.mkdir(exist_ok=True)
    placed = {mask: folder / f"{mask.stem}.{ending}" for mask in masks if mask.suffix == ".tif"}
    counts = [write_polygons(mask, path, table) for mask, path in placed.items() if not path.is_file()]
    print(f"{sum(counts)} polygons of {len(counts)} masks written to {folder}")


def choose_pairs(args: argparse.Namespace, table: ClassTable,
                 targets: dict[Path, Path]) -> tuple[list[dict], Path, Counter[str]]:
    """Rows of the manifest, the folder that their paths start at, and why others are left out.

    The folder is the deepest one above images and masks.
    """
    root = Path(os.path.commonpath([*(path.resolve().parent for path in targets), args.outdir.resolve()]))
    rows: list[dict] = []
    left_out: Counter[str] = Counter()
    background = find_class(table, args.background, "--background") if args.max_background is not None else None
    with ThreadPoolExecutor(args.num_threads) as pool:
        masks = pool.map(lambda path: read_mask(path, table), targets.values())
        for (image, target), mask in zip(targets.items(), masks, strict=True):
            if not (mask != IGNORE_INDEX).any():
                left_out["without one pixel of a class"] += 1
            elif background is not None and (mask == background).mean() >= args.max_background:
                left_out["with too much background (--max_background)"] += 1
            else:
                names = [path.resolve().relative_to(root).as_posix() for path in (target, image)]
                rows.append({"source": names[0], "target": names[1], "prompt": table.prompt(mask)})
    return rows, root, left_out


def main(argv: list[str] | None = None) -> None:
    """Predict what is missing, write the manifest and say what was kept."""
    args = build_parser().parse_args(argv)
    if args.window < 64 or 2 * args.overlap > args.window:
        raise UserError(f"--window {args.window} --overlap {args.overlap}: expected windows of 64 pixels or more "
                        "that share at most half.")
    from post_processing.segmentation.segmentor import segmentor_of

    args.choices = make_reading(args, "--scale_from and the folder that prepare_dataset.py wrote for the segmentor's "
                                "training, or --scale_range MIN MAX of that training")
    if args.scale_percentiles:
        raise UserError("--scale_percentiles: the segmentor needs the scale of its training. Expected --scale_from "
                        "with the folder that prepare_dataset.py wrote for it, or --scale_range.")
    targets, infos = list_targets(args)
    segmentor = segmentor_of(args)
    table = (ClassTable.load(args.map_to) if args.map_to else segmentor.class_table).without_source_ids()
    open_folder(args, table)
    predict_missing(args, segmentor, table, targets, infos)
    rows, root, left_out = choose_pairs(args, table, targets)
    write_manifest(args.outdir / "items.json", rows)
    if args.polygons:
        write_outlines(args.outdir / "polygons", targets.values(), args.polygons, table)
    reasons = "".join(f", {count} left out {reason}" for reason, count in left_out.items())
    print(f"{len(rows)} of {len(targets)} pairs kept{reasons}; {args.outdir / 'items.json'} (--data_root {root})")


if __name__ == "__main__":
    run_entry_point(main)
