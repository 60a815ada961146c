"""Files that are whole or absent, lists that several processes write, locks, and what tells files apart.

Light on purpose (no torch): every room may import it.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

Record = dict[str, Any]
RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0)  # seconds; what a network folder needs to come back
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries say so: the system's words, also through a worker process, then torch, Pillow, NumPy and rasterio.
FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|File too large|PytorchStreamWriter failed writing"
                       r"|inline_container\.cc:\d+\] \. unexpected pos|encoder error -2 when writing"
                       r"|\d+ requested and \d+ written|Write failed\. See previous exception")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
LOCK_TRIES, LOCK_WAIT = 4, 0.05  # is_locked() looks at a lock by taking it for a moment
IDENTITY_BYTES = 1 << 15  # of each end of a large image; the end of a PNG holds the check sum of all its pixels
WHOLE_BYTES = 8 << 20  # up to here the whole file is read
SHOWN_CHANGES, SHOWN_CHARACTERS = 12, 60
SHOWN_BEFORE = 20  # characters of a long string before the first that differs


class OutputError(OSError):
    """A folder cannot be written; the text says where, why and what to do."""


def describe_failure(error: BaseException) -> str | None:
    """One sentence on a disk that is full or a file that cannot be read or written; None for any other error.

    Libraries turn the system's error into one of their own, so what caused it and its text count as well.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for one in chain:
        if isinstance(one, OutputError):
            return str(one)
        found = FULL_TEXT.search(str(one))
        if found or (isinstance(one, OSError) and one.errno in DISK_FULL):
            reason = one.strerror if isinstance(one, OSError) and one.strerror else found[0]
            where = f"{os.fsdecode(one.filename)}: " if getattr(one, "filename", None) else ""
            return (f"{where}the disk is full, or may not be filled further ({reason}). Free some space and run the "
                    "same command again.")
    first = chain[0]
    if not isinstance(first, OSError) or first.errno is None:
        return None
    where = f"{os.fsdecode(first.filename)}: " if first.filename is not None else ""
    return (f"{where}{first.strerror}. Expected files and folders that can be read and written. Mend that and run the "
            "same command again.")


def atomic_write(path: Path, content: bytes | str | Callable[[IO[bytes]], Any], temporary: Path | None = None,
                 is_synced: bool = True) -> None:
    """Write a file so that it is there complete or not at all.

    Args:
        path: where it ends up; its folder exists.
        content: what it holds (text is UTF-8), or a function that receives the open binary file and writes it.
        temporary: name until it is complete, on the same file system; default: a hidden one beside it, of this thread
            alone. One that is always the same lets the next write take away what a killed process left.
        is_synced: wait until the file would survive a power cut.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        if is_synced:
            with open(temporary, "rb+") as file:  # opened again: `content` may have put another file in its place
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError as error:  # the folder is gone or read-only: the error of the write says so
            logger.debug("%s: not removed (%s)", temporary, error)


def with_retries(action: Callable[[], Any], path: Path, size: int = 0) -> Any:
    """Run a write that may be repeated, again after a while if the folder does not answer.

    Raises:
        OutputError: naming file and size, in bytes; at once when the disk is full, else after the last try.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return action()
        except OutputError:
            raise
        except OSError as error:
            if error.errno in DISK_FULL:
                raise OutputError(f"{path}: the disk is full ({error.strerror}), {size:,} bytes were needed. Free some "
                                  "space and run the same command again; what is finished stays.") from error
            if delay is None:
                raise OutputError(
                    f"{path}: cannot be written ({error}), tried {len(RETRY_DELAYS) + 1} times. Expected a folder that "
                    "can be written. Mend it and run the same command again; what is finished stays.") from error
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
def lock(path: Path) -> Iterator[None]:
    """Keep other processes, on this and other machines, out of the block; waits for them.

    The kernel frees the lock of a process that dies, on network file systems too. Not to be nested with itself.

    Args:
        path: the lock file, by custom `.lock` of the folder whose lists and records the block changes; it stays.
    """
    with open(path, "wb") as file:
        take_flock(file, fcntl.LOCK_EX)
        yield


def take_lock(path: Path) -> IO[bytes] | None:
    """Open and lock a file; None if another process has the lock. Closing the file frees it."""
    for _ in range(LOCK_TRIES):
        file = open(path, "ab+")
        try:
            take_flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BlockingIOError:
            time.sleep(LOCK_WAIT)
        except FileNotFoundError:
            logger.debug("%s: removed by the process that had it a moment ago", path)
        file.close()  # no use: it is, or was, another process's
    return None


def is_locked(path: Path) -> bool:
    """Whether a living process has the lock of this file."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_json(path: Path) -> Any:
    """Value in a JSON file, None if there is no such file; ValueError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, atomically; one process at a time."""
    text = (json.dumps(value, indent=1) + "\n").encode()
    with_retries(lambda: atomic_write(path, text, path.with_name(f".{path.name}.tmp")), path, len(text))


def to_line(record: Record) -> bytes:
    """A record as a line of a JSON-lines file."""
    return json.dumps(record).encode() + b"\n"


def read_lines(path: Path, *key: str) -> dict[Any, Record]:
    """Records of a JSON-lines file, {} if there is none: the newest of each key, sorted by it.

    Args:
        path: the file; a line that a killed process left unfinished is left out.
        key: names of the values that tell records apart; of several, the keys are tuples.
    """
    key_of = itemgetter(*key)
    records: dict[Any, Record] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            records[key_of(record)] = record
        except (ValueError, TypeError, KeyError):
            continue
    return {name: records[name] for name in sorted(records)}


def append_lines(path: Path, records: Iterable[Record]) -> None:
    """Add records to a JSON-lines file that several processes write, in one write."""
    text = b"".join(map(to_line, records))

    def add() -> None:
        with lock(path.with_name(".lock")), open(path, "ab+") as file:
            is_torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write((b"\n" if is_torn else b"") + text)

    if text:
        with_retries(add, path, len(text))


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Write a JSON-lines file, atomically, or remove it when there is no record; hold the lock of its folder.

    Records are written as they come: those of a million images need not fit into memory.
    """
    atomic_write(path, lambda file: file.writelines(map(to_line, records)), path.with_name(f".{path.name}.tmp"))
    if path.stat().st_size == 0:
        path.unlink()


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where links are not possible (another disk, a file system without them)."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)  # a copy that was cut short is never taken for one


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """Tells files apart: size and a digest, of both ends of large PNG and JPEG files and of the whole of all others.

    A change inside a PNG changes the check sum at its end, and inside a JPEG nearly always its size; in a TIFF or a
    manifest it need not. Neither path nor time count, so that copies of a data set are the same data.
    """
    size = path.stat().st_size
    if size <= WHOLE_BYTES or path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        return f"{size}-{file_sha256(path)[:24]}"
    with open(path, "rb") as file:
        content = file.read(IDENTITY_BYTES)
        file.seek(size - IDENTITY_BYTES)
        content += file.read()
    return f"{size}-{hashlib.sha256(content).hexdigest()[:24]}"


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, as hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def find_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say what differs between settings read from a JSON file and those at hand, down to single entries of mappings.

    Returns:
        `name was X, is Y, ...`, empty if nothing does.
    """
    changes = list(_changes(old, json.loads(json.dumps(new)), ""))  # JSON makes strings of numbers that are keys
    return ", ".join(changes[:SHOWN_CHANGES]) + (", ..." if len(changes) > SHOWN_CHANGES else "")


def _changes(old: Any, new: Any, prefix: str) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _changes(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        old, new = _differing_parts(old, new)
        yield f"{prefix.rstrip('.')} was {_short(old)}, is {_short(new)}"


def _differing_parts(old: Any, new: Any) -> tuple[Any, Any]:
    """Two values, or where they are too long to be shown, such as command lines, what differs of them."""
    if max(len(json.dumps(value)) for value in (old, new)) <= SHOWN_CHARACTERS:
        return old, new
    if isinstance(old, str) and isinstance(new, str):
        start = _common_start(old, new) - SHOWN_BEFORE
        return (old, new) if start <= 0 else (f"...{old[start:]}", f"...{new[start:]}")
    if not (isinstance(old, list) and isinstance(new, list)):
        return old, new
    start = _common_start(old, new)
    end = _common_start(old[start:][::-1], new[start:][::-1])
    old, new = old[start : len(old) - end], new[start : len(new) - end]
    return _differing_parts(old[0], new[0]) if len(old) == len(new) == 1 else (old, new)


def _common_start(old: Sequence[Any], new: Sequence[Any]) -> int:
    """How many elements two sequences have in common from their start on."""
    pairs = enumerate(zip(old, new, strict=False))
    return next((place for place, pair in pairs if pair[0] != pair[1]), min(len(old), len(new)))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Put a folder together that appears complete or not at all; gives the place to write to.

    Args:
        path: where it ends up; what is there already is replaced.
    """
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    old = partial.with_suffix(".old")
    for stale in (partial, old):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        if path.exists():
            path.rename(old)
        try:
            partial.rename(path)
        except OSError:  # another process made one in the meantime, perhaps: what was there must not be lost
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
