"""Train an MMSegmentation segmentor on image-mask pairs: any config of configs/mmseg, any class table, no copied files.

Writes to --work_dir: config.json (the resolved config) and segmentor.pth (weights and class table, plain tensors). The
two are what evaluate.py and the filter take. mmengine's own logs and checkpoints lie beside them.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python scripts/...` as well as `python -m`

from ldm.data.classes import ClassTable  # noqa: E402
from ldm.util import UserError, is_rank_zero, run_entry_point  # noqa: E402
from post_processing.backbone import find_imagenet_weights, load_imagenet_backbone  # noqa: E402
from post_processing.mmseg_dataset import class_weights, count_pixels, dataset_config, list_pairs  # noqa: E402
from post_processing.segmentor import (  # noqa: E402
    HISTORY_BUFFER,
    HISTORY_METHOD,
    read_checkpoint,
    require_mmseg,
    save_checkpoint,
)

LOG = logging.getLogger(__name__)
HISTORY_METHODS = ("min", "max", "current", "mean")  # what mmengine stores with a loss history


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--config", default="configs/mmseg/small.py", help="mmengine config of the model; a .py file is code and is run"
    )
    add("--class_table", required=True, help="name in configs/classes or path of a class table")
    add("--data_root", default=".", help="where the paths of the manifests start")
    add("--train_txt_file", help="JSON-lines manifest of training pairs")
    add("--val_txt_file", help="manifest of validation pairs; scored at the end and every --val_interval steps")
    add("--image_folder", help="folder of training images, instead of a manifest")
    add("--mask_folder", help="folder of masks with the stems of the images")
    add("--work_dir", required=True, help="output folder")
    add("--max_steps", type=int, help="optimizer steps (default: the config's)")
    add("--batch_size", type=int, help="tiles a step (default: the config's)")
    add("--learning_rate", type=float, help="peak rate (default: the config's)")
    add("--init_backbone", help="imagenet, none or a file of torchvision MobileNetV2 weights (default: the config's)")
    add("--class_balance", type=float, help="exponent of the class weights, 0 = none (default: the config's)")
    add("--val_interval", type=int, default=500, help="steps between validations")
    add("--num_workers", type=int, default=0, help="loader processes")
    add("--threads", type=int, default=0, help="CPU threads, 0 = torch's choice")
    add("-s", "--seed", type=int, default=23, help="seed of weights, order and augmentation")
    add("-r", "--resume", action="store_true", help="go on from the last checkpoint in --work_dir")
    add("--overwrite", action="store_true", help="allow a --work_dir that holds a finished training")
    add("-d", "--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def make_config(args: argparse.Namespace, table: ClassTable) -> Any:
    """Complete the model's config with classes, data, schedule and hooks.

    Returns:
        mmengine Config ready for Runner.from_cfg.
    """
    from mmengine.config import Config

    if not Path(args.config).is_file():
        raise FileNotFoundError(f"segmentor config not found: {args.config}. Give one such as configs/mmseg/small.py.")
    config = Config.fromfile(args.config)
    for flag in ("max_steps", "batch_size", "learning_rate", "init_backbone", "class_balance"):
        if getattr(args, flag) is not None:
            config[flag] = getattr(args, flag)
    source = {
        "manifest": args.train_txt_file,
        "data_root": args.data_root,
        "image_folder": args.image_folder,
        "mask_folder": args.mask_folder,
    }
    pixels = count_pixels(list_pairs(table, **source), table)
    LOG.info(
        "class shares of the training pixels: %s",
        ", ".join(
            f"{name} {share:.1%}" for name, share in zip(table.names, pixels / max(pixels.sum(), 1), strict=True)
        ),
    )
    weights = class_weights(pixels, config.get("class_balance", 0.0))
    fill_classes(config.model, table.num_classes, weights if config.get("class_balance", 0.0) else None)
    config.train_dataloader = make_loader(
        dataset_config(table, config.train_pipeline, **source), config.batch_size, args.num_workers, is_training=True
    )
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
        raise UserError(
            f"GPUS: {processes} processes without a GPU. Expected 1; mmengine spreads over GPUs only. Use GPUS=1."
        )
    config.launcher = "pytorch" if processes > 1 else "none"
    config.randomness = dict(seed=args.seed)
    config.work_dir, config.resume, config.log_level = args.work_dir, args.resume, "INFO"
    config.log_processor = dict(by_epoch=False)
    return config


def set_schedule(config: Any) -> None:
    """Set optimizer, learning rate over the steps, logging and checkpoints of a config in place."""
    steps = config.max_steps
    config.optimizer["lr"] = config.learning_rate
    config.optim_wrapper = dict(
        type="OptimWrapper",
        optimizer=config.optimizer,
        paramwise_cfg=config.get("paramwise_cfg"),
        clip_grad=dict(max_norm=5.0),
    )
    warm_up = max(1, steps // 20)
    config.param_scheduler = [
        dict(type="LinearLR", start_factor=0.01, begin=0, end=warm_up, by_epoch=False),
        dict(type="PolyLR", eta_min=0.0, power=0.9, begin=warm_up, end=steps, by_epoch=False),
    ]
    config.default_hooks = dict(
        logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
        checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=max(1, min(500, steps)), max_keep_ckpts=1),
    )


def fill_classes(model: dict[str, Any], num_classes: int, weights: list[float] | None) -> None:
    """Set the number of classes, and the class weights if any, in every head of a model config, in place."""
    for key in ("decode_head", "auxiliary_head"):
        heads = model.get(key)
        for head in heads if isinstance(heads, list | tuple) else [heads] if heads else []:
            head["num_classes"] = num_classes
            losses = head.get("loss_decode") or []
            for loss in losses if isinstance(losses, list | tuple) else [losses]:
                if weights and loss.get("type") == "CrossEntropyLoss":
                    # With weights mmseg's mean leaves ignored pixels out anyway, and stops if told so as well.
                    loss["class_weight"], loss["avg_non_ignore"] = weights, False


def make_loader(dataset: dict[str, Any], batch_size: int, num_workers: int, is_training: bool) -> dict[str, Any]:
    """Loader node for mmengine's Runner; endless and shuffled for training, in order once otherwise."""
    return dict(
        batch_size=batch_size if is_training else 1,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        sampler=dict(type="InfiniteSampler" if is_training else "DefaultSampler", shuffle=is_training),
        dataset=dataset,
    )


def prepare_work_dir(args: argparse.Namespace) -> Path:
    """Create the output folder; refuse one that holds a finished training unless told otherwise."""
    work_dir = Path(args.work_dir)
    if (work_dir / "segmentor.pth").exists() and not (args.overwrite or args.resume):
        raise FileExistsError(
            f"{work_dir}: holds a trained segmentor. Give another --work_dir, --resume or --overwrite."
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    return work_dir


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


def build_runner(config: Any) -> Any:
    """Build mmengine's Runner with the backbone's weights loaded."""
    from mmengine.runner import Runner

    runner = Runner.from_cfg(config)
    model = getattr(runner.model, "module", runner.model)
    if config.get("channels_last", False):
        runner.model.to(memory_format=torch.channels_last)
    init = config.get("init_backbone", "none")
    if init != "none" and not config.resume:
        model.init_weights()  # now, so that the Runner does not initialise over the loaded weights later
        path = find_imagenet_weights() if init == "imagenet" else Path(init)
        count = load_imagenet_backbone(model.backbone, path)
        LOG.info("backbone: %d tensors from %s", count, path)
    return runner


def main(argv: list[str] | None = None) -> None:
    """Train and write config.json and segmentor.pth."""
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    table = ClassTable.load(args.class_table)
    require_mmseg()
    work_dir = prepare_work_dir(args)
    use_safe_reader()
    config = make_config(args, table)
    runner = build_runner(config)
    if is_rank_zero():
        (work_dir / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str))
    started = time.time()
    model = runner.train()
    minutes = (time.time() - started) / 60
    if not is_rank_zero():
        return
    model = getattr(model, "module", model)
    save_checkpoint(work_dir / "segmentor.pth", model, table, steps=config.max_steps, seed=args.seed)
    read_checkpoint(work_dir / "segmentor.pth")  # what was written must pass the reader that others use
    LOG.info(
        "%d steps in %.1f minutes; wrote %s and config.json", config.max_steps, minutes, work_dir / "segmentor.pth"
    )


if __name__ == "__main__":
    run_entry_point(main)
