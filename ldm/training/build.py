"""What a training starts from: the method with the weights that the flags and the config name, and its latents."""
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ldm.generation.machine import compile_blocks
from ldm.methods.base import Method
from ldm.modules.unet import UNetEncoder
from ldm.training.average import AveragedWeights
from ldm.util import instantiate_from_config
from ldm.weights.checkpoint import open_whole
from ldm.weights.load import SCHEDULE, Account, fill, group_name, groups_in_training

log = logging.getLogger("train")

WHOLE_BELOW = 256 << 20  # bytes of frozen weights up to which exports and checkpoints are whole files


@dataclass
class Start:
    """A method as its training finds it.

    Attributes:
        method: the network.
        origins: our name of a tensor -> weight file that it was filled from.
    """

    method: Method
    origins: dict[str, str] = field(default_factory=dict)

    def take(self, account: Account) -> Account:
        """Note where tensors came from."""
        self.origins |= {name: file for name, file in account.loaded.items() if Path(file).exists()}
        return account

    def left_out(self) -> dict[str, str]:
        """Tensors that need not be saved, name -> file: frozen, in a named file, and too many to copy at every save.

        Below WHOLE_BELOW there are none: a small model is one file that needs no other.
        """
        trained = {name for name, p in self.method.named_parameters() if p.requires_grad}
        own = self.method.state_dict()
        homes = {name: file for name, file in self.origins.items()
                 if name in own and name not in trained and name not in SCHEDULE}
        return homes if sum(own[name].nbytes for name in homes) > WHOLE_BELOW else {}


def build_method(config: Any, checkpoint: Path | None = None, pretrained: Sequence[str] = (),
                 complete: str | None = None, allow_partial: bool = False, is_filled_later: bool = False) -> Start:
    """The network with its weights.

    Args:
        config: of the training; `init` names files that fill parts.
        checkpoint: of the run that is resumed: all comes from there.
        pretrained: weight files whose later ones win; parts that train may be missing.
        complete: weight file that must fit completely.
        allow_partial: go on where weights are missing or of another shape.
        is_filled_later: fill nothing (see start_finetuning).
    """
    method = instantiate_from_config(config.model)
    if checkpoint:
        method.start_training()
    start, own = Start(method), method.state_dict()
    if checkpoint:  # the Trainer loads it again with the rest; the latent cache needs the autoencoder before
        *bases, last = open_whole(checkpoint, own)
        log.info(start.take(fill(method, [*bases, last])))
        start.origins = {name: file for name, file in start.origins.items() if file != last.name}
        return start
    if is_filled_later:
        return start
    filled = {name for name in own if name.startswith(method.prefilled)}
    for part, file in dict(config.get("init") or {}).items():  # part of the network -> file that fills it
        inside = {name for name in own if name.startswith(part + ".")}
        account = fill(method, [file.only(part + ".") for file in open_whole(file, own)], inside.__contains__)
        account.fresh.clear()  # the other parts are none of this file's business
        log.info(start.take(account))
        filled |= inside
    groups, free = method.weight_groups(), groups_in_training(method)

    def is_required(name: str) -> bool:
        return name not in filled and group_name(name, groups) not in free

    if pretrained:
        files = [file for path in pretrained for file in open_whole(path, own)]
        log.info(start.take(fill(method, files, is_required, allow_partial, initialise_branches=True)))
    if complete:
        log.info(start.take(fill(method, open_whole(complete, own), allow_partial=allow_partial)))
    if not pretrained and not complete and any(map(is_required, dict(method.named_parameters()))):
        log.warning("warning: parts that do not train keep random weights. Give --pretrain_path, or train them "
                    "(model.params.train).")
    return start


def start_finetuning(start: Start, callbacks: Sequence[Any], trained: str, averaged: str | None = None) -> None:
    """Load trained weights for training, and their average for the callback, of the trainer's, that goes on with it.

    `trained` is a weight file; of a checkpoint that keeps an average, too, the weights in training. `averaged` is the
    file of the average where it has one of its own.
    """
    method, own = start.method, start.method.state_dict()
    files = open_whole(averaged or trained, own)
    log.info(start.take(fill(method, files)))
    average = {name: value.clone() for name, value in method.state_dict().items()}
    # Behind the files of the average, since weights in training alone are what newer checkpoints keep beside it.
    current = open_whole(trained, own, entries=("current_model_state", "state_dict"))
    log.info(start.take(fill(method, [*files, *current])))
    for callback in callbacks:
        if isinstance(callback, AveragedWeights):
            callback.start = average


def compile_training(method: nn.Module, **options: Any) -> None:
    """Compile the repeated blocks; they get plain tensors then, since compiled code groups its products by itself."""
    compile_blocks(method, **options)
    for part in method.modules():
        if isinstance(part, UNetEncoder):
            part.is_joint = False


def cache_latents(method: Method, data: Any, trainer: Any, folder: str) -> None:
    """Let the training set hand out latents of the frozen autoencoder instead of images."""
    from ldm.training.latents import build_latent_cache
    encoder = method.cacheable_encoder()
    paths = data.train_set.cacheable_paths()
    data.train_set.latents = build_latent_cache(
        paths, data.train_set.size, encoder, Path(folder), trainer.strategy.root_device,
        num_workers=data.num_workers, autocast=trainer.precision_plugin.forward_context)
