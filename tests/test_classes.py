"""Class tables and the exact reading of masks."""
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ldm.data.classes import ClassTable, read_mask
from ldm.data.tables import TABLE_DIR
from ldm.util import UserError

IDS = np.array([[0, 1, 2, 3], [4, 4, 255, 0]], np.uint8)
CLASSES = [{"id": 0, "name": "a", "colour": [1, 2, 3]}, {"id": 1, "name": "b", "colour": [4, 5, 6]}]


def make_table(**changes):
    return ClassTable.load({"name": "test", "classes": CLASSES, **changes})


@pytest.mark.parametrize("name", sorted(file.stem for file in TABLE_DIR.glob("*.yaml")))
def test_every_shipped_table_loads_and_survives_to_dict(name):
    table = ClassTable.load(name)
    assert table.name == name
    assert ClassTable.load(table.to_dict()) == table


def test_counts_of_the_published_sets():
    counts = {name: ClassTable.load(name).num_classes for name in ("loveda", "gid24", "fusu", "potsdam", "mini")}
    assert counts == {"loveda": 7, "gid24": 24, "fusu": 17, "potsdam": 6, "mini": 5}


def test_upstream_prompt_of_the_gid_demo_mask():
    mask = np.array([[20, 17, 255], [14, 2, 2]])
    prompt = "a satellite image of irrigated field fish pond rural residential road"
    assert ClassTable.load("gid24").prompt(mask) == prompt


def test_prompt_joins_in_ascending_id_and_skips_ignore():
    table = ClassTable.load("dubai")
    assert table.prompt(np.array([[4, 255, 1]])) == "a satellite image of land, water"
    assert table.prompt(np.full((2, 2), 255)) == "a satellite image"


@pytest.mark.parametrize(("changes", "message"), [
    ({"classes": [CLASSES[0], {**CLASSES[1], "id": 2}]}, "without gaps"),
    ({"classes": [CLASSES[0], {**CLASSES[1], "id": 0}]}, "without gaps"),
    ({"classes": [CLASSES[0], {**CLASSES[1], "name": "a"}]}, "name used by more than one class: a"),
    ({"classes": [CLASSES[0], {**CLASSES[1], "colour": [1, 2, 3]}]}, "colour used by more than one"),
    ({"classes": [CLASSES[0], {**CLASSES[1], "colour": [8, 514, 230]}]}, "514"),
    ({"classes": [CLASSES[0], {**CLASSES[1], "colour": [8, 5]}]}, "three values"),
    ({"classes": [CLASSES[0], {**CLASSES[1], "colour": [0, 0, 0]}]}, "ignore_colour"),
    ({"classes": [{"id": 0, "name": "a"}]}, "no colour"),
    ({"clases": []}, "unknown keys clases"),
    ({"ignore_index": 0}, "source_ids"),
    ({"source_ids": {1: 0, 2: 7}}, "2: 7"),
    ({"mappings": {"dubai": {"road": "c"}}}, "unknown classes c"),
    ({"prompt_template": "an image"}, "placeholder"),
    ({"classes": 3}, "Expected a list"),
])
def test_wrong_tables_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_table(**changes)


def test_unknown_table_names_the_nearest():
    with pytest.raises(FileNotFoundError, match="Did you mean dubai"):
        ClassTable.load("dubay")


def test_table_from_a_classes_json(tmp_path):
    file = tmp_path / "mine" / "classes.json"
    file.parent.mkdir()
    file.write_text('{\n "ignore": 255,\n "classes": {"1": {"name": "b", "colour": [4, 5, 6]},\n'
                    '  "0": {"name": "a", "colour": [1, 2, 3]}}\n}')
    assert ClassTable.load(file) == ClassTable.load({"name": "mine", "classes": CLASSES})


def test_mapping_between_tables():
    mini = ClassTable.load("mini")
    assert mini.map_from(ClassTable.load("dubai"))[[0, 1, 2, 3, 4, 255]].tolist() == [0, 1, 2, 3, 4, 255]
    coast = ClassTable.load("usgs_monterey")
    assert mini.map_from(coast)[:11].tolist() == [4, 3, 3, 1, 3, 3, 1, 1, 3, 2, 0]
    assert mini.map_from(ClassTable.load("oam_building"))[[0, 1, 255]].tolist() == [255, 0, 255]


def test_mapping_lists_the_classes_without_target():
    with pytest.raises(UserError, match="no class for background, barren, forest, agricultural of loveda"):
        ClassTable.load("mini").map_from(ClassTable.load("loveda"))


@pytest.mark.parametrize("kind", ["grey", "16-bit", "palette", "colour", "tiff", "rgba"])
def test_masks_of_every_kind_are_read_exactly(tmp_path, kind):
    table = ClassTable.load("dubai")
    file = tmp_path / ("mask.tif" if kind == "tiff" else "mask.png")
    if kind == "16-bit":
        image = Image.fromarray(IDS.astype(np.uint16))
    elif kind == "palette":
        image = Image.fromarray(IDS, mode=None).convert("L")
        image.putpalette(np.random.default_rng(0).integers(0, 255, 768).astype(np.uint8).tobytes())
    elif kind in ("colour", "rgba"):
        image = Image.fromarray(table.colourise(IDS)).convert("RGBA" if kind == "rgba" else "RGB")
    else:
        image = Image.fromarray(IDS)
    image.save(file)
    mask = read_mask(file, table)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, IDS)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_png_of_few_bits_keeps_its_numbers(tmp_path, bits):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes([0b00011011]) if bits == 2 else bytes([0x01, 0x23])
    header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    file = tmp_path / "mask.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row))
                     + chunk(b"IEND", b""))
    assert read_mask(file, ClassTable.load("dubai")).tolist() == [[0, 1, 2, 3]]


def test_loveda_ids_are_shifted_and_nodata_ignored(tmp_path):
    file = tmp_path / "mask.png"
    Image.fromarray(np.array([[0, 1, 7]], np.uint8)).save(file)
    table = ClassTable.load("loveda")
    assert read_mask(file, table).tolist() == [[255, 0, 6]]
    with pytest.raises(UserError, match="ids 7 are not in class table loveda"):
        read_mask(file, table.without_source_ids())


@pytest.mark.parametrize(("values", "message"), [
    (np.array([[0, 9, 77]], np.uint8), "ids 9, 77 are not in class table dubai"),
    (np.array([[300]], np.uint16), "ids 300"),
    (np.full((1, 1, 3), 7, np.uint8), r"\(7, 7, 7\)"),
])
def test_values_outside_the_table_name_file_and_values(tmp_path, values, message):
    file = tmp_path / "bad_mask.png"
    Image.fromarray(values).save(file)
    with pytest.raises(UserError, match=message) as error:
        read_mask(file, ClassTable.load("dubai"))
    assert "bad_mask.png" in str(error.value)


def test_jpeg_masks_are_refused_by_content(tmp_path):
    file = tmp_path / "mask.png"
    Image.fromarray(IDS).save(file, format="JPEG")
    with pytest.raises(UserError, match="JPEG mask"):
        read_mask(file, ClassTable.load("dubai"))


def test_truncated_and_missing_masks(tmp_path):
    file = tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 5, (64, 64), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="not readable"):
        read_mask(file, ClassTable.load("dubai"))
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        read_mask(tmp_path / "nothing.png", ClassTable.load("dubai"))


def test_import_is_light():
    code = "import sys, ldm.data.classes; assert not {'torch', 'pytorch_lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_class_table_has_one_name_at_every_door(capsys):
    """--classes everywhere; what it was called before works, and says so."""
    import inference
    from ldm.cli import say_new_name
    from post_processing import filter as filter_command
    from post_processing import resample
    from scripts import convert_checkpoint, evaluate, measure_gain, predict_masks, train_segmentor

    pair = ["--segmentor", "c", "p"]
    doors = [
        (inference.build_parser().parse_args, [], "dataset"),
        (filter_command.build_parser().parse_args, ["c", "p", "--filtered-mask-path", "f"], "classes"),
        (resample.build_parser().parse_args, ["--filtered-mask-path", "f", "--out-dir", "o"], "classes"),
        (predict_masks.build_parser().parse_args, [*pair, "--outdir", "o"], "classes"),
        (evaluate.build_parser().parse_args, ["segmentor", *pair, "--real", "r"], "classes"),
        (evaluate.build_parser().parse_args, ["mask_following", *pair, "--real", "r", "--run", "x"], "classes"),
        (evaluate.build_parser().parse_args, ["consistency", *pair, "--exact", "r", "--run", "x"], "classes"),
        (convert_checkpoint.build_parser().parse_args, ["a", "b"], "classes"),
        (train_segmentor.parse_arguments, ["--work_dir", "w"], "classes"),
        (measure_gain.build_parser().parse_args, ["--data_root", "d", "--ckpt", "c", "--outdir", "o"], "class_table"),
    ]
    for parse, flags, dest in doors:
        for spelling in ("--classes", "--class_table", "--dataset"):
            assert getattr(parse([*flags, spelling, "mini"]), dest) == "mini"
            note = f"note: {spelling} is now called --classes; both work\n"
            assert capsys.readouterr().err == ("" if spelling == "--classes" else note)
            say_new_name.cache_clear()
