"""Files of a sampling run: whole or absent, in order, safe between processes."""

import hashlib
import json
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ldm import files
from ldm.files import OutputError, append_lines, atomic_write, lock, read_lines, write_lines
from ldm.generation import writer
from ldm.generation.store import ShardStore
from ldm.generation.writer import ImageWriter


def add_records(arguments):
    path, row = arguments
    for copy in range(20):
        append_lines(path, [{"row": row, "copy": copy}])
        if copy % 5 == 0:
            settle(path)


def settle(path):
    with lock(path.with_name(".lock")):
        write_lines(path, read_lines(path, "row", "copy").values())


def test_processes_can_add_to_one_file_and_settle_it(tmp_path):
    path = tmp_path / "index.jsonl"
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(add_records, [(path, row) for row in range(4)]))
    settle(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["row"], line["copy"]) for line in lines] == [(row, copy) for row in range(4) for copy in range(20)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_png_is_lossless_and_what_was_written_is_known(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    path = tmp_path / "a.png"
    with ImageWriter(tmp_path) as images:
        images.submit(image, path)
    assert np.array_equal(np.asarray(Image.open(path)), image) and list(tmp_path.iterdir()) == [path]
    assert images.written == {path: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())}


def test_the_queue_is_bounded_and_an_error_surfaces_at_once(tmp_path, monkeypatch):
    image = np.zeros((2, 2, 3), np.uint8)
    gate, seen = threading.Event(), []
    monkeypatch.setattr(writer, "encode_image", lambda *_: gate.wait(10) and b"")
    images = ImageWriter(tmp_path, threads=1, limit=2)

    def fill():
        for number in range(4):
            images.submit(image, tmp_path / f"{number}.png")
            seen.append(number)

    thread = threading.Thread(target=fill)
    thread.start()
    time.sleep(0.2)
    assert seen == [0, 1]  # the third waits: two are under way
    gate.set()
    thread.join()

    monkeypatch.setattr(files, "RETRY_DELAYS", (0.01,))
    images = ImageWriter(tmp_path, threads=1)
    with pytest.raises(OutputError, match="absent.*tried 2 times"):  # noqa: SIM117
        with images:
            for _ in range(100):
                images.submit(image, tmp_path / "absent" / "a.png")
                time.sleep(0.01)
            pytest.fail("the error came only at the end")


def test_a_folder_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RETRY_DELAYS", (0.01, 0.01, 0.5))
    threading.Timer(0.2, (tmp_path / "late").mkdir).start()
    with ImageWriter(tmp_path) as images:
        images.submit(np.zeros((2, 2, 3), np.uint8), tmp_path / "late" / "a.png")
    assert (tmp_path / "late" / "a.png").is_file()


def test_a_folder_of_other_images_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.png").touch()
    with pytest.raises(FileExistsError, match="no run.json"):
        ShardStore(tmp_path, {"seed": 1}).begin({"rows": 1, "shard_size": 1, "copies": 1})
    settings = {"seed": 1, "size": (1, 2)}
    first = ShardStore(tmp_path / "new", settings).begin({"rows": 9, "shard_size": 4, "copies": 2})
    second = ShardStore(tmp_path / "new", settings).begin({"rows": 9, "shard_size": 5, "copies": 1})
    assert first == second == {"rows": 9, "shard_size": 4, "copies": 2}
    with pytest.raises(FileExistsError, match="seed was 1, is 2"):
        ShardStore(tmp_path / "new", {"seed": 2, "size": (1, 2)}).check()
