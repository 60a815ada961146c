"""Encoding and writing of images, on threads, while the next batch is sampled."""

import hashlib
import io
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.files import OutputError, atomic_write, with_retries

JPEG_QUALITY = 95


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
        """Queue one image, (H, W, 3) or (H, W) uint8, for a .png or .jpg, or any bands for a .npy.

        Waits when the disk is far behind, and raises what an earlier write raised.
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
            with_retries(lambda: atomic_write(path, content, temporary), path, len(content))
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
