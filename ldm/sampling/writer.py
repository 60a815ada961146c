"""Files of a sampling run: images, their index, the run's record. Every write is whole or does not happen."""

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

Record = dict[str, Any]


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that it is there complete or not at all.

    Args:
        path: where it ends up; its folder exists.
        write: receives the open binary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, atomically."""
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


class RecordFile:
    """JSON-lines file of samples, keyed by (row, copy), that several processes may add to.

    Lines are added as samples finish; settle() leaves one line a sample, in order. A line that a killed process left
    unfinished is dropped.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """Records on disk, the newest of each (row, copy), sorted by (row, copy)."""
        records: dict[tuple[int, int], Record] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    records[record["row"], record["copy"]] = record
                except (json.JSONDecodeError, TypeError, KeyError):
                    continue
        return [records[key] for key in sorted(records)]

    def append(self, record: Record) -> None:
        """Add one record."""
        with self._locked(), open(self.path, "ab+") as file:
            is_torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write((b"\n" if is_torn else b"") + json.dumps(record).encode() + b"\n")

    def settle(self, added: Iterable[Record] = (), keep: Callable[[Record], bool] = lambda record: True) -> None:
        """Rewrite the file with one line a sample, sorted; remove it when none is left.

        Args:
            added: records to put in, over older ones of the same (row, copy).
            keep: which of the records on disk stay.
        """
        with self._locked():
            records = {(record["row"], record["copy"]): record for record in self.read() if keep(record)}
            records |= {(record["row"], record["copy"]): record for record in added}
            if not records:
                self.path.unlink(missing_ok=True)
                return
            text = "".join(json.dumps(records[key]) + "\n" for key in sorted(records))
            write_atomic(self.path, lambda file: file.write(text.encode()))

    @contextmanager
    def _locked(self):  # noqa: ANN202
        # The lock is a file of its own: settle() replaces the record file, and a lock on it would go with it.
        with open(self.path.with_name(f".{self.path.name}.lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class ImageWriter:
    """Encodes and writes images on a few threads while the next batch is sampled; use it as a context manager.

    Args:
        folder: run's output folder; records name their image relative to it.
        index: where a record goes once its image is on disk.
        threads: number of threads.
        jpeg_quality: quality of .jpg files, colour at full resolution (4:4:4).
    """

    def __init__(self, folder: Path, index: RecordFile, threads: int = 4, jpeg_quality: int = 95) -> None:
        self.folder = folder
        self.index = index
        self.jpeg_quality = jpeg_quality
        self._pool = ThreadPoolExecutor(threads)
        self._pending: list[Future] = []
        self._limit = 16 * threads

    def submit(self, image: np.ndarray, record: Record) -> None:
        """Queue one image; waits when the disk is far behind, raises what an earlier write raised.

        Args:
            image: (H, W, 3) uint8.
            record: its line of the index; `image` is the path below the folder, ending in .png or .jpg.
        """
        while len(self._pending) >= self._limit:
            self._pending.pop(0).result()
        self._pending.append(self._pool.submit(self._write, image, record))

    def _write(self, image: np.ndarray, record: Record) -> None:
        is_jpeg = record["image"].endswith(".jpg")
        options = {"format": "JPEG", "quality": self.jpeg_quality, "subsampling": 0} if is_jpeg else {"format": "PNG"}
        write_atomic(self.folder / record["image"], lambda file: Image.fromarray(image).save(file, **options))
        self.index.append(record)

    def __enter__(self) -> "ImageWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Finish the queue, then raise what a write raised."""
        self._pool.shutdown(wait=True)
        for future in self._pending:
            future.result()


def open_run(folder: Path, fingerprint: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Create a run's output folder, or join a run that paints the same pictures.

    Args:
        folder: output folder, made when missing.
        fingerprint: JSON values that decide what the pictures look like.
        details: further JSON values worth keeping.

    Raises:
        FileExistsError: if the folder holds a run with another fingerprint; names the differences.
    """
    check_run(folder, fingerprint)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    if not (folder / "run.json").exists():
        write_json(folder / "run.json", {"fingerprint": fingerprint, **details})


def check_run(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Raise FileExistsError if the folder holds other pictures than this fingerprint's (see open_run)."""
    run_file = folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--outdir: {folder} is a file. Expected a folder. Choose another --outdir.")
    if not run_file.exists():
        if (folder / "images").is_dir() and any((folder / "images").iterdir()):
            raise FileExistsError(
                f"--outdir: {folder} has images but no run.json. Expected a new folder or an earlier run of"
                " inference.py. Choose another --outdir."
            )
        return
    try:
        old = json.loads(run_file.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(
            f"{run_file}: not a run record ({error}). Expected what inference.py wrote. Choose another --outdir."
        ) from error
    new = json.loads(json.dumps(fingerprint))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        shown = ", ".join(f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in changed)
        raise FileExistsError(
            f"--outdir: {folder} holds a run with other settings ({shown}). Expected the same settings to continue it."
            " Choose another --outdir."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
