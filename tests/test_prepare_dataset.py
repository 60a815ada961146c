"""scripts/prepare_dataset.py on tiny data sets written by the tests."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.classes import ClassTable, read_mask
from ldm.data.manifest import read_manifest
from ldm.util import UserError
from scripts.prepare_dataset import main

ROOT = Path(__file__).resolve().parents[1]
TABLE = {"name": "toy", "classes": [{"id": 0, "name": "field", "colour": [0, 200, 0]},
                                    {"id": 1, "name": "lake", "colour": [0, 0, 200]},
                                    {"id": 2, "name": "road", "colour": [90, 90, 90]}]}


def write_pair(images: Path, masks: Path | None, name: str, seed: int, size: int = 64, ext: str = ".png",
               mask_name: str | None = None, value: int | None = None) -> None:
    """Write a random image and a mask of blocks (or of one value)."""
    rng = np.random.default_rng(seed)
    images.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(images / f"{name}{ext}")
    if masks is not None:
        masks.mkdir(parents=True, exist_ok=True)
        mask = np.kron(rng.integers(0, 3, (2, 2)), np.ones((size // 2, size // 2))).astype(np.uint8)
        mask = mask if value is None else np.full_like(mask, value)
        Image.fromarray(mask).save(masks / f"{mask_name or name}.png")


@pytest.fixture
def table(tmp_path: Path) -> str:
    """File of the class table of the tests."""
    file = tmp_path / "toy.yaml"
    file.write_text(json.dumps(TABLE))
    return str(file)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four scenes of four windows each, in folders images/ and masks/."""
    for scene in range(4):
        for place, (y, x) in enumerate(((0, 0), (0, 48), (48, 0), (48, 48))):  # 64 wide: they overlap
            write_pair(tmp_path / "images", tmp_path / "masks", f"s{scene}_y{y}_x{x}", seed=10 * scene + place)
    return tmp_path


def folders(source: Path, table: str, out: Path, *flags: str) -> list[str]:
    """Arguments for the folder preset."""
    return ["--images", str(source / "images"), "--masks", str(source / "masks"), "--classes", table, "--tile", "32",
            "--out", str(out), *flags]


def read_rows(file: Path) -> list[dict]:
    """All rows of a manifest as dicts."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def absolute_box(path: str) -> tuple[str, int, int]:
    """Scene and absolute corner of a tile, from its file name."""
    scene, y, x, top, left = re.fullmatch(r".*/(\w+?)_y(\d+)_x(\d+)_(\d+)_(\d+)\.png", path).groups()
    return scene, int(y) + int(top), int(x) + int(left)


def test_tiles_hold_the_pixels_of_their_window(source: Path, table: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(folders(source, table, out, "--stride", "16", "--val_fraction", "0"))
    rows = read_manifest(out / "train_set_items.json", out, table=ClassTable.load(out / "classes.yaml"), size_factor=8)
    assert len(rows) == 16 * 9  # starts 0, 16, 32 in 64 pixels
    image = np.asarray(Image.open(source / "images" / "s1_y0_x48.png"))
    mask = np.asarray(Image.open(source / "masks" / "s1_y0_x48.png"))
    assert (np.asarray(Image.open(out / "img_train/s1_y0_x48_0016_0032.png")) == image[16:48, 32:]).all()
    written = read_mask(out / "label_train/s1_y0_x48_0016_0032.png", ClassTable.load(table))
    assert (written == mask[16:48, 32:]).all()
    row = next(row for row in rows if row.mask.stem == "s1_y0_x48_0016_0032")
    assert row.prompt == ClassTable.load(table).prompt(written)
    summary = json.loads((out / "summary.json").read_text())
    assert sum(summary["splits"]["train"]["pixels"]) == 16 * 9 * 32 * 32


def test_last_window_ends_at_the_border(tmp_path: Path, table: str) -> None:
    write_pair(tmp_path / "images", tmp_path / "masks", "a", 0, size=80)
    main(folders(tmp_path, table, tmp_path / "out", "--val_fraction", "0"))
    assert {file.stem[-4:] for file in (tmp_path / "out/img_train").iterdir()} == {"0000", "0032", "0048"}


def test_groups_stay_on_one_side_and_references_never_overlap(source: Path, table: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(folders(source, table, out, "--stride", "16", "--val_fraction", "0.3", "--train_ref", "same_group",
                 "--train_refs_per_mask", "3", "--group_regex", r"^(s\d)"))
    scenes = {}
    for split in ("train", "val"):
        rows = read_rows(out / f"{split}_set_items.json")
        scenes[split] = {absolute_box(row["target"])[0] for row in rows}
        assert len({(row["source"], row["ref_image"]) for row in rows}) == len(rows)
        for row in rows:
            (scene, y, x), (scene2, y2, x2) = absolute_box(row["target"]), absolute_box(row["ref_image"])
            assert scene == scene2
            assert abs(y - y2) >= 32 or abs(x - x2) >= 32
    assert len(scenes["val"]) == 1 and scenes["train"] | scenes["val"] == {"s0", "s1", "s2", "s3"}
    assert not scenes["train"] & scenes["val"]


def test_tile_without_possible_reference_is_left_out_and_counted(tmp_path: Path, table: str) -> None:
    write_pair(tmp_path / "images", tmp_path / "masks", "a", 0, size=32)
    write_pair(tmp_path / "images", tmp_path / "masks", "b", 1, size=64)
    out = tmp_path / "out"
    main(folders(tmp_path, table, out, "--val_fraction", "0", "--train_ref", "same_group"))
    assert {Path(row["target"]).name[0] for row in read_rows(out / "train_set_items.json")} == {"b"}
    assert json.loads((out / "summary.json").read_text())["tiles_without_reference"] == 1


def test_same_seed_same_files(source: Path, table: str, tmp_path: Path) -> None:
    def run(name: str, seed: str) -> dict[str, bytes]:
        out = tmp_path / name
        main(folders(source, table, out, "--test_fraction", "0.25", "--val_fraction", "0.25", "--train_ref", "random",
                     "--pair", "nearest_mix", "random", "--seed", seed))
        return {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}

    first = run("a", "1")
    assert first == run("b", "1")
    assert first != run("c", "2")


def test_nearest_mix_takes_the_reference_with_the_nearest_class_mix(tmp_path: Path, table: str) -> None:
    for split, values in (("train", (0, 1, 2)), ("test", (2, 0))):
        for value in values:
            write_pair(tmp_path / f"img_{split}", tmp_path / f"label_{split}", f"{split}{value}", value, 32,
                       value=value)
    out = tmp_path / "out"
    main(["--preset", "shared", "--root", str(tmp_path), "--classes", table, "--tile", "0", "--out", str(out),
          "--val_fraction", "0", "--pair", "nearest_mix"])
    pairs = {(row["source"], row["ref_image"]) for row in read_rows(out / "inference_items.json")}
    assert pairs == {("label_test/test2.png", "img_train/train2.png"), ("label_test/test0.png", "img_train/train0.png")}


def test_unlabelled_images_alone_make_a_training_set(source: Path, table: str, tmp_path: Path) -> None:
    """No masks at all: every row has an ignored mask, and its reference is another tile of the same image."""
    out = tmp_path / "out"
    main(["--classes", table, "--tile", "32", "--train_ref", "same_group", "--unlabelled_train",
          str(source / "images"), "--out", str(out)])
    rows = read_rows(out / "train_set_items.json")
    assert len(rows) == 64 and {row["prompt"] for row in rows} == {"a satellite image"}
    assert all((np.asarray(Image.open(out / row["source"])) == 255).all() for row in rows)
    assert all(row["target"].split("_y")[0] == row["ref_image"].split("_y")[0] for row in rows)
    assert not (out / "val_set_items.json").exists()
    with pytest.raises(UserError, match="--images and --masks, or for unlabelled images alone"):
        main(["--classes", table, "--out", str(tmp_path / "other")])


def test_unlabelled_images_train_and_serve_as_references(source: Path, table: str, tmp_path: Path) -> None:
    for place in range(2):
        write_pair(tmp_path / "more", None, f"u{place}", 50 + place, ext=".jpg")
    out = tmp_path / "out"
    more = str(tmp_path / "more")
    main(folders(source, table, out, "--unlabelled_train", more, "--ref_dir", more, "--pair", "folder",
                 "--refs_per_mask", "2", "--test_fraction", "0.25", "--val_fraction", "0"))
    rows = [row for row in read_rows(out / "train_set_items.json") if Path(row["target"]).name.startswith("u")]
    assert len(rows) == 8 and {row["prompt"] for row in rows} == {"a satellite image"}
    assert (np.asarray(Image.open(out / rows[0]["source"])) == 255).all()
    painted = read_rows(out / "inference_items.json")
    assert len(painted) == 2 * len(read_rows(out / "test_set_items.json"))
    assert all(row["ref_image"].startswith("ref_img/") and (out / row["ref_image"]).is_file() for row in painted)


def test_mapping_to_another_table_and_max_ignore(tmp_path: Path, table: str) -> None:
    target = {"name": "two", "classes": [{"id": 0, "name": "water", "colour": [0, 0, 255]}],
              "mappings": {"toy": {"field": "ignore", "lake": "water", "road": "ignore"}}}
    (tmp_path / "two.yaml").write_text(json.dumps(target))
    write_pair(tmp_path / "images", tmp_path / "masks", "lake", 0, value=1)
    write_pair(tmp_path / "images", tmp_path / "masks", "road", 1, value=2)
    out = tmp_path / "out"
    main(folders(tmp_path, table, out, "--map_to", str(tmp_path / "two.yaml"), "--val_fraction", "0"))
    rows = read_rows(out / "train_set_items.json")
    assert len(rows) == 4 and {row["prompt"] for row in rows} == {"a satellite image of water"}
    assert (np.asarray(Image.open(out / rows[0]["source"])) == 0).all()


def test_unlabelled_tiles_and_references_with_holes(tmp_path: Path, table: str) -> None:
    """Black without a word about it is named; as no data it leaves out what has more of it than --max_nodata."""
    write_pair(tmp_path / "images", tmp_path / "masks", "labelled", 0, value=1)
    more = tmp_path / "more"
    more.mkdir()
    for name, black in (("whole", 0), ("edge", 1), ("hole", 16)):
        image = np.full((32, 32, 3), 90, np.uint8)
        image[:, :black] = 0
        Image.fromarray(image).save(more / f"{name}.png")
    flags = ["--val_fraction", "0", "--unlabelled_train", str(more), "--ref_dir", str(more), "--pair", "folder",
             "--tile", "32", "--infer_split", "train"]  # fmt: skip

    def prepare(out: str, *further: str) -> tuple[set[str], dict]:
        main(folders(tmp_path, table, tmp_path / out, *flags, *further))
        kept = {path.stem.split("_")[0] for path in (tmp_path / out / "ref_img").iterdir()}
        unlabelled = {path.stem.split("_")[0] for path in (tmp_path / out / "img_train").iterdir()}
        assert unlabelled == kept | {"labelled"}
        return kept, json.loads((tmp_path / out / "summary.json").read_text())

    kept, summary = prepare("unnamed")
    assert kept == {"whole", "edge", "hole"}
    assert any("images without masks are black" in note and "--nodata 0" in note for note in summary["notes"])
    kept, summary = prepare("named", "--nodata", "0")
    assert kept == {"whole", "edge"} and summary["left_out"] == {"unlabelled tiles over --max_nodata": 2}
    assert not any("black" in note for note in summary["notes"])
    assert prepare("all", "--nodata", "0", "--max_nodata", "0.5")[0] == {"whole", "edge", "hole"}
    assert prepare("none", "--nodata", "0", "--max_nodata", "0")[0] == {"whole"}


def test_loveda_layout(tmp_path: Path) -> None:
    for part, domain, value in (("Train", "Rural", 2), ("Val", "Rural", 0), ("Train", "Urban", 1)):
        folder = tmp_path / "LoveDA" / part / domain
        for place in range(2):
            write_pair(folder / "images_png", folder / "masks_png", f"{part}{domain}{place}", place, 32, value=value)
    out = tmp_path / "out"
    main(["--preset", "loveda", "--root", str(tmp_path / "LoveDA"), "--domains", "Rural", "--tile", "0",
          "--out", str(out),
          "--max_ignore", "1", "--pair", "folder", "--ref_dir", str(tmp_path / "LoveDA/Train/Urban/images_png"),
          "--infer_split", "train"])
    table = ClassTable.load("loveda")
    rows = read_manifest(out / "train_set_items.json", out, table=ClassTable.load(out / "classes.yaml"))
    assert [row.prompt for row in rows] == [table.prompt(np.array([[1]]))] * 2  # 2 on disk is id 1, building
    assert (read_mask(rows[0].mask, ClassTable.load(out / "classes.yaml")) == 1).all()  # and is not shifted again
    assert (np.asarray(Image.open(out / "label_val/ValRural0.png")) == 255).all()  # 0 on disk is no data
    assert {row["ref_image"] for row in read_rows(out / "inference_items.json")} <= {
        "ref_img/TrainUrban0.png", "ref_img/TrainUrban1.png"}


def test_gid_layout_with_colour_masks(tmp_path: Path, table: str) -> None:
    for place in range(2):
        write_pair(tmp_path / "GID/image_RGB", None, f"GF2_{place}", place, ext=".tif")
        colours = np.full((64, 64, 3), (0, 0, 200), np.uint8)
        (tmp_path / "GID/label_15classes").mkdir(exist_ok=True)
        Image.fromarray(colours).save(tmp_path / f"GID/label_15classes/GF2_{place}_label.tif")
    out = tmp_path / "out"
    main(["--preset", "gid", "--root", str(tmp_path / "GID"), "--classes", table, "--tile", "32", "--out", str(out)])
    rows = read_rows(out / "train_set_items.json") + read_rows(out / "val_set_items.json")
    assert len(rows) == 8 and all((np.asarray(Image.open(out / row["source"])) == 1).all() for row in rows)


def test_bad_input_is_one_error_with_all_files_and_nothing_stays(source: Path, table: str, tmp_path: Path) -> None:
    Image.new("L", (60, 64)).save(source / "masks/s0_y0_x0.png")
    Image.new("L", (64, 64), 77).save(source / "masks/s1_y0_x0.png")
    (source / "images/s3_y0_x0.png").write_bytes(b"no image")
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, str(ROOT / "scripts/prepare_dataset.py"), *folders(source, table, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error:"):]
    for text in ("3 problems", "s0_y0_x0.png: 60x64", "s1_y0_x0.png: ids 77", "s3_y0_x0.png: not readable"):
        assert text in error
    (source / "masks/s2_y0_x0.png").unlink()
    (source / "masks/stray.png").write_bytes((source / "masks/s2_y0_x48.png").read_bytes())
    with pytest.raises(UserError, match=r"(?s)2 problems.*s2_y0_x0.png: no mask.*stray.png: no image"):
        main(folders(source, table, tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before


def test_overwrite_only_replaces_own_output(source: Path, table: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(folders(source, table, out, "--stride", "16"))
    with pytest.raises(FileExistsError, match="not empty"):
        main(folders(source, table, out))
    main(folders(source, table, out, "--overwrite"))
    assert not (out / "img_train/s1_y0_x0_0016_0016.png").exists()
    with pytest.raises(FileExistsError, match="leaves it alone"):
        main(folders(source, table, source / "images", "--overwrite"))
    assert len(list((source / "images").iterdir())) == 16


@pytest.mark.parametrize(("flags", "text"), [
    (["--pair", "folder"], "--ref_dir"),
    (["--group_regex", "("], "--group_regex"),
    (["--train_refs_per_mask", "2"], "--train_ref"),
    (["--tile", "0", "--stride", "8"], "--stride"),
    (["--tile", "512"], "16 images are smaller than --tile 512.*--tile 64 or less.*--pad"),
    (["--pair", "random"], "no test masks"),
])
def test_contradicting_flags(source: Path, table: str, tmp_path: Path, flags: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        main(folders(source, table, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


def test_merge_rewrites_paths_below_one_root(source: Path, table: str, tmp_path: Path) -> None:
    out = tmp_path / "all"
    for name, seed in (("one", "1"), ("two", "2")):
        main(folders(source, table, out / name, "--train_ref", "random", "--seed", seed))
    arguments = ["--merge", str(out / "one"), str(out / "two"), "--out", str(out)]
    main(arguments)
    rows = read_manifest(out / "train_set_items.json", out, need=("image", "reference", "prompt"),
                         table=ClassTable.load(out / "classes.yaml"))
    parts = [read_rows(out / name / "train_set_items.json") for name in ("one", "two")]
    assert len(rows) == len(parts[0]) + len(parts[1])
    assert rows[0].mask_name == "one/" + parts[0][0]["source"] and rows[-1].mask_name.startswith("two/")
    assert json.loads((out / "summary.json").read_text())["splits"]["train"]["images"] == 24
    with pytest.raises(FileExistsError):
        main(arguments)
    heavy = [{**row, "weight": 3} for row in parts[1]]  # written by the user
    (out / "two/train_set_items.json").write_text("".join(json.dumps(row) + "\n" for row in heavy))
    main([*arguments, "--overwrite"])
    again = read_manifest(out / "train_set_items.json", out)
    assert [row.weight for row in again] == [1] * len(parts[0]) + [3] * len(heavy)


def test_folders_of_the_pixel_space_generators(tmp_path: Path, table: str):
    for split in ("train", "test"):
        for place in range(2):
            name = f"{split}{place}"
            write_pair(tmp_path / f"a/{split}/images", tmp_path / f"a/{split}/masks", name, place, size=32)
            write_pair(tmp_path / f"b/{split}", tmp_path / f"c/all/{split}", name, place, size=32, ext=".jpg")
    write_pair(tmp_path / "unused", tmp_path / "c/all/val", "v", 0)  # masks to sample from, without images
    flags = ["--classes", table, "--tile", "0", "--val_fraction", "0"]
    main(["--preset", "images_masks", "--root", str(tmp_path / "a"), "--out", str(tmp_path / "one"), *flags])
    pair = ["--preset", "data_mask", "--images", str(tmp_path / "b"), "--masks", str(tmp_path / "c")]
    main([*pair, "--out", str(tmp_path / "two"), *flags])
    for out in ("one", "two"):
        for split in ("train", "test"):
            rows = read_rows(tmp_path / out / f"{split}_set_items.json")
            assert [row["source"] for row in rows] == [f"label_{split}/{split}{place}.png" for place in range(2)]
            original = tmp_path / f"c/all/{split}/{split}1.png"
            assert (tmp_path / out / rows[1]["source"]).is_file()
            written = read_mask(tmp_path / out / rows[1]["source"], ClassTable.load(TABLE))
            assert (written == np.asarray(Image.open(original))).all()
    mask = tmp_path / "c/all/train/train0.png"
    Image.open(mask).save(mask.with_suffix(".jpg"), quality=100)
    mask.unlink()
    with pytest.raises(UserError, match="a JPEG mask. JPEG changes pixel values"):
        main([*pair, "--out", str(tmp_path / "three"), *flags])
    with pytest.raises(UserError, match="neither train nor val nor test"):
        main(["--preset", "images_masks", "--root", str(tmp_path / "b"), "--out", str(tmp_path / "four"), *flags])
