"""A TISynth of test size, and one that writes down what it sees."""

import hashlib
import json
import os
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from cldm.tisynth import TISynth

ROOT = Path(__file__).resolve().parents[1]


def randomize(module: nn.Module, std: float = 0.2) -> nn.Module:
    """Random values for all parameters: zero-initialised layers would hide what comes before them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def model_params(name: str, **changes: object) -> dict:
    """Arguments of TISynth from a config in configs/model, at the size of tisynth_tiny.yaml."""

    def load(file: str) -> dict:
        return OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/model/{file}.yaml"))["model"]["params"]

    tiny = load("tisynth_tiny")
    sizes = {key: tiny[key] for key in ("unet", "autoencoder", "text_encoder", "stem_widths", "class_table")}
    sizes["text_encoder"]["params"]["tokenizer"] = str(ROOT / "configs/model/mini_tokenizer.json")
    return {**load(name), **sizes, **changes}


class RecordingTISynth(TISynth):
    """Appends to $RECORD_TO/rank_N.jsonl what the network gets in every call, and a digest of all weights."""

    def predict_noise(self, latent: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if is_distributed else 0
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.parameters()))
        record = {"training": self.training, "timestep": timestep.tolist(), "latent": latent.sum().item(),
                  "weights": digest.hexdigest()}  # fmt: skip
        with (Path(os.environ["RECORD_TO"]) / f"rank_{rank}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        return super().predict_noise(latent, timestep, **conditions)
