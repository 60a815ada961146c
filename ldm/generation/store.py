"""Shards of a run: groups of rows that one process generates at a time and publishes with their statistics file last.

`shards/000012.json` is there if and only if shard 12 is finished; it lists every image with size and SHA-256.
`shards/000012.lock` is locked as long as a living process works on the shard. The kernel frees the lock when it
dies, on network file systems too, so there is no time after which a claim expires and no clock that could be wrong.
`shards/000012.partial/` holds what is not complete.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ldm.files import Record, file_sha256, read_json, write_json
from ldm.generation.writer import ImageWriter
from ldm.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass
class Claim:
    """A shard that this process has for itself.

    Attributes:
        number: of the shard.
        lock: open lock file; says who generates and how far it is.
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


class ShardStore(RunFolder):
    """The output folder of a run and its shards on disk; readers give neither settings nor details (see RunFolder)."""

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None = None,
                 details: Mapping[str, Any] | None = None) -> None:
        super().__init__(folder, settings, items="index.jsonl", key=("row", "copy"), results="images/*",
                         details=details)

    def begin(self, layout: Mapping[str, int]) -> dict[str, int]:
        """Create the output folder, or join a run that generates the same images (see RunFolder.open).

        Args:
            layout: `rows`, `copies`, and `shard_size`, which only counts for a new run.
        Returns:
            The run's layout: that of its first command, with the largest number of copies asked for so far.
        """

        def update(record: Record) -> Record:
            for name in ("images", "shards"):
                (self.folder / name).mkdir(exist_ok=True)
            old = record.get("layout", {})
            return {"layout": {**layout, **old, "copies": max(layout["copies"], old.get("copies", 0))}}

        return self.open(update)["layout"]

    def statistics_path(self, number: int) -> Path:
        """The file that is there if and only if a shard is finished."""
        return self.folder / "shards" / f"{number:06d}.json"

    def statistics(self, number: int) -> dict[str, Any] | None:
        """What a finished shard's statistics file says; None if the shard is not finished."""
        try:
            return read_json(self.statistics_path(number))
        except ValueError:  # damaged: its images are looked at again
            logger.warning("%s: damaged, the shard counts as not finished", self.statistics_path(number))
            return None

    def statistics_time(self, number: int) -> int | None:
        """When the statistics of a shard were written, in nanoseconds; None if there are none."""
        path = self.statistics_path(number)
        return path.stat().st_mtime_ns if path.exists() else None

    def all_statistics(self) -> Iterator[dict[str, Any]]:
        """Statistics of all finished shards, in order."""
        for path in sorted((self.folder / "shards").glob("*.json")):
            statistics = self.statistics(int(path.stem))
            if statistics is not None:
                yield statistics

    @contextmanager
    def claim_shard(self, number: int) -> Iterator[Claim | None]:
        """Take a shard for this process; gives None if another process has it."""
        with self.claim(f"shards/{number:06d}") as held:
            yield held and Claim(number, held)

    def find_finished(self, claim: Claim, records: Iterable[Record]) -> None:
        """Note in the claim which images are complete: those in the statistics, and sound ones found on disk."""
        statistics = self.statistics(claim.number) or {"records": []}
        known = {record["image"]: (record["bytes"], record["sha256"]) for record in statistics["records"]}
        for record in records:
            name = record["image"]
            path = self.folder / name
            if not path.is_file():
                continue
            if name in known and path.stat().st_size == known[name][0]:
                claim.files[name] = known[name]
            elif is_sound(path):
                claim.files[name] = path.stat().st_size, file_sha256(path)

    def forget(self, claim: Claim, records: Iterable[Record]) -> None:
        """Remove what there is of a shard, to generate it again."""
        for path in [self.statistics_path(claim.number), *(self.folder / record["image"] for record in records)]:
            path.unlink(missing_ok=True)

    def writer(self, claim: Claim) -> ImageWriter:
        """Writer for images of a claimed shard."""
        return ImageWriter(self.work(f"shards/{claim.number:06d}"))

    def publish(self, claim: Claim, records: Sequence[Record], failures: Sequence[Record], details: dict) -> None:
        """Make a shard count as finished: its lines of the lists, then its statistics with further details.

        Args:
            claim: with the images that are complete in `files`.
            records: of all images; those of others are left out.
            failures: of all samples without an image, with a `reason`.
        """
        records = [record for record in records if record["image"] in claim.files]
        failures = sorted(failures, key=itemgetter(*self.key))
        self.add(records, failures)
        hashed = [{**record, **dict(zip(("bytes", "sha256"), claim.files[record["image"]], strict=True))}
                  for record in records]  # fmt: skip
        write_json(self.statistics_path(claim.number), {
            "shard": claim.number, "images": len(records), "failed": len(failures), **details,
            "host": socket.gethostname(), "records": hashed, "failures": failures,
        })  # fmt: skip

    def is_unfinished(self, number: int, copies: int) -> bool:
        """Whether a shard lacks images: never generated, failed samples, or fewer copies."""
        statistics = self.statistics(number)
        return not statistics or statistics["failed"] > 0 or statistics["copies"] < copies

    def sweep(self, copies: int) -> None:
        """Remove what killed processes left of finished shards."""
        folder = self.folder / "shards"
        for number in sorted({int(path.stem) for path in [*folder.glob("*.lock"), *folder.glob("*.partial")]}):
            if not self.is_unfinished(number, copies):
                with self.claim_shard(number):  # on the way out it removes them
                    pass

    def settle(self) -> None:
        """Leave index.jsonl and failures.jsonl complete and in order, as the statistics of the shards say."""

        def images() -> Iterator[Record]:
            for statistics in self.all_statistics():
                for record in statistics["records"]:
                    yield {key: value for key, value in record.items() if key not in ("bytes", "sha256")}

        self.rewrite(lambda: (images(), (record for part in self.all_statistics() for record in part["failures"])))


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
