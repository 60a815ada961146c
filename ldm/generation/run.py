"""Identity of a run: an output folder belongs to one set of inputs, weights and settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.files import OutputError, find_changes, lock, write_json


def open_run(
    folder: Path, fingerprint: Mapping[str, Any], details: Mapping[str, Any], layout: Mapping[str, Any]
) -> dict[str, Any]:
    """Create a run's output folder, or join a run that paints the same pictures.

    Args:
        folder: output folder, made when missing.
        fingerprint: JSON values that decide what the pictures look like.
        details: further JSON values worth keeping; `config` is compared too, for the message.
        layout: `rows`, `copies`, and `shard_size`, which only counts for a new run.

    Returns:
        The run's layout: that of its first command, with the largest number of copies asked for so far.

    Raises:
        FileExistsError: if the folder holds a run with another fingerprint; names the differences.
        OutputError: if the folder cannot be written.
    """
    check_run(folder, fingerprint, details)
    try:
        for name in ("images", "shards"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock"):
            check_run(folder, fingerprint, details)
            old = read_run(folder).get("layout", {})
            layout = {**layout, **old, "copies": max(layout["copies"], old.get("copies", 0))}
            if layout != old:
                write_json(folder / "run.json", {"fingerprint": fingerprint, "layout": layout, **details})
    except FileExistsError:  # another run was begun a moment ago
        raise
    except OSError as error:
        raise OutputError(f"--outdir: {folder} cannot be written ({error}). Expected a folder that can be. "
                          "Choose another --outdir.") from error
    return dict(layout)


def read_run(folder: Path) -> dict[str, Any]:
    """Contents of run.json, empty when there is none; FileExistsError if it is no run record."""
    path = folder / "run.json"
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run["fingerprint"], dict):
            raise TypeError("fingerprint is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(
            f"{path}: not a run record ({error}). Expected what inference.py wrote. Choose another --outdir."
        ) from error
    return run


def check_run(folder: Path, fingerprint: Mapping[str, Any], details: Mapping[str, Any] | None = None) -> None:
    """Raise FileExistsError if the folder holds other pictures than this fingerprint's (see open_run)."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"--outdir: {folder} is a file. Expected a folder. Choose another --outdir.")
    run = read_run(folder)
    if not run:
        if (folder / "images").is_dir() and any((folder / "images").iterdir()):
            raise FileExistsError(
                f"--outdir: {folder} has images but no run.json. Expected a new folder or an earlier run of"
                " inference.py. Choose another --outdir."
            )
        return
    old, new = run["fingerprint"], dict(fingerprint)
    if old == json.loads(json.dumps(new)):
        return
    if run.get("config") and (details or {}).get("config"):
        old, new = {**old, "config": run["config"]}, {**new, "config": details["config"]}
    raise FileExistsError(
        f"--outdir: {folder} holds a run with other settings ({find_changes(old, new)}). Expected the same settings to "
        "continue it. Choose another --outdir."
    )
