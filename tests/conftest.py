"""Fixtures that several test files share: a data set drawn by program, and a config that trains on it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
data:
  target: ldm.data.datamodule.DataModule
  params:
    data_root: ???
    train_manifest: ${data.params.data_root}/train_set_items.json
    val_manifest: ${data.params.data_root}/val_set_items.json
    class_table: ${model.params.class_table}
    batch_size: 2
    num_workers: 0
    size: [16, 16]
    reference: manifest
training:
  learning_rate: 1.0e-2
  weight_decay: 0.0
  ema_decay: null
  preview_every: null
  cache_latents: null
lightning:
  trainer:
    max_steps: 2
    precision: 32-true
    enable_progress_bar: false
    log_every_n_steps: 1
  checkpoint:
    every_n_train_steps: 100
"""


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten 32 x 32 images whose colours follow the classes of their masks; eight to train on, two to validate."""
    root = tmp_path_factory.mktemp("toy")
    random = np.random.default_rng(0)
    colours = random.integers(40, 215, (5, 3))
    for folder in ("label", "img"):
        (root / folder).mkdir()
    for i in range(10):
        mask = np.kron(random.integers(0, 5, (4, 4)), np.ones((8, 8), int)).astype(np.uint8)
        image = (colours[mask] + random.integers(-20, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
        mask[:2] = 255
        Image.fromarray(mask).save(root / f"label/{i}.png")
        Image.fromarray(image).save(root / f"img/{i}.png")
    rows = [{"source": f"label/{i}.png", "target": f"img/{i}.png", "prompt": f"a satellite image of road {i}",
             "ref_image": f"img/{(i + 3) % 10}.png"} for i in range(10)]  # fmt: skip
    for name, part in (("train", rows[:8]), ("val", rows[8:])):
        (root / f"{name}_set_items.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    (root / "train.yaml").write_text(CONFIG)
    return root
