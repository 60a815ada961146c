"""The contract: what training, generation and weights may ask of a method. Nobody asks which one it is."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.classes import ClassTable
from ldm.modules.blocks import TimestepSequential
from ldm.sampling.guidance import Correct
from ldm.sampling.modes import METHOD_SETTINGS, Sampling
from ldm.util import UserError


@dataclass(frozen=True)
class WeightGroup:
    """A part of a network as reports of loaded weights know it. A tensor belongs to the first group that it fits.

    Args:
        name: in tables and messages.
        prefix: of the names of its tensors.
        contains: what its names have beside the prefix.
        stem: prefix, behind `prefix`, of the layers that see a kind of hint; a file whose first such layer
            (`stem` + `0.weight`) has another shape gives the rest, and the stem starts fresh.
        copy_of: prefix of another part; where no file has this group, its tensors start as copies of those there that
            have the same name and shape and begin with one of `copied`.
        copied: see copy_of.
        remedy: what to do when a file has nothing for it.
    """

    name: str
    prefix: str
    contains: str = ""
    stem: str = ""
    copy_of: str = ""
    copied: tuple[str, ...] = ()
    remedy: str = ""

    def has(self, name: str) -> bool:
        """Whether a tensor of this name fits the group."""
        return name.startswith(self.prefix) and self.contains in name


class ConditionCache:
    """Embeddings of prompts and latents of references by key, each computed once; the least recently used leave first.

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


class Method(nn.Module):
    """A network with its training and, if it generates images, its sampling.

    Every method gives `training_loss`, `trainable_groups` and `preview`; one that generates images also `class_table`,
    `noise_shape`, `own_sampling` and `sample`.

    Attributes:
        class_table: classes of the masks that it takes; None = it takes none.
        takes: what a manifest must give beside the masks, of `prompt`, `reference`, `instance`.
        image_channels: of the images.
        size_factor: heights and widths must be multiples of it.
        sampling_settings: settings of its own in Sampling.method -> the value that changes nothing.
        prefilled: prefixes of weights that were filled from files while it was built.
        autocast_dtype: of the weights where images are generated under autocast; None = as in their file.
        condition_cache: set where the weights no longer change (load_method): keeps what was computed of prompts and
            references.
    """

    class_table: ClassTable | None = None
    takes: tuple[str, ...] = ()
    image_channels: int = 3
    size_factor: int
    sampling_settings: Mapping[str, Any] = {}
    prefilled: tuple[str, ...] = ()
    autocast_dtype: torch.dtype | None = torch.float32
    condition_cache: ConditionCache | None = None

    def training_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch after normalize_batch, drawn from torch's global generator, and its parts for the log."""
        raise NotImplementedError

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named groups of the parameters that train."""
        raise NotImplementedError

    def preview(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Images for the grid of a training run, by title: (B, C, H, W) in [-1, 1]."""
        raise NotImplementedError

    @property
    def own_sampling(self) -> Sampling:
        """How the method samples unless told otherwise; UserError if it generates no images."""
        raise UserError(f"--ckpt: a {type(self).__name__} generates no images. Expected a generator.")

    def noise_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of the noise that a sample of this image size starts from; ValueError for a size it cannot have."""
        raise NotImplementedError

    def sample(self, batch: Mapping[str, Any], noise: Tensor, sampling: Sampling | None = None,
               draw: Callable[[Sequence[int]], Tensor] | None = None, correct: Correct | None = None) -> Tensor:
        """Generate images (see DiffusionMethod.sample)."""
        raise NotImplementedError

    def check(self, sampling: Sampling) -> None:
        """UserError or ValueError where the method cannot sample so; knows nothing of files and needs no weights."""
        unknown = [name for name, value in sampling.method.items()
                   if name not in self.sampling_settings and value != METHOD_SETTINGS.get(name)]
        if unknown:
            known = ", ".join(self.sampling_settings) or "none"
            raise UserError(f"sampling: {type(self).__name__} has no {' and no '.join(unknown)}. Expected of these "
                            f"settings only what it has ({known}). Leave the flags out; with --mode turbo, take fast.")

    def check_prompts(self, prompts: Collection[str]) -> None:
        """UserError or FileNotFoundError where prompts cannot be encoded; called before the weights are loaded."""

    def batch_kind(self, prompt: str) -> Hashable:
        """What must be equal within a batch, so that an image does not depend on those that it is generated with."""
        return None

    def fingerprint(self) -> dict[str, Any]:
        """What decides the images beside weights, config, sampling and the files of the rows; plain values."""
        return {}

    def start_training(self) -> None:
        """Add what only a training has; called when weights are filled, or with -r before they are."""

    def exported(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of a training as weights for inference: undo what start_training did."""
        return dict(state)

    def cacheable_encoder(self) -> nn.Module:
        """The frozen autoencoder whose latents of the training images may be kept, see build_latent_cache.

        Raises:
            UserError: saying why there is nothing to keep.
        """
        raise UserError(f"cache_latents: {type(self).__name__} has no autoencoder, there is nothing to encode. Set "
                        "training.cache_latents=null.")

    def latent_space(self) -> str:
        """What tells latents of one autoencoder from those of another, a hash; empty where images are sampled."""
        return ""

    def weight_groups(self) -> tuple[WeightGroup, ...]:
        """Its parts, for reports of loaded weights and for what files may leave out."""
        return ()

    def weight_notes(self) -> list[str]:
        """Remarks on the weights that it has now, for the report of what was loaded."""
        return []

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated blocks of its networks, which torch.compile takes one by one."""
        return (block for group in self.modules() if isinstance(group, TimestepSequential) for block in group)
