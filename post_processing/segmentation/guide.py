"""A segmentor that guides a generator (see ldm.sampling.rectify)."""

from pathlib import Path

import torch
from torch import Tensor

from ldm.data.classes import ClassTable
from ldm.util import say_once
from post_processing.segmentation.segmentor import load_segmentor


class SegmentorGuide:
    """Any MMSegmentation segmentor as a differentiable function of images, frozen and in evaluation mode.

    Args:
        config, checkpoint: see load_segmentor; its classes are those of the checkpoint.
        device: where it computes.
    """

    sees, channels = "images", 3

    def __init__(self, config: str | Path, checkpoint: str | Path, device: str | torch.device = "cpu") -> None:
        self.segmentor = load_segmentor(config, checkpoint, device, names_suffice=True)
        self.class_table, self.kept = self.segmentor.class_table, None

    def keep_classes(self, table: ClassTable) -> None:
        """Give the scores of a table's classes alone, in its order, where the guide knows more; nothing if not all."""
        places = [self.class_table.find(name) for name in table.names]
        surplus = [name for index, name in enumerate(self.class_table.names) if index not in places]
        if surplus and None not in places and len(set(places)) == len(places):
            say_once(f"--guide: its outputs {', '.join(surplus)} are no classes of the model and are left out; the "
                     f"other {len(places)} have the names of the model's classes.")  # fmt: skip
            self.class_table, self.kept = table, places

    def __call__(self, images: Tensor) -> Tensor:
        """Class scores, (B, K, H, W) float32, of images (B, 3, H, W) float in [0, 1]."""
        scores = self.segmentor.scores(images * 255)
        return scores if self.kept is None else scores[:, self.kept]
