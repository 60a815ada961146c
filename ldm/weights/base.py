"""Files that hold only what was trained: which weight files they stand on, by their hash, and how these are found."""
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.files import file_sha256
from ldm.util import UserError
from ldm.weights.checkpoint import Checkpoint, open_checkpoint


def describe_bases(origins: Mapping[str, str]) -> str:
    """What a file says about the weights that it leaves out.

    Args:
        origins: our name of a tensor -> file or folder that holds it.
    Returns:
        JSON: a list of `path`, `sha256` and the `tensors` taken from there.
    """
    return json.dumps([
        {"path": str(Path(path).absolute()), "sha256": hash_weights(path),
         "tensors": sorted(name for name, origin in origins.items() if origin == path)}
        for path in dict.fromkeys(origins.values())])


def hash_weights(path: str | Path) -> str:
    """SHA-256 of a weight file, or of the names and hashes of all files in a folder of weights.

    Of a folder of SD3.5 only the parts that are read count (see open_folder): its text encoders have many gigabytes.
    """
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    parts = [path / part for part in ("transformer", "vae")] if (path / "transformer").is_dir() else [path]
    files = sorted(file for part in parts for file in part.rglob("*") if file.is_file())
    lines = [f"{file_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_whole(path: str | Path, known: Iterable[str] = (), **options: Any) -> list[Checkpoint]:
    """Open a weight file and what it stands on.

    Args:
        path, known, options: see open_checkpoint.
    Returns:
        Its bases, each cut down to what it gives, and last the file itself: later ones win.
    Raises:
        UserError: naming every base that is not there, or is another file, with the hash that it must have.
    """
    checkpoint = open_checkpoint(path, known, **options)
    bases = [(find_base(checkpoint, base, is_checked=True), set(base["tensors"])) for base in read_bases(checkpoint)]
    opened = []
    for file, names in bases:
        found = open_checkpoint(file, names)
        opened.append(replace(found, tensors={name: t for name, t in found.tensors.items() if name in names}))
    return [*opened, checkpoint]


def check_bases(checkpoint: Checkpoint) -> None:
    """UserError if a base of a checkpoint is nowhere; hashes, which take seconds, are left to open_whole."""
    for base in read_bases(checkpoint):
        find_base(checkpoint, base, is_checked=False)


def read_bases(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What describe_bases wrote into a file; empty for a whole one."""
    text = checkpoint.metadata.get("base")
    if text is None:
        return []
    try:
        bases = [{"path": str(base["path"]), "sha256": str(base["sha256"]), "tensors": [*map(str, base["tensors"])]}
                 for base in json.loads(text)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {checkpoint.name}: its list of base files is damaged ({error}). Expected path, "
                        "sha256 and tensors of each. Fetch it again.") from error
    return bases


def find_base(checkpoint: Checkpoint, base: Mapping[str, Any], is_checked: bool) -> Path:
    """Where a base lies: at its old path, or beside the file that stands on it."""
    name = Path(base["path"]).name
    places = list(dict.fromkeys([Path(base["path"]), Path(checkpoint.name).parent / name]))
    there = [place for place in places if place.is_file() or place.is_dir()]
    for place in there:
        if not is_checked or hash_weights(place) == base["sha256"]:
            return place
    wrong = f" {' and '.join(map(str, there))} is another file." if there else ""
    raise UserError(
        f"checkpoint {checkpoint.name}: holds only what was trained; {len(base['tensors'])} tensors are in {name} "
        f"(sha256 {base['sha256']}), which is missing.{wrong} Expected it as {' or '.join(map(str, places))}. Put it "
        "there; python scripts/convert_checkpoint.py THIS WHOLE.safetensors then makes one file of both.")
