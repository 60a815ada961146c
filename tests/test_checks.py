"""Parts of the checks in benchmarks/ that their numbers hang on."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
from benchmarks.autoencoder_check import grid_strength
from benchmarks.rectify_check import DISTORTIONS, copy_numbers, interval
from post_processing.run_index import Sample


def test_a_grid_is_seen_and_plain_noise_has_none():
    image = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert grid_strength(image, 8) == pytest.approx(1, abs=0.03)
    blocks = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(8, 2)
    assert grid_strength(0.1 * image + blocks.repeat_interleave(8, 3), 8) > 5


def test_the_interval_holds_the_difference_and_is_nothing_for_equal_images():
    random = np.random.default_rng(0)
    true = random.integers(50, 100, (40, 2)).astype(float)
    masks = [Path(f"{number // 2}.png") for number in range(40)]

    def areas(share: float) -> np.ndarray:
        right = true * (share + random.normal(0, 0.03, true.shape))
        return np.stack([right, true, true], 1)

    better, worse = areas(0.8), areas(0.6)
    low, high = interval(better, worse, masks)
    # right of 0.8 and 0.6: IoU 0.8 / 1.2 and 0.6 / 1.4
    assert low < 100 * (0.8 / 1.2 - 0.6 / 1.4) < high and high - low < 6
    assert interval(better, better, masks) == [0, 0]


def test_copies_are_numbered_by_seed_and_distortions_keep_the_size():
    samples = [Sample(Path(f"a_{seed}.png"), Path(f"{mask}.png"), "a") for seed, mask in
               ((42, 0), (43, 1), (10000042, 0), (10000043, 1))]  # fmt: skip
    assert copy_numbers(samples).tolist() == [0, 0, 1, 1]
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    changed = {name: change(image) for name, change in DISTORTIONS.items()}
    assert all(one.shape == image.shape and one.dtype == np.uint8 for one in changed.values())
    assert (changed["as generated"] == image).all() and len({one.tobytes() for one in changed.values()}) == 5
    assert np.abs(changed["noise 8"].astype(int) - image).mean() < 8
