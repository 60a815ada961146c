"""Shards of a run: groups of rows that one process paints at a time and publishes with their statistics file last.

`shards/000012.json` is there if and only if shard 12 is finished; it lists every image with size and SHA-256.
`shards/000012.lock` is locked as long as a living process paints the shard. The kernel frees the lock when the process
dies, on network file systems too, so there is no time after which a claim expires and no clock that could be wrong.
`shards/000012.partial/` holds what is not complete.
"""

import io
import json
import logging
import os
import shutil
import socket
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ldm.files import (
    OutputError,
    Record,
    append_lines,
    atomic_write,
    file_sha256,
    lock,
    read_json,
    take_lock,
    with_retries,
    write_json,
    write_lines,
)
from ldm.generation.writer import ImageWriter

logger = logging.getLogger(__name__)


@dataclass
class Claim:
    """A shard that this process has for itself.

    Attributes:
        number: of the shard.
        lock: open lock file; says who paints and how far it is.
        files: (bytes, sha256) of images that are complete, by their name in the index.
        begun: when the claim was made, seconds since 1970.
    """

    number: int
    lock: IO[bytes]
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    begun: float = field(default_factory=time.time)

    def report(self, done: int, total: int) -> None:
        """Note the progress where --status finds it."""
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "begun": self.begun, "done": done,
                           "total": total})  # fmt: skip
        # A folder that cannot be written shows when images are. Nothing is buffered: close() would try it once more.
        with suppress(OSError):
            os.ftruncate(self.lock.fileno(), 0)
            os.write(self.lock.fileno(), text.encode())


class ShardStore:
    """The shards of an output folder on disk.

    Args:
        folder: the run's output folder.
        is_tar: publish each shard as one tar in `tars/` instead of files in `images/`.
    """

    def __init__(self, folder: Path, is_tar: bool = False) -> None:
        self.folder, self.is_tar = folder, is_tar
        self.index, self.failures = folder / "index.jsonl", folder / "failures.jsonl"

    def path(self, number: int, ending: str) -> Path:
        """File or folder of a shard: `json`, `lock` or `partial`."""
        return self.folder / "shards" / f"{number:06d}.{ending}"

    def statistics(self, number: int) -> dict[str, Any] | None:
        """What a finished shard's statistics file says; None if the shard is not finished."""
        try:
            return read_json(self.path(number, "json"))
        except ValueError:  # damaged: its images are looked at again
            logger.warning("%s: damaged, the shard counts as not finished", self.path(number, "json"))
            return None

    def statistics_time(self, number: int) -> int | None:
        """When the statistics of a shard were written, in nanoseconds; None if there are none."""
        path = self.path(number, "json")
        return path.stat().st_mtime_ns if path.exists() else None

    def all_statistics(self) -> Iterator[dict[str, Any]]:
        """Statistics of all finished shards, in order."""
        for path in sorted((self.folder / "shards").glob("*.json")):
            statistics = self.statistics(int(path.stem))
            if statistics is not None:
                yield statistics

    @contextmanager
    def claim(self, number: int) -> Iterator[Claim | None]:
        """Take a shard for this process; gives None if another process has it."""
        lock = with_retries(lambda: take_lock(self.path(number, "lock")), self.path(number, "lock"), 0)
        if lock is None:
            yield None
            return
        work = self.path(number, "partial")
        with lock:
            try:
                with_retries(lambda: work.mkdir(exist_ok=True), work, 0)
                for stale in work.glob(".tmp-*"):
                    stale.unlink()
                yield Claim(number, lock)
            finally:
                leave(work, self.path(number, "lock"))

    def target(self, number: int, record: Record) -> Path:
        """Where the image of a record is written."""
        return self.path(number, "partial") / record["image"] if self.is_tar else self.folder / record["image"]

    def find_finished(self, claim: Claim, records: Iterable[Record]) -> None:
        """Note in the claim which images are complete: those in the statistics, and sound ones found on disk."""
        statistics = self.statistics(claim.number) or {"records": []}
        known = {record["image"]: (record["bytes"], record["sha256"]) for record in statistics["records"]}
        if self.is_tar and known:
            self.unpack(claim.number)
        for record in records:
            name, path = record["image"], self.target(claim.number, record)
            if not path.is_file() or (self.is_tar and not path.with_name(mask_name(name)).is_file()):
                continue
            if name in known and path.stat().st_size == known[name][0]:
                claim.files[name] = known[name]
            elif is_sound(path):
                claim.files[name] = path.stat().st_size, file_sha256(path)

    def forget(self, claim: Claim, records: Iterable[Record]) -> None:
        """Remove what there is of a shard, to paint it again."""
        for path in [self.path(claim.number, "json"), *(self.target(claim.number, record) for record in records)]:
            path.unlink(missing_ok=True)

    def writer(self, claim: Claim) -> ImageWriter:
        """Writer for images of a claimed shard."""
        return ImageWriter(self.path(claim.number, "partial"))

    def publish(self, claim: Claim, records: Sequence[Record], failures: Sequence[Record], details: dict) -> None:
        """Make a shard count as finished: its tar, its lines of the lists, then its statistics.

        Args:
            claim: with all images of the records in `files`.
            records: of all images.
            failures: of all samples without an image, with a `reason`.
            details: further values for the statistics.
        """
        listed, failures = list(records), sorted(failures, key=itemgetter("row", "copy"))
        if self.is_tar:
            name = f"tars/{claim.number:06d}.tar"
            size, digest = self.pack(claim.number, records)
            details = {**details, "tar": {"name": name, "bytes": size, "sha256": digest}}
            listed = [{**record, "tar": name} for record in records]
        append_lines(self.index, listed)
        append_lines(self.failures, failures)
        hashed = [{**record, **dict(zip(("bytes", "sha256"), claim.files[record["image"]], strict=True))}
                  for record in listed]  # fmt: skip
        write_json(self.path(claim.number, "json"), {
            "shard": claim.number, "images": len(records), "failed": len(failures), **details,
            "host": socket.gethostname(), "records": hashed, "failures": failures,
        })  # fmt: skip
        if self.is_tar:
            shutil.rmtree(self.path(claim.number, "partial"))

    def pack(self, number: int, records: Sequence[Record]) -> tuple[int, str]:
        """Write a shard's tar: `KEY.png`, `KEY.mask.png` (ids), `KEY.json` a sample; always the same bytes.

        Returns:
            Its size and SHA-256.
        """
        work, path = self.path(number, "partial"), self.folder / "tars" / f"{number:06d}.tar"

        def write() -> tuple[int, str]:
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, lambda file: write_tar(file, work, records), work / ".tmp-tar")
            return path.stat().st_size, file_sha256(path)

        return with_retries(write, path, sum((work / record["image"]).stat().st_size for record in records))

    def unpack(self, number: int) -> None:
        """Bring the images of a published tar back into the work folder, to add to them."""
        path, work = self.folder / "tars" / f"{number:06d}.tar", self.path(number, "partial")
        if not path.is_file():
            return
        try:
            with tarfile.open(path) as archive:
                for member in archive:  # extractall is only safe with a filter, which Python 3.11.2 does not have
                    if not member.isfile() or Path(member.name).name != member.name:
                        raise tarfile.TarError(f"{member.name!r} is no plain file of a shard")
                    with archive.extractfile(member) as source, open(work / member.name, "wb") as target:
                        shutil.copyfileobj(source, target)
        except (OSError, tarfile.TarError) as error:
            raise OutputError(f"{path}: cannot be read ({error}). Expected the tar of a finished shard. Run "
                              "inference.py --verify, which removes it if it is damaged, then this again.") from error

    def sweep(self, is_finished: Callable[[Record | None], bool]) -> None:
        """Remove what killed processes left of shards with finished statistics."""
        folder = self.folder / "shards"
        for number in sorted({int(path.stem) for path in [*folder.glob("*.lock"), *folder.glob("*.partial")]}):
            if is_finished(self.statistics(number)):
                with self.claim(number) as claim:
                    if claim and is_finished(self.statistics(number)):
                        shutil.rmtree(self.path(number, "partial"))

    def settle(self) -> None:
        """Leave index.jsonl and failures.jsonl complete and in order, as the statistics of the shards say."""

        def listed() -> Iterator[Record]:
            for statistics in self.all_statistics():
                for record in statistics["records"]:
                    yield {key: value for key, value in record.items() if key not in ("bytes", "sha256")}

        def rewrite() -> None:
            with lock(self.folder / ".lock"):
                write_lines(self.index, listed())
                write_lines(self.failures, (record for part in self.all_statistics() for record in part["failures"]))

        with_retries(rewrite, self.index)


def leave(work: Path, lock: Path) -> None:
    """Remove the lock file and, when it is empty, the work folder; whatever the folder's state."""
    for remove, path in ((Path.rmdir, work), (Path.unlink, lock)):
        try:
            remove(path)
        except OSError as error:
            logger.debug("%s: stays (%s)", path, error)


def is_sound(path: Path) -> bool:
    """Whether an image file decodes completely."""
    try:
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
            return True
        with Image.open(path) as image:
            image.load()
    except Exception:  # Pillow raises OSError, SyntaxError, struct.error, zlib.error, ...
        return False
    return True


def mask_name(image: str) -> str:
    """Name of the mask that belongs to an image of a tar."""
    return f"{Path(image).stem}.mask.png"


def write_tar(file: IO[bytes], work: Path, records: Sequence[Record]) -> None:
    """Write samples to a tar without times, owners or anything else that could differ between runs."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for record in records:
            name = record["image"]
            members = {file_name: (work / file_name).read_bytes() for file_name in (name, mask_name(name))}
            members[f"{Path(name).stem}.json"] = json.dumps(record).encode()
            for member, content in members.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
