"""Files of a sampling run: images and lists of records. Every write is whole or does not happen."""

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

Record = dict[str, Any]
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0)  # seconds; what a network folder needs to come back
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
JPEG_QUALITY = 95


class OutputError(Exception):
    """The output folder cannot be written; the text says where, why and what to do."""


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any], temporary: Path | None = None) -> None:
    """Write a file so that it is there complete or not at all, also after a power cut.

    Args:
        path: where it ends up; its folder exists.
        write: receives the open binary file.
        temporary: name until it is complete, on the same file system; default: a hidden one beside it, always the
            same, so that the next write takes away what a killed one left. Then only one process may write.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError as error:  # the folder is gone or read-only: the error of the write says so
            logger.debug("%s: not removed (%s)", temporary, error)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, atomically."""
    text = (json.dumps(value, indent=2) + "\n").encode()
    with_retries(lambda: write_atomic(path, lambda file: file.write(text)), path, len(text))


def with_retries(action: Callable[[], Any], path: Path, size: int) -> Any:
    """Run a write, again after a while if the folder does not answer.

    Args:
        action: writes, and may be repeated.
        path, size: file and number of bytes, for the message.
    Raises:
        OutputError: at once when the disk is full, else after the last try.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return action()
        except OSError as error:
            if error.errno in DISK_FULL:
                raise OutputError(f"{path}: the disk is full ({error.strerror}), {size:,} bytes were needed. Free some "
                                  "space and run the same command again; finished images stay.") from error
            if delay is None:
                raise OutputError(
                    f"{path}: cannot be written ({error}), tried {len(RETRY_DELAYS) + 1} times. Expected a folder that "
                    "can be written. Mend it and run the same command again; finished images stay.") from error
            logger.warning("%s: %s; next try in %s s", path, error, delay)
            time.sleep(delay)


def take_flock(file: IO[bytes], operation: int) -> None:
    """flock() of a file; where the file system has no locks, as some network file systems, only a warning."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn_of_no_locks(Path(file.name).parent, error.strerror)


@cache  # once
def warn_of_no_locks(folder: Path, reason: str) -> None:
    """Say that nothing keeps processes apart."""
    logger.warning("%s: no locks on this file system (%s); give every process a --shard of its own, and run the "
                   "command once more when all have ended", folder, reason)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes, on this and other machines, out of the block; waits for them.

    Args:
        folder: the output folder whose lists and record the block changes.
    """
    with open(folder / ".lock", "wb") as lock:
        take_flock(lock, fcntl.LOCK_EX)
        yield


def record_key(record: Record) -> tuple[int, int]:
    """What tells samples of a run apart: row of the manifest and copy."""
    return record["row"], record["copy"]


class RecordFile:
    """JSON-lines file of samples, keyed by (row, copy), that several processes may add to.

    Lines are added as shards finish; replace() leaves one line a sample, in order. A line that a killed process left
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
                    records[record_key(record)] = record
                except (json.JSONDecodeError, TypeError, KeyError):
                    continue
        return [records[key] for key in sorted(records)]

    def append(self, records: Iterable[Record]) -> None:
        """Add records, all in one write."""
        text = b"".join(json.dumps(record).encode() + b"\n" for record in records)

        def add() -> None:
            with locked(self.path.parent), open(self.path, "ab+") as file:
                is_torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write((b"\n" if is_torn else b"") + text)

        if text:
            with_retries(add, self.path, len(text))

    def replace(self, collect: Callable[[], Iterable[Record]]) -> None:
        """Rewrite the file; remove it when there is no record.

        Args:
            collect: gives the records, each sample once, in order; runs while no other process can add any. They are
                written as they come: those of a million images need not fit into memory.
        """

        def rewrite() -> None:
            with locked(self.path.parent):
                write_atomic(self.path, lambda file: file.writelines(json.dumps(record).encode() + b"\n"
                                                                     for record in collect()))
                if self.path.stat().st_size == 0:
                    self.path.unlink()

        with_retries(rewrite, self.path, 0)


def encode_image(image: np.ndarray, extension: str) -> bytes:
    """Contents of an image file.

    Args:
        image: (H, W, 3) or (H, W) uint8; for `.npy` any bands.
        extension: `.png` (lossless), `.jpg` (quality 95, colour at full resolution) or `.npy`.
    """
    jpeg = {"format": "JPEG", "quality": JPEG_QUALITY, "subsampling": 0}
    buffer = io.BytesIO()
    if extension == ".npy":
        np.save(buffer, image)
        return buffer.getvalue()
    Image.fromarray(image).save(buffer, **(jpeg if extension == ".jpg" else {"format": "PNG"}))
    return buffer.getvalue()


class ImageWriter:
    """Encodes and writes images on a few threads while the next batch is sampled; use it as a context manager.

    Args:
        work: folder for files that are not complete yet, on the file system of the results.
        threads: number of threads.
        limit: most images that wait; then submit() waits too.

    Attributes:
        written: (bytes, sha256) of every file written so far, by path.
    """

    def __init__(self, work: Path, threads: int = 4, limit: int = 64) -> None:
        self.work = work
        self.written: dict[Path, tuple[int, str]] = {}
        self._pool = ThreadPoolExecutor(threads)
        self._pending: deque[Future] = deque()
        self._limit = limit
        self._error: OutputError | None = None

    def submit(self, image: np.ndarray, path: Path) -> None:
        """Queue one image; waits when the disk is far behind, raises what an earlier write raised.

        Args:
            image: (H, W, 3) or (H, W) uint8.
            path: file to write, ending in .png or .jpg.
        """
        while len(self._pending) >= self._limit or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._write, image, path))

    def _write(self, image: np.ndarray, path: Path) -> None:
        if self._error is not None:  # the folder is gone: each of the waiting images would try as long again
            raise self._error
        content = encode_image(image, path.suffix)
        temporary = self.work / f".tmp-{os.getpid()}-{threading.get_ident()}"
        try:
            with_retries(lambda: write_atomic(path, lambda file: file.write(content), temporary), path, len(content))
        except OutputError as error:
            self._error = error
            raise
        self.written[path] = (len(content), hashlib.sha256(content).hexdigest())

    def __enter__(self) -> "ImageWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the queue, then raise what a write raised, unless the block itself raised."""
        self._pool.shutdown(wait=True)
        while self._pending and kind is None:
            self._pending.popleft().result()
