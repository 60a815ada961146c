r"""Put generated images back on the map: GeoTIFFs of a run of inference.py, one a scene or one a tile.

    python scripts/write_geotiff.py --run outputs/mine --txt_file data/mine/test_set_items.json --out outputs/mine_geo

prepare_dataset.py notes in its manifests where each tile of a GeoTIFF lies (scene, crs, transform); --txt_file is the
manifest that the run was generated from. Tiles of one scene become {scene}.tif, for looking at in QGIS.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.cli import natural  # noqa: E402
from ldm.data.images import image_size  # noqa: E402
from ldm.data.masks import short_list  # noqa: E402
from ldm.files import read_lines  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402
from post_processing.geo import PlacedTile, write_mosaic  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """Command line of write_geotiff.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", dest="run_folder", type=Path, required=True, help="--outdir of inference.py")
    add("--txt_file", type=Path, help="manifest with the places of the tiles (default: the run's own)")
    add("--out", type=Path, required=True, help="output folder")
    add("--copy", type=natural, default=0, help="which image of each mask, from 0 (default: %(default)s)")
    add("--single", action="store_true", help="one file a tile, named after its image, in place of one a scene")
    add("--overwrite", action="store_true", help="replace GeoTIFFs of these names in --out")
    add("-d", "--debug", action="store_true", help="show the traceback of an error")
    return parser


def read_places(manifest: Path) -> dict[int, dict]:
    """Rows of a manifest that say where they lie, by their number as inference.py counts."""
    if not manifest.is_file():
        raise FileNotFoundError(f"--txt_file: not found: {manifest}. Expected that of the run.")
    lines = [line for line in manifest.read_bytes().splitlines() if line.strip()]
    rows = {index: json.loads(line.decode("utf-8-sig")) for index, line in enumerate(lines)}
    return {index: row for index, row in rows.items() if row.get("transform")}


def find_tiles(run_folder: Path, manifest: Path, copy: int) -> dict[str, list[PlacedTile]]:
    """Generated images of one copy by scene, in the order of the manifest; UserError if none has a place."""
    places, tiles = read_places(manifest), {}
    for (row, number), record in read_lines(run_folder / "index.jsonl", "row", "copy").items():
        place = places.get(row)
        if number != copy or place is None:
            continue
        if Path(place["source"]).as_posix() != record["mask"]:
            raise UserError(f"--txt_file {manifest}: row {row} is {place['source']}, in the run {record['mask']}. "
                            "Expected the manifest that the run was generated from.")
        image = run_folder / record["image"]
        height, width = image_size(image)
        # An image generated at another size covers the same ground with other pixels.
        own = record.get("resized_from") or (height, width)
        down, across = own[0] / height, own[1] / width
        a, b, c, d, e, f = place["transform"]
        transform = (a * across, b * down, c, d * across, e * down, f)
        tiles.setdefault(place["scene"], []).append(PlacedTile(image, (height, width), place.get("crs"), transform))
    if not tiles:
        raise UserError(f"{run_folder}: no image of copy {copy} has a place in {manifest}. Expected rows with scene "
                        "and transform, as prepare_dataset.py writes for tiles of GeoTIFFs. Check --txt_file.")
    return tiles


def main(argv: list[str] | None = None) -> None:
    """Write the files and say how many."""
    args = build_parser().parse_args(argv)
    record = args.run_folder / "run.json"
    if args.txt_file is None:
        if not record.is_file():
            raise FileNotFoundError(f"--run: no run.json in {args.run_folder}. Expected the --outdir of inference.py.")
        args.txt_file = Path(json.loads(record.read_text(encoding="utf-8"))["arguments"]["txt_file"])
    scenes = find_tiles(args.run_folder, args.txt_file, args.copy)
    if args.single:
        scenes = {tile.image.stem: [tile] for tiles in scenes.values() for tile in tiles}
    files = {args.out / f"{name}.tif": tiles for name, tiles in scenes.items()}
    there = [file.name for file in files if file.exists()]
    if there and not args.overwrite:
        raise FileExistsError(f"--out {args.out}: {len(there)} of {len(files)} files are there ({short_list(there)}). "
                              "Choose a new folder, or --overwrite.")
    args.out.mkdir(parents=True, exist_ok=True)
    for file, tiles in files.items():
        write_mosaic(file, tiles)
    print(f"{sum(map(len, scenes.values()))} images in {len(scenes)} GeoTIFFs: {args.out}")


if __name__ == "__main__":
    run_entry_point(main)
