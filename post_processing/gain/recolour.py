"""Real pairs in the colours of unlabelled references: the strongest competitor of a generator that follows them."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.data.images import read_image
from ldm.data.transforms import match_colours
from ldm.files import link_or_copy
from post_processing.evaluation.scores import lab_to_rgb, rgb_to_lab


def recolour(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Give an image the mean and covariance that a reference's colours have in CIE L*a*b* (see match_colours).

    Args:
        image: (H, W, 3) uint8.
        reference: (h, w, 3) uint8.
    Returns:
        (H, W, 3) uint8; colours that no screen has are clipped.
    """
    own, wanted = (rgb_to_lab(torch.from_numpy(np.array(one)).permute(2, 0, 1)[None])[0].flatten(1).T
                   for one in (image, reference))
    matrix, offset = map(torch.from_numpy, match_colours(own.numpy(), wanted.numpy()))
    changed = (own @ matrix.T + offset).T.reshape(1, 3, *image.shape[:2])
    return lab_to_rgb(changed)[0].permute(1, 2, 0).numpy()


def write_recoloured(folder: Path, items: Sequence[dict[str, str]], root: Path) -> list[dict[str, str]]:
    """Write the images of a manifest in the colours of their references, and their masks beside them.

    Args:
        folder: gets images/ and masks/.
        items: rows with source, target and ref_image.
        root: where their paths start.
    Returns:
        Rows of a manifest, paths below the folder.
    """
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, item in enumerate(items):
        image = recolour(read_image(root / item["target"], None), read_image(root / item["ref_image"], None))
        row = {"source": f"masks/{number:06d}{Path(item['source']).suffix}", "target": f"images/{number:06d}.png"}
        Image.fromarray(image).save(folder / row["target"])
        (folder / row["source"]).unlink(missing_ok=True)
        link_or_copy(root / item["source"], folder / row["source"])
        rows.append(row)
    return rows
