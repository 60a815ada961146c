"""The guide of --guide: found by a dotted path, known by its files' hashes, and checked against the model."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.data.classes import same_names
from ldm.files import file_sha256
from ldm.methods.base import Method
from ldm.util import UserError, locate, may_call

# By name, since nothing here knows of segmentors.
SEGMENTOR = "post_processing.segmentation.guide.SegmentorGuide"
LATENT = "ldm.training.latent_guide.LatentGuide"


def find_guide(arguments: Sequence[str], allow_modules: Sequence[str] = ()) -> tuple[str, list[str]]:
    """Dotted path of the class of a guide, and the files that it takes.

    Args:
        arguments: of --guide: the weights of a guide on latents; config and weights of a segmentor; or a class of the
            user's own and its files.
        allow_modules: of --allow_modules.
    Raises:
        FileNotFoundError: if a file is missing.
        UserError: for a class that may not be called, or another number of files.
    """
    first, *files = arguments
    if re.fullmatch(r"\w+(\.\w+)+", first) and not Path(first).exists() and "/" not in first and may_call(
            first, allow_modules):
        target = first
    elif len(arguments) in (1, 2):
        target, files = (LATENT, SEGMENTOR)[len(arguments) - 1], list(arguments)
    else:
        raise UserError(f"--guide: {len(arguments)} files. Expected config and weights of a segmentor, or the weights "
                        "of a guide on latents.")
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--guide: {file} not found. Expected a file of a trained guide. Check the path.")
    return target, files


def guide_fingerprint(arguments: Sequence[str], allow_modules: Sequence[str] = ()) -> dict[str, Any]:
    """What of a guide decides the images: its class, and the contents of its files."""
    target, files = find_guide(arguments, allow_modules)
    return {"guide": [target, *map(file_sha256, files)]}


def load_guide(arguments: Sequence[str], method: Method, device: torch.device | str,
               allow_modules: Sequence[str] = ()) -> Any:
    """Build a guide (see ldm.sampling.rectify.Guide and find_guide) and check that it fits the model or its skeleton.

    Raises:
        UserError, ValueError, FileNotFoundError: if its files are not what they should be, its classes are not the
            model's, or it takes other images or latents.
    """
    target, files = find_guide(arguments, allow_modules)
    guide = locate(target)(*files, device=device)
    if hasattr(guide, "keep_classes"):  # a segmentor may know more classes, and by their names which are the model's
        guide.keep_classes(method.class_table)
    names, expected = list(guide.class_table.names), list(method.class_table.names)
    if not same_names(names, expected):
        raise UserError(f"--guide: it was trained on the classes {', '.join(names)}. Expected those of the model: "
                        f"{', '.join(expected)}. Train one with the model's class table.")
    side = method.size_factor
    channels = method.image_channels if guide.sees == "images" else method.noise_shape(side, side)[0]
    if guide.channels != channels:
        raise UserError(f"--guide: it takes {guide.sees} of {guide.channels} channels. Expected {channels}, as the "
                        "model makes them. Give one that was trained for this model.")
    if guide.sees == "latents" and not any(p.is_meta for p in method.parameters()) and (
            guide.latent_space != method.latent_space()):
        raise UserError("--guide: it was trained on latents of another autoencoder. Expected those of this model. "
                        "Train one: scripts/train_segmentor.py --on_latents CKPT.")
    return guide
