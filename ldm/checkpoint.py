"""Reading and writing weights. No file is ever allowed to run code."""
import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ldm.util import UserError


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary, metadata=header)
    os.replace(temporary, path)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], DictConfig | None]:
    """Read a weight file without running anything in it.

    Args:
        path: `.safetensors`, or a pickle (`.ckpt`, `.pth`, `.pt`) of tensors, flat or under `state_dict`.
    Returns:
        Weights by key (a Lightning run's `method.` prefix removed), and the config when the file carries one.
    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is not a weight file or would need to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}. Check --ckpt / --pretrain_path.")
    if path.suffix == ".safetensors":
        weights, config = read_safetensors(path)
    else:
        weights, config = read_pickle(path)
    return {key.removeprefix("method."): value for key, value in weights.items()}, config


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], DictConfig | None]:
    """Tensors and config of a safetensors file."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path}: not a readable safetensors file ({error}). Fetch it again.") from error
    return weights, OmegaConf.create(metadata["config"]) if "config" in metadata else None


def read_pickle(path: Path) -> tuple[dict[str, Tensor], DictConfig | None]:
    """Tensors and config of a torch checkpoint, by the restricted unpickler."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {path}: cannot be read as plain tensors ({str(error).splitlines()[0]}). Expected safetensors "
            "or a torch file without other objects.") from error
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path}: holds a {type(content).__name__}. Expected a dictionary of tensors.")
    weights = content.get("state_dict", content)
    bad = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if bad:
        raise UserError(f"checkpoint {path}: {len(bad)} entries are no tensors ({', '.join(map(str, bad[:3]))}). "
                        "Expected a state_dict.")
    config = content.get("config") if weights is not content else None
    return dict(weights), OmegaConf.create(config) if config else None


def load_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], source: str,
                 may_miss: tuple[str, ...] = ()) -> str:
    """Copy weights into a module and account for every tensor.

    Args:
        module: receives the weights; a floating tensor of another precision is converted.
        weights: tensors by key.
        source: name of the file, for the report.
        may_miss: prefixes of keys that the module declares new and that the file therefore need not have.
    Returns:
        The report: a line a group (first part of the key) with loaded / missing / unexpected counts.
    Raises:
        UserError: if keys are missing outside `may_miss`, or a shape differs.
    """
    own = module.state_dict()
    wrong = [f"{k}: file {tuple(weights[k].shape)}, model {tuple(own[k].shape)}" for k in own
             if k in weights and weights[k].shape != own[k].shape]
    missing = [k for k in own if k not in weights]
    fatal = [k for k in missing if not k.startswith(may_miss or ("\0",))]
    if wrong or fatal:
        text = [f"checkpoint {source}: does not fit the model."]
        text += [f"  wrong shape ({len(wrong)}): " + "; ".join(wrong[:5])] if wrong else []
        text += [f"  missing ({len(fatal)}): " + ", ".join(fatal[:8])] if fatal else []
        text.append("Use the config that the file was trained with, or --pretrain_path of train.py.")
        raise UserError("\n".join(text))
    module.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)
    groups = sorted({k.split(".")[0] for k in own if "." in k})
    lines = [f"{source}: loaded {len(own) - len(missing)} of {len(own)} tensors, "
             f"{len(set(weights) - set(own))} unexpected"]
    for group in groups:
        keys = [k for k in own if k.startswith(group + ".")]
        absent = sum(k in missing for k in keys)
        lines.append(f"  {group:<24} loaded {len(keys) - absent:>5}  missing {absent:>5}")
    return "\n".join(lines)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
