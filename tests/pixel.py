"""Pixel-space methods of test size."""

from omegaconf import OmegaConf
from tiny import ROOT, randomize
from torch import nn

from ldm.util import instantiate_from_config

TINY = ("seg_guided_tiny", "sdm_tiny")


def config(name: str, **changes: object) -> dict:
    """Model config from configs/model with changed arguments."""
    model = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/model/{name}.yaml"))["model"]
    return {**model, "params": {**model["params"], **changes}}


def make(name: str, std: float | None = 0.1, **changes: object) -> nn.Module:
    """A method in evaluation mode; std=None keeps its initial weights."""
    method = instantiate_from_config(config(name, **changes))
    return (method if std is None else randomize(method, std)).eval()
