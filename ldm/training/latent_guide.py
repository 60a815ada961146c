"""A guide on latents (see ldm.sampling.rectify): a small segmentor that leaves the decoder out, and its training.

Decoding with gradients dominates the cost of rectifying at the size of Stable Diffusion; this network sees the clean
latent itself. It belongs to one autoencoder.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask
from ldm.data.images import read_image
from ldm.data.transforms import resize_image, resize_mask
from ldm.methods.base import Method
from ldm.util import UserError
from ldm.weights.checkpoint import save_safetensors
from ldm.weights.files import read_file
from ldm.weights.load import load_method, read_model_config

log = logging.getLogger(__name__)

DETAIL = 4  # scores for each latent along both axes: classes are finer than latents of 8 pixels


class LatentGuide:
    """A trained guide on latents.

    Args:
        file: from train_latent_guide.
        device: where it computes.
    Raises:
        FileNotFoundError, UserError: if it is no such file.
    """

    sees = "latents"

    def __init__(self, file: str | Path, device: str | torch.device = "cpu") -> None:
        raw = read_file(file)
        try:
            about = json.loads(raw.metadata["latent_guide"])
            self.class_table, self.channels = ClassTable.load(about["class_table"]), int(about["channels"])
            self.latent_space = str(about["latent_space"])
            self.network = make_network(self.channels, self.class_table.num_classes, int(about["width"]))
            self.network.load_state_dict({name: stored.read() for name, stored in raw.tensors.items()})
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"--guide: {file} is no guide on latents ({error}). Expected what train_segmentor.py "
                            "--on_latents wrote. With one file, give that; a segmentor has two.") from error
        self.network = self.network.to(device).eval().requires_grad_(False)

    def __call__(self, latents: Tensor) -> Tensor:
        """Class scores, (B, K, 4 h, 4 w), of clean latents (B, C, h, w)."""
        return self.network(latents)


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        norm = lambda: nn.GroupNorm(math.gcd(8, width), width)  # noqa: E731
        self.layers = nn.Sequential(norm(), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                    norm(), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))  # fmt: skip

    def forward(self, h: Tensor) -> Tensor:
        """(B, width, h, w) -> the same."""
        return h + self.layers(h)


def make_network(channels: int, num_classes: int, width: int) -> nn.Sequential:
    """Convolutions from latents (B, channels, h, w) to scores (B, num_classes, DETAIL * h, DETAIL * w)."""
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), Residual(width), Residual(width), Residual(width),
                         nn.SiLU(), nn.Conv2d(width, num_classes * DETAIL**2, 3, padding=1), nn.PixelShuffle(DETAIL))


class Tiles(Dataset):
    """Images (3, H, W) float32 in [-1, 1] and masks (H, W) int64 of pairs; all of the first mask's size."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]], table: ClassTable, factor: int) -> None:
        self.pairs, self.table = pairs, table
        self.size = tuple(max(factor, side // factor * factor) for side in read_mask(pairs[0][1], table).shape)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = read_image(self.pairs[index][0]), read_mask(self.pairs[index][1], self.table)
        image, mask = resize_image(image, self.size), resize_mask(mask, self.size)
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1,
                torch.from_numpy(np.array(mask)).long())  # fmt: skip


@torch.no_grad()
def encode_pairs(method: Method, pairs: Sequence[tuple[Path, Path]], table: ClassTable, device: torch.device | str,
                 num_workers: int = 0) -> tuple[Tensor, Tensor]:
    """Clean latents of all images, plain and mirrored along both axes, and their masks, on the CPU.

    Returns:
        Latents (4 N, C, h, w) float16 and masks (4 N, H, W) uint8.
    """
    latents, masks = [], []
    loader = DataLoader(Tiles(pairs, table, method.size_factor), 16, num_workers=num_workers)
    for image, mask in tqdm(loader, desc="latents"):
        for axes in ((), (-1,), (-2,), (-2, -1)):
            latents.append(method.encode_start(image.flip(axes).to(device)).half().cpu())
            masks.append(mask.flip(axes).to(torch.uint8))
    return torch.cat(latents), torch.cat(masks)


def train_latent_guide(checkpoint: str | Path, pairs: Sequence[tuple[Path, Path]], table: ClassTable, out: Path,
                       max_steps: int = 1500, batch_size: int = 16, learning_rate: float = 1e-3, width: int = 64,
                       seed: int = 23, device: str | torch.device = "cpu", num_workers: int = 0,
                       noise: float = 0.5) -> dict[str, Any]:
    """Train a segmentor on a generator's latents of real pairs, and write it to `out`.

    Args:
        checkpoint: the generator whose autoencoder makes the latents.
        pairs: images and masks.
        table: their classes, which must be the generator's.
        out: file to write, .safetensors.
        max_steps, batch_size, learning_rate: of AdamW, its rate falling to 0 as a cosine.
        width: channels inside.
        seed: of weights, order and noise.
        device: where to compute.
        num_workers: loader processes.
        noise: most noise that is added to latents while training, in units of their standard deviation: clean latents
            that a generator implies early are blurred and wrong, and the guide should not be sure of them.
    Returns:
        `steps`, `loss` (mean of the last tenth), `accuracy` on the training pixels of the last tenth.
    Raises:
        UserError: if the generator has no latents, or other classes.
    """
    method = load_method(checkpoint, read_model_config(checkpoint), device)
    space = method.latent_space()
    if not space:
        raise UserError(f"--on_latents: {checkpoint} works on images, not on latents. Expected a latent generator. "
                        "Leave the flag out, and guide it with a segmentor on images.")
    latents, masks = encode_pairs(method, pairs, table, device, num_workers)
    spread = float(latents.float().std())
    torch.manual_seed(seed)
    network = make_network(latents.shape[1], table.num_classes, width).to(device)
    with torch.no_grad():
        network[0].weight /= spread  # so that latents of any spread are seen as of one
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    order, late = torch.Generator().manual_seed(seed), deque(maxlen=max(max_steps // 10, 1))
    for _ in tqdm(range(max_steps), desc="guide on latents"):
        chosen = torch.randint(len(latents), (batch_size,), generator=order)
        clean, mask = latents[chosen].to(device).float(), masks[chosen].to(device).long()
        level = noise * spread * torch.rand(batch_size, 1, 1, 1, generator=order)
        noisy = clean + (level * torch.randn(clean.shape, generator=order)).to(device)
        scores = F.interpolate(network(noisy), mask.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(scores, mask, ignore_index=IGNORE_INDEX)
        if not bool(loss.isfinite()):  # a batch of ignored pixels alone
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        known = mask != IGNORE_INDEX
        late.append(torch.stack([loss.detach(), (scores.argmax(1) == mask)[known].float().mean()]))
    if not late:
        raise UserError(f"--on_latents: none of {len(masks)} masks has a pixel with a class. Expected labelled pairs.")
    about = {"class_table": table.to_dict(), "channels": latents.shape[1], "width": width, "latent_space": space}
    save_safetensors(out, network.state_dict(), metadata={"latent_guide": json.dumps(about)})
    loss, accuracy = torch.stack(list(late)).mean(0).tolist()
    log.info("%d steps on %d latents: loss %.3f, accuracy %.3f; wrote %s", max_steps, len(latents), loss, accuracy, out)
    return {"steps": max_steps, "loss": loss, "accuracy": accuracy}
