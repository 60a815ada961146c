r"""Building annotations to masks and back, label files of synthetic pairs for detectors, and F1 of predicted buildings.

    python scripts/convert_buildings.py coco_to_masks --coco train.json --out data/buildings
    python scripts/convert_buildings.py export --run outputs/mine --instances data/buildings/instances --out data/yolo
    python scripts/convert_buildings.py score --truth val.json --predicted results.json

`coco_to_masks` writes masks/ (class ids), instances/0/, 1/, ... and classes.yaml; see
post_processing/evaluation/buildings.py.
`export` writes annotations.json (COCO), and for pairs of images and masks images/, labels/ and data.yaml (YOLO-seg).
`score` takes predictions and truth of the same file names, or of the same stems.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.data.classes import ClassTable, read_mask, read_raw_mask  # noqa: E402
from ldm.data.images import image_size  # noqa: E402
from ldm.data.manifest import read_manifest  # noqa: E402
from ldm.files import link_or_copy  # noqa: E402
from ldm.util import UserError, run_entry_point  # noqa: E402
from post_processing.evaluation.buildings import (  # noqa: E402
    Scene,
    find_class,
    find_components,
    from_layers,
    read_coco,
    repeated_stems,
    score_instances,
    to_coco,
    to_layers,
    yolo_lines,
)


def build_parser() -> argparse.ArgumentParser:
    """Command line of convert_buildings.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    classes = argparse.ArgumentParser(add_help=False)
    classes.add_argument("--classes", help="class table of the masks (default: export --run: that of the run; else "
                         "oam_building)")
    classes.add_argument("--building", default="building", help="its class of buildings (default: %(default)s)")
    classes.add_argument("--out", type=Path, required=True, help="output folder; must not exist or be empty")
    coco = argparse.ArgumentParser(add_help=False)
    coco.add_argument("--categories", nargs="+", default=[], help="categories that are buildings (default: the only "
                      "one)")
    coco.add_argument("--crowds_are_objects", action="store_true", help="take regions with iscrowd 1 for single "
                      "buildings: some tools, such as CVAT, set it on every RLE")

    masks = commands.add_parser("coco_to_masks", parents=[common, classes, coco], help="COCO annotations to masks")
    masks.add_argument("--coco", type=Path, required=True, help="COCO file")
    masks.add_argument("--background", default="background", help="class of all other pixels, or `ignore` (default: "
                       "%(default)s)")
    masks.set_defaults(run_command=coco_to_masks)

    export = commands.add_parser("export", parents=[common, classes], help="masks or pairs to COCO and YOLO-seg")
    export.set_defaults(run_command=export_pairs)
    add = export.add_argument
    add("--run", dest="run_folder", type=Path, help="--outdir of inference.py")
    add("--txt_file", type=Path, help="manifest of pairs (source, target), as filtered and resampled")
    add("--masks", type=Path, help="folder of masks without images: COCO only")
    add("--data_root", type=Path, help="where the paths of the run's masks or of the manifest start (default: as noted "
        "in the run; the folder of the manifest)")
    add("--instances", type=Path, help="instances/ of coco_to_masks, by stems of masks: keeps touching buildings apart "
        "(default: connected regions of the masks)")
    add("--min_area", type=int, default=1, help="smallest connected region in pixels (default: %(default)s)")
    add("--val_fraction", type=float, default=0.0, help="share of the masks whose pairs data.yaml validates on "
        "(default: 0 = on the images that it trains on)")
    add("--seed", type=int, default=0, help="seed of the draw of those masks (default: %(default)s)")

    score = commands.add_parser("score", parents=[common, coco], help="F1 of predicted instances")
    score.add_argument("--truth", type=Path, required=True, help="COCO file")
    score.add_argument("--predicted", type=Path, required=True, help="COCO file, or a COCO list of results")
    score.add_argument("--iou", type=float, default=0.5, help="IoU from which a prediction is right (default: "
                       "%(default)s)")
    score.set_defaults(run_command=score_predictions)
    return parser


def prepare_out(out: Path) -> None:
    """Make the output folder; FileExistsError if something is in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out}: exists and is not empty. Choose a new folder.")
    out.mkdir(parents=True, exist_ok=True)


def check_stems(names: Sequence[str]) -> None:
    """UserError if two files would be written under one name."""
    if doubled := repeated_stems(names):
        raise UserError(f"{len(doubled)} stems are used by more than one image ({', '.join(doubled[:3])}). Expected "
                        "one each. Rename the files.")  # fmt: skip


def coco_to_masks(args: argparse.Namespace) -> dict[str, Any]:
    """Write class masks and instance layers of a COCO file; returns the counts."""
    table = ClassTable.load(args.classes or "oam_building").without_source_ids()
    building = find_class(table, args.building, "--building")
    background = find_class(table, args.background, "--background")
    scenes = list(read_coco(args.coco, args.categories,
                            crowds_are_objects=args.crowds_are_objects).values())  # fmt: skip
    check_stems([scene.file_name for scene in scenes])
    prepare_out(args.out)
    (args.out / "masks").mkdir()
    summary = count_instances(scenes) | {"without_a_pixel": 0, "layers": 0}
    for scene in tqdm(scenes, disable=None):
        name = f"{Path(scene.file_name).stem}.png"
        layers = to_layers(scene)
        mask = np.where(np.any(layers, axis=0), building, background).astype(np.uint8)
        Image.fromarray(mask).save(args.out / "masks" / name)
        for number, layer in enumerate(layers):
            folder = args.out / "instances" / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(layer).save(folder / name)
        summary["layers"] = max(summary["layers"], len(layers))
        drawn = sum(not one.is_crowd for one in from_layers(layers))
        summary["without_a_pixel"] += sum(not one.is_crowd for one in scene.instances) - drawn
    text = yaml.safe_dump(table.to_dict(), sort_keys=False)
    (args.out / "classes.yaml").write_text(text, encoding="utf-8")
    return summary


def collect_pairs(args: argparse.Namespace) -> tuple[list[tuple[Path | None, Path]], ClassTable]:
    """(image, mask) files to export, each once, and the class table of the masks."""
    from post_processing.run_index import read_run

    sources = [flag for flag in ("run_folder", "txt_file", "masks") if getattr(args, flag)]
    if len(sources) != 1:
        raise UserError(f"export: {len(sources)} sources. Expected one of --run, --txt_file and --masks.")
    table = ClassTable.load(args.classes or "oam_building")
    if args.run_folder:
        samples, run = read_run(args.run_folder, args.data_root)
        if not args.classes and run.get("class_table"):
            table = ClassTable.load(run["class_table"])
        pairs = [(sample.image, sample.mask) for sample in samples]
    elif args.txt_file:
        root = args.data_root or args.txt_file.parent
        pairs = [(row.image, row.mask) for row in read_manifest(args.txt_file, root, need=("image",), table=table)]
    elif args.masks.is_dir():
        pairs = [(None, path) for path in sorted(args.masks.glob("*.png"))]
    else:
        raise FileNotFoundError(f"--masks: folder not found: {args.masks}. Check the path.")
    if not pairs:
        raise UserError(f"--masks {args.masks}: no .png files. Expected masks. Check the path.")
    return list(dict.fromkeys(pairs)), table


def read_instance_layers(folder: Path, stem: str) -> list[np.ndarray]:
    """Instance layers of a mask by its stem; FileNotFoundError if there are none."""
    paths = sorted(folder.glob("*/"), key=lambda path: path.name.zfill(9))
    layers = [read_raw_mask(path / f"{stem}.png") for path in paths if (path / f"{stem}.png").is_file()]
    if not layers:
        raise FileNotFoundError(f"--instances: no {stem}.png in {folder}/0. Expected instances/ of coco_to_masks.")
    return layers


def read_scene(image: Path | None, mask: Path, table: ClassTable, args: argparse.Namespace) -> Scene:
    """Buildings of a pair, at the size of its image."""
    from ldm.data.transforms import resize_mask

    values = read_mask(mask, table)
    size = values.shape if image is None else image_size(image)
    inside = resize_mask(values, size) == find_class(table, args.building, "--building")
    if args.instances:
        layers = [resize_mask(layer.astype(np.int32), size) for layer in
                  read_instance_layers(args.instances, mask.stem)]
        found = from_layers(layers, inside)
    else:
        found = find_components(inside, args.min_area)
    return Scene((image or mask).name, size, found)


def export_pairs(args: argparse.Namespace) -> dict[str, Any]:
    """Write annotations.json and, for pairs, images/, labels/ and data.yaml; returns the counts."""
    pairs, table = collect_pairs(args)
    check_stems([(image or mask).name for image, mask in pairs])
    if args.val_fraction and args.masks:
        raise UserError("--val_fraction: masks alone have no data.yaml. Expected --run or --txt_file. Leave it out.")
    is_val = draw_validation([mask.stem for _, mask in pairs], args.val_fraction, args.seed)
    prepare_out(args.out)
    scenes = [read_scene(image, mask, table, args) for image, mask in tqdm(pairs, disable=None)]
    if pairs[0][0] is not None:
        for folder in ("images", "labels"):
            (args.out / folder).mkdir()
        for (image, _), scene in zip(pairs, scenes, strict=True):
            link_or_copy(image, args.out / "images" / image.name)
            text = "".join(f"{line}\n" for line in yolo_lines(scene))  # an empty file: an image without buildings
            (args.out / "labels" / f"{image.stem}.txt").write_text(text, encoding="utf-8")
        write_data_yaml(args.out, [image.name for image, _ in pairs], is_val, args.building)
    (args.out / "annotations.json").write_text(json.dumps(to_coco(scenes, args.building)), encoding="utf-8")
    return count_instances(scenes)


def count_instances(scenes: Sequence[Scene]) -> dict[str, int]:
    """Numbers of images, buildings and crowd regions, which are no single building."""
    crowds = sum(one.is_crowd for scene in scenes for one in scene.instances)
    return {"images": len(scenes), "empty_images": sum(not scene.instances for scene in scenes),
            "instances": sum(len(scene.instances) for scene in scenes) - crowds, "crowd_regions": crowds}  # fmt: skip


def draw_validation(stems: Sequence[str], fraction: float, seed: int) -> list[bool]:
    """Choose the pairs to validate on, by the stems of their masks.

    All samples of a mask are on one side; filtered masks are called as their samples, so `_seed_N` does not count.

    Raises:
        UserError: if a side would be empty, or the fraction is not in [0, 1).
    """
    from post_processing.segmentation.loading import SEED_ENDING

    names = [SEED_ENDING.sub("", stem) for stem in stems]
    order = sorted(set(names))
    count = round(fraction * len(order))
    if not 0 <= fraction < 1 or (fraction and not 0 < count < len(order)):
        raise UserError(f"--val_fraction {fraction}: {count} of {len(order)} masks. Expected 0, or a share that leaves "
                        "masks on both sides. Change it.")  # fmt: skip
    drawn = {order[index] for index in np.random.default_rng(seed).permutation(len(order))[:count]}
    return [name in drawn for name in names]


def write_data_yaml(out: Path, images: Sequence[str], is_val: Sequence[bool], building: str) -> None:
    """Write data.yaml, and train.txt and val.txt if some images are to validate on; else that is done on all."""
    parts = {"train": "images", "val": "images"}
    if any(is_val):
        for part, wanted in (("train", False), ("val", True)):
            parts[part] = f"{part}.txt"
            names = [name for name, drawn in zip(images, is_val, strict=True) if drawn == wanted]
            # ultralytics reads ./ as the folder of the list.
            (out / parts[part]).write_text("".join(f"./images/{name}\n" for name in names), encoding="utf-8")
    content = {"path": str(out.resolve()), **parts, "names": {0: building}}
    (out / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def score_predictions(args: argparse.Namespace) -> dict[str, Any]:
    """F1, precision, recall and counts (see score_instances)."""
    if not 0 < args.iou <= 1:
        raise UserError(f"--iou {args.iou}: expected a number above 0, up to 1.")
    truth = read_coco(args.truth, args.categories, crowds_are_objects=args.crowds_are_objects)
    predicted = read_coco(args.predicted, args.categories, args.truth, args.crowds_are_objects)
    return score_instances(truth, predicted, args.iou)


def main(argv: list[str] | None = None) -> None:
    """Run one command and print what it counted, as JSON."""
    args = build_parser().parse_args(argv)
    print(json.dumps(args.run_command(args), indent=1))


if __name__ == "__main__":
    run_entry_point(main)
