"""Files that filter and resample leave behind: whole or not at all, one line a picture, one set of settings."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]
IDENTITY_BYTES = 1 << 15  # of each end of a large picture; the end of a PNG holds the check sum of all its pixels
WHOLE_BYTES = 8 << 20  # up to here the whole file is read
SHOWN_CHANGES = 8


def write_atomic(path: Path, content: bytes, temporary: Path | None = None, is_synced: bool = True) -> None:
    """Write a file so that it is there complete or not at all.

    Args:
        path: where it ends up; its folder exists.
        content: what it holds.
        temporary: name until it is complete, on the same file system; default: a hidden one beside it.
        is_synced: wait until it would survive a power cut.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if is_synced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where links are not possible (another disk, a file system without them)."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, atomically."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Write a JSON-lines file, atomically."""
    write_atomic(path, b"".join(json.dumps(record).encode() + b"\n" for record in records))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of the block; waits for them. The kernel frees the lock of a process that dies."""
    with open(path.with_name(f".{path.name}.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def append_lines(path: Path, records: Iterable[Record]) -> None:
    """Add records to a JSON-lines file that several processes write, in one write each."""
    text = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    if text:
        with locked(path), open(path, "ab+") as file:
            is_torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write((b"\n" if is_torn else b"") + text)


def read_lines(path: Path, key: str = "image") -> dict[str, Record]:
    """Records of a JSON-lines file by one of their values, the last one wins; lines cut off by a kill are left out."""
    records: dict[str, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            records[record[key]] = record
        except (ValueError, TypeError, KeyError):
            continue
    return dict(sorted(records.items()))


def sha256_of(path: Path) -> str:
    """SHA-256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
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
        return f"{size}-{sha256_of(path)[:24]}"
    with open(path, "rb") as file:
        content = file.read(IDENTITY_BYTES)
        file.seek(size - IDENTITY_BYTES)
        content += file.read()
    return f"{size}-{hashlib.sha256(content).hexdigest()[:24]}"


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def find_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say which of the settings read from a JSON file differ from the ones at hand, `name was X, is Y`."""
    new = json.loads(json.dumps(new))  # JSON makes strings of the numbers that source_ids has as keys

    def short(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 60 else text[:57] + "..."

    changes = [f"{key} was {short(old.get(key))}, is {short(new.get(key))}"
               for key in sorted({*old, *new}) if old.get(key) != new.get(key)]  # fmt: skip
    return changes[:SHOWN_CHANGES] + ["..."] * (len(changes) > SHOWN_CHANGES)


def read_settings(path: Path) -> Record:
    """Settings stored in a folder, {} if there are none.

    Raises:
        FileExistsError: if the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise FileExistsError(
            f"{path}: not the settings of a run ({type(error).__name__}). Expected what this command writes. "
            "Choose another folder."
        ) from error
