"""What a run keeps of its conditions: embeddings of prompts and latents of references, each computed once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor


class ConditionCache:
    """Tensors by key, the least recently used leave first.

    Each is computed for one sample alone, so that it does not depend on which samples shared its batch.

    Args:
        limit: most tensors to keep; a reference latent of 512 x 512 pixels takes 64 KB, an embedding of CLIP 231 KB.
    """

    def __init__(self, limit: int = 2048) -> None:
        self.limit = limit
        self.tensors: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key, made at its first use."""
        if key not in self.tensors:
            self.tensors[key] = make()
            if len(self.tensors) > self.limit:
                self.tensors.popitem(last=False)
        self.tensors.move_to_end(key)
        return self.tensors[key]
