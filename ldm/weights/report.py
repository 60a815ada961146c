"""Fills a network from weight files and accounts for every tensor: where it came from, what is missing or left."""
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.methods.base import Method, WeightGroup
from ldm.util import UserError
from ldm.weights.files import StoredTensor

log = logging.getLogger(__name__)

MIN_MATCH = 0.9  # share of a file's tensors that must find their place
SCHEDULE = frozenset((
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar",
))  # fmt: skip


class HasTensors(Protocol):
    """A weight file whose tensors have our names (see ldm.weights.checkpoint.Checkpoint)."""

    name: str
    tensors: Mapping[str, StoredTensor]
    notes: Sequence[str]


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
        stems: (file, group) whose hint stem takes another number of channels and was left out.
        notes: further remarks.
    """

    groups: Sequence[WeightGroup] = ()
    loaded: dict[str, str] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)
    stems: list[tuple[str, WeightGroup]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The table: a line a group."""
        names = {*self.loaded, *self.copied, *self.fresh, *(n for _, n in self.unexpected), *(n for _, n in self.wrong)}
        columns = ("loaded", "copied", "missing", "unexpected", "wrong shape")
        lines = [f"{'group':<18}" + "".join(f"{title:>12}" for title in columns) + "  from"]
        group_of = {name: group_name(name, self.groups) for name in names}
        for group in sorted(set(group_of.values())):
            own = [name for name in self.loaded if group_of[name] == group]
            counts = (len(own), *(sum(group_of[name] == group for name in kind) for kind in (
                self.copied, self.fresh, [n for _, n in self.unexpected], [n for _, n in self.wrong])))
            origins = [group_name(g.copy_of, self.groups) for g in self.groups if g.name == group and counts[1]]
            sources = sorted({self.loaded[name] for name in own}) + [f"copied from the {name}" for name in origins]
            numbers = "".join(f"{count:>12}" for count in counts)
            lines.append(f"{group:<18}{numbers}  {', '.join(sources) or '-'}")
        return "\n".join([*lines, *self.notes])


def group_name(name: str, groups: Sequence[WeightGroup]) -> str:
    """Name of the part of the network that a tensor belongs to; what no group has is called by its first word."""
    if name in SCHEDULE:
        return "schedule"
    return next((group.name for group in groups if group.has(name)), name.split(".")[0])


def groups_of(module: nn.Module) -> tuple[WeightGroup, ...]:
    """Parts of a network; a module that is no method has none."""
    return module.weight_groups() if isinstance(module, Method) else ()


def fill(module: nn.Module, files: Sequence[HasTensors], is_required: Callable[[str], bool] = lambda name: True,
         allow_partial: bool = False, initialise_branches: bool = False, place: "Placement | None" = None) -> Account:
    """Fill a network from files; where several have a tensor, the last one counts.

    The noise schedule is never loaded: it follows from the config, and a file with another one is an error.

    Args:
        module: the network.
        files: weights by our names; read one tensor at a time.
        is_required: says of a name whether it must come from a file.
        allow_partial: go on where it would stop.
        initialise_branches: let parts that no file has start as copies of others (see WeightGroup.copy_of).
        place: how tensors enter a network that was built without memory; None = copy into the memory it has.
    Returns:
        The account.
    Raises:
        UserError: if required tensors are missing, or less than MIN_MATCH of a file finds a place, or the schedules
            differ; the text holds the account.
    """
    own = module.state_dict()
    account, problems = Account(groups_of(module)), []
    chosen: dict[str, StoredTensor] = {}
    for file in files:
        account.notes += [f"{file.name}: {note}" for note in file.notes]
        problems += choose(file, own, chosen, account)
    copies = find_copies(account.groups, own, chosen) if initialise_branches else {}
    account.copied = list(copies)
    known = {*chosen, *account.copied, *(SCHEDULE & set(own))}
    account.fresh = [name for name in own if name not in known]
    account.notes += [
        f"{file}: its {group.name} takes another kind of hint ({account.wrong[file, first_of_stem(group)]}); the "
        "hint stem starts fresh, at zero effect" for file, group in account.stems]
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
            *(f"  {problem}" for problem in problems), *describe_wrong(account), str(account)]))
    account.notes += [f"allowed by --allow_partial: {problem}" for problem in problems]
    with torch.no_grad():
        for name, stored in chosen.items():
            if place is not None or not own[name].is_meta:  # a skeleton is accounted for, not filled
                put(module, own, name, stored.read(), place)
        for name, origin in copies.items():
            own[name].copy_(own[origin])
    account.notes += module.weight_notes() if isinstance(module, Method) else []
    return account


@dataclass(frozen=True)
class Placement:
    """Where and how the tensors of a network that was built without memory are put.

    Attributes:
        device: where to.
        dtype: of floating tensors; None = as in the file.
        channels_last: lay out convolutions with their channels innermost.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    channels_last: bool = False


def choose(file: HasTensors, own: Mapping[str, Tensor], chosen: dict[str, StoredTensor], account: Account) -> list[str]:
    """Enter the tensors of one file that fit into `chosen` and the account; returns problems."""
    problems = compare_schedule(file, own)
    wrong = {name: stored for name, stored in file.tensors.items()
             if name in own and name not in SCHEDULE and tuple(stored.shape) != tuple(own[name].shape)}
    stems = [group for group in account.groups if group.stem and first_of_stem(group) in wrong]
    skipped = tuple(group.prefix + group.stem for group in stems)
    used = unknown = 0
    for name, stored in file.tensors.items():
        if name in SCHEDULE or (skipped and name.startswith(skipped)):
            continue
        if name not in own:
            account.unexpected.append((file.name, name))
            unknown += 1
        elif name not in wrong:
            chosen[name] = stored
            account.loaded[name] = file.name
            used += 1
    account.stems += [(file.name, group) for group in stems]
    for name, stored in wrong.items():
        account.wrong[file.name, name] = f"file {stored.shape}, model {tuple(own[name].shape)}"
    failed = sum(not name.startswith(skipped or ("\0",)) for name in wrong)
    if used < MIN_MATCH * (used + unknown + failed):
        problems.append(f"{file.name}: {used} of {used + unknown + failed} tensors have a place in the model")
    elif failed:
        problems.append(f"{file.name}: {failed} tensors have another shape")
    return problems


def compare_schedule(file: HasTensors, own: Mapping[str, Tensor]) -> list[str]:
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


def first_of_stem(group: WeightGroup) -> str:
    """Name of the first weight that sees a group's hint."""
    return f"{group.prefix}{group.stem}0.weight"


def find_copies(groups: Sequence[WeightGroup], own: Mapping[str, Tensor], chosen: Collection[str]) -> dict[str, str]:
    """Names of tensors that start as copies -> those that they are copies of (see WeightGroup.copy_of).

    Args:
        groups: of the network.
        own: all its tensors.
        chosen: names that a file has.
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


def put(module: nn.Module, own: Mapping[str, Tensor], name: str, value: Tensor, place: Placement | None) -> None:
    """Copy a value into a tensor of the network, or put it in its place."""
    if place is None:
        own[name].copy_(value)
        return
    dtype = place.dtype if place.dtype is not None and value.is_floating_point() else value.dtype
    layout = torch.channels_last if place.channels_last and value.ndim == 4 else torch.preserve_format
    value = value.to(device=place.device, dtype=dtype, memory_format=layout)
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=owner._parameters[leaf].requires_grad)
    else:
        owner._buffers[leaf] = value


def describe_wrong(account: Account, count: int = 5) -> list[str]:
    """The first tensors of another shape, a line each."""
    return [f"  {file}: {name}: {what}" for (file, name), what in list(account.wrong.items())[:count]]


def required_while_training(module: nn.Module, trained: Collection[nn.Parameter], filled: Collection[str],
                            ) -> Callable[[str], bool]:
    """Which tensors must come from a file before a training: those of groups that do not train and are not filled yet.

    Args:
        module: the network.
        trained: its parameters that train.
        filled: names that have their values already.
    """
    ids, groups = {id(parameter) for parameter in trained}, groups_of(module)
    free = {group_name(name, groups) for name, parameter in module.named_parameters() if id(parameter) in ids}
    filled = set(filled)
    return lambda name: group_name(name, groups) not in free and name not in filled
