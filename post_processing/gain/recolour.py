"""Real pairs in the colours of unlabelled references: the strongest competitor of a generator that follows them."""
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ldm.data.images import read_image
from ldm.data.manifest import read_manifest, write_manifest
from ldm.data.transforms import match_colours
from ldm.files import link_or_copy
from post_processing.evaluation.scores import lab_to_rgb, rgb_to_lab

if TYPE_CHECKING:
    from post_processing.gain.plan import Plan


def recolour(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Give an image the mean and covariance that a reference's colours have in CIE L*a*b* (see match_colours).

    (H, W, 3) and (h, w, 3) uint8 -> (H, W, 3) uint8; colours that no screen has are clipped.
    """
    own, wanted = (rgb_to_lab(torch.from_numpy(np.array(one)).permute(2, 0, 1)[None]).flatten(2).mT
                   for one in (image, reference))
    matrix, offset = match_colours(own, wanted).split([3, 1], dim=2)
    changed = matrix @ own.mT + offset
    return lab_to_rgb(changed.reshape(1, 3, *image.shape[:2]))[0].permute(1, 2, 0).numpy()


def write_recoloured_set(plan: "Plan") -> None:
    """Write the pairs that the generator starts from (mixed ones with --mix_masks) in the colours of their references.

    One image for each that the generator makes: the same masks, the same references, without it.
    """
    folder = plan.outdir / "recolour"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    items = read_manifest(plan.manifests["painted"], plan.mask_root, need=("image", "reference"), check_files=False)
    rows = []
    for number, item in enumerate(items):
        image = recolour(read_image(item.image, None), read_image(item.reference, None))
        row = {"source": f"masks/{number:06d}{item.mask.suffix}", "target": f"images/{number:06d}.png"}
        Image.fromarray(image).save(folder / row["target"])
        (folder / row["source"]).unlink(missing_ok=True)
        link_or_copy(item.mask, folder / row["source"])
        rows.append(row)
    write_manifest(plan.manifests["recoloured"], rows)
