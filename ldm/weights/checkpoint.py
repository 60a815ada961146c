"""Reading and writing checkpoints. No file is ever allowed to run code."""
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ldm.files import atomic_write
from ldm.util import UserError
from ldm.weights.files import RawFile, StoredTensor, read_file, read_folder
from ldm.weights.names import PARTS, from_diffusers, to_our_names
from ldm.weights.report import fill
from ldm.weights.sd35 import adopt

REST = "tisynth"  # folder of a diffusers directory for what diffusers has no place for
# Matrices in some files, 1x1 convolutions here: attention of the autoencoder in diffusers, transformers of SD2.
PROJECTION = re.compile(r".*(\.attn_1\.(q|k|v|proj_out)|(put_blocks\.\d+|middle_block)\.1\.proj_(in|out))\.weight")
CLASSES = {"UNet2DConditionModel": "unet", "ControlNetModel": "controlnet", "AutoencoderKL": "vae",
           "CLIPTextModel": "text_encoder"}


@dataclass(frozen=True)
class Checkpoint:
    """A weight file or folder under our names.

    Attributes:
        name: its path, for reports.
        tensors: by our names, read when asked for.
        config: config inside the file, None if there is none.
        metadata: further strings inside the file.
        notes: what was renamed or set aside.
    """

    name: str
    tensors: dict[str, StoredTensor]
    config: DictConfig | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def only(self, prefix: str) -> "Checkpoint":
        """The tensors whose names begin with the prefix."""
        return replace(self, tensors={k: v for k, v in self.tensors.items() if k.startswith(prefix)})


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
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    raw, adopted = adopt_file(read_file(path, drop_objects, entries))
    names, notes = to_our_names(raw.tensors, known, use_ema)
    notes = adopted + notes
    renamed = sum(ours != theirs for ours, theirs in names.items())
    notes += [f"renamed {renamed} of {len(raw.tensors)} tensors"] if renamed else []
    metadata = {key: value for key, value in raw.metadata.items() if key != "config"}
    return Checkpoint(str(path), rename(raw, names), read_config(path, raw), metadata, notes)


def adopt_file(raw: RawFile) -> tuple[RawFile, list[str]]:
    """A file of SD3.5's transformer or of CRFM under our names, others as they are; and notes (see adopt)."""
    tensors, notes = adopt(raw.tensors)
    return replace(raw, tensors=tensors), notes


def rename(raw: RawFile, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Tensors of a file under our names: our name -> name in the file.

    Projections become 1x1 convolutions, and the joint projection of open_clip's attention falls into its three parts.
    """
    tensors = {ours: raw.tensors[theirs] for ours, theirs in names.items()}
    for name, theirs in names.items():
        if re.search(r"\.attn\.in_proj_(weight|bias)$", theirs):
            stored, part = tensors[name], "qkv".index(name.split(".")[-2][0])
            tensors[name] = StoredTensor((stored.shape[0] // 3, *stored.shape[1:]), stored.dtype,
                                         lambda read=stored.read, part=part: read().chunk(3)[part])
    for name, stored in tensors.items():
        if len(stored.shape) == 2 and PROJECTION.fullmatch(name):
            tensors[name] = StoredTensor(
                (*stored.shape, 1, 1), stored.dtype, lambda read=stored.read: read()[..., None, None])
    return tensors


def open_folder(folder: Path) -> Checkpoint:
    """Open a diffusers folder: `unet` or `transformer`, `vae`, `text_encoder`, `controlnet` in it, or one part alone.

    Text encoders of a folder with a `transformer` are left out: prompts are encoded before (scripts/encode_prompts.py).
    """
    tensors: dict[str, StoredTensor] = {}
    notes, config = [], None
    own = read_folder(folder)
    if own is not None:
        own, adopted = adopt_file(own)
        names, notes = to_our_names(own.tensors)
        return Checkpoint(str(folder), rename(own, names), notes=adopted + notes)
    if (folder / "transformer").is_dir():
        parts = [open_folder(folder / part) for part in ("transformer", "vae")]
        return Checkpoint(str(folder), parts[0].tensors | parts[1].tensors, notes=[n for p in parts for n in p.notes])
    for part in (*PARTS, REST):
        raw = read_folder(folder / part)
        if raw is None:
            continue
        check_class(folder / part, part)
        if part == REST:
            tensors |= raw.tensors
            config = read_config(folder / part, raw)
        elif part == "text_encoder":
            names, _ = to_our_names(raw.tensors)
            tensors |= rename(raw, names)
        else:
            tensors |= rename(raw, {ours: theirs for theirs, ours in from_diffusers(part, raw.tensors).items()})
        notes.append(f"{part}: {len(raw.tensors)} tensors")
    if not tensors:
        raise UserError(f"checkpoint {folder}: a folder without weights. Expected {', '.join(PARTS)} in it with "
                        "diffusion_pytorch_model.safetensors or model.safetensors. Check the path.")
    return Checkpoint(str(folder), tensors, config, notes=notes)


def check_class(folder: Path, part: str) -> None:
    """UserError if config.json of a part names the class of another one."""
    path = folder / "config.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        name = found.get("_class_name") or next(iter(found.get("architectures") or []), None)
        if CLASSES.get(name, part) != part:
            raise UserError(f"checkpoint {path}: a {name}. Expected the {part} of a diffusers folder. Check the path.")


def read_config(path: Path, raw: RawFile) -> DictConfig | None:
    """The config inside a file.

    Raises:
        UserError: if it is no mapping, or has interpolations, which could read the environment of the process.
    """
    text = raw.metadata.get("config")
    if text is None and raw.config is None:
        return None
    if "${" in (text if text is not None else str(raw.config)):
        raise UserError(f"checkpoint {path}: its config has interpolations. Expected plain values. Give --config.")
    try:
        config = OmegaConf.create(text if text is not None else plain(raw.config))
    except Exception as error:  # yaml's own exceptions share no public base below Exception in omegaconf's API
        raise UserError(f"checkpoint {path}: its config is not valid ({error}). Give --config.") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"checkpoint {path}: its config is no mapping. Give --config.")
    return config


def plain(node: Any) -> Any:
    """Nested mappings and sequences as dict and list."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    return [plain(value) for value in node] if isinstance(node, (list, tuple)) else node


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], DictConfig | None]:
    """Read all tensors of a checkpoint (see open_checkpoint).

    Returns:
        Weights by our names, and the config when the file carries one.
    """
    checkpoint = open_checkpoint(path)
    return {key: stored.read() for key, stored in checkpoint.tensors.items()}, checkpoint.config


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of one file under the names that they have in it (see ldm.weights.files.read_file)."""
    return {key: stored.read() for key, stored in read_file(path).tensors.items()}


def load_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], source: str,
                 may_miss: tuple[str, ...] = ()) -> str:
    """Copy tensors that are in memory into a module and account for every one (see ldm.weights.report.fill).

    Args:
        module: receives the weights; a floating tensor of another precision is converted.
        weights: tensors by key.
        source: name of the file, for the report.
        may_miss: prefixes of keys that may be absent.
    Returns:
        The report.
    Raises:
        UserError: if keys are missing outside `may_miss`, or a shape differs.
    """
    own = module.state_dict()
    tensors = {key: StoredTensor(tuple(value.shape), value.dtype, lambda value=value: value)
               for key, value in weights.items() if key in own}
    notes = [f"{len(weights) - len(tensors)} tensors are not used"] if len(tensors) < len(weights) else []
    is_required = (lambda name: not name.startswith(may_miss)) if may_miss else (lambda name: True)
    return str(fill(module, [Checkpoint(source, tensors, notes=notes)], is_required))


def save_safetensors(path: Path, weights: Mapping[str, Tensor], config: DictConfig | None = None,
                     metadata: Mapping[str, str] | None = None) -> None:
    """Write weights with the config in the metadata, atomically.

    Args:
        path: file to write.
        weights: tensors by key.
        config: resolved config, kept as yaml under the metadata key `config`.
        metadata: further strings.
    """
    from safetensors.torch import save_file
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = dict(metadata or {})
    if config is not None:
        header["config"] = OmegaConf.to_yaml(config, resolve=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    atomic_write(path, lambda file: save_file(tensors, file.name, metadata=header))
