"""What command lines share: types of arguments and the choice of a device. Light on purpose (torch only when asked)."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ldm.util import UserError

if TYPE_CHECKING:
    import torch


class _Classes(argparse.Action):
    """Keeps the class table; an older spelling of the flag works, and says how it is called everywhere."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        if option_string not in (None, "--classes"):
            say_new_name(option_string)
        setattr(namespace, self.dest, values)


@cache  # once
def say_new_name(spelling: str) -> None:
    """Say on stderr how a flag of an older spelling is called."""
    print(f"note: {spelling} is now called --classes; both work", file=sys.stderr)


def add_classes(add: Callable[..., Any], text: str, dest: str = "classes", is_required: bool = False) -> None:
    """Add --classes, the one name of a class table at every door; --class_table and --dataset go on working.

    Args:
        add: `add_argument` of a parser.
        text: what it is of, for the help.
        dest: attribute that holds it.
        is_required: whether the command stops without it.
    """
    add("--classes", "--class_table", "--dataset", dest=dest, action=_Classes, required=is_required, metavar="TABLE",
        help=f"class table, a name in configs/classes or a file: {text}")  # fmt: skip


def positive_int(text: str) -> int:
    """Argument type: whole number of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def natural(text: str) -> int:
    """Argument type: whole number of at least 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """Argument type: finite number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def fraction(text: str) -> float:
    """Argument type: number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number between 0 and 1")


def shard(text: str) -> tuple[int, int]:
    """Argument type: `i/n` with 0 <= i < n."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not possible. Expected i/n with 0 <= i < n, such as 0/4.")
    return int(first), int(count)


def _number(text: str, kind: type, is_valid: Any, expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not possible. Expected {expected}.")
    return value


def choose_device(name: str) -> "torch.device":
    """Find the device of --device (`auto` = CUDA if there is one); UserError if there is no such device.

    Every process of torchrun or srun on a machine takes a GPU of its own.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.device_count():
            local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
            device = torch.device("cuda", local % torch.cuda.device_count())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device: {name} cannot be used ({reason}). Expected auto, cpu or cuda. Change it.") from error
    return device


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers of floating point with two digits, None as a dash."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [list(heads), *([cell(value) for value in row] for row in rows)]
    lines.insert(1, ["---"] * len(heads))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
