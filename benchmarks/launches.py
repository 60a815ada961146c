"""How many kernels a piece of code would launch: its dispatches to operators, counted without a GPU."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What makes a tensor without computing, or another view of one.
FREE = frozenset((
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided",
    "expand", "narrow", "new_empty_strided", "permute", "reshape", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "tensor_split", "transpose", "unbind", "unfold", "unsqueeze", "view",
))  # fmt: skip
TENSORS_A_LAUNCH = 48  # of operators on lists of tensors: torch's kernels take 30 to 110, by how many lists there are


class LaunchCount(TorchDispatchMode):
    """Counts operators while it is entered.

    Attributes:
        counts: launches by operator; one on lists of tensors counts as many as its kernels need.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count and go on."""
        name = func._schema.name.split("::")[1]
        if name not in FREE:
            is_list = name.startswith(("_foreach_", "_fused_"))
            self.counts[name] += -(-len(args[0]) // TENSORS_A_LAUNCH) if is_list else 1
        return func(*args, **(kwargs or {}))


def count_launches(work: Any) -> int:
    """Launches of a work, which is done once before, so that what is computed once in a run does not count."""
    work()
    with LaunchCount() as count:
        work()
    return count.total


def autocast(is_on: bool) -> torch.autocast:
    """Lightning's bf16-mixed on a CPU, or float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=is_on, cache_enabled=False)
