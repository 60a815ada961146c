"""Buildings between COCO, masks and YOLO labels, and F1, on hand-made cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ldm.data.classes import ClassTable, read_mask
from ldm.util import UserError

masks = pytest.importorskip("pycocotools.mask")
cv2 = pytest.importorskip("cv2")

from post_processing.evaluation.buildings import (  # noqa: E402
    Instance,
    Scene,
    decode,
    encode,
    join_rings,
    match_instances,
    read_coco,
    score_instances,
    trace_rings,
    yolo_lines,
)
from scripts.convert_buildings import draw_validation, main  # noqa: E402

SIZE = (40, 60)
REAL = Path(__file__).resolve().parents[2] / "shared/data"  # beside the repository


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def polygon(top: int, left: int, bottom: int, right: int) -> list[int]:
    return [left, top, right, top, right, bottom, left, bottom]


def uncompressed(mask: np.ndarray) -> dict:
    """COCO's run lengths down the columns, starting with zeros, counted here by a plain loop."""
    counts, value = [0], 0
    for pixel in mask.ravel(order="F"):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


RING = box(2, 30, 20, 50) - box(6, 34, 12, 40) - box(14, 44, 16, 46)  # a yard and a light well
ISLAND = RING + box(8, 36, 10, 38)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    compressed = encode(ISLAND)
    segmentations = [
        [polygon(0, 0, 10, 10), polygon(20, 0, 24, 30)],  # two parts
        [polygon(0, 10, 10, 20)],  # touches the first
        [polygon(5, 5, 15, 15)],  # lies over both
        uncompressed(RING),
        {"size": list(SIZE), "counts": compressed["counts"].decode()},  # the same ring and a hut in its yard
    ]
    annotations = [{"id": 90 - i, "image_id": 7, "category_id": 3, "iscrowd": 0, "segmentation": one}
                   for i, one in enumerate(segmentations)]  # fmt: skip
    annotations.append({"id": 1, "image_id": 7, "category_id": 3, "iscrowd": 1,
                        "segmentation": uncompressed(box(30, 0, 40, 60))})  # fmt: skip
    annotations.append({"id": 2, "image_id": 7, "category_id": 5, "segmentation": [polygon(0, 0, 40, 60)]})
    content = {"images": [{"id": 7, "file_name": "a.jpg", "height": 40, "width": 60},
                          {"id": 8, "file_name": "empty.jpg", "height": 40, "width": 60}],
               "annotations": annotations,
               "categories": [{"id": 3, "name": "building"}, {"id": 5, "name": "tile"}]}  # fmt: skip
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return path


EXPECTED = [box(0, 0, 10, 10) + box(20, 0, 24, 30), box(0, 10, 10, 20), box(5, 5, 15, 15), RING, ISLAND,
            box(30, 0, 40, 60)]  # fmt: skip


def test_coco_to_masks_and_back_loses_nothing(coco: Path, tmp_path: Path, capsys):
    main(["coco_to_masks", "--coco", str(coco), "--categories", "building", "--out", str(tmp_path / "m")])
    counts = json.loads(capsys.readouterr().out)
    assert counts == {"images": 2, "empty_images": 1, "instances": 5, "crowd_regions": 1, "without_a_pixel": 0,
                      "layers": 2}  # fmt: skip
    table = ClassTable.load(tmp_path / "m/classes.yaml")
    mask = read_mask(tmp_path / "m/masks/a.png", table)
    assert (mask == np.any(EXPECTED, axis=0)).all()
    assert not read_mask(tmp_path / "m/masks/empty.png", table).any()

    main(["export", "--masks", str(tmp_path / "m/masks"), "--instances", str(tmp_path / "m/instances"), "--out",
          str(tmp_path / "b")])  # fmt: skip
    assert json.loads(capsys.readouterr().out) == {"images": 2, "empty_images": 1, "instances": 5, "crowd_regions": 1}
    content = json.loads((tmp_path / "b/annotations.json").read_text())
    assert [one["file_name"] for one in content["images"]] == ["a.png", "empty.png"]
    scene = read_coco(tmp_path / "b/annotations.json")["a.png"]
    assert [one.is_crowd for one in scene.instances] == [False] * 5 + [True]
    for instance, expected in zip(scene.instances, EXPECTED, strict=True):
        assert (decode(instance.rle) == expected.astype(bool)).all()
    forms = [type(one["segmentation"]).__name__ for one in content["annotations"]]
    assert forms == ["list", "list", "list", "dict", "dict", "dict"]
    assert len(content["annotations"][0]["segmentation"]) == 2
    assert content["annotations"][3]["area"] == RING.sum() and content["annotations"][3]["bbox"] == [30, 2, 20, 18]

    # Predictions of a.png are held against the truth of a.jpg.
    capsys.readouterr()
    main(["score", "--truth", str(coco), "--predicted", str(tmp_path / "b/annotations.json"), "--categories",
          "building"])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert (result["f1"], result["true_positives"], result["images"]) == (1.0, 5, 2)


@pytest.mark.parametrize("name", ["oam_banepa", "oam_kampala"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_instances_of_real_masks_survive_the_round_trip(name: str, split: str, tmp_path: Path):
    """Masks -> COCO -> masks and instances -> COCO; every building is found again, by pycocotools alone."""
    tiles = sorted((REAL / name / f"label_{split}").glob("*.png"))[::4]
    if not tiles:
        pytest.skip(f"no masks in {REAL / name}, which is no part of the repository")
    (tmp_path / "real").mkdir()
    for tile in tiles:
        (tmp_path / "real" / tile.name).symlink_to(tile)
    main(["export", "--masks", str(tmp_path / "real"), "--out", str(tmp_path / "one")])
    main(["coco_to_masks", "--coco", str(tmp_path / "one/annotations.json"), "--out", str(tmp_path / "known")])
    main(["export", "--masks", str(tmp_path / "known/masks"), "--instances", str(tmp_path / "known/instances"),
          "--out", str(tmp_path / "two")])  # fmt: skip
    for tile in tiles:
        again = tmp_path / "known/masks" / tile.name
        assert np.array_equal(*(np.asarray(Image.open(path)) == 1 for path in (tile, again)))
    first, second = (rles_by_name(tmp_path / part / "annotations.json") for part in ("one", "two"))
    assert list(first) == list(second) == [tile.name for tile in tiles] and sum(map(len, first.values())) > 9
    for file, buildings in first.items():
        assert len(second[file]) == len(buildings)
        if buildings:
            iou = masks.iou(buildings, second[file], [0] * len(buildings))
            assert iou.max(axis=1).min() >= 0.99 and len(set(iou.argmax(axis=1))) == len(buildings)


def rles_by_name(path: Path) -> dict[str, list]:
    """File name -> run-length masks, read by pycocotools' own reader."""
    coco = pytest.importorskip("pycocotools.coco").COCO(str(path))
    return {coco.imgs[i]["file_name"]: [coco.annToRLE(one) for one in coco.loadAnns(coco.getAnnIds(i))]
            for i in sorted(coco.imgs)}  # fmt: skip


def test_outlines_enclose_exactly_the_pixels():
    rng = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.8, 1.0):
        mask = np.kron(rng.random((9, 13)) < share, np.ones((3, 2))).astype(bool)
        outer, holes = trace_rings(mask)
        points = join_rings([*outer, *holes]).astype(float)
        area = (points[:, 0] * np.roll(points[:, 1], -1) - points[:, 1] * np.roll(points[:, 0], -1)).sum() / 2
        assert abs(area) == mask.sum()  # holes taken out, nothing between the parts
        if share == 1.0:
            assert sorted(map(tuple, outer[0])) == [(0, 0), (0, 27), (26, 0), (26, 27)] and not holes


def test_damaged_annotations_are_all_named(coco: Path):
    content = json.loads(coco.read_text())
    with pytest.raises(UserError, match="categories building, tile; wanted: not given"):
        read_coco(coco)
    content["annotations"][0]["segmentation"] = [[0, 0, 5, 5]]
    content["annotations"][1]["image_id"] = 99
    content["annotations"][3]["segmentation"]["counts"][0] += 1
    coco.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"3 problems: annotation 0 \(id 90\).*annotation 1 .*99.*annotation 3 "):
        read_coco(coco, ["building"])


def test_synthetic_pairs_become_coco_and_yolo(tmp_path: Path, capsys):
    (tmp_path / "label").mkdir()
    (tmp_path / "run/images").mkdir(parents=True)
    two = box(0, 0, 10, 10) + box(20, 20, 40, 60) - box(24, 30, 30, 40)
    two[35, 50] = 255  # an ignored pixel, as the filter leaves it
    lines = []
    for number, mask in enumerate((two, np.zeros(SIZE, np.uint8))):
        Image.fromarray(mask).save(tmp_path / f"label/{number}.png")
        Image.fromarray(np.full((80, 120, 3), 9, np.uint8)).save(tmp_path / f"run/images/{number}_seed_5.png")
        lines.append(json.dumps({"image": f"images/{number}_seed_5.png", "mask": f"label/{number}.png", "width": 120,
                                 "height": 80}))  # fmt: skip
    (tmp_path / "run/index.jsonl").write_text("\n".join(lines) + "\n")
    run = {"data_root": str(tmp_path), "class_table": ClassTable.load("oam_building").to_dict()}
    (tmp_path / "run/run.json").write_text(json.dumps(run))
    out = tmp_path / "out"
    main(["export", "--run", str(tmp_path / "run"), "--out", str(out)])
    assert json.loads(capsys.readouterr().out) == {"images": 2, "empty_images": 1, "instances": 2, "crowd_regions": 0}
    assert (out / "labels/1_seed_5.txt").read_text() == "" and (out / "images/1_seed_5.png").is_file()
    painted = np.zeros((80, 120), np.uint8)
    rows = (out / "labels/0_seed_5.txt").read_text().splitlines()
    for row in rows:
        points = np.array(row.split()[1:], float).reshape(-1, 2) * (120, 80)
        assert row.startswith("0 ") and len(points) > 2
        painted |= masks.decode(masks.frPyObjects([points.ravel().tolist()], 80, 120))[..., 0]
    expected = np.kron(two == 1, np.ones((2, 2), bool))
    assert len(rows) == 2 and (painted.astype(bool) == expected).mean() > 0.99  # the bridges are drawn one pixel wide
    scenes = read_coco(out / "annotations.json")
    assert (np.any([decode(one.rle) for one in scenes["0_seed_5.png"].instances], axis=0) == expected).all()
    with pytest.raises(FileExistsError, match="not empty"):
        main(["export", "--run", str(tmp_path / "run"), "--out", str(out)])

    data = yaml.safe_load((out / "data.yaml").read_text())
    assert data["train"] == data["val"] == "images"  # as the help says
    main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "split"), "--val_fraction", "0.5"])
    data = yaml.safe_load((tmp_path / "split/data.yaml").read_text())
    lists = [(tmp_path / "split" / data[part]).read_text().splitlines() for part in ("train", "val")]
    assert sorted(sum(lists, [])) == ["./images/0_seed_5.png", "./images/1_seed_5.png"] and all(map(len, lists))
    assert all((tmp_path / "split" / line).is_file() for line in sum(lists, []))
    with pytest.raises(UserError, match="--val_fraction: masks alone"):
        main(["export", "--masks", str(tmp_path / "label"), "--out", str(tmp_path / "no"), "--val_fraction", "0.5"])


def test_samples_of_a_mask_are_all_on_one_side():
    # As in a run, and as filtered masks are called.
    for stems in ([f"m{i % 10}" for i in range(40)], [f"m{i % 10}_seed_{i}" for i in range(40)]):
        drawn = [draw_validation(stems, 0.3, seed) for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2] and sum(drawn[0]) == 12
        assert all(len({drawn[0][i] for i in range(m, 40, 10)}) == 1 for m in range(10))
    assert not any(draw_validation(["a", "b"], 0.0, 0))
    for fraction in (0.1, 0.9, -0.5, 1.5):
        with pytest.raises(UserError, match="of 2 masks. Expected 0, or a share"):
            draw_validation(["a", "b"], fraction, 0)


def test_yolo_line_of_a_square():
    assert yolo_lines(Scene("a", SIZE, [Instance(encode(box(10, 15, 20, 30)))])) == [
        "0 0.250000 0.250000 0.250000 0.500000 0.500000 0.500000 0.500000 0.250000"]  # fmt: skip


def scene(*instances: tuple) -> Scene:
    return Scene("a", SIZE, [Instance(encode(mask), *rest) for mask, *rest in instances])


def test_f1_matches_greedily_by_score():
    truth = scene((box(0, 0, 10, 10),), (box(0, 20, 10, 30),), (box(30, 0, 40, 10),))
    exact, shifted, off = box(0, 0, 10, 10), box(0, 2, 10, 12), box(0, 4, 10, 14)  # IoU 1, 2/3, 3/7
    assert match_instances(truth, scene((off, False, 0.9))) == (0, 1, 3)
    assert match_instances(truth, scene((shifted, False, 0.9))) == (1, 0, 2)
    # the surer, worse box takes the building, and the exact one has none left
    assert match_instances(truth, scene((exact, False, 0.3), (shifted, False, 0.9))) == (1, 1, 2)
    assert match_instances(truth, scene()) == (0, 0, 3)
    assert match_instances(scene(), truth) == (0, 3, 0)
    # half of the pixels: the limit itself counts
    assert match_instances(scene((box(0, 0, 10, 20),)), scene((exact,))) == (1, 0, 0)
    crowd = scene((box(0, 0, 10, 10),), (box(20, 0, 40, 60), True))
    found = scene((box(22, 3, 30, 9),), (box(25, 20, 35, 30),), (box(0, 40, 10, 50),))
    assert match_instances(crowd, found) == (0, 1, 1)


def test_f1_of_a_list_of_results(coco: Path, tmp_path: Path, capsys):
    results = [{"image_id": 7, "category_id": 3, "segmentation": uncompressed(RING), "score": 0.9},
               {"image_id": 8, "category_id": 3, "segmentation": [polygon(0, 0, 9, 9)], "score": 0.8}]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(results))
    main(["score", "--truth", str(coco), "--predicted", str(tmp_path / "results.json"), "--categories", "building"])
    result = json.loads(capsys.readouterr().out)
    counts = [result[key] for key in ("true_positives", "false_positives", "false_negatives", "images")]
    assert counts == [1, 1, 4, 2] and result["f1"] == pytest.approx(2 / 7)
    with pytest.raises(UserError, match="not in the truth"):
        score_instances({}, {"a": scene()})
    with pytest.raises(UserError, match="^truth: 1 stems are used by more than one image .a.. Expected"):
        score_instances({"x/a.jpg": scene(), "y/a.jpg": scene()}, {"a.png": scene()})
    with pytest.raises(UserError, match="^predictions: 1 stems"):
        score_instances({"a.jpg": scene()}, {"a.png": scene(), "a.tif": scene()})
    nested = {"x/a.jpg": scene(), "y/a.jpg": scene()}
    assert score_instances(nested, nested)["images"] == 2  # the same file names need no stems


def test_files_of_other_tools(coco: Path, tmp_path: Path, capsys):
    """iscrowd on single buildings (CVAT), the mark and the backslashes of Windows, annotations of no image."""
    flag = ["--categories", "building", "--crowds_are_objects"]
    main(["coco_to_masks", "--coco", str(coco), "--out", str(tmp_path / "m"), *flag])
    assert json.loads(capsys.readouterr().out)["instances"] == 6
    main(["export", "--masks", str(tmp_path / "m/masks"), "--instances", str(tmp_path / "m/instances"), "--out",
          str(tmp_path / "b")])  # fmt: skip
    assert json.loads(capsys.readouterr().out)["crowd_regions"] == 0
    assert len(yolo_lines(read_coco(tmp_path / "b/annotations.json")["a.png"])) == 6
    for given, count in ((flag, 6), (flag[:2], 5)):
        main(["score", "--truth", str(coco), "--predicted", str(coco), *given])
        assert json.loads(capsys.readouterr().out)["true_positives"] == count

    content = json.loads(coco.read_text())
    content["images"] = [{**one, "file_name": name} for one, name in zip(
        content["images"], ("train\\a.png", "val\\b.png"), strict=True)]  # fmt: skip
    marked = tmp_path / "marked.json"
    marked.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert list(read_coco(marked, ["building"])) == ["train/a.png", "val/b.png"]
    main(["coco_to_masks", "--coco", str(marked), "--categories", "building", "--out", str(tmp_path / "w")])
    assert sorted(path.name for path in (tmp_path / "w/masks").iterdir()) == ["a.png", "b.png"]

    content["annotations"] = [{**content["annotations"][0], "image_id": 9}, {"id": 4, "category_id": 3, "image_id": 7}]
    marked.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"id 90\): image_id 9 is not in images; .*id 4\): no key 'segmentation'"):
        read_coco(marked, ["building"])
    marked.write_text(json.dumps({**content, "annotations": None}))
    with pytest.raises(UserError, match="Expected lists under images, annotations and categories"):
        read_coco(marked, ["building"])
