"""Weights of every layout under our names; files that hold only what was trained, and what they stand on."""
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ldm.files import atomic_write, file_sha256
from ldm.util import UserError
from ldm.weights.files import Checkpoint, StoredTensor, read_file, read_folder
from ldm.weights.names import PARTS, to_our_names
from ldm.weights.sd35 import adopt

REST = "tisynth"  # where conversions of old put what diffusers has no place for
# Matrices in some files, 1x1 convolutions here: attention of the autoencoder in diffusers, transformers of SD2.
PROJECTION = re.compile(r".*(\.attn_1\.(q|k|v|proj_out)|(put_blocks\.\d+|middle_block)\.1\.proj_(in|out))\.weight")
CLASSES = {"UNet2DConditionModel": "unet", "ControlNetModel": "controlnet", "AutoencoderKL": "vae",
           "CLIPTextModel": "text_encoder"}


def open_checkpoint(path: str | Path, known: Iterable[str] = (), use_ema: bool = False,
                    drop_objects: bool = False, entries: Sequence[str] = ("state_dict",)) -> Checkpoint:
    """Open weights of any layout that the method can use.

    Args:
        path: safetensors or torch file (wrapped or flat; of Stable Diffusion, ControlNet with or without its prefix,
            TISynth, CLIP, diffusers, ours), or a diffusers folder, whole or of one part.
        known: names of the network to fill; only needed for a file that has nothing but averaged weights.
        use_ema: take averaged weights.
        drop_objects, entries: see ldm.weights.files.read_file.
    Returns:
        Its tensors under our names, not yet read.
    Raises:
        FileNotFoundError: if there is nothing.
        UserError: if it cannot be used (see read_file, to_our_names).
    """
    if Path(path).is_dir():
        return open_folder(Path(path))
    return under_our_names(read_file(path, drop_objects, entries), known, use_ema)


def open_folder(folder: Path) -> Checkpoint:
    """Open a diffusers folder: `unet` or `transformer`, `vae`, `text_encoder`, `controlnet` in it, or one part alone.

    Text encoders of a folder with a `transformer` are left out: prompts are encoded before (scripts/encode_prompts.py).
    """
    own = read_folder(folder)
    if own is not None:
        return replace(under_our_names(own), name=str(folder))
    if (folder / "transformer").is_dir():
        parts = {name: open_folder(folder / name) for name in ("transformer", "vae")}
    else:
        found = {name: read_part(folder / name, name) for name in (*PARTS, REST)}
        parts = {name: under_our_names(raw) for name, raw in found.items() if raw is not None}
    if not parts:
        raise UserError(f"checkpoint {folder}: a folder without weights. Expected {', '.join(PARTS)} in it with "
                        "diffusion_pytorch_model.safetensors or model.safetensors. Check the path.")
    tensors = {name: stored for part in parts.values() for name, stored in part.tensors.items()}
    config = next((part.config for part in parts.values() if part.config is not None), None)
    return Checkpoint(str(folder), tensors, config,
                      notes=[f"{name}: {'; '.join(part.notes)}" for name, part in parts.items() if part.notes])


def read_part(folder: Path, part: str) -> Checkpoint | None:
    """A part of a diffusers folder, if it is there; UserError if its config.json names the class of another one."""
    raw, path = read_folder(folder), folder / "config.json"
    if raw is not None and path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        name = found.get("_class_name") or next(iter(found.get("architectures") or []), None)
        if CLASSES.get(name, part) != part:
            raise UserError(f"checkpoint {path}: a {name}. Expected the {part} of a diffusers folder. Check the path.")
    return raw


def under_our_names(raw: Checkpoint, known: Iterable[str] = (), use_ema: bool = False) -> Checkpoint:
    """A file as it was read -> the same under our names (see to_our_names), its config as a DictConfig.

    Projections become 1x1 convolutions, and the joint projection of open_clip's attention falls into its three parts.
    """
    adopted, notes = adopt(raw.tensors)
    names, further = to_our_names(adopted, known, use_ema)
    tensors = {ours: adopted[theirs] for ours, theirs in names.items()}
    for name, theirs in names.items():
        stored = tensors[name]
        if re.search(r"\.attn\.in_proj_(weight|bias)$", theirs):
            part = "qkv".index(name.split(".")[-2][0])
            tensors[name] = StoredTensor((stored.shape[0] // 3, *stored.shape[1:]), stored.dtype,
                                         lambda read=stored.read, part=part: read().chunk(3)[part])
        elif len(stored.shape) == 2 and PROJECTION.fullmatch(name):
            tensors[name] = StoredTensor(
                (*stored.shape, 1, 1), stored.dtype, lambda read=stored.read: read()[..., None, None])
    renamed = sum(ours != theirs for ours, theirs in names.items())
    counted = [f"renamed {renamed} of {len(adopted)} tensors"] if renamed else []
    return replace(raw, tensors=tensors, config=read_config(raw), notes=[*notes, *further, *counted])


def read_config(raw: Checkpoint) -> DictConfig | None:
    """The config inside a file.

    Raises:
        UserError: if it is no mapping, or has interpolations, which could read the environment of the process.
    """
    if raw.config is None:
        return None
    if "${" in str(raw.config):
        raise UserError(f"checkpoint {raw.name}: its config has interpolations. Expected plain values. Give --config.")
    try:
        config = OmegaConf.create(raw.config)
    except Exception as error:  # yaml's own exceptions share no public base below Exception in omegaconf's API
        raise UserError(f"checkpoint {raw.name}: its config is not valid ({error}). Give --config.") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"checkpoint {raw.name}: its config is no mapping. Give --config.")
    return config


def save_safetensors(path: Path, weights: Mapping[str, Tensor], config: DictConfig | None = None,
                     metadata: Mapping[str, str] | None = None) -> None:
    """Write weights with the resolved config as yaml under the metadata key `config`, atomically."""
    from safetensors.torch import save_file
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = dict(metadata or {})
    if config is not None:
        header["config"] = OmegaConf.to_yaml(config, resolve=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}

    def write(file: IO[bytes]) -> None:
        save_file(tensors, file.name, metadata=header)  # another file in its place, which its owner alone may read
        with suppress(OSError):  # file systems without modes: no reason to lose the weights
            os.chmod(file.name, stat.S_IMODE(os.fstat(file.fileno()).st_mode))

    atomic_write(path, write)


def describe_bases(origins: Mapping[str, str]) -> str:
    """What a file says about the weights that it leaves out: JSON, a list of `path`, `sha256` and `tensors` there.

    Args:
        origins: our name of a tensor -> file or folder that holds it.
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
    opened = []
    for base, file in find_bases(checkpoint, is_checked=True):
        names = set(base["tensors"])
        found = open_checkpoint(file, names)
        opened.append(replace(found, tensors={name: t for name, t in found.tensors.items() if name in names}))
    return [*opened, checkpoint]


def find_bases(checkpoint: Checkpoint, is_checked: bool = False) -> list[tuple[dict[str, Any], Path]]:
    """What describe_bases wrote into a file, and where each base lies: at its old path, or beside the file.

    UserError if the list is damaged, or a base is nowhere; with is_checked hashes count, which takes seconds.
    """
    try:
        bases = [{"path": str(base["path"]), "sha256": str(base["sha256"]), "tensors": [*map(str, base["tensors"])]}
                 for base in json.loads(checkpoint.metadata.get("base", "[]"))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {checkpoint.name}: its list of base files is damaged ({error}). Expected path, "
                        "sha256 and tensors of each. Fetch it again.") from error
    return [(base, find_base(checkpoint.name, base, is_checked)) for base in bases]


def find_base(checkpoint: str, base: Mapping[str, Any], is_checked: bool) -> Path:
    """Where one base lies (see find_bases)."""
    name = Path(base["path"]).name
    places = list(dict.fromkeys([Path(base["path"]), Path(checkpoint).parent / name]))
    there = [place for place in places if place.is_file() or place.is_dir()]
    for place in there:
        if not is_checked or hash_weights(place) == base["sha256"]:
            return place
    wrong = f" {' and '.join(map(str, there))} is another file." if there else ""
    raise UserError(
        f"checkpoint {checkpoint}: holds only what was trained; {len(base['tensors'])} tensors are in {name} "
        f"(sha256 {base['sha256']}), which is missing.{wrong} Expected it as {' or '.join(map(str, places))}. Put it "
        "there; python scripts/convert_checkpoint.py THIS WHOLE.safetensors then makes one file of both.")
