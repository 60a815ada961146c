"""A toy experiment on noise correction: a small network, images drawn by program, and labels flipped by a known T.

    python -m benchmarks.noise_toy --seeds 1,2,3

What correction can recover when its assumptions hold (noise depends on the class only, drawn independently at each
pixel, or with --block 4 in squares of 4 x 4). It says nothing about synthesized images. Trains arms of equal length:
true labels, flipped ones with the plain loss, label smoothing, forward correction with T by HOC, and with the true T.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ldm.data.classes import IGNORE_INDEX
from post_processing.segmentation.dlc import SYNTHETIC, CorrectedCrossEntropy
from post_processing.segmentation.noise import count_consensus, estimate_hoc

TRANSITION = [[0.80, 0.10, 0.05, 0, 0.05], [0.42, 0.55, 0, 0.03, 0], [0.05, 0, 0.70, 0.25, 0], [0, 0, 0.42, 0.58, 0],
              [0.40, 0.05, 0, 0, 0.55]]  # fmt: skip
MEANS = [[0, 0, 0, 0], [1.2, 0, 0.3, 0], [0, 1.2, 0, 0.3], [0.4, 1.1, 0.9, 0], [0.9, 0.2, 0, 1.1]]
ARMS = ("clean", "noisy", "smooth", "hoc", "true_t")
SIZE, TRAIN, TEST, BATCH, STEPS = 32, 128, 96, 8, 300


def draw_tiles(count: int, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 4, 32, 32) float32 and their classes (N, 32, 32) int64: four areas, rare squares of a fifth."""
    waves = np.fft.rfft2(random.normal(size=(count, 4, SIZE, SIZE)))
    y, x = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]
    truth = np.fft.irfft2(waves * np.exp(-(y**2 + x**2) * 200), s=(SIZE, SIZE)).argmax(1)
    for tile in truth:
        for _ in range(random.poisson(0.04 * SIZE * SIZE / 16)):
            top, left = random.integers(SIZE - 3, size=2)
            tile[top : top + 4, left : left + 4] = 4
    images = np.array(MEANS)[truth] + random.normal(scale=0.9, size=(count, SIZE, SIZE, 4))
    return torch.from_numpy(images).float().movedim(-1, 1), torch.from_numpy(truth)


def flip_labels(labels: np.ndarray, transition: Sequence, block: int, random: np.random.Generator) -> np.ndarray:
    """Draw each pixel's label, (N, H, W) -> same, from the row of its class; a block shares the random number."""
    count, height, width = labels.shape
    draws = random.random((count, -(-height // block), -(-width // block))).repeat(block, 1).repeat(block, 2)
    levels = np.cumsum(transition, 1)[np.where(labels == IGNORE_INDEX, 0, labels)]
    flipped = (draws[:, :height, :width, None] > levels).sum(-1).clip(max=len(transition) - 1)
    return np.where(labels == IGNORE_INDEX, IGNORE_INDEX, flipped)


def make_network() -> nn.Sequential:
    """Two 3 x 3 convolutions of 16 channels and a classifier."""
    layers = [layer for channels in (4, 16) for layer in
              (nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]  # fmt: skip
    return nn.Sequential(nn.Sequential(*layers), nn.Conv2d(16, len(MEANS), 1))


@torch.no_grad()
def estimate(network: nn.Sequential, images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """T by HOC from five rounds of 4000 points, at least 4 pixels apart."""
    network.eval()
    generator, counts = np.random.default_rng([seed, 9]), 0
    for _ in range(5):
        top, left = generator.integers(4, size=2)
        features = network[0](images)[:, :, top::4, left::4].movedim(1, -1).flatten(0, 2)
        chosen = torch.from_numpy(generator.permutation(len(features))[:4000])
        counts = counts + count_consensus(labels[:, top::4, left::4].flatten()[chosen], features[chosen], len(MEANS))
    network.train()
    return estimate_hoc(counts)


def run_arm(arm: str, seed: int, block: int = 1) -> dict[str, float]:
    """Train one arm.

    Returns:
        OA and mIoU on test tiles with true labels, in [0, 1]; `tv`, the mean total-variation distance between the rows
        of the T that was used and of the true one (the identity's where none was).
    """
    random = np.random.default_rng([seed, 0])
    transition = torch.tensor(TRANSITION, dtype=torch.float64)
    images, truth = draw_tiles(TRAIN, random)
    test_images, test_truth = draw_tiles(TEST, random)
    labels = truth if arm == "clean" else torch.from_numpy(flip_labels(truth.numpy(), TRANSITION, block, random))
    torch.manual_seed(seed)
    network = make_network()
    loss = CorrectedCrossEntropy(len(MEANS), label_smoothing=0.1 if arm == "smooth" else 0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))
    for step in range(2 * STEPS):
        if step == STEPS and arm in ("hoc", "true_t"):
            known = transition if arm == "true_t" else estimate(network, images, labels, seed)
            loss.set_transition({SYNTHETIC: known})
        chosen = torch.from_numpy(random.integers(TRAIN, size=BATCH))
        optimizer.zero_grad()
        loss(network(images[chosen]), labels[chosen] + 64 * SYNTHETIC).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        predicted = network(test_images).argmax(1)
    pairs = torch.bincount(predicted.flatten() * 5 + test_truth.flatten(), minlength=25).view(5, 5).double()
    hits = pairs.diagonal()
    return {"OA": float(hits.sum() / pairs.sum()), "mIoU": float((hits / (pairs.sum(0) + pairs.sum(1) - hits)).mean()),
            "tv": float((loss.transition[SYNTHETIC] - transition).abs().sum(1).mean() / 2)}  # fmt: skip


def main() -> None:
    """Print a table of all arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1", help="comma-separated")
    parser.add_argument("--block", type=int, default=1, help="side of the squares that are flipped together")
    args = parser.parse_args()
    print("| arm | seed | OA | mIoU | TV of T |\n|---|---|---|---|---|")
    for arm in ARMS:
        for seed in map(int, args.seeds.split(",")):
            found = run_arm(arm, seed, args.block)
            print(f"| {arm} | {seed} | {found['OA']:.3f} | {found['mIoU']:.3f} | {found['tv']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
