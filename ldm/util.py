"""Configuration, instantiation and error handling shared by every entry point."""
import difflib
import functools
import importlib
import inspect
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.files import describe_failure

# Dotted paths that users' checkpoints and segmentors name -> where the code lives now.
MOVED = {
    "ldm.models.autoencoder.": "ldm.methods.autoencoder.",
    "post_processing.mixing.": "post_processing.segmentation.mixing.",
    "post_processing.mmseg_dataset.": "post_processing.segmentation.dataset.",
}

EXIT_MISTAKE, EXIT_OUTPUT = 2, 4
OWN_PACKAGES = ("ldm.", "cldm.")


class UserError(ValueError):
    """A mistake in the user's input; the text says where, what is wrong, what was expected and what to do."""


def instantiate_from_config(config: Any, **extra: Any) -> Any:
    """Build the object that a `target:`/`params:` node describes.

    Args:
        config: mapping with `target` (dotted path of a class or function) and optional `params` (keyword arguments).
        extra: further keyword arguments; they win over `params`.
    Raises:
        UserError: if the node has no target, or the target does not exist, or does not take these arguments.
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    if "target" not in config:
        raise UserError(f"config node: no `target` (keys: {', '.join(config)}). Expected target: package.module.Class.")
    unknown = set(config) - {"target", "params"}
    if unknown:
        raise UserError(f"config node {config['target']}: unknown keys {sorted(unknown)}. Arguments go under params.")
    target = locate(config["target"])
    params = {**(config.get("params") or {}), **extra}
    try:
        return target(**params)
    except TypeError as error:
        name = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if name:
            raise UserError(f"config node {config['target']}: {error}.{nearest(name[1], arguments_of(target))} "
                            "See the docstring of the class.") from error
        raise


def arguments_of(target: Callable) -> list[str]:
    """Names of the arguments that a function or a class (with its base classes) takes."""
    functions = [c.__init__ for c in inspect.getmro(target)[:-1] if "__init__" in vars(c)] if isinstance(
        target, type) else [target]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {p.name: None for f in functions for p in inspect.signature(f).parameters.values()
             if p.kind not in variable and p.name != "self"}
    return list(names)


def check_keys(node: str, keys: Iterable[str], known: Sequence[str]) -> None:
    """UserError naming the nearest known key when a node of the config has a key that nothing reads."""
    for key in keys:
        if key not in known:
            raise UserError(f"config: {node}.{key} is unknown.{nearest(key, known)}")


def nearest(name: str, known: Sequence[str]) -> str:
    """` Did you mean X?` for the known name that is most like a wrong one; empty when none is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def current_path(dotted: str) -> str:
    """Today's dotted path of an object whose module has moved since a file was written; others as they are."""
    for old, new in MOVED.items():
        if dotted.startswith(old):
            return new + dotted.removeprefix(old)
    return dotted


def locate(dotted: str) -> Any:
    """Import the object at a dotted path such as `cldm.tisynth.TISynth`; UserError when it is not there."""
    dotted = current_path(dotted)
    module_name, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"config target {dotted}: cannot be imported ({error}). Check the spelling and PYTHONPATH.") from error


def check_targets(config: Any, source: str, allow_modules: Sequence[str] = ()) -> None:
    """Refuse a config that would call anything but networks and data modules of this project; nothing is called.

    One rule for every config, whoever wrote it: inside a checkpoint, given by a flag or left in a run folder. It comes
    before the first `instantiate_from_config`, since what a target gets may hold further nodes.

    Args:
        config: the whole config or a part of it, plain values or omegaconf's.
        source: where it is from, for the message.
        allow_modules: packages or modules of the user whose functions and classes may be called as well.

    Raises:
        UserError: naming the first target that is refused.
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    nodes = [config]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            nodes.extend(node.values())
            if node.get("target") is not None and not may_call(node["target"], allow_modules):
                name = str(node["target"])[:80]
                raise UserError(
                    f"{source}: its config would call {name}. Expected networks and data modules of this project; "
                    f"nothing was called. If it is your own, add --allow_modules {name.split('.')[0]}.")
        elif isinstance(node, (list, tuple)):
            nodes.extend(node)


def may_call(target: Any, allow_modules: Sequence[str] = ()) -> bool:
    """Whether a config may name this target (see check_targets); its module is imported if it is a permitted one."""
    if not isinstance(target, str) or not re.fullmatch(r"\w+(\.\w+)+", target):
        return False
    if target.startswith(tuple(f"{module}." for module in allow_modules)):
        return True
    if not target.startswith(OWN_PACKAGES):
        return False
    found = locate(target)
    # Bases by name, for neither torch nor Lightning is needed to read a command line.
    bases = {f"{base.__module__}.{base.__name__}" for base in getattr(found, "__mro__", ())}
    is_known = any(base.endswith((".module.Module", ".LightningDataModule")) for base in bases)
    return isinstance(found, type) and found.__module__.startswith(OWN_PACKAGES) and is_known


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merge yaml files left to right, then `key.sub=value` overrides, and lock the result.

    Args:
        files: yaml paths; later files win.
        overrides: strings `key.sub=value`. A key that no file has is an error naming the nearest known one, except
            below `params`, `training` and the parts of `lightning`, whose keys are checked by what receives them.
    Returns:
        The merged config, struct-locked.
    Raises:
        FileNotFoundError: for a missing file.
        UserError: for unreadable yaml or a bad override.
    """
    config = OmegaConf.create()
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"config file not found: {file}. Give a yaml such as configs/model/tisynth_mini.yaml.")
        try:
            config = OmegaConf.merge(config, OmegaConf.load(file))
        except Exception as error:  # yaml's own and omegaconf's share no base below it
            raise UserError(f"config file {file}: not valid yaml ({error}).") from error
    for override in overrides:
        apply_override(config, override)
    OmegaConf.set_struct(config, True)
    return config


def apply_override(config: DictConfig, override: str) -> None:
    """Apply one `key.sub=value` to a config in place (see load_config)."""
    key, sign, _ = override.partition("=")
    if not sign or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, for example lightning.trainer.max_steps=1000.")
    parent = key.rpartition(".")[0]
    is_open = ".params." in key or parent in ("training", "lightning.trainer", "lightning.checkpoint")
    known = flat_keys(config)
    if not is_open and key not in known:
        raise UserError(f"override {override!r}: the config has no key {key}.{nearest(key, known)}")
    try:
        config.merge_with(OmegaConf.from_dotlist([override]))
    except Exception as error:  # yaml's and omegaconf's grammar errors share no base below Exception
        raise UserError(f"override {override!r}: {str(error).splitlines()[0]}. Expected key.sub=value with a yaml "
                        "value. Quote it for the shell.") from error


def flat_keys(config: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a config, inner nodes included."""
    keys = []
    if OmegaConf.is_dict(config):
        for key in config:
            name = f"{prefix}{key}"
            keys.append(name)
            if not OmegaConf.is_missing(config, key):
                keys += flat_keys(config._get_node(key), name + ".")
    return keys


def run_entry_point(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> None:
    """Run `main` with the command line (None = sys.argv[1:]): one line for mistakes of the user and for files.

    Exit codes: 2 for a mistake of the user; 4 where the disk is full or a file cannot be read or written; 1 with a
    traceback for a mistake of ours; else what `main` returns (None = 0). With `--debug`, every error has a traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        code = main(argv) or 0
        sys.stdout.flush()
    except Exception as error:
        text = None if isinstance(error, (FileNotFoundError, FileExistsError)) else describe_failure(error)
        is_mistake = isinstance(error, (ValueError, KeyError, OSError))
        if "--debug" in argv or "-d" in argv or (text is None and not is_mistake):
            raise
        text, code = (text, EXIT_OUTPUT) if text else (
            error.args[0] if isinstance(error, KeyError) and error.args else error, EXIT_MISTAKE)
        print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


@functools.cache
def say_once(text: str) -> None:
    """Log a warning, each text once."""
    logging.getLogger(__name__).warning(text)


def is_rank_zero() -> bool:
    """True on the process that logs and writes (rank 0, or no distributed launch at all).

    Torchrun sets RANK, srun SLURM_PROCID, Lightning's own launcher LOCAL_RANK and NODE_RANK; all are 0 only there.
    """
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return all(int(os.environ.get(name) or 0) == 0 for name in names)


def leave_signals_to_main(_: int = 0) -> None:
    """For processes of a loader: srun and Ctrl-C signal every process of a job; these end when the main one ends them.

    The first SIGTERM is the job's. A program that leaves without closing its loader sends more of them, and waits.
    """
    for name in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
