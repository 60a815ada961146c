"""Buildings as instances: COCO annotations, instance masks, outlines, YOLO label lines and F1 at an IoU.

In memory an instance is a run-length mask of pycocotools, which holds parts, holes and overlaps without loss. On disk:

* class mask: the building class wherever there is a building (`read_mask`), instances are not told apart;
* instance layers: 16-bit PNGs, 0 = none, k = k-th instance of the image, 65535 = crowd. Instances that touch have
  different numbers; one that overlaps an earlier one goes to a further layer, so nothing is cut off;
* COCO: outlines along pixel edges, which pycocotools rasterises to the same pixels again. COCO polygons cannot have
  holes (their union is taken), so an instance with holes is written as compressed RLE;
* YOLO: one closed line an instance. Its further parts and its holes are joined to it by bridges of no width.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.classes import ClassTable
from ldm.util import UserError

CROWD = 65535  # value of crowd regions in instance layers


@dataclass(frozen=True)
class Instance:
    """One building.

    Attributes:
        rle: compressed run-length mask, {"size": [H, W], "counts": bytes}.
        is_crowd: a region of buildings that were not drawn one by one.
        score: confidence of a prediction, 1 for truth.
    """

    rle: dict[str, Any]
    is_crowd: bool = False
    score: float = 1.0


@dataclass
class Scene:
    """An image's buildings, in the order of their annotations; possibly none.

    Attributes:
        file_name: name of the image.
        size: (height, width) in pixels.
        instances: the buildings.
    """

    file_name: str
    size: tuple[int, int]
    instances: list[Instance] = field(default_factory=list)


def find_class(table: ClassTable, name: str, flag: str) -> int:
    """Id of a class of a table by its name, or 255 for `ignore`; UserError if there is no such class."""
    if name == "ignore":
        return table.ignore_index
    index = table.find(name)
    if index is None:
        raise UserError(f"{flag} {name}: not in class table {table.name}. Expected one of {', '.join(table.names)}.")
    return index


def repeated_stems(files: Iterable[str | Path]) -> list[str]:
    """Stems that more than one of the files has, sorted."""
    return sorted(stem for stem, count in Counter(Path(file).stem for file in files).items() if count > 1)


def coco_masks() -> Any:
    """pycocotools.mask; UserError with what to install if it is missing."""
    try:
        import pycocotools.mask as masks
    except ImportError as error:
        raise UserError(f"pycocotools cannot be imported ({error}). Expected the packages of requirements/seg.txt. "
                        "Install them.") from error
    return masks


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Run-length mask of an array (H, W) that is not 0 inside."""
    return coco_masks().encode(np.asfortranarray(mask, dtype=np.uint8))


def decode(rle: Mapping[str, Any]) -> np.ndarray:
    """Array (H, W) bool of a run-length mask."""
    return coco_masks().decode(rle).astype(bool)


def read_coco(path: str | Path, categories: Sequence[str] = (), truth: str | Path | None = None,
              crowds_are_objects: bool = False) -> dict[str, Scene]:
    """Read annotations: polygons of any number of parts, RLE (compressed or not), crowds, images without buildings.

    Args:
        path: COCO file, or a list of results ({image_id, category_id, segmentation, score}).
        categories: names of the categories that are buildings; may be left out if there is one only.
        truth: COCO file that the image and category ids of a list of results are from.
        crowds_are_objects: take regions with iscrowd 1 for single buildings; some tools set it on every RLE.

    Returns:
        file name -> scene, in the order of the file's images; folders of names are parted by `/`.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: listing every annotation that cannot be read.
    """
    coco_masks()  # one message if it is missing, not one an annotation
    content = read_json(path)
    if isinstance(content, list):
        if truth is None:
            raise UserError(f"{path}: a list of results. Expected a COCO file with images and categories.")
        content = {**read_json(truth), "annotations": content}
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UserError(f"{path}: not a COCO file. Expected lists under images, annotations and categories.")
    wanted = choose_categories(content["categories"], categories, path)
    try:
        # Names that Windows wrote have backslashes, which no other system takes for folders.
        scenes = {one["id"]: Scene(str(one["file_name"]).replace("\\", "/"), (int(one["height"]), int(one["width"])))
                  for one in content["images"]}  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: an image without {error}. Expected id, file_name, height and width.") from error
    problems = []
    for place, annotation in enumerate(content["annotations"]):
        try:
            if annotation["category_id"] in wanted:
                scene = scenes.get(annotation["image_id"])
                if scene is None:
                    raise ValueError(f"image_id {annotation['image_id']} is not in images")
                rle = read_segmentation(annotation["segmentation"], scene.size)
                is_crowd = bool(annotation.get("iscrowd", 0)) and not crowds_are_objects
                scene.instances.append(Instance(rle, is_crowd, float(annotation.get("score", 1.0))))
        except (KeyError, TypeError, ValueError) as error:
            name = annotation.get("id", "?") if isinstance(annotation, dict) else "?"
            what = f"no key {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"annotation {place} (id {name}): {what}")
    by_name = {scene.file_name: scene for scene in scenes.values()}
    if len(by_name) < len(content["images"]):
        problems.append("images: ids or file names are used twice")
    if problems:
        raise UserError(f"{path}: {len(problems)} problems: {'; '.join(problems[:10])}. Correct the file.")
    return by_name


def read_json(path: str | Path) -> Any:
    """Content of a JSON file; FileNotFoundError or UserError naming it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"annotations not found: {path}. Check the path.")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # with or without the mark of Windows
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Expected COCO annotations.") from error


def choose_categories(known: Sequence[Mapping[str, Any]], names: Sequence[str], path: str | Path) -> set[int]:
    """Ids of the named categories, of the only one if none is named; UserError for unknown or missing names."""
    ids = {str(one["name"]): one["id"] for one in known}
    if (not names and len(ids) != 1) or not set(names) <= set(ids):
        raise UserError(f"{path}: categories {', '.join(sorted(ids))}; wanted: {', '.join(names) or 'not given'}. "
                        "Expected names from the file. Choose those of buildings with --categories.")
    return {ids[name] for name in names or ids}


def read_segmentation(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Run-length mask of a COCO segmentation of an image of a size (height, width); ValueError if it is malformed."""
    masks = coco_masks()
    if isinstance(segmentation, list):
        if segmentation and not isinstance(segmentation[0], list):
            segmentation = [segmentation]  # some exporters leave out the list around a single part
        if not segmentation or any(len(part) < 6 or len(part) % 2 for part in segmentation):
            raise ValueError("no outline: polygons need three or more points each, as x, y, x, y, ...")
        parts = [np.asarray(part, np.float64).tolist() for part in segmentation]
        return masks.merge(masks.frPyObjects(parts, *size))
    if tuple(segmentation["size"]) != tuple(size):
        raise ValueError(f"RLE of size {segmentation['size']}, image {list(size)}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if sum(counts) != size[0] * size[1] or min(counts) < 0:
            raise ValueError(f"RLE counts {sum(counts)} pixels, image {size[0] * size[1]}")
        return masks.frPyObjects({"size": list(size), "counts": counts}, *size)
    rle = {"size": list(size), "counts": counts.encode() if isinstance(counts, str) else counts}
    decode(rle)  # a damaged string is noticed here
    return rle


def to_layers(scene: Scene) -> list[np.ndarray]:
    """Instance layers of a scene.

    Returns:
        One or more arrays (H, W) uint16: 0, the number of the instance from 1, or 65535 for crowds.
    Raises:
        UserError: for more instances than 16 bits can number.
    """
    if len(scene.instances) >= CROWD:
        raise UserError(f"{scene.file_name}: {len(scene.instances)} instances. Expected at most {CROWD - 1}. Cut it.")
    layers = [np.zeros(scene.size, np.uint16)]
    for number, instance in enumerate(scene.instances, start=1):
        mask, value = decode(instance.rle), CROWD if instance.is_crowd else number
        layer = next((one for one in layers if not one[mask].any()), None)
        if layer is None:
            layers.append(layer := np.zeros(scene.size, np.uint16))
        layer[mask] = value
    return layers


def from_layers(layers: Sequence[np.ndarray], inside: np.ndarray | None = None) -> list[Instance]:
    """Instances of layers, in the order of their numbers, all crowds as one at the end.

    Args:
        layers: arrays (H, W) integer as of to_layers.
        inside: (H, W) bool, where buildings may be; None = everywhere.
    """
    parts: dict[int, np.ndarray] = {}
    for layer in layers:
        layer = layer if inside is None else np.where(inside, layer, 0)
        for value in np.unique(layer[layer > 0]):
            mask = layer == value
            parts[int(value)] = parts[int(value)] | mask if value in parts else mask
    return [Instance(encode(parts[value]), value == CROWD) for value in sorted(parts)]


def find_components(mask: np.ndarray, min_area: int = 1) -> list[Instance]:
    """Connected regions of a mask (H, W) bool, pixels touching at corners included, of at least min_area pixels."""
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(np.ascontiguousarray(mask, np.uint8), connectivity=8)
    return [Instance(encode(labels == label)) for label in range(1, count)
            if stats[label, cv2.CC_STAT_AREA] >= min_area]  # fmt: skip


def trace_rings(mask: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Closed lines around the regions of a mask, along the edges of its pixels.

    At twice the size, the pixel centres that OpenCV runs through lie on either side of each edge of the original
    pixels, and halving (rounded up) puts both on it. So the lines enclose exactly the pixels of the mask.

    Args:
        mask: (H, W) bool.

    Returns:
        Outer lines and holes: each (N, 2) int, x 0..W and y 0..H, first point not repeated; holes run the other way.
    """
    import cv2

    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return [], []
    start = columns[0], rows[0]
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    twice = np.kron(mask.astype(np.uint8), np.ones((2, 2), np.uint8))
    lines, levels = cv2.findContours(twice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    outer: list[np.ndarray] = []
    holes: list[np.ndarray] = []
    for line, (_, _, _, parent) in zip(lines, levels[0], strict=True):
        points = (line[:, 0] + 1) // 2
        points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
        step, back = np.roll(points, -1, axis=0) - points, points - np.roll(points, 1, axis=0)
        corners = points[step[:, 0] * back[:, 1] != step[:, 1] * back[:, 0]]
        (outer if parent < 0 else holes).append(corners + start)
    return outer, holes


def to_coco(scenes: Sequence[Scene], category: str = "building") -> dict[str, Any]:
    """COCO content of scenes: polygons along pixel edges, compressed RLE for instances with holes and for crowds.

    Instances without any pixel are left out.
    """
    masks = coco_masks()
    images, annotations = [], []
    for image_id, scene in enumerate(scenes, start=1):
        height, width = scene.size
        images.append({"id": image_id, "file_name": scene.file_name, "height": height, "width": width})
        for instance in scene.instances:
            outer, holes = trace_rings(decode(instance.rle))
            if not outer:
                continue
            segmentation: Any = [ring.ravel().tolist() for ring in outer]
            if holes or instance.is_crowd:
                segmentation = {"size": [height, width], "counts": instance.rle["counts"].decode()}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": int(instance.is_crowd),
                 "area": int(masks.area(instance.rle)), "bbox": masks.toBbox(instance.rle).tolist(),
                 "segmentation": segmentation} | ({"score": instance.score} if instance.score != 1 else {})
            )  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": category}]}


def join_rings(rings: Sequence[np.ndarray]) -> np.ndarray:
    """One closed line through several: each is entered and left again over the shortest bridge to those before.

    A bridge is walked in both directions and encloses nothing. (N, 2) arrays -> (M, 2).
    """
    joined = rings[0]
    for ring in rings[1:]:
        distance = ((joined[:, None] - ring[None]) ** 2).sum(-1)
        here, there = np.unravel_index(distance.argmin(), distance.shape)
        turned = np.roll(ring, -there, axis=0)
        joined = np.concatenate([joined[: here + 1], turned, turned[:1], joined[here:]])
    return joined


def yolo_lines(scene: Scene) -> list[str]:
    """Lines `0 x y x y ...` of a YOLO-seg label file, coordinates as shares of width and height; no crowds."""
    height, width = scene.size
    lines = []
    for instance in scene.instances:
        outer, holes = trace_rings(decode(instance.rle))
        if outer and not instance.is_crowd:
            points = join_rings([*outer, *holes]) / (width, height)
            lines.append(" ".join(["0", *(f"{value:.6f}" for value in points.ravel())]))
    return lines


def match_instances(truth: Scene, predicted: Scene, threshold: float = 0.5) -> tuple[int, int, int]:
    """Match predictions to the buildings of one image, the surest prediction first.

    Each takes, of the buildings not taken yet, the one with the highest IoU, if that reaches the threshold. One that
    finds none but lies in a crowd region by that share of its area does not count.

    Returns:
        Numbers of true positives, false positives and false negatives.
    """
    crowds = [int(one.is_crowd) for one in truth.instances]
    order = sorted(predicted.instances, key=lambda one: -one.score)
    positives = wrong = 0
    if order and crowds:
        iou = coco_masks().iou([one.rle for one in order], [one.rle for one in truth.instances], crowds)
        is_crowd = np.array(crowds, bool)
        is_free = ~is_crowd
        for row in iou:
            best = int(np.where(is_free, row, -1).argmax())
            if is_free[best] and row[best] >= threshold:
                is_free[best] = False
                positives += 1
            elif not (row[is_crowd] >= threshold).any():
                wrong += 1
    else:
        wrong = len(order)
    return positives, wrong, crowds.count(0) - positives


def key_by_stem(scenes: Mapping[str, Scene], what: str) -> dict[str, Scene]:
    """The scenes by the stems of their file names; UserError if two have one stem."""
    if doubled := repeated_stems(scenes):
        raise UserError(f"{what}: {len(doubled)} stems are used by more than one image ({', '.join(doubled[:3])}). "
                        "Expected the truth's file names in the predictions, or one image a stem. Rename.")  # fmt: skip
    return {Path(name).stem: scene for name, scene in scenes.items()}


def score_instances(truth: Mapping[str, Scene], predicted: Mapping[str, Scene],
                    threshold: float = 0.5) -> dict[str, Any]:
    """F1 over all images of the truth (file name -> scene); images without predictions count as missed.

    Predictions belong to the image of their file name or, if one has no such image, all to that of their stem: made
    from masks they are of a.png, not a.jpg.

    Returns:
        f1, precision, recall in 0..1 (0 where nothing is there to divide by), and the counts they are from.
    Raises:
        UserError: for predictions of images that the truth does not have, or of another size, and for stems used twice.
    """
    if not set(predicted) <= set(truth):
        truth, predicted = key_by_stem(truth, "truth"), key_by_stem(predicted, "predictions")
    wrong = [name for name, scene in predicted.items() if name not in truth or truth[name].size != scene.size]
    if wrong:
        raise UserError(f"predictions: {len(wrong)} images are not in the truth or have another size there "
                        f"({', '.join(wrong[:3])}). Expected predictions for the images of the truth.")  # fmt: skip
    counts = [match_instances(scene, predicted.get(name, Scene(name, scene.size)), threshold)
              for name, scene in truth.items()]  # fmt: skip
    positives, false, missed = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    return {
        "f1": share(2 * positives, 2 * positives + false + missed), "precision": share(positives, positives + false),
        "recall": share(positives, positives + missed), "iou": threshold, "true_positives": positives,
        "false_positives": false, "false_negatives": missed, "images": len(truth),
    }  # fmt: skip
