"""A method out of a checkpoint: first without memory, to check the user's input against, then with its weights."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.checkpoint import load_checkpoint, load_weights
from ldm.util import UserError, instantiate_from_config, load_config

logger = logging.getLogger(__name__)

# Arguments of modules that name files with weights. A checkpoint holds those weights already.
WEIGHT_ARGUMENTS = ("weights_dir", "weights_file")


def read_model_config(checkpoint: str | Path, config_file: str | Path | None = None) -> dict[str, Any]:
    """Find the config of a checkpoint, without reading the weights of a safetensors file.

    Args:
        checkpoint: .safetensors, .ckpt, ...
        config_file: yaml to use instead of the config inside the checkpoint.

    Returns:
        Plain dictionary `{"model": {"target": ..., "params": ...}}`.

    Raises:
        FileNotFoundError: if a file is missing.
        UserError: if there is no config, or it has no `model`.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"--ckpt: file not found: {checkpoint}. Expected .safetensors or .ckpt. Check the path."
        )
    if config_file is not None:
        config = load_config([config_file])
    elif Path(checkpoint).suffix == ".safetensors":
        config = _read_header(checkpoint).get("config")
    else:
        config = load_checkpoint(checkpoint)[1]
    if config is None:
        raise UserError(
            f"--ckpt: {checkpoint} has no config inside. Expected one, or --config. Add --config with a yaml."
        )
    config = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    if not isinstance(config, dict) or "model" not in config:
        raise UserError(
            f"config of {config_file or checkpoint}: no key `model` (keys: {', '.join(map(str, config))})."
            " Expected model: with target and params. Check --config."
        )
    return {"model": config["model"]}


def build_skeleton(config: dict[str, Any]) -> nn.Module:
    """Build the method on the meta device: it knows sizes and classes, and costs neither memory nor time.

    Args:
        config: from read_model_config.
    """
    with torch.device("meta"):
        return instantiate_from_config(_without_weight_files(config["model"]))


def load_method(checkpoint: str | Path, config: dict[str, Any], device: torch.device | str) -> nn.Module:
    """Build a method and load its weights.

    Args:
        checkpoint: .safetensors, .ckpt, ...
        config: from read_model_config.
        device: where it goes.

    Returns:
        The method in evaluation mode, frozen, channels last.

    Raises:
        UserError: if the weights do not fit the config.
    """
    with torch.device(device):
        method = instantiate_from_config(_without_weight_files(config["model"]))
    logger.info(load_weights(method, load_checkpoint(checkpoint)[0], str(checkpoint)))
    return method.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def _read_header(path: str | Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"--ckpt: {path} is not a readable safetensors file ({error}). Fetch it again.") from error


def _without_weight_files(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: None if key in WEIGHT_ARGUMENTS else _without_weight_files(value) for key, value in node.items()}
    return node
