"""Training of MMSegmentation segmentors: config, class table and pairs become one mmengine run.

Trains on real pairs, on synthesized ones, or on both at a fixed ratio; the length is in optimizer steps, whatever the
number of pairs. `args` is the command line of scripts/train_segmentor.py, which says what each setting means.
"""

import argparse
import json
import logging
import os
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.classes import ClassTable
from ldm.util import UserError, is_rank_zero
from post_processing.segmentation.backbone import find_imagenet_weights, load_backbone
from post_processing.segmentation.config import find_heads, read_config, walk
from post_processing.segmentation.dataset import class_weights, count_pixels, dataset_config, list_pairs
from post_processing.segmentation.dlc import CORRECTED_LOSS
from post_processing.segmentation.dlc_training import (
    NOISE_FLAGS,
    add_noise_correction,
    check_flags,
    check_resumed,
    is_corrected,
    list_kept_flags,
    name_correction,
)
from post_processing.segmentation.mixing import JOINT_DATASET, MIX_DATASET, RATIO_SAMPLER
from post_processing.segmentation.segmentor import (
    HISTORY_BUFFER,
    HISTORY_METHOD,
    check_weights,
    read_checkpoint,
    require_mmseg,
    save_checkpoint,
    unwrap,
)

LOG = logging.getLogger(__name__)
HISTORY_METHODS = ("min", "max", "current", "mean")  # what mmengine stores with a loss history
SETTINGS = ("max_steps", "batch_size", "learning_rate", "init_backbone", "class_balance")  # change the config
DATA_FLAGS = ("class_table", "data_root", "train_txt_file", "val_txt_file", "image_folder", "mask_folder",
              "synthetic_txt_file", "synthetic_root", "synthetic_ratio", "augment", "val_interval", "num_workers",
              *NOISE_FLAGS)


def train_segmentor(args: argparse.Namespace) -> Path:
    """Train a segmentor, and write config.json (the resolved config) and segmentor.pth to its work_dir.

    Args:
        args: the command line (see scripts/train_segmentor.py); `given` holds the names of the flags on it.
    Returns:
        Path of segmentor.pth (written by rank 0 only).
    Raises:
        UserError, ValueError, FileNotFoundError, FileExistsError: if settings contradict each other or data are wrong.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    require_mmseg()
    work_dir = Path(args.work_dir)
    if (work_dir / "segmentor.pth").exists() and not (args.overwrite or args.resume):
        raise FileExistsError(
            f"{work_dir}: holds a trained segmentor. Give another --work_dir, --resume or --overwrite.")
    work_dir.mkdir(parents=True, exist_ok=True)
    use_safe_reader()
    config, table = make_config(args)
    runner = build_runner(config, args.init_from)
    if is_rank_zero():
        (work_dir / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str))
    started = time.time()
    model = runner.train()
    minutes = (time.time() - started) / 60
    path = work_dir / "segmentor.pth"
    if is_rank_zero():
        steps = runner.max_iters
        save_checkpoint(path, unwrap(model), table, steps=steps, seed=args.seed)
        read_checkpoint(path)  # what was written must pass the reader that others use
        LOG.info("%d steps in %.1f minutes; wrote %s and config.json", steps, minutes, path)
    return path


def load_config(args: argparse.Namespace) -> tuple[Any, ClassTable]:
    """Read the config and the class table, and check that the flags go with them.

    Returns:
        mmengine Config with the flags' settings, and the table.
    Raises:
        FileNotFoundError: if there is no such config.
        UserError: if there is no class table, or flags contradict a config that has its own data.
    """
    config = read_config(args.config)
    given = [f"--{name}" for name in args.given if name in (*SETTINGS, *DATA_FLAGS)]
    if "train_dataloader" in config and given:
        raise UserError(f"{', '.join(given)}: {args.config} has its own data and schedule. Expected neither on the "
                        "command line. Change them there, or leave the flags out.")
    for name in SETTINGS:
        if getattr(args, name) is not None:
            config[name] = getattr(args, name)
    spec = args.classes or config.get("class_table")
    if spec is None:
        raise UserError("--classes: missing. Expected a name in configs/classes or the path of a class table.")
    return config, ClassTable.load(spec)


def list_sources(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Where the training sets of the command line are, real before synthesized; UserError if there is none."""
    sources: list[dict[str, Any]] = []
    if args.train_txt_file or args.image_folder or args.mask_folder:
        folders = {"image_folder": args.image_folder, "mask_folder": args.mask_folder}
        sources.append({"manifest": args.train_txt_file, "data_root": args.data_root, **folders})
    if args.synthetic_txt_file:
        root = args.synthetic_root or Path(args.synthetic_txt_file).parent
        sources.append({"manifest": args.synthetic_txt_file, "data_root": root, "is_synthetic": True})
    if not sources:
        raise UserError("--train_txt_file: no training pairs. Expected real ones, --synthetic_txt_file, or both.")
    return sources


def fill_data(config: Any, table: ClassTable, args: argparse.Namespace) -> None:
    """Set classes, class weights and the training loader of a config in place."""
    sources = list_sources(args)
    share = args.synthetic_ratio / (1 + args.synthetic_ratio) if len(sources) == 2 else 0.0
    drawn = np.zeros(table.num_classes)
    for source, weight in zip(sources, (1 - share, share), strict=False):
        pairs = list_pairs(table, **{key: value for key, value in source.items() if key != "is_synthetic"})
        pixels = count_pixels((pair.mask for pair in pairs), table)
        drawn += weight * pixels / max(pixels.sum(), 1)
        LOG.info("%d pairs, %.0f %% of the draws: %s", len(pairs), 100 * weight, source["manifest"] or "folders")
    LOG.info("class shares of the pixels drawn: %s",
             ", ".join(f"{name} {value:.1%}" for name, value in zip(table.names, drawn, strict=True)))  # fmt: skip
    balance = config.get("class_balance", 0.0)
    fill_classes(config.model, table.num_classes, class_weights(drawn, balance) if balance else None)
    pipeline = config.train_pipeline if args.augment == "none" else config.train_pipeline[:-1]
    nodes = [dataset_config(table, pipeline, **source, check_files=False) for source in sources]
    if is_corrected(args):
        add_noise_correction(config, table, args, nodes)
    dataset = nodes[0] if len(nodes) == 1 else dict(type=JOINT_DATASET, datasets=nodes)
    if args.augment != "none":
        if len(nodes) == 2:
            raise UserError(f"--augment {args.augment}: mixes pairs of one set. Expected real or synthesized ones.")
        dataset = dict(type=MIX_DATASET, dataset=dataset, kind=args.augment, pipeline=config.train_pipeline[-1:])
    config.train_dataloader = make_loader(dataset, config.batch_size, args.num_workers, is_training=True)
    if len(nodes) == 2:
        config.train_dataloader["sampler"] = dict(type=RATIO_SAMPLER, ratio=args.synthetic_ratio)


def make_config(args: argparse.Namespace) -> tuple[Any, ClassTable]:
    """Complete the model's config with classes, data, schedule and hooks.

    Returns:
        mmengine Config ready for Runner.from_cfg, and the class table.
    """
    config, table = load_config(args)
    if "train_dataloader" not in config:
        check_flags(args)
        config.noise_correction = name_correction(args)  # into config.json, as the next
        config.kept_flags = list_kept_flags(args, table)
        check_resumed(args, config.kept_flags)
        fill_data(config, table, args)
        config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=config.max_steps, val_interval=args.val_interval)
        if args.val_txt_file:
            dataset = dataset_config(table, config.test_pipeline, manifest=args.val_txt_file, data_root=args.data_root)
            config.val_dataloader = make_loader(dataset, config.batch_size, args.num_workers, is_training=False)
            config.val_cfg = dict(type="ValLoop")
            config.val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
        set_schedule(config)
    config.env_cfg = dict(
        cudnn_benchmark=True,
        mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
        dist_cfg=dict(backend="nccl" if torch.cuda.is_available() else "gloo"),
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not torch.cuda.is_available():
        raise UserError(f"GPUS: {processes} processes without a GPU. Expected 1; mmengine spreads over GPUs only. "
                        "Leave GPUS out.")
    config.launcher = "pytorch" if processes > 1 else "none"
    config.sync_bn = "torch" if processes > 1 else None
    config.randomness = dict(seed=args.seed)
    # mmengine would take --resume without a checkpoint for one with, and the backbone would start from random weights.
    found = find_checkpoint(Path(args.work_dir)) if args.resume else None
    config.resume = found is not None
    if found:
        config.load_from = str(found)
    config.work_dir, config.log_level = args.work_dir, "INFO"
    config.log_processor = dict(by_epoch=False)
    return config, table


def find_checkpoint(work_dir: Path) -> Path | None:
    """The newest whole checkpoint that a training left in its folder, None if there is none.

    mmengine's own note, last_checkpoint, holds a path that is wrong once the folder is moved. A kill while one is
    written leaves a part of it, which has no directory of the zip file at its end.
    """
    numbers = {path: re.fullmatch(r"(?:iter|epoch)_(\d+)", path.stem) for path in work_dir.glob("*.pth")}
    found = sorted((int(match[1]), path) for path, match in numbers.items() if match)
    for _, path in reversed(found):
        if zipfile.is_zipfile(path):
            return path
        LOG.warning("%s is not whole and is left out: its training was stopped while it was written", path)
    return None


def set_schedule(config: Any) -> None:
    """Set optimizer, learning rate over the steps, logging and checkpoints of a config in place."""
    steps, clip = config.max_steps, config.get("clip_grad", 5.0)
    config.optimizer["lr"] = config.learning_rate
    config.optim_wrapper = dict(
        type="OptimWrapper",
        optimizer=config.optimizer,
        paramwise_cfg=config.get("paramwise_cfg"),
        clip_grad=dict(max_norm=clip) if clip else None,
    )
    warm_up = int(steps * config.get("warm_up", 0.05))
    warm_up = warm_up if warm_up > 1 else 0  # mmengine's LinearLR over one step would stay at its first factor for good
    linear = dict(type="LinearLR", start_factor=0.01, begin=0, end=warm_up, by_epoch=False)
    poly = dict(type="PolyLR", eta_min=config.get("eta_min", 0.0), power=0.9, begin=warm_up, end=steps, by_epoch=False)
    config.param_scheduler = [linear] * (warm_up > 0) + [poly] * (warm_up < steps)
    # Two: the older one is deleted before the new one is written, and a kill must leave one.
    hooks = dict(
        logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
        checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=max(1, min(500, steps)), max_keep_ckpts=2),
    )
    config.default_hooks = hooks | dict(config.get("default_hooks") or {})  # custom_hooks stay as they are


def fill_classes(model: dict[str, Any], num_classes: int, weights: list[float] | None) -> None:
    """Set the number of classes, and the class weights if any, in every head of a model config, in place.

    Heads inside a head that wraps them are found too.

    Raises:
        UserError: if there are weights and a head whose losses take none.
    """
    for key, head in find_heads(model):
        inner = [node for node in walk(head) if "num_classes" in node or "loss_decode" in node] or [head]
        for node in inner:
            node["num_classes"] = num_classes
        losses = [loss for node in inner for loss in walk(node.get("loss_decode"))
                  if loss.get("type") in ("CrossEntropyLoss", CORRECTED_LOSS)]  # fmt: skip
        if weights and not losses:
            raise UserError(f"config: loss_decode of {key} {head.get('type')} has no CrossEntropyLoss, but the "
                            "classes have weights. Expected a loss that takes them, or class_balance = 0.")
        for loss in losses if weights else ():
            loss["class_weight"] = weights
            if loss["type"] == "CrossEntropyLoss":
                loss["avg_non_ignore"] = False  # with weights mmseg leaves ignored pixels out, and stops if told so


def make_loader(dataset: dict[str, Any], batch_size: int, num_workers: int, is_training: bool) -> dict[str, Any]:
    """Loader node for mmengine's Runner; endless and shuffled for training, in order once otherwise."""
    return dict(
        batch_size=batch_size if is_training else 1,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        sampler=dict(type="InfiniteSampler" if is_training else "DefaultSampler", shuffle=is_training),
        dataset=dataset,
    )


def use_safe_reader() -> None:
    """Make mmengine resume through a reader that cannot run code (its own one retries without protection)."""
    from mmengine.logging.history_buffer import HistoryBuffer
    from mmengine.runner.checkpoint import CheckpointLoader

    def history_method(owner: Any, name: str) -> Any:
        if owner is not HistoryBuffer or name not in HISTORY_METHODS:
            raise UserError(f"checkpoint: asks for attribute {name!r} of {owner!r}. Expected loss histories only.")
        return getattr(HistoryBuffer, name)

    def read(filename: str, map_location: Any = None) -> Any:
        return read_checkpoint(filename, {HISTORY_BUFFER: HistoryBuffer, HISTORY_METHOD: history_method})

    CheckpointLoader.register_scheme(prefixes="", loader=read, force=True)


def build_runner(config: Any, init_from: str | None) -> Any:
    """Build mmengine's Runner with the weights to start from loaded; ValueError if they do not fit."""
    from mmengine.runner import Runner

    runner = Runner.from_cfg(config)
    # A line for every parameter, hundreds of them.
    runner.logger.addFilter(lambda record: "paramwise_options" not in record.getMessage())
    model = unwrap(runner.model)
    if config.get("channels_last", False):
        runner.model.to(memory_format=torch.channels_last)
    init = config.get("init_backbone", "none")
    if config.resume or (init == "none" and not init_from):
        return runner
    model.init_weights()  # now, so that the Runner does not initialise over the loaded weights later
    if init_from:
        state_dict = read_checkpoint(init_from)["state_dict"]
        # Losses may differ: what they hold (T of noisy labels) belongs to a training, not to the network.
        state_dict = {name: value for source in (state_dict, model.state_dict()) for name, value in source.items()
                      if (".loss_decode." in name) == (source is not state_dict)}  # fmt: skip
        wrong = check_weights(model, state_dict)
        if wrong:
            raise ValueError(f"--init_from {init_from}: does not fit the config: {wrong}. Give one of the same model.")
        model.load_state_dict(state_dict)
    else:
        path = find_imagenet_weights() if init == "imagenet" else Path(init)
        LOG.info("backbone: %d tensors from %s", load_backbone(model.backbone, path), path)
    return runner
