"""Pairs of images and masks as an MMSegmentation dataset: from a class table and a manifest or two folders.

Nothing is copied into mmseg and no class list is edited: a config names `TABLE_DATASET` as its type, and the class
table travels inside the config.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.classes import ClassTable, read_mask
from ldm.data.images import Pair, find_images, pair_images, read_image
from ldm.data.manifest import read_manifest
from ldm.util import UserError
from post_processing.segmentation.segmentor import dataset_meta

TABLE_DATASET = "post_processing.segmentation.dataset.TableSegDataset"  # mmengine imports the class by this dotted path


def dataset_config(table: ClassTable, pipeline: Sequence[Mapping[str, Any]], *, check_files: bool = True,
                   is_synthetic: bool = False, **source: Any) -> dict[str, Any]:
    """Config node of a TableSegDataset for mmengine's Runner.

    Args:
        table: the classes.
        pipeline: mmseg transforms after loading (RandomCrop, ..., PackSegInputs).
        check_files: decode all files of the manifest first; False where that has been done.
        is_synthetic: whether the images are synthesized; every sample carries it in its meta information.
        source: where the pairs are (see list_pairs).
    """
    node = {"type": TABLE_DATASET, "class_table": table.to_dict(), "pipeline": [dict(step) for step in pipeline]}
    node |= {key: str(value) for key, value in source.items() if value is not None}
    if "manifest" in node:
        node["check_files"] = check_files
    return node | ({"is_synthetic": True} if is_synthetic else {})


def list_pairs(table: ClassTable | None, *, manifest: str | Path | None = None, data_root: str | Path = ".",
               image_folder: str | Path | None = None, mask_folder: str | Path | None = None,
               check_files: bool = True) -> list[Pair]:
    """Find the images with masks of a manifest or of two folders, in a fixed order, each pair once.

    Args:
        table: the classes, which the masks of a manifest are checked with; None = they are not.
        manifest: JSON-lines file of image-mask rows relative to data_root; or else both folders:
        data_root: where the manifest's paths start.
        image_folder: folder of images.
        mask_folder: folder of masks that have the stem of their image.
        check_files: decode all files of the manifest first.

    Raises:
        ValueError: if neither or both sources are given, or an image lacks its mask, or nothing is there.
        FileNotFoundError: if a folder is missing.
    """
    if (manifest is None) == (image_folder is None or mask_folder is None):
        raise ValueError("dataset: expected either a manifest or both an image folder and a mask folder. Give one of "
                         "the two.")
    if manifest is not None:
        rows = read_manifest(manifest, data_root, need=("image",), table=table, check_files=check_files)
        pairs = list(dict.fromkeys(Pair(row.image, row.mask) for row in rows))  # rows may differ in the reference only
    else:
        images, masks = find_images(Path(image_folder)), find_images(Path(mask_folder))
        pairs, lacking, _ = pair_images(images, masks)
        problems = [*images.problems, *masks.problems]
        if lacking:
            first = ", ".join(images.files[name].name for name in lacking[:5])
            problems.append(
                f"dataset: {len(lacking)} of {len(images.files)} images in {image_folder} have no mask in {mask_folder}"
                f" ({first}). Expected a mask with the stem of every image.")
        if problems:
            raise UserError("; ".join(problems))
    if not pairs:
        raise ValueError(f"dataset: no pairs in {manifest or image_folder}. Expected at least one image with its mask.")
    return pairs


class TableSegDataset(torch.utils.data.Dataset):
    """Image-mask pairs that pass through an mmseg pipeline; masks are read exactly, through the class table."""

    def __init__(self, class_table: Mapping[str, Any] | str, pipeline: Sequence[Mapping[str, Any]] = (),
                 is_synthetic: bool = False, **source: Any) -> None:
        """List the files; see dataset_config for the arguments."""
        from mmengine.dataset import Compose

        self.table = ClassTable.load(class_table)
        self.pairs = list_pairs(self.table, **source)
        self.pipeline = Compose(list(pipeline))
        self.is_synthetic = is_synthetic

    @property
    def metainfo(self) -> dict[str, Any]:
        """Class names and colours, as mmengine stores them in checkpoints."""
        return dataset_meta(self.table)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load one pair and run the pipeline.

        Returns:
            What the last transform gives; for PackSegInputs `inputs` (3, h, w) uint8 BGR and `data_samples`, with
            `is_synthetic` in their meta information.
        Raises:
            ValueError: if image and mask differ in size.
        """
        pair = self.pairs[index]
        image, mask = read_image(pair.image, None), read_mask(pair.mask, self.table)
        if image.shape[:2] != mask.shape:
            raise ValueError(f"dataset: image {pair.image} has {image.shape[:2]} pixels, mask {pair.mask} "
                             f"{mask.shape}. Expected equal sizes (height, width). Replace one of them.")
        sample = self.pipeline(make_sample(image, mask, index, img_path=str(pair.image), seg_map_path=str(pair.mask),
                                           is_synthetic=self.is_synthetic))  # fmt: skip
        return note_origin(sample, self.is_synthetic)


def make_sample(image: np.ndarray, mask: np.ndarray, index: int, **more: Any) -> dict[str, Any]:
    """What mmseg's transforms expect to be loaded, of an image (H, W, C) uint8 and a mask (H, W) uint8."""
    if image.shape[2] == 3:
        image = np.ascontiguousarray(image[:, :, ::-1])  # they expect BGR
    size = image.shape[:2]
    return {"img": image, "gt_seg_map": mask, "seg_fields": ["gt_seg_map"], "ori_shape": size, "img_shape": size,
            "reduce_zero_label": False, "sample_idx": index, **more}  # fmt: skip


def note_origin(sample: dict[str, Any], is_synthetic: bool) -> dict[str, Any]:
    """Write `is_synthetic` into the meta information of a packed sample, whatever keys PackSegInputs keeps."""
    if "data_samples" in sample:
        sample["data_samples"].set_metainfo({"is_synthetic": is_synthetic})
    return sample


def count_pixels(masks: Iterable[Path], table: ClassTable) -> np.ndarray:
    """Pixels of each class over all masks, (K,) int64; ignored pixels are not counted."""
    total = np.zeros(256, dtype=np.int64)
    for mask in masks:
        total += np.bincount(read_mask(mask, table).ravel(), minlength=256)
    return total[: table.num_classes]


def class_weights(pixels: np.ndarray, exponent: float) -> list[float]:
    """Loss weights that rise with the rarity of a class.

    Args:
        pixels: (K,) pixel counts of the training set.
        exponent: weight ~ share ** -exponent; 0 = all equal, 1 = every class counts the same in sum.
    Returns:
        K weights whose mean over the pixels is 1; a class without pixels gets 1.
    """
    share = pixels / max(pixels.sum(), 1)
    weight = np.where(share > 0, np.maximum(share, 1e-4) ** -exponent, 0.0)
    weight = weight / max((weight * share).sum(), 1e-12)
    return [float(value) for value in np.where(share > 0, weight, 1.0).round(5)]


class RandomScale:
    """mmcv's RandomResize about the size of each image, so that one is trained on at the scale it is predicted at.

    With a fixed `scale` all tiles are brought to that size before they are cut: those of 512 pixels to 128 where the
    crop has 128, and a segmentor then meets them at four times what it has seen.
    """

    def __init__(self, ratio_range: tuple[float, float]) -> None:
        """Edges are multiplied by one number between the two of ratio_range, drawn anew for each image."""
        from mmcv.transforms import RandomResize

        self.resize = RandomResize(scale=(1, 1), ratio_range=tuple(ratio_range), keep_ratio=True)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize image and mask of a pipeline's results."""
        height, width = results["img"].shape[:2]
        self.resize.scale = (width, height)
        return self.resize(results)
