"""A folder of results that belongs to one set of settings, which generation, filter, resample and others share."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from ldm.files import (
    OutputError,
    Record,
    append_lines,
    find_changes,
    lock,
    read_json,
    read_lines,
    take_lock,
    with_retries,
    write_json,
    write_lines,
)


class RunFolder:
    """A folder of results that belongs to one set of settings: whoever has the same ones continues it.

    Its record is a JSON file, `{"settings": {...}, ...}`. Items that are done have a line each in one list, those that
    could not be done one in failures.jsonl, with a `reason`.

    Args:
        path: the folder; it need not exist.
        settings: JSON values that decide the results.
        flag: option of the command line that names the folder, for messages.
        record: file name of the record.
        items: file name of the list of items.
        key: names of the values that tell items apart.
        results: pattern of the results; a folder that has some but no record is somebody else's.
        details: further values for the record; they are compared only to explain why settings differ.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any] | None = None, flag: str = "--outdir",
                 record: str = "run.json", items: str = "items.jsonl", key: Sequence[str] = ("image",),
                 results: str = "*.png", details: Mapping[str, Any] | None = None) -> None:
        self.folder, self.settings, self.details = path, settings or {}, details or {}
        self.flag, self.key, self.results = flag, key, results
        self.record, self.items, self.failures = path / record, path / items, path / "failures.jsonl"

    def read(self) -> Record:
        """The record, {} if there is none. Older forms are read: settings named `fingerprint`, or nothing but settings.

        Raises:
            FileExistsError: if the file is something else.
        """
        try:
            content = read_json(self.record)
            if content is None:
                return {}
            if "settings" not in content:
                content = {"settings": content.pop("fingerprint", None) or dict(content), **content}
            if not isinstance(content["settings"], dict):
                raise TypeError("its settings are no object")
        except (ValueError, TypeError, AttributeError) as error:
            raise FileExistsError(f"{self.record}: not the record of a run ({error}). Expected what this command "
                                  f"writes. Choose another {self.flag}.") from error
        return content

    def changes(self, record: Record) -> str:
        """What differs between the settings in a record and those at hand, "" if nothing does (see find_changes)."""
        changes = find_changes(record["settings"], self.settings)
        explained = {key: value for key, value in self.details.items() if key in record}
        more = find_changes({key: record[key] for key in explained}, explained) if changes else ""
        return ", ".join(filter(None, (changes, more)))

    def check(self) -> Record:
        """The record (see read).

        Raises:
            FileExistsError: if the folder holds results of other settings or of somebody else.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.flag}: {self.folder} is a file. Expected a folder. Choose another one.")
        record = self.read()
        if not record and any(self.folder.glob(self.results)):
            raise FileExistsError(
                f"{self.flag}: {self.folder} has results but no {self.record.name}. Expected a new folder or one of an "
                f"earlier run. Choose another {self.flag}.")
        if changes := record and self.changes(record):
            raise FileExistsError(
                f"{self.flag}: {self.folder} holds results of other settings ({changes}). Expected the same settings "
                f"to go on. Choose another {self.flag}.")
        return record

    def open(self, update: Callable[[Record], Record] = lambda _: {}) -> Record:
        """Create the folder, or join it.

        Args:
            update: gives further values of the record from the record so far ({} in a new folder).
        Returns:
            These values.
        Raises:
            FileExistsError: see check.
            OutputError: if the folder cannot be written.
        """
        self.check()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with lock(self.folder / ".lock"):
                record = self.check()
                more = update(record)
                if not record or any(record.get(key) != value for key, value in more.items()):
                    self.write(**more)
        except (FileExistsError, OutputError):  # another run was begun a moment ago
            raise
        except OSError as error:
            raise OutputError(f"{self.flag}: {self.folder} cannot be written ({error}). Expected a folder that can be. "
                              f"Choose another {self.flag}.") from error
        return more

    def write(self, **more: Any) -> None:
        """Write the record: settings, further values, details."""
        write_json(self.record, {"settings": self.settings, **more, **self.details})

    def work(self, name: str) -> Path:
        """Folder for what is not complete of a part of the work that this process has (see claim)."""
        return self.folder / f"{name}.partial"

    @contextmanager
    def claim(self, name: str) -> Iterator[IO[bytes] | None]:
        """Keep a part of the work for this process; gives its open lock file, None if another process has it.

        Args:
            name: of the part: `{name}.lock` is its lock, `{name}.partial/` an empty folder on entry, gone on exit.
        """
        path, work = self.folder / f"{name}.lock", self.work(name)
        held = with_retries(lambda: take_lock(path), path)
        if held is None:
            yield None
            return
        with held:
            try:
                shutil.rmtree(work, ignore_errors=True)  # a killed process may have left it
                with_retries(lambda: work.mkdir(exist_ok=True), work)
                yield held
            finally:
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):
                    path.unlink()

    def done(self) -> dict[Any, Record]:
        """Records of the items that are done, by key."""
        return read_lines(self.items, *self.key)

    def failed(self) -> dict[Any, Record]:
        """Records of the items that could not be done, by key."""
        return read_lines(self.failures, *self.key)

    def add(self, done: Iterable[Record], failed: Iterable[Record] = ()) -> None:
        """Note items as done or failed; several processes may."""
        append_lines(self.items, done)
        append_lines(self.failures, failed)

    def rewrite(self, collect: Callable[[], tuple[Iterable[Record], Iterable[Record]]]) -> None:
        """Replace both lists with (done, failed) of a function that runs while no other process can add to them."""

        def write() -> None:
            with lock(self.folder / ".lock"):
                for path, records in zip((self.items, self.failures), collect(), strict=True):
                    write_lines(path, records)

        with_retries(write, self.items)

    def finish(self, keys: Iterable[Any], failed: Iterable[Record]) -> list[Record]:
        """Leave the lists in order, with one line for each item of the run and no others.

        Args:
            keys: of all items of the run.
            failed: records of what failed in this process.
        Returns:
            All failures, of other processes too.
        """
        key_of, keys = itemgetter(*self.key), set(keys)
        own = {key_of(record): record for record in failed}

        def collect() -> tuple[list[Record], list[Record]]:
            done = {key: record for key, record in self.done().items() if key in keys and key not in own}
            others = {key: record for key, record in self.failed().items() if key in keys and key not in done}
            return list(done.values()), [record for _, record in sorted({**others, **own}.items())]

        self.rewrite(collect)
        return list(self.failed().values())
