"""Decoded tiles in the shared memory of a node: every file is decoded once, for all epochs, workers and ranks."""
import errno
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ldm.util import UserError

TileKey = tuple[str, str, tuple[int, int] | None]  # what of a row, its file, the size that it is brought to


class TileCache:
    """Arrays by key, views into one mapped file that no name leads to any more; processes that are forked share it.

    Args:
        memory: (N,) uint8, all arrays one behind the other.
        index: key -> (first byte, shape, name of the dtype).
    """

    def __init__(self, memory: np.ndarray, index: dict[TileKey, tuple[int, tuple[int, ...], str]]) -> None:
        self.memory, self.index = memory, index

    def __len__(self) -> int:
        return len(self.index)

    def get(self, key: TileKey) -> np.ndarray | None:
        """The array of a key, None if there is none. It must not be changed."""
        if key not in self.index:
            return None
        start, shape, dtype = self.index[key]
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[start:start + count].view(dtype).reshape(shape)


def shared_folder() -> Path:
    """Where files live in memory: /dev/shm, or the temporary folder on systems without it."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def write_tiles(path: Path, keys: Sequence[TileKey], read: Callable[[TileKey], np.ndarray], limit: float) -> None:
    """Decode tiles in threads and write them one behind the other, with their index in `path`.json.

    Raises:
        UserError: beyond the limit, in bytes, or when the file system is full.
    """
    index, position = [], 0
    advice = "Raise data.params.cache_limit_gb, choose fewer or smaller tiles, or set data.params.cache=null."
    try:
        with path.open("wb") as file, ThreadPoolExecutor(max_workers=min(16, (os.cpu_count() or 1) + 2)) as pool:
            for begin in range(0, len(keys), 256):  # in parts, so that decoded tiles do not queue up in memory
                part = keys[begin:begin + 256]
                for key, tile in zip(part, pool.map(read, part), strict=True):
                    index.append((key, position, tile.shape, tile.dtype.str))
                    position += tile.nbytes
                    if position > limit:
                        raise UserError(f"data.params.cache: {len(index)} of {len(keys)} decoded tiles take "
                                        f"{position / 1e9:.1f} GB. Expected all in at most {limit / 1e9:g} GB. "
                                        f"{advice}")
                    file.write(np.ascontiguousarray(tile).data)
        Path(f"{path}.json").write_text(json.dumps(index), encoding="utf-8")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"data.params.cache: {path.parent} is full after {position / 1e9:.1f} GB. Give it more space "
                        f"(docker run --shm-size, or mount -o remount,size=), or {advice[0].lower()}{advice[1:]}"
                        ) from error
    finally:
        if len(index) < len(keys):
            remove_tiles(path)


def open_tiles(path: Path) -> TileCache:
    """Map what write_tiles wrote."""
    index = {(kind, file, None if size is None else tuple(size)): (start, tuple(shape), dtype)
             for (kind, file, size), start, shape, dtype in json.loads(Path(f"{path}.json").read_text())}
    return TileCache(np.memmap(path, np.uint8, "r"), index)


def remove_tiles(path: Path) -> None:
    """Take the names away; the memory stays as long as a process has it mapped."""
    path.unlink(missing_ok=True)
    Path(f"{path}.json").unlink(missing_ok=True)
