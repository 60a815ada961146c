"""Self-training on images of another place that have no masks: a teacher labels them, the student learns from mixtures.

Student and exponential-moving-average teacher as in DACS (Tranheden et al., WACV 2021: ClassMix between domains,
pseudo labels weighted by the teacher's confidence) with the masked images of MIC (Hoyer et al., CVPR 2023). A hook adds
to each batch as many mixed and masked target images as it has labelled ones; their labels carry the domain PSEUDO, so
the corrected loss sees them like any others, and source pixels in a mixture stay what they were.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ldm.data.classes import IGNORE_INDEX
from ldm.data.images import find_images, read_image
from ldm.data.manifest import probe_files
from ldm.util import UserError, is_rank_zero
from post_processing.segmentation.dataset import make_sample
from post_processing.segmentation.dlc import CODE, PSEUDO, WEIGHT_CODE, check_capacity
from post_processing.segmentation.segmentor import unwrap

SELF_TRAINING_HOOK = "post_processing.segmentation.self_training.make_self_training_hook"
TARGET_DATASET = "post_processing.segmentation.self_training.TargetDataset"
MOST_MEMORY = 0.999  # share of the teacher that stays in a step
CONFIDENT = 0.968  # probability from which a pixel speaks for its image
HIDDEN = 0.7  # share of the blocks of a masked image
BLOCKS = 8  # along a side: 64 px of 512
JITTER_CHANCE, BLUR_CHANCE = 0.8, 0.5
JITTER = 0.2  # of brightness, contrast and saturation, around 1
COLOUR_STEPS = ("PhotoMetricDistortion",)  # not before the teacher, which should see images as they are


def list_targets(path: str | Path, data_root: str | Path) -> list[Path]:
    """Images of a folder, or of a JSON-lines manifest (key `target`, relative to the data root), each once.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        UserError: naming all lines without an image, all images that cannot be read, or if there is nothing.
    """
    path = Path(path)
    if path.is_dir():
        images = list(find_images(path).files.values())
    elif path.is_file():
        images, wrong = [], []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                images.append(Path(data_root) / json.loads(line)["target"])
            except (ValueError, TypeError, KeyError):
                wrong.append(f"line {number} has no `target`")
                continue
            if not images[-1].is_file():
                wrong.append(f"line {number}: {images[-1]} does not exist")
        if wrong:
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise UserError(f"--target_txt_file {path}: {'; '.join(wrong[:8])}{more}. Expected objects with the path "
                            "of an image below --data_root.")
    else:
        raise FileNotFoundError(f"--target_txt_file: not found: {path}. Give a manifest or a folder of images.")
    if not images:
        raise UserError(f"--target_txt_file {path}: no images. Expected unlabelled images of the target.")
    images = list(dict.fromkeys(images))
    found = probe_files((image, read_image) for image in images)
    if wrong := [text for text in found if isinstance(text, str)]:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"--target_txt_file {path}: {len(wrong)} images cannot be used: {' '.join(wrong[:8])}{more}")
    return images


class TargetDataset(torch.utils.data.Dataset):
    """Images without masks that pass through an mmseg pipeline; the mask only says where there is an image."""

    def __init__(self, images: Sequence[str], pipeline: Sequence[dict[str, Any]]) -> None:
        """Take paths and transforms (PackSegInputs last)."""
        from mmengine.dataset import Compose

        self.images, self.pipeline = list(images), Compose(list(pipeline))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Load an image: `inputs` (3, h, w) uint8 BGR, `data_samples` with 0 where there is an image, 255 elsewhere."""
        image = read_image(self.images[index])
        mask = np.zeros(image.shape[:2], np.uint8)
        return self.pipeline(make_sample(image, mask, index, img_path=self.images[index]))


def add_self_training(config: Any, args: Any, num_classes: int) -> None:
    """Change a config in place: the hook that brings the target images; losses are corrected ones already."""
    check_capacity(num_classes, PSEUDO)
    pipeline = [step for step in config.train_pipeline if step["type"] not in COLOUR_STEPS]
    images = [str(image) for image in list_targets(args.target_txt_file, args.data_root)]
    loader = dict(
        batch_size=config.batch_size, num_workers=args.num_workers, persistent_workers=args.num_workers > 0,
        sampler=dict(type="InfiniteSampler", shuffle=True, seed=args.seed),
        dataset=dict(type=TARGET_DATASET, images=images, pipeline=pipeline),
    )  # fmt: skip
    hook = dict(type=SELF_TRAINING_HOOK, loader=loader, num_classes=num_classes, seed=args.seed)
    config.custom_hooks = [*(config.get("custom_hooks") or []), hook]


@torch.no_grad()
def update_average(teacher: torch.nn.Module, student: torch.nn.Module, step: int) -> None:
    """Move a teacher towards its student, in place, after `step` earlier moves; buffers are copied."""
    share = min(1 - 1 / (step + 1), MOST_MEMORY)
    torch._foreach_lerp_(list(teacher.parameters()), [new.detach() for new in student.parameters()], 1 - share)
    for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
        old.copy_(new)


def make_pseudo_labels(logits: torch.Tensor, is_image: torch.Tensor) -> torch.Tensor:
    """Turn a teacher's scores into coded labels.

    Args:
        logits: (B, K, H, W).
        is_image: (B, H, W) bool; elsewhere there is only padding.
    Returns:
        (B, H, W) int64: domain PSEUDO, weight = share of the image's pixels that the teacher is sure of; 255 outside.
    """
    probability, label = logits.float().softmax(1).max(1)
    is_sure = (probability >= CONFIDENT) & is_image
    share = is_sure.sum((1, 2)) / is_image.sum((1, 2)).clamp_min(1)
    weight_code = ((1 - share) * WEIGHT_CODE).round().long()[:, None, None] * WEIGHT_CODE
    return torch.where(is_image, label + CODE * PSEUDO + weight_code, IGNORE_INDEX)


def choose_half(labels: torch.Tensor, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """Pixels of a random half (rounded up) of the classes of each mask, ignored ones never.

    (B, H, W) int64, coded -> bool. The generator is the CPU's, so that the draw waits for nothing on the device.
    """
    code = labels & (WEIGHT_CODE - 1)
    classes = torch.where(code == IGNORE_INDEX, num_classes, code & (CODE - 1))
    is_there = functional.one_hot(classes, num_classes + 1)[..., :num_classes].flatten(1, 2).any(1)
    draws = torch.rand(is_there.shape, generator=generator).to(labels.device).masked_fill(~is_there, 2.0)
    rank = draws.argsort(1).argsort(1)
    is_chosen = (rank < (is_there.sum(1, keepdim=True) + 1) // 2) & is_there
    is_chosen = functional.pad(is_chosen, (0, 1))  # class K: ignored
    return is_chosen.gather(1, classes.flatten(1)).view_as(classes)


def hide_blocks(images: torch.Tensor, fill: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Replace most blocks of each image (B, 3, H, W) by a colour (3,)."""
    height, width = images.shape[-2:]
    is_hidden = (torch.rand(len(images), 1, BLOCKS, BLOCKS, generator=generator) < HIDDEN).to(images.device)
    is_hidden = functional.interpolate(is_hidden.float(), size=(height, width), mode="nearest").bool()
    return torch.where(is_hidden, fill.view(1, 3, 1, 1).to(images.dtype), images)


def change_colours(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change brightness, contrast and saturation, and blur, each image (B, 3, H, W) uint8 by draws of its own."""
    count = len(images)
    draws = torch.rand(6, count, generator=generator).to(images.device)
    factors = (1 + JITTER * (2 * draws[:3] - 1))[..., None, None, None]
    changed = images.float() * factors[0]
    mean = changed.mean((1, 2, 3), keepdim=True)
    changed = mean + (changed - mean) * factors[1]
    grey = changed.mean(1, keepdim=True)
    changed = grey + (changed - grey) * factors[2]
    changed = torch.where(draws[3, :, None, None, None] < JITTER_CHANCE, changed, images.float())
    places = torch.arange(-3, 4, device=images.device)
    kernel = torch.exp(-(places**2) / (2 * (0.15 + draws[4, :, None]) ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # a channel each
    flat = functional.pad(changed, (3, 3, 3, 3), mode="replicate").flatten(0, 1)[None]
    flat = functional.conv2d(flat, kernel[:, None, None, :], groups=3 * count)
    blurred = functional.conv2d(flat, kernel[:, None, :, None], groups=3 * count)[0].view_as(changed)
    changed = torch.where(draws[5, :, None, None, None] < BLUR_CHANCE, blurred, changed)
    return changed.round().clamp(0, 255).to(torch.uint8)


def mix_batch(source: tuple[torch.Tensor, torch.Tensor], target: tuple[torch.Tensor, torch.Tensor], num_classes: int,
              fill: torch.Tensor, generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Make what the student learns from beside its labelled images.

    Args:
        source, target: images (B, 3, H, W) uint8 and coded labels (B, H, W), on one device.
        num_classes: K.
        fill: colour (3,) of hidden blocks.
        generator: on the CPU.
    Returns:
        Mixed images with their labels (half of the classes of a source image pasted onto each target image), and masked
        target images with the pseudo labels of all their pixels.
    """
    order = torch.randperm(len(source[0]), generator=generator).to(source[0].device)
    images, labels = (tensor[order] for tensor in source)
    is_pasted = choose_half(labels, num_classes, generator)
    mixed = torch.where(is_pasted[:, None], images, target[0])
    mixed_labels = torch.where(is_pasted, labels, target[1])
    return [(change_colours(mixed, generator), mixed_labels),
            (hide_blocks(change_colours(target[0], generator), fill, generator), target[1])]  # fmt: skip


def stack_padded(batch: dict[str, Any], size: tuple[int, int],
                 device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W) uint8 and labels (B, H, W) int64 of a list batch, padded right and below (0 and 255)."""

    def pad(tensor: torch.Tensor, value: int) -> torch.Tensor:
        height, width = tensor.shape[-2:]
        return functional.pad(tensor, (0, size[1] - width, 0, size[0] - height), value=value)

    images = torch.stack([pad(image, 0) for image in batch["inputs"]])
    labels = torch.stack([pad(sample.gt_sem_seg.data[0], IGNORE_INDEX) for sample in batch["data_samples"]])
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def make_self_training_hook(loader: dict[str, Any], num_classes: int, seed: int) -> Any:
    """Make the mmengine hook that holds the teacher and adds target images, from a loader's node, to each batch."""
    from mmengine.dist import get_rank
    from mmengine.hooks import Hook
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    class SelfTrainingHook(Hook):
        priority = "LOW"  # after noise was estimated from the labelled images, before a checkpoint is written
        loaded: dict[str, Any] | None = None

        def before_train(self, runner: Any) -> None:
            student = unwrap(runner.model)
            self.teacher = copy.deepcopy(student).eval().requires_grad_(False)
            self.moves = 0
            if self.loaded:
                self.teacher.load_state_dict(self.loaded["state_dict"])
                self.moves = int(self.loaded["moves"])
            self.loader = runner.build_dataloader(loader, seed=seed)
            self.loader.sampler.skip(runner.iter * self.loader.batch_size)
            self.batches = iter(self.loader)

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            student = unwrap(runner.model)
            device = next(student.parameters()).device
            batch = next(self.batches)
            images = [*data_batch["inputs"], *batch["inputs"]]
            size = tuple(max(image.shape[side] for image in images) for side in (-2, -1))
            source = stack_padded(data_batch, size, device)
            target, is_image = stack_padded(batch, size, device)
            with torch.no_grad():
                inputs = self.teacher.data_preprocessor({"inputs": list(target)}, training=False)["inputs"]
                logits = self.teacher(inputs, None, mode="tensor")
                logits = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            pseudo = make_pseudo_labels(logits, is_image != IGNORE_INDEX)
            count = min(len(source[0]), len(target))
            generator = torch.Generator().manual_seed((seed * 1000 + get_rank()) * 10_000_000 + runner.iter)
            source, target = ([tensor[:count] for tensor in pair] for pair in (source, (target, pseudo)))
            fill = self.teacher.data_preprocessor.mean.flatten().round()
            fill = fill.flip(0) if self.teacher.data_preprocessor._channel_conversion else fill
            for new_images, new_labels in mix_batch(source, target, num_classes, fill, generator):
                for image, label in zip(new_images, new_labels, strict=True):
                    sample = SegDataSample(metainfo={"img_shape": size, "ori_shape": size, "is_synthetic": False})
                    sample.gt_sem_seg = PixelData(data=label[None])
                    data_batch["inputs"].append(image)
                    data_batch["data_samples"].append(sample)

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            update_average(self.teacher, unwrap(runner.model), self.moves)
            self.moves += 1

        def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
            if is_rank_zero():
                checkpoint["teacher"] = {"state_dict": self.teacher.state_dict(), "moves": self.moves}

        def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
            self.loaded = checkpoint.get("teacher")

    return SelfTrainingHook()
