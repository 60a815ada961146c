"""A method out of a checkpoint: first without memory, to check the user's input against, then with its weights."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.methods.conditions import ConditionCache
from ldm.util import UserError, check_targets, instantiate_from_config, load_config
from ldm.weights.base import check_bases, open_whole
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.report import Placement, fill

logger = logging.getLogger(__name__)

# Arguments of modules that name files with weights. A checkpoint holds those weights already.
WEIGHT_ARGUMENTS = ("weights_dir",)


def read_model_config(checkpoint: str | Path, config_file: str | Path | None = None,
                      allow_modules: Sequence[str] = ()) -> dict[str, Any]:
    """Find the config of a checkpoint, without reading its weights, and refuse it if it would call anything foreign.

    Args:
        checkpoint: .safetensors, .ckpt, ...
        config_file: yaml to use instead of the config inside the checkpoint.
        allow_modules: modules of the user's own that it may name (see ldm.util.check_targets).

    Returns:
        Plain dictionary `{"model": {"target": ..., "params": ...}}`.

    Raises:
        FileNotFoundError: if a file is missing.
        UserError: if there is no config, it has no `model`, or names a target that it may not.
    """
    if Path(checkpoint).is_dir():
        raise UserError(
            f"--ckpt: {checkpoint} is a folder. Expected a file. Make one: python scripts/convert_checkpoint.py"
            f" {checkpoint} OUT.safetensors"
        )
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(
            f"--ckpt: file not found: {checkpoint}. Expected .safetensors or .ckpt. Check the path."
        )
    if config_file is not None:
        config = load_config([config_file])
    else:
        opened = open_checkpoint(checkpoint)
        check_bases(opened)
        config = opened.config
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
    check_targets(config["model"], f"--config {config_file}" if config_file else f"checkpoint {checkpoint}",
                  allow_modules)
    return {"model": config["model"]}


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Within it, modules are built with their parameters on the meta device; buffers get their values as usual."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def build_skeleton(config: dict[str, Any]) -> nn.Module:
    """Build the method on the meta device: it knows sizes and classes, and costs neither memory nor time.

    Args:
        config: from read_model_config.
    """
    with torch.device("meta"):
        return instantiate_from_config(_without_weight_files(config["model"]))


def load_method(
    checkpoint: str | Path,
    config: dict[str, Any],
    device: torch.device | str,
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """Build a method and load its weights, one tensor at a time: never more than the model and a tensor in memory.

    Args:
        checkpoint: .safetensors, .ckpt, ...
        config: from read_model_config.
        device: where it goes.
        dtype: of its parameters; None keeps that of the file, e.g. half the memory for float16: predict_noise then
            takes tensors of that type (the schedule stays float32).

    Returns:
        The method in evaluation mode, frozen, channels last.

    Raises:
        UserError: if the weights do not fit the config.
    """
    with parameters_without_memory(), torch.device(device):
        method = instantiate_from_config(_without_weight_files(config["model"]))
    files = open_whole(checkpoint, method.state_dict())
    logger.info(fill(method, files, place=Placement(device, dtype, channels_last=True)))
    method.condition_cache = ConditionCache()  # nothing changes the weights from here on
    return method.to(device).eval().requires_grad_(False)


def _without_weight_files(node: Any) -> Any:
    if isinstance(node, dict):
        if "perceptual_weights" in node:  # a loss of the training, its weights are not part of the network
            node = {**node, "perceptual_weights": None, "perceptual_weight": 0.0}
        return {key: None if key in WEIGHT_ARGUMENTS else _without_weight_files(value) for key, value in node.items()}
    return node
