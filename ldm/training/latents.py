"""Cache of autoencoder latents, so that training does not encode the same images again in every epoch."""
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.data.dataset import to_tensor
from ldm.data.images import read_image
from ldm.data.transforms import normalize_batch, resize_image
from ldm.files import atomic_write

log = logging.getLogger(__name__)


class LatentCache:
    """Posterior moments of images, plain and flipped, in one memory-mapped file.

    Args:
        moments: (N, 2, 2C, h, w) float16; second axis: as it is, flipped left to right.
        paths: the N images.
    """

    def __init__(self, moments: np.ndarray, paths: Sequence[Path]) -> None:
        self.moments = moments
        self.index = {path: i for i, path in enumerate(paths)}

    def get(self, path: Path, is_flipped: bool) -> Tensor:
        """Moments of one image: (2C, h, w) float16, mean first, then log-variance."""
        return torch.from_numpy(np.array(self.moments[self.index[path], int(is_flipped)]))


class FlippedImages(Dataset):
    """Images resized to one size; item i is image i // 2, flipped when i is odd."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return 2 * len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = resize_image(read_image(self.paths[index // 2]), self.size)
        return {"image": to_tensor(image[:, ::-1] if index % 2 else image)}


def build_latent_cache(paths: Sequence[Path], size: tuple[int, int], autoencoder: nn.Module, folder: Path,
                       device: torch.device | str, batch_size: int = 32, num_workers: int = 2,
                       autocast: Callable = nullcontext) -> LatentCache:
    """Encode images once, or open the file of an earlier run with the same images, size and autoencoder.

    Args:
        paths: distinct image files.
        size: (height, width) that all are resized to.
        autoencoder: has `encode(image) -> posterior with mean and logvar`.
        folder: where the file goes; its name is the fingerprint of what is in it.
        device, batch_size, num_workers: of the encoding.
        autocast: makes the context that it runs in, for mixed precision.
    """
    digest = hashlib.sha256(json.dumps([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]).encode())
    digest.update(str(size).encode())
    for parameter in autoencoder.state_dict().values():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    file = folder / f"latents-{digest.hexdigest()[:16]}.npy"
    if not file.exists():
        log.info("encoding %d images (plain and flipped) into %s", len(paths), file)
        folder.mkdir(parents=True, exist_ok=True)
        autoencoder.to(device)
        loader = DataLoader(FlippedImages(paths, size), batch_size, num_workers=num_workers)

        def encode(partial: IO[bytes]) -> None:
            target, done = None, 0
            for batch in tqdm(loader, desc="latents"):
                with torch.no_grad(), autocast():
                    posterior = autoencoder.encode(normalize_batch(batch, device)["image"])
                moments = torch.cat([posterior.mean, posterior.logvar], dim=1).half().cpu().numpy()
                if target is None:
                    shape = (2 * len(paths), *moments.shape[1:])
                    target = np.lib.format.open_memmap(partial.name, "w+", np.float16, shape)
                target[done:done + len(moments)] = moments
                done += len(moments)
            target.flush()

        atomic_write(file, encode)
    moments = np.load(file, mmap_mode="r")
    return LatentCache(moments.reshape(len(paths), 2, *moments.shape[1:]), paths)
