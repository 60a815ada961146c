"""Configs of segmentors, read so that a data file runs nothing, and completed where they are of an old MMSegmentation.

A config in Python is code: mmengine runs it, so only your own belong here. A .json or .yaml file is data, whoever wrote
it. mmengine would run those too: by tags of yaml, by `custom_imports`, by a `_base_` in Python and by any importable
function that a `type` names. All of that is refused here, before anything is called.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm.util import UserError, current_path

logger = logging.getLogger(__name__)

DATA_SUFFIXES = (".json", ".yaml", ".yml")
LIBRARIES = ("mmseg", "mmengine", "mmcv", "mmpretrain", "mmdet")  # a `type` may name one of them as its registry
OWN_TYPES = ("post_processing.segmentation.",)


def read_config(path: str | Path) -> Any:
    """Read an mmengine config file; classes of this project that have moved since it was written are found.

    Args:
        path: .py (run as code, with what it imports), .json, .yaml or .yml (data; see the head of this module).

    Returns:
        mmengine Config.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is no config, or a data file asks to run something.
    """
    from mmengine.config import Config

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"segmentor config not found: {path}. Give configs/mmseg/small.py, say, or a config.json.")
    is_data = path.suffix.lower() in DATA_SUFFIXES
    if is_data:
        check_data(path)
    else:
        logger.debug("%s: a config in Python, which is run", path)
    try:
        config = Config.fromfile(
            str(path), import_custom_modules=not is_data, use_predefined_variables=not is_data,
            use_environment_variables=not is_data)  # fmt: skip
    except FileNotFoundError as error:  # a _base_
        raise FileNotFoundError(f"segmentor config {path}: {error}. Expected its _base_ files beside it. Copy them, or "
                                "give the config.json of the training, which has none.") from error
    except Exception as error:  # the file's own code may raise anything
        raise UserError(f"segmentor config {path}: cannot be read ({type(error).__name__}: {error}). Expected a config "
                        "of mmengine.") from error
    for node in walk(config._cfg_dict):
        if isinstance(node.get("type"), str):
            node["type"] = current_path(node["type"])
            if is_data and not is_known_type(node["type"]):
                raise UserError(
                    f"segmentor config {path}: its type {node['type'][:80]} would be imported and called. Expected "
                    "names of MMSegmentation's registry; nothing was called. If it is your own, give the config as "
                    ".py file.")
    return config


def walk(tree: Any) -> Iterator[dict]:
    """All mappings in a config, outer ones first."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            yield node
            nodes.extend(node.values())
        elif isinstance(node, (list, tuple)):
            nodes.extend(node)


def find_heads(model: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The heads in a model's config, each with its key, `decode_head` (all of a cascade) before `auxiliary_head`."""
    found = [(key, model.get(key)) for key in ("decode_head", "auxiliary_head")]
    return [(key, head) for key, heads in found if heads
            for head in (heads if isinstance(heads, list | tuple) else [heads])]  # fmt: skip


def is_known_type(name: str) -> bool:
    """Whether a `type` is a name in a registry or a class of this project, and not a path to anything importable."""
    if "." not in name:
        return True
    if name.startswith(OWN_TYPES):
        return True
    scope, _, short = name.partition(".")
    if scope not in LIBRARIES or "." in short:
        return False
    from importlib import import_module

    from mmengine.registry import Registry

    # mmengine takes a name that no registry has for one to import, such as the function mmengine.load.
    try:
        registries = vars(import_module(f"{scope}.registry")).values()
    except ImportError:
        return False
    return any(isinstance(registry, Registry) and short in registry.module_dict for registry in registries)


def check_data(path: Path, seen: tuple[Path, ...] = ()) -> None:
    """UserError if a data file, or one that it is based on, is no plain data or asks for code to be run."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"segmentor config {path}: not plain data ({' '.join(str(error).split())[:200]}). Expected "
                        "JSON or yaml without tags; nothing was run.") from error
    if not isinstance(content, Mapping):
        raise UserError(f"segmentor config {path}: a {type(content).__name__}. Expected keys such as model.")
    if content.get("custom_imports"):
        raise UserError(f"segmentor config {path}: its custom_imports would be run. Expected none in a data file; "
                        "nothing was run. If they are your own, give the config as .py file.")
    bases = content.get("_base_") or []
    for base in [bases] if isinstance(bases, str) else bases:
        base = path.parent / str(base)
        if base.suffix.lower() not in DATA_SUFFIXES:
            raise UserError(f"segmentor config {path}: its _base_ {base.name[:80]} would be run. Expected .json or "
                            ".yaml; nothing was run. If it is your own, give the config as .py file.")
        if base in seen:
            raise UserError(f"segmentor config {path}: is its own _base_. Expected an end. Take it out.")
        if not base.is_file():
            raise FileNotFoundError(f"segmentor config {path}: its _base_ {base} is not there. Copy it beside it.")
        check_data(base, (*seen, path))


def fill_preprocessor(config: Any, source: str) -> None:
    """Give a model without data_preprocessor, as those of MMSegmentation 0.x are, one of the config's own numbers.

    Args:
        config: mmengine Config or mapping; its `model` is completed in place.
        source: the file, for messages.

    Raises:
        UserError: if there is no model, or nothing in the config says how its images were normalised.
    """
    model = config.get("model")
    if not isinstance(model, dict):
        raise UserError(f"segmentor config {source}: no `model`. Expected a config of MMSegmentation. Check the path.")
    if model.get("data_preprocessor"):
        return
    found = config.get("data_preprocessor") or find_normalisation(config)
    if not found:
        raise UserError(
            f"segmentor config {source}: its model has no data_preprocessor, as in MMSegmentation 0.x, and nothing "
            "says how its images were normalised. Expected mean, std and bgr_to_rgb. Add data_preprocessor=dict(type="
            "'SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, "
            "pad_val=0, seg_pad_val=255, size_divisor=1) to it, with the numbers of its training.")
    model["data_preprocessor"] = found
    logger.info("%s: no data_preprocessor in its model; taken from the config: mean %s, std %s, %s", source,
                found.get("mean"), found.get("std"), "RGB" if found.get("bgr_to_rgb") else "BGR")  # fmt: skip


def find_normalisation(config: Any) -> dict[str, Any] | None:
    """A data_preprocessor from img_norm_cfg or a step `Normalize` of a 0.x config; None if it has neither."""
    steps = [config.get("img_norm_cfg"), *(node for node in walk(dict(config)) if node.get("type") == "Normalize")]
    for step in steps:
        if isinstance(step, dict) and step.get("mean") is not None and step.get("std") is not None:
            return dict(type="SegDataPreProcessor", mean=list(step["mean"]), std=list(step["std"]),
                        bgr_to_rgb=bool(step.get("to_rgb", True)), pad_val=0, seg_pad_val=255, size_divisor=1)
    return None
