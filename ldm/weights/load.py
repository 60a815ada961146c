"""A method out of weight files, every tensor accounted for: where it came from, what is missing or left over."""
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.diffusion.path import BUFFER_NAMES
from ldm.methods.base import ConditionCache, Method, WeightGroup
from ldm.util import UserError, check_targets, instantiate_from_config, load_config
from ldm.weights.checkpoint import find_bases, open_checkpoint, open_whole
from ldm.weights.files import Checkpoint, StoredTensor

log = logging.getLogger(__name__)

MIN_MATCH = 0.9  # share of a file's tensors that must find their place
SCHEDULE = frozenset((*BUFFER_NAMES, "logvar"))


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
        raise UserError(f"--ckpt: {checkpoint} is a folder. Expected a file. Make one: python "
                        f"scripts/convert_checkpoint.py {checkpoint} OUT.safetensors")
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"--ckpt: file not found: {checkpoint}. Expected .safetensors or .ckpt. Check the "
                                "path.")
    if config_file is not None:
        config, source = load_config([config_file]), f"--config {config_file}"
    else:
        opened = open_checkpoint(checkpoint)
        find_bases(opened)  # that they are there
        config, source = opened.config, f"checkpoint {checkpoint}"
    if config is None:
        raise UserError(f"--ckpt: {checkpoint} has no config inside. Expected one, or --config. Add --config with a "
                        "yaml.")
    config = OmegaConf.to_container(config, resolve=True)
    if "model" not in config:
        raise UserError(f"config of {config_file or checkpoint}: no key `model` (keys: {', '.join(map(str, config))})."
                        " Expected model: with target and params. Check --config.")
    check_targets(config["model"], source, allow_modules)
    return {"model": config["model"]}


def build_skeleton(config: Mapping[str, Any]) -> Method:
    """Build the method on the meta device: it knows sizes and classes, and costs neither memory nor time.

    Args:
        config: from read_model_config.
    """
    with torch.device("meta"):
        return instantiate_from_config(without_weight_files(config["model"]))


def without_weight_files(node: Any) -> Any:
    """A config whose modules fill nothing from files of their own: a checkpoint holds those weights already."""
    if not isinstance(node, Mapping):
        return node
    if "perceptual_weights" in node:  # a loss of the training, its weights are not part of the network
        node = {**node, "perceptual_weights": None, "perceptual_weight": 0.0}
    return {key: None if key == "weights_dir" else without_weight_files(value) for key, value in node.items()}


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


def load_method(checkpoint: str | Path, config: Mapping[str, Any], device: torch.device | str,
                dtype: torch.dtype | None = torch.float32) -> Method:
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
    def place(value: Tensor) -> Tensor:
        layout = torch.channels_last if value.ndim == 4 else torch.preserve_format
        return value.to(device, (dtype or value.dtype) if value.is_floating_point() else value.dtype,
                        memory_format=layout)

    with parameters_without_memory(), torch.device(device):
        method = instantiate_from_config(without_weight_files(config["model"]))
    log.info(fill(method, open_whole(checkpoint, method.state_dict()), place=place))
    method.condition_cache = ConditionCache()  # nothing changes the weights from here on
    return method.to(device).eval().requires_grad_(False)


@dataclass
class Account:
    """What happened to every tensor of a network and of the files.

    Attributes:
        groups: parts of the network.
        loaded: our name -> file that it came from.
        copied: names that were copied from another part.
        fresh: names that keep the values they were built with.
        unexpected: (file, name) without a place in the network.
        wrong: (file, name) -> "shape in the file, shape in the network".
        notes: further remarks.
    """

    groups: Sequence[WeightGroup] = ()
    loaded: dict[str, str] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The table: a line a group."""
        kinds = {"loaded": self.loaded, "copied": self.copied, "missing": self.fresh,
                 "unexpected": [n for _, n in self.unexpected], "wrong shape": [n for _, n in self.wrong]}
        counts = [Counter(group_name(name, self.groups) for name in kind) for kind in kinds.values()]
        sources = {(group_name(name, self.groups), file) for name, file in self.loaded.items()}
        sources |= {(group.name, f"copied from the {group_name(group.copy_of, self.groups)}")
                    for group in self.groups if counts[1][group.name]}
        lines = [f"{'group':<18}" + "".join(f"{title:>12}" for title in kinds) + "  from"]
        for name in sorted(set().union(*counts)):
            origins = ", ".join(sorted(source for group, source in sources if group == name)) or "-"
            lines.append(f"{name:<18}" + "".join(f"{count[name]:>12}" for count in counts) + f"  {origins}")
        return "\n".join([*lines, *self.notes])


def group_name(name: str, groups: Sequence[WeightGroup]) -> str:
    """Name of the part of the network that a tensor belongs to; what no group has is called by its first word."""
    if name in SCHEDULE:
        return "schedule"
    return next((group.name for group in groups if group.has(name)), name.split(".")[0])


def groups_in_training(method: Method) -> set[str]:
    """Names of the groups in which something trains."""
    ids = {id(p) for group in method.trainable_groups().values() for p in group}
    groups = method.weight_groups()
    return {group_name(name, groups) for name, parameter in method.named_parameters() if id(parameter) in ids}


def fill(method: Method, files: Sequence[Checkpoint], is_required: Callable[[str], bool] = lambda name: True,
         allow_partial: bool = False, initialise_branches: bool = False,
         place: Callable[[Tensor], Tensor] | None = None) -> Account:
    """Fill a network from files; where several have a tensor, the last one counts.

    The noise schedule is never loaded: it follows from the config, and a file with another one is an error.

    Args:
        method: the network.
        files: weights by our names; read one tensor at a time.
        is_required: says of a name whether it must come from a file.
        allow_partial: go on where it would stop.
        initialise_branches: let parts that no file has start as copies of others (see WeightGroup.copy_of).
        place: makes of a tensor that was read the one of a network built without memory; None = copy into the memory
            it has.
    Returns:
        The account.
    Raises:
        UserError: if required tensors are missing, or less than MIN_MATCH of a file finds a place, or the schedules
            differ; the text holds the account.
    """
    own = method.state_dict()
    account, problems = Account(method.weight_groups()), []
    chosen: dict[str, StoredTensor] = {}
    for number, file in enumerate(files):
        account.notes += [f"{file.name}: {note}" for note in file.notes]
        replaced = {name for later in files[number + 1:] for name, stored in later.tensors.items()
                    if name in own and tuple(stored.shape) == tuple(own[name].shape)}
        problems += choose(file, own, chosen, account, replaced)
    copies = find_copies(account.groups, own, chosen) if initialise_branches else {}
    account.copied = list(copies)
    has_values = {*chosen, *copies, *SCHEDULE}
    account.fresh = [name for name in own if name not in has_values]
    missing = [name for name in account.fresh if is_required(name)]
    if missing:
        names = sorted({group_name(name, account.groups) for name in missing})
        problems.append(f"{len(missing)} tensors have no values, in: {', '.join(names)} (first: {missing[0]})")
        problems += [group.remedy for group in account.groups if group.name in names and group.remedy]
    if problems and not allow_partial:
        raise UserError("\n".join([
            f"checkpoint {', '.join(file.name for file in files)}: does not fit the model. Expected every tensor of "
            f"the parts that do not train, and at least {MIN_MATCH:.0%} of each file in use. Give the missing files or "
            "the config they were trained with, or go on with --allow_partial.",
            *(f"  {problem}" for problem in problems),
            *(f"  {file}: {name}: {what}" for (file, name), what in list(account.wrong.items())[:5]), str(account)]))
    account.notes += [f"allowed by --allow_partial: {problem}" for problem in problems]
    with torch.no_grad():
        for name, stored in chosen.items():
            if place is not None:
                put(method, name, place(stored.read()))
            elif not own[name].is_meta:  # a skeleton is accounted for, not filled
                own[name].copy_(stored.read())
        for name, origin in copies.items():
            own[name].copy_(own[origin])
    account.notes += method.weight_notes()
    return account


def choose(file: Checkpoint, own: Mapping[str, Tensor], chosen: dict[str, StoredTensor], account: Account,
           replaced: Collection[str] = ()) -> list[str]:
    """Enter the tensors of one file that fit into `chosen` and the account; returns problems.

    Those that do not fit, but are `replaced` by a later file, are none.
    """
    problems = compare_schedule(file, own)
    tensors = {name: stored for name, stored in file.tensors.items() if name not in SCHEDULE}
    wrong = {name: f"file {stored.shape}, model {tuple(own[name].shape)}" for name, stored in tensors.items()
             if name in own and tuple(stored.shape) != tuple(own[name].shape)}
    if out := [name for name in wrong if name in replaced]:
        account.notes.append(f"{file.name}: {len(out)} tensors of another shape are left out, a later file has them "
                             f"(first: {out[0]})")
        tensors, wrong = ({k: v for k, v in some.items() if k not in out} for some in (tensors, wrong))
    for group in account.groups:
        first = f"{group.prefix}{group.stem}0.weight"  # what sees a hint
        if group.stem and first in wrong:
            tensors = {name: stored for name, stored in tensors.items()
                       if not name.startswith(group.prefix + group.stem)}
            for name in [name for name in chosen if name.startswith(group.prefix + group.stem)]:
                del chosen[name], account.loaded[name]  # of an earlier file, whose branch this one replaces
            account.notes.append(f"{file.name}: its {group.name} takes another kind of hint ({wrong[first]}); the hint "
                                 "stem starts fresh, at zero effect")
    fitting = {name: stored for name, stored in tensors.items() if name in own and name not in wrong}
    chosen |= fitting
    account.loaded |= dict.fromkeys(fitting, file.name)
    account.unexpected += [(file.name, name) for name in tensors if name not in own]
    account.wrong |= {(file.name, name): what for name, what in wrong.items()}
    failed = sum(name in wrong for name in tensors)
    if len(fitting) < MIN_MATCH * len(tensors):
        problems.append(f"{file.name}: {len(fitting)} of {len(tensors)} tensors have a place in the model")
    elif failed:
        problems.append(f"{file.name}: {failed} tensors have another shape")
    return problems


def compare_schedule(file: Checkpoint, own: Mapping[str, Tensor]) -> list[str]:
    """A problem if the file was trained on another noise schedule than the network's."""
    stored = file.tensors.get("alphas_cumprod")
    if stored is None or "alphas_cumprod" not in own or own["alphas_cumprod"].is_meta:
        return []
    ours = own["alphas_cumprod"].float().cpu()
    theirs = stored.read().float()
    tolerance = 1e-5 if stored.dtype in (torch.float32, torch.float64) else 1e-2
    if theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=0.0, atol=tolerance):
        return []
    return [f"{file.name}: was trained on another noise schedule ({len(theirs)} steps, last alphas_cumprod "
            f"{float(theirs[-1]):.3g}; the config's has {len(ours)}, {float(ours[-1]):.3g}). Set model.params.schedule"]


def find_copies(groups: Sequence[WeightGroup], own: Mapping[str, Tensor], chosen: Collection[str]) -> dict[str, str]:
    """Names of tensors that start as copies -> those that they are copies of (see WeightGroup.copy_of).

    `own` are all tensors of the network, `chosen` those that a file has.
    """
    copies: dict[str, str] = {}
    for group in groups:
        if not group.copy_of or any(name.startswith(group.prefix) for name in chosen) or not any(
                name.startswith(group.copy_of) for name in chosen):
            continue
        starts = tuple(group.prefix + part for part in group.copied)
        pairs = {name: group.copy_of + name.removeprefix(group.prefix) for name in own if name.startswith(starts)}
        copies |= {name: origin for name, origin in pairs.items()
                   if origin in own and own[origin].shape == own[name].shape}
    return copies


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of one that has no memory."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=owner._parameters[leaf].requires_grad)
    else:
        owner._buffers[leaf] = value
