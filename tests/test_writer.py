"""Files of a sampling run: whole or absent, in order, safe between processes."""

import json
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ldm.sampling.writer import ImageWriter, RecordFile, open_run, write_atomic


def add_records(arguments):
    path, row = arguments
    records = RecordFile(path)
    for copy in range(20):
        records.append({"row": row, "copy": copy})
        if copy % 5 == 0:
            records.settle()


def test_processes_can_add_to_one_file_and_settle_it(tmp_path):
    path = tmp_path / "index.jsonl"
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(add_records, [(path, row) for row in range(4)]))
    RecordFile(path).settle()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["row"], line["copy"]) for line in lines] == [(row, copy) for row in range(4) for copy in range(20)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_png_is_lossless_and_errors_of_the_threads_surface(tmp_path):
    (tmp_path / "images").mkdir()
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    index = RecordFile(tmp_path / "index.jsonl")
    with ImageWriter(tmp_path, index) as writer:
        writer.submit(image, {"row": 0, "copy": 0, "image": "images/a.png"})
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "a.png")), image)
    with pytest.raises(FileNotFoundError), ImageWriter(tmp_path, index) as writer:
        writer.submit(image, {"row": 1, "copy": 0, "image": "absent/a.png"})
    assert [record["row"] for record in index.read()] == [0]


def test_a_folder_of_other_pictures_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.png").touch()
    with pytest.raises(FileExistsError, match="no run.json"):
        open_run(tmp_path, {"seed": 1}, {})
    open_run(tmp_path / "new", {"seed": 1, "size": (1, 2)}, {})
    open_run(tmp_path / "new", {"seed": 1, "size": (1, 2)}, {})
    with pytest.raises(FileExistsError, match="seed was 1, is 2"):
        open_run(tmp_path / "new", {"seed": 2, "size": (1, 2)}, {})
