"""Manifests: all bad rows in one error, with line numbers."""
import json

import numpy as np
import pytest
from PIL import Image

from ldm.data.classes import ClassTable
from ldm.data.manifest import ManifestError, read_manifest, write_manifest
from ldm.util import UserError

GOOD = {"source": "label/a.png", "target": "img/a.png", "prompt": "a satellite image of road", "ref_image": "img/a.png"}


@pytest.fixture
def data_root(tmp_path):
    random = np.random.default_rng(0)
    for folder in ("label", "img"):
        (tmp_path / folder).mkdir()
    for name, size in (("a", (32, 48)), ("small", (16, 16)), ("odd", (30, 48))):
        Image.fromarray(random.integers(0, 5, size, np.uint8)).save(tmp_path / f"label/{name}.png")
        Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(tmp_path / f"img/{name}.png")
    Image.fromarray(np.full((32, 48), 7, np.uint8)).save(tmp_path / "label/id7.png")
    Image.fromarray(np.zeros((32, 48), np.uint8)).save(tmp_path / "label/lossy.jpg")
    (tmp_path / "img/cut.png").write_bytes((tmp_path / "img/a.png").read_bytes()[:500])
    (tmp_path / "label/text.png").write_text("not an image")
    return tmp_path


def read(data_root, lines, **options):
    file = data_root / "rows.json"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    options = {"need": ("image", "reference", "prompt"), "table": ClassTable.load("dubai"), "size_factor": 8, **options}
    return read_manifest(file, data_root, **options)


def test_good_rows(data_root):
    rows = read(data_root, [GOOD, "", {**GOOD, "prompt": "other", "ref_image": "img/small.png"}])
    assert [(row.index, row.line) for row in rows] == [(0, 1), (1, 3)]
    assert rows[1].mask == data_root / "label/a.png" and rows[1].mask_name == "label/a.png"
    assert rows[1].reference == data_root / "img/small.png" and rows[1].prompt == "other"


BAD_ROWS = [
    ('{"source": "label/a.png", ', "not valid JSON"),
    ('["label/a.png"]', "a JSON list"),
    ({key: value for key, value in GOOD.items() if key != "ref_image"}, "missing key 'ref_image'"),
    ({**GOOD, "prompt": 3}, "prompt is 3 (int)"),
    ({**GOOD, "promt": "x"},
     "unknown key 'promt'. Expected source, target, prompt, ref_image, instance, weight, scene, window, crs, "
     "transform. Did you mean prompt?"),
    ({**GOOD, "prompt": "  "}, "prompt is empty"),
    ({**GOOD, "source": "/etc/passwd"}, "is absolute or leaves the data root"),
    ({**GOOD, "target": "img/../../a.png"}, "is absolute or leaves the data root"),
    ({**GOOD, "source": "label/none.png"}, "mask: file not found"),
    ({**GOOD, "ref_image": "img/none.png"}, "reference: file not found"),
    ({**GOOD, "source": "label/lossy.jpg"}, "a JPEG mask"),
    ({**GOOD, "source": "label/text.png"}, "text.png: not readable"),
    ({**GOOD, "target": "img/cut.png"}, "cut.png: not readable"),
    ({**GOOD, "source": "label/id7.png"}, "ids 7 are not in class table dubai"),
    ({**GOOD, "source": "label/small.png"}, "Expected equal sizes"),
    ({**GOOD, "source": "label/odd.png", "target": "img/odd.png"}, "Expected multiples of 8"),
    (GOOD, "the same row as line 1"),
]


def test_one_error_lists_every_kind_of_bad_row_with_its_line(data_root):
    with pytest.raises(ManifestError) as error:
        read(data_root, [GOOD, *(row for row, _ in BAD_ROWS)])
    text = str(error.value)
    assert "rows.json: 17 problems in 17 lines" in text
    for line, (_, message) in enumerate(BAD_ROWS, start=2):
        shown = [entry for entry in text.splitlines() if entry.startswith(f"  line {line}: ")]
        assert len(shown) == 1 and message in shown[0], (line, message, shown)
    assert "  line 1: " not in text


def test_many_problems_are_shortened_but_every_line_is_named(data_root):
    with pytest.raises(ManifestError) as error:
        read(data_root, ["{"] * 300)
    assert len(error.value.problems) == 300
    assert len(str(error.value).splitlines()) == 103
    assert "and 200 more, in lines 101-300" in str(error.value)


def test_files_that_are_not_needed_are_not_looked_at(data_root):
    rows = read(data_root, [{"source": "label/a.png", "target": "/gone.png"}], need=())
    assert rows[0].image is None and rows[0].reference is None and rows[0].prompt == ""


def test_own_sizes_are_free_when_rows_are_resized(data_root):
    odd = {**GOOD, "source": "label/odd.png", "target": "img/odd.png"}
    assert len(read(data_root, [odd], size=(32, 64))) == 1
    with pytest.raises(UserError, match="30x64"):
        read(data_root, [odd], size=(30, 64))


def test_without_decoding_only_existence_is_checked(data_root):
    cut = {**GOOD, "target": "img/cut.png"}
    assert len(read(data_root, [cut], check_files=False)) == 1
    with pytest.raises(ManifestError, match="file not found"):
        read(data_root, [{**GOOD, "target": "img/none.png"}], check_files=False)


def test_missing_manifest_root_and_rows(data_root):
    with pytest.raises(FileNotFoundError, match="manifest not found"):
        read_manifest(data_root / "none.json", data_root)
    with pytest.raises(UserError, match="no rows"):
        read(data_root, [])
    with pytest.raises(FileNotFoundError, match="data root not found"):
        read_manifest(data_root / "rows.json", data_root / "none")


def test_written_manifests_are_read_back(data_root):
    rows = [GOOD, {**GOOD, "prompt": "Zürich, 道路"}]
    write_manifest(data_root / "out/new.json", rows)
    assert [row.prompt for row in read_manifest(data_root / "out/new.json", data_root)] == [r["prompt"] for r in rows]
    with pytest.raises(UserError, match="mask"):
        write_manifest(data_root / "out/new.json", [GOOD, {"mask": "label/a.png"}])
    assert len(read_manifest(data_root / "out/new.json", data_root)) == 2
    assert [file.name for file in (data_root / "out").iterdir()] == ["new.json"]
