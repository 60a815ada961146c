"""Reads weight files of any origin without running anything in them: safetensors, and torch pickles of tensors."""
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.util import UserError

MAX_TENSORS = 20_000  # SD1.5 with both branches and averaged weights has about 2,700
MAPPED_BYTES = 16 << 20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# What old Lightning files hold beside the weights. None of it is imported or called: stand-ins take its place.
HARMLESS_PREFIXES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.dtypes.",
                     "datetime.")
HARMLESS = {
    "argparse.Namespace", "builtins.complex", "builtins.dict", "builtins.float", "builtins.frozenset", "builtins.int",
    "builtins.list", "builtins.set", "builtins.slice", "builtins.str", "collections.defaultdict", "collections.deque",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.ndarray", "pathlib.Path", "pathlib.PosixPath",
    "pathlib.PurePosixPath", "pathlib.WindowsPath", "typing.Any",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that is read when it is asked for.

    Attributes:
        shape, dtype: as stored.
        read: returns it on the CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a file or folder.

    Attributes:
        name: its path, for reports.
        tensors: read when asked for; by the names in the file, or by ours (see ldm.weights.checkpoint).
        config: inside the file, yaml or plain values, or as checkpoints are opened a DictConfig; None if there is none.
        metadata: further strings inside the file.
        notes: what was renamed or set aside.
    """

    name: str
    tensors: dict[str, StoredTensor]
    config: Any = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def only(self, prefix: str) -> "Checkpoint":
        """The tensors whose names begin with the prefix."""
        return replace(self, tensors={k: v for k, v in self.tensors.items() if k.startswith(prefix)})

    def read(self) -> dict[str, Tensor]:
        """All tensors, in memory."""
        return {key: stored.read() for key, stored in self.tensors.items()}


class StandIn:
    """Takes the place of an object in a pickle: swallows its arguments and its state, keeps and runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        """Take any arguments: a pickle may rebuild the object in several ways."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class StandInDict:
    """Takes the place of a subclass of dict: becomes a plain dictionary."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:
        """An empty dictionary, which the pickle then fills."""
        return {}


def stand_in(name: str) -> Callable[..., Any]:
    """What takes the place of the object of this dotted name."""
    if name == "builtins.getattr":
        return lambda *_: StandIn
    return StandInDict if name.endswith(("AttributeDict", "defaultdict")) else StandIn


def read_file(path: str | Path, drop_objects: bool = False, entries: Sequence[str] = ("state_dict",)) -> Checkpoint:
    """Open a weight file; what it is follows from its contents, not from its name.

    Args:
        path: safetensors, or a torch file of tensors, flat or under `state_dict`.
        drop_objects: put stand-ins in the place of all objects of a torch file instead of those known as harmless.
        entries: of a torch file that holds several things, take the first of these that is there.
    Returns:
        Its tensors, not yet read, and what it says about them.
    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is no weight file, is damaged or too large, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}. Expected a weight file. Check the path.")
    with path.open("rb") as file:
        start = file.read(64)
    # One header length of safetensors in 32 begins with the byte of a pickle; in a pickle these bytes are not zero.
    if start[8:9] == b"{" and (start[:1] != b"\x80" or start[5:8] == bytes(3)):
        return read_safetensors(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return read_pickle(path, start[:2] == b"PK", drop_objects, entries)
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "is a web page, not weights. The download returned an error or login page. Fetch it again"
    elif text.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not weights. Run git lfs pull"
    elif not start:
        what = "is empty. Fetch it again"
    else:
        what = f"begins with {start[:12]!r}: neither safetensors nor a torch file. Fetch it again"
    raise UserError(f"checkpoint {path}: {what}.")


class SafeFile:
    """Copies tensors out of a safetensors file.

    The library maps files, and every page that was read counts as the process's memory while the map is open: it is
    opened anew after MAPPED_BYTES, so that loading a model takes the model's memory and no more.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.copied = path, 0
        self.file = self.open()

    def open(self) -> Any:
        """A new map of the file; the library checks that header and contents belong together."""
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {self.path}: damaged or cut short ({error}). Expected a complete safetensors "
                            "file. Fetch it again or write it anew.") from error

    def read(self, name: str) -> Tensor:
        """A copy of a tensor."""
        if self.copied > MAPPED_BYTES:
            self.file, self.copied = self.open(), 0
        tensor = self.file.get_tensor(name).clone()
        self.copied += tensor.nbytes
        return tensor


def read_safetensors(path: Path) -> Checkpoint:
    """Open a safetensors file (see read_file)."""
    opened, tensors = SafeFile(path), {}
    check_count(path, len(opened.file.keys()))
    for name in opened.file.keys():
        entry = opened.file.get_slice(name)
        dtype = entry.get_dtype()
        if dtype not in DTYPES:
            raise UserError(f"checkpoint {path}: {name[:80]!r} is of type {dtype!r}. Expected one of "
                            f"{', '.join(DTYPES)}. Convert it.")
        tensors[name] = StoredTensor(tuple(entry.get_shape()), DTYPES[dtype], lambda name=name: opened.read(name))
    metadata = dict(opened.file.metadata() or {})
    return Checkpoint(str(path), tensors, metadata.pop("config", None), metadata)


def read_pickle(path: Path, is_zip: bool, drop_objects: bool, entries: Sequence[str]) -> Checkpoint:
    """Open a torch file (see read_file) with stand-ins for what Lightning files hold beside weights.

    `is_zip`: it is of the format of torch 1.6 or later, which can be mapped instead of read.
    """
    allowed: list[Any] = []
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if is_zip else []
        refused = sorted(name for name in found if name not in HARMLESS and not name.startswith(HARMLESS_PREFIXES)
                         and not drop_objects)
        if refused:
            raise UserError(
                f"checkpoint {path}: holds more than tensors: {', '.join(refused[:8])}. Nothing of it was run. "
                "Expected tensors and plain values. If you need its weights: python scripts/convert_checkpoint.py "
                f"{path} OUT.safetensors --drop_objects (keeps tensors only, in a process of its own).")
        allowed = [(stand_in(name), name) for name in found]
        with torch.serialization.safe_globals(allowed), path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle's protocol
            # Torch goes by the ending of a path and takes .safetensors for just that, whatever is in the file.
            is_mapped = is_zip and path.suffix.lower() != ".safetensors"
            content = torch.load(path if is_mapped else file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"checkpoint {path}: cannot be read as tensors ({refusal(error)}). Nothing of it was run. "
                        "Expected safetensors or a complete torch file of tensors. Fetch it again.") from error
    return unwrap(path, content, entries)


def refusal(error: Exception) -> str:
    """Why torch's restricted reader stopped, without its advice, which is an unsafe way."""
    text = " ".join(str(error).split())
    called = re.search(r"GLOBAL ([\w.]+)", text)
    if called:
        return f"it names {called[1]}"
    text = text.partition("WeightsUnpickler error: ")[2] or text
    for advice in (" Check the documentation", " This is an internal miniz error", " In PyTorch 2.6"):
        text = text.partition(advice)[0]
    return text.rstrip(".")[:200] or type(error).__name__


def unwrap(path: Path, content: Any, entries: Sequence[str]) -> Checkpoint:
    """The tensors in the contents of a torch file: one of its entries, or the contents themselves."""
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path}: holds a {type(content).__name__}. Expected a dictionary of tensors.")
    weights = next((content[entry] for entry in entries if entry in content), content)
    if not isinstance(weights, Mapping):
        raise UserError(f"checkpoint {path}: its state_dict is a {type(weights).__name__}. Expected a dictionary.")
    check_count(path, len(weights))
    bad = [key for key, value in weights.items() if not isinstance(key, str) or not isinstance(value, Tensor)
           or value.layout != torch.strided or value.dtype not in DTYPES.values()]
    if bad or not weights:
        raise UserError(f"checkpoint {path}: {len(bad)} of {len(weights)} entries are no plain tensors "
                        f"({', '.join(str(key)[:60] for key in bad[:3])}). Expected a state_dict.")
    tensors = {key: StoredTensor(tuple(value.shape), value.dtype, lambda value=value: value.detach())
               for key, value in weights.items()}
    about = content if weights is not content else {}
    config, base = about.get("config"), about.get("base")  # base: see describe_bases
    return Checkpoint(str(path), tensors, config if isinstance(config, Mapping) else None,
                      {"base": base} if isinstance(base, str) else {})


def check_count(path: Path, count: int) -> None:
    """UserError for more tensors than a network of this kind can have."""
    if count > MAX_TENSORS:
        raise UserError(f"checkpoint {path}: has {count:,} tensors. Expected at most {MAX_TENSORS:,}. "
                        "This is no weight file of a network of this kind.")


def read_folder(folder: Path) -> Checkpoint | None:
    """Open the weights that lie directly in a folder of diffusers or transformers, in one file or in several.

    None if there are none; UserError if an index names files that are missing or do not hold what it says.
    """
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for ending in ("safetensors", "safetensors.index.json", "fp16.safetensors", "bin"):
            path = folder / f"{stem}.{ending}"
            if path.is_file():
                return read_shards(path) if ending.endswith("json") else read_file(path)
    return None


def read_shards(index: Path) -> Checkpoint:
    """Open weights that an index spreads over several files (see read_folder)."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        is_valid = all(isinstance(name, str) and name == os.path.basename(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {index}: not an index of weight files ({error}). Fetch it again.") from error
    if not is_valid or len(names) > 1000:
        raise UserError(f"checkpoint {index}: names files outside its folder, or too many. Fetch it again.")
    files = {name: read_file(index.parent / name).tensors for name in names}
    absent = [key for key, name in places.items() if key not in files[name]]
    if absent:
        raise UserError(f"checkpoint {index}: {len(absent)} tensors are not in the files it names ({absent[0]}). "
                        "Fetch all of them again.")
    check_count(index, len(places))
    return Checkpoint(str(index), {key: files[name][key] for key, name in places.items()})
