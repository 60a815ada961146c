"""State of an output folder, for whoever asks: how far its run is, and whether its files are what was written."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from ldm.files import file_sha256, is_locked
from ldm.generation.store import ShardStore

SHOWN = 20
HASHING_THREADS = 8


def open_store(folder: Path) -> tuple[ShardStore, dict[str, Any]]:
    """Shards and run record of an output folder; FileNotFoundError if it is none."""
    store = ShardStore(folder)
    run = store.read()
    if "layout" not in run:
        raise FileNotFoundError(f"--outdir: {folder} has no run of inference.py. Expected its output folder. Check it.")
    return store, run


def describe_run(folder: Path) -> tuple[str, int]:
    """Shards done, running, interrupted and to do, with rates and the time left; and the number of failed samples."""
    store, run = open_store(folder)
    layout = run["layout"]
    count = -(-layout["rows"] // layout["shard_size"])
    finished = list(store.all_statistics())
    done = {part["shard"] for part in finished if part["copies"] >= layout["copies"]}
    with_failures = sum(part["failed"] > 0 for part in finished)
    images, failed = (sum(part[key] for part in finished) for key in ("images", "failed"))
    lines, running, stopped, under_way = [], 0, 0, 0
    for path in sorted((folder / "shards").glob("*.lock")):
        if int(path.stem) in done:
            continue
        progress = read_progress(path)
        state = "running" if is_locked(path) else "interrupted"
        running, stopped = running + (state == "running"), stopped + (state != "running")
        under_way += progress.get("done", 0)
        lines.append(f"  shard {path.stem} {state}, {progress.get('done', 0)} of {progress.get('total', '?')} images, "
                     f"{progress.get('host', '?')} pid {progress.get('pid', '?')}")
    total = layout["rows"] * layout["copies"]
    head = [f"{folder}: {count} shards of {layout['shard_size']} rows, {layout['copies']} images each row",
            f"  {len(done)} done ({with_failures} with failures), {running} running, {stopped} interrupted, "
            f"{count - len(done) - running - stopped} to do",
            f"  {images} images in finished shards, {failed} failed"]  # fmt: skip
    seconds = sum(part["seconds"] for part in finished if part["painted"])
    if seconds:
        rate = sum(part["painted"] for part in finished) / seconds
        left = timedelta(seconds=round(max(0, total - images - failed - under_way) / rate / max(running, 1)))
        head.append(f"  {3600 * rate:.0f} images/hour a process, about {left} left with {max(running, 1)} processes")
    return "\n".join(head + lines[:SHOWN] + [f"  and {len(lines) - SHOWN} more"] * (len(lines) > SHOWN)), failed


def read_progress(path: Path) -> dict[str, Any]:
    """What the lock file of a shard says; empty if it is just being written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def verify_run(folder: Path) -> tuple[str, int]:
    """Compare sizes and hashes of all files of finished shards; shards with a wrong file count as not finished again.

    Returns:
        Text, and the number of damaged or missing files.

    Raises:
        OutputError, OSError: if the folder cannot be written.
    """
    store, _ = open_store(folder)
    lines, checked = [], 0
    with ThreadPoolExecutor(min(HASHING_THREADS, (os.cpu_count() or 1) + 1)) as pool:
        for part in store.all_statistics():
            files = part["records"]
            checked += len(files)
            problems = pool.map(lambda entry: find_damage(folder / entry["image"], entry), files)
            bad = {entry["image"]: problem for entry, problem in zip(files, problems, strict=True) if problem}
            if bad:
                with store.claim_shard(part["shard"]) as claim:
                    if claim:  # else a process is at work on it
                        requeue(store, part["shard"], bad)
                lines += [f"  {name}: {problem}" for name, problem in bad.items()]
    store.settle()
    text = f"{folder}: {checked} files checked, {len(lines)} damaged"
    if lines:
        text += ". Run the same command of inference.py again to generate them."
    return "\n".join([text, *lines[:SHOWN]] + [f"  and {len(lines) - SHOWN} more"] * (len(lines) > SHOWN)), len(lines)


def find_damage(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file, None if nothing."""
    if not path.is_file():
        return "missing"
    try:
        size, digest = path.stat().st_size, file_sha256(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if size != entry["bytes"]:
        return f"{size} bytes, written were {entry['bytes']}"
    return None if digest == entry["sha256"] else "other contents than were written"


def requeue(store: ShardStore, number: int, names: Iterable[str]) -> None:
    """Remove wrong files and the statistics of their shard, so that the next run generates them."""
    for name in names:
        (store.folder / name).unlink(missing_ok=True)
    store.statistics_path(number).unlink(missing_ok=True)
