"""Train a method: parse flags, merge yaml, build module, data and Trainer, fit.

    python train.py --config_model configs/model/tisynth_tiny.yaml -b configs/train/mini.yaml --data_root DATA init=null
    python train.py -r logs/2026-11-21T10-00-00_mini          # resume, exactly
"""
import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

from ldm.util import UserError, check_keys, is_rank_zero, nearest, run_entry_point

log = logging.getLogger("train")


def build_parser() -> argparse.ArgumentParser:
    """All flags of train.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="data, optimizer and trainer; merged left to right")
    add("--config_model", metavar="YAML", help="network, for example configs/model/tisynth_sd15.yaml")
    add("--allow_modules", action="append", default=[], metavar="MODULE", help="module of your own that configs "
        "may name; may be given several times; else only networks and data modules of this project")
    add("-n", "--name", default="", help="ending of the run folder's name")
    add("-f", "--postfix", default="", help="further ending of the run folder's name")
    add("-p", "--project", help="run folder to use instead of logdir/time_name")
    add("-l", "--logdir", default="logs", help="where run folders go (default: %(default)s)")
    add("--gpus", help="numbers of the GPUs: '0' = the first one, '0,1,2,3' = four of them (a lone number is a GPU, "
        "not a count, as upstream); '' = CPU; default: all there are, else CPU")
    add("--num_nodes", type=int, default=1, help="machines of a distributed run (default: %(default)s)")
    add("--precision", help="Lightning precision, for example bf16-mixed or 32-true; default: as in the yaml")
    add("--data_root", help="folder that the manifests' paths start from")
    add("--train_txt_file", help="training manifest (JSON lines)")
    add("--val_txt_file", help="validation manifest")
    add("--pretrain_path", action="append", metavar="FILE", help="weights to start from: a file or a diffusers folder; "
        "may be given several times, later ones fill or override. Parts that train may be missing")
    add("--allow_partial", action="store_true", help="go on where weights are missing, unused or of another shape")
    add("--clip_dir", help="local folder of CLIP ViT-L/14, weights and tokenizer, for the text encoder")
    add("--actual_resume", help="weights to start from that must fit completely")
    add("--finetune", metavar="FILE", help="weights to go on from with a new optimizer, and their average if FILE is a "
        ".ckpt of a run that kept one")
    add("--finetune_ema", metavar="FILE", help="averaged weights for --finetune where they have a file of their own")
    add("-r", "--resume", help="run folder or its .ckpt: continue with optimizer, step and random state")
    add("-s", "--seed", type=int, help="base seed; each rank draws its own numbers (default: 23, or the run's with -r)")
    add("--scale_lr", action="store_true", help="multiply the learning rate by accumulation x GPUs x batch size")
    add("-t", "--train", default="true", choices=["true", "false"], nargs="?", const="true",
        help="false: build and validate everything, do not fit (default: %(default)s)")
    add("--no-test", action="store_true", dest="no_test", help="skip the validation pass at the end of the training")
    add("--dry_run", action="store_true", help="print the merged config and stop")
    add("-d", "--debug", action="store_true", help="show tracebacks")
    add("overrides", nargs="*", metavar="key.sub=value",
        help="changes to the config, e.g. lightning.trainer.max_steps=10")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the flags; overrides may stand anywhere between them, also behind the files of -b."""
    parser = build_parser()
    try:
        args, unknown = parser.parse_known_intermixed_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"train.py: {error}. See train.py --help.") from error
    if unknown:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        flag = unknown[0].split("=")[0]
        raise UserError(f"train.py: {flag} is an unknown flag.{nearest(flag, flags)} See train.py --help.")
    args.overrides = [file for file in args.base if "=" in file and not Path(file).exists()] + args.overrides
    args.base = [file for file in args.base if file not in args.overrides]
    return args


def merge_config(args: argparse.Namespace):  # noqa: ANN201 (DictConfig; omegaconf is imported late)
    """Config from the files (or from the run that is resumed), the flags and the overrides, in this order."""
    from omegaconf import OmegaConf

    from ldm.data.classes import ClassTable
    from ldm.util import check_targets, load_config
    files = [*([args.config_model] if args.config_model else []), *args.base]
    if args.resume:
        if files or args.pretrain_path or args.actual_resume or args.finetune:
            raise UserError("-r: takes config and weights from the run folder. Drop --config_model, --base, "
                            "--pretrain_path, --actual_resume and --finetune, or start a new run without -r.")
        files = [find_run(args.resume)[0] / "config.yaml"]
    if (args.finetune and (args.pretrain_path or args.actual_resume)) or (args.finetune_ema and not args.finetune):
        raise UserError("--finetune: fills the whole model, with --finetune_ema for its average. Expected none of "
                        "--pretrain_path, --actual_resume beside it, and --finetune_ema only with it. Drop one.")
    if not files:
        raise UserError("train.py: no config. Give --config_model YAML and -b YAML, or -r RUN_DIR.")
    flags = {"data.params.data_root": args.data_root, "data.params.train_manifest": args.train_txt_file,
             "data.params.val_manifest": args.val_txt_file, "lightning.trainer.precision": args.precision,
             "model.params.text_encoder.params.weights_dir": args.clip_dir}
    config = load_config(files, [f"{k}={v}" for k, v in flags.items() if v is not None] + args.overrides)
    for node in ("model", "data", "training", "lightning"):
        if node not in config:
            raise UserError(f"config: node `{node}` is missing. Expected model (--config_model), data, training and "
                            "lightning (--base).")
    missing = [key.rpartition(".") for key in sorted(OmegaConf.missing_keys(config))]  # and what refers to them
    unset = [parent + dot + leaf for parent, dot, leaf in missing
             if not OmegaConf.is_interpolation(OmegaConf.select(config, parent), leaf)]
    if unset:
        raise UserError(f"config: {', '.join(unset)} must be given. Add {unset[0]}=VALUE"
                        + (" or --data_root." if "data.params.data_root" in unset else "."))
    check_targets(config, " ".join(map(str, files)), args.allow_modules)
    OmegaConf.set_struct(config, False)
    config.seed = config.get("seed", 23) if args.seed is None else args.seed
    if "class_table" in config.model.params:  # the table goes into the config, so that checkpoints are complete
        config.model.params.class_table = ClassTable.load(
            OmegaConf.to_container(config.model.params, resolve=True)["class_table"]).to_dict()
    OmegaConf.set_struct(config, True)
    return config


def find_run(path: str) -> tuple[Path, Path]:
    """Run folder and checkpoint of a `-r` argument."""
    checkpoint = Path(path) / "checkpoints" / "last.ckpt" if Path(path).is_dir() else Path(path)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"-r {path}: no checkpoint at {checkpoint}. Give a run folder or a .ckpt inside one.")
    return checkpoint.parent.parent, checkpoint


def pick_devices(gpus: str | None) -> dict:
    """Lightning's accelerator and devices for a --gpus argument."""
    import torch
    if gpus is None and torch.cuda.is_available():
        return {"accelerator": "auto", "devices": "auto"}
    if not gpus:
        return {"accelerator": "cpu", "devices": 1}
    if not gpus.replace(",", "").isdecimal():
        raise UserError(f"--gpus {gpus!r}: expected numbers of GPUs such as 0 or 0,1,2,3, or '' for the CPU.")
    indices, count = [int(index) for index in gpus.split(",") if index], torch.cuda.device_count()
    if max(indices) >= count:
        raise UserError(f"--gpus {gpus}: this machine has {count} GPUs, numbered from 0. Four GPUs are 0,1,2,3; "
                        "--gpus '' trains on the CPU.")
    return {"accelerator": "gpu", "devices": indices}


def build_trainer(config, args: argparse.Namespace, run_dir: Path, data, budget):  # noqa: ANN001, ANN201
    """The Trainer with its callbacks and loggers."""
    import importlib.util

    import pytorch_lightning as pl
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    from ldm.training.average import AveragedWeights
    from ldm.training.callbacks import ImageGrid, Progress, RunCheckpoint, RunRecord, WeightExport
    from ldm.util import arguments_of
    settings = OmegaConf.to_container(config.lightning, resolve=True)
    check_keys("lightning", settings, ("trainer", "checkpoint"))
    check_keys("lightning.trainer", settings.get("trainer", {}), arguments_of(pl.Trainer))
    checkpoint = {key: value for key, value in settings.get("checkpoint", {}).items() if key != "every_minutes"}
    check_keys("lightning.checkpoint", checkpoint, arguments_of(ModelCheckpoint))
    training = config.training
    parts = len(list(run_dir.glob("csv*")))  # a resumed run continues in csv_2: CSVLogger deletes what a folder has
    loggers = [CSVLogger(run_dir, name="", version=f"csv_{parts + 1}" if parts else "csv")]
    if importlib.util.find_spec("tensorboard"):
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    callbacks = [RunRecord(run_dir, config), LearningRateMonitor("step"),
                 RunCheckpoint(run_dir / "checkpoints", **{
                     "filename": "step-{step:07d}", "auto_insert_metric_name": False, "save_last": True,
                     "enable_version_counter": False, **checkpoint})]
    if training.get("ema_decay"):
        callbacks.append(AveragedWeights(training.ema_decay, bool(training.get("ema_warmup", True))))
    callbacks += [WeightExport(run_dir, config), budget]  # behind EMA, whose weights they export and save
    if training.get("patience"):
        callbacks.append(EarlyStopping("loss_epoch", patience=training.patience, check_on_train_epoch_end=True))
    if training.get("preview_every") and data.val_set is not None:
        callbacks.append(ImageGrid(run_dir, data.val_set, training.preview_every))
    trainer = {"log_every_n_steps": 20, "enable_model_summary": False, "use_distributed_sampler": False,
               "num_sanity_val_steps": 0, "num_nodes": args.num_nodes, **pick_devices(args.gpus),
               **settings.get("trainer", {})}
    if trainer.get("enable_progress_bar", True):
        callbacks.append(Progress())
    return pl.Trainer(logger=loggers, callbacks=callbacks, default_root_dir=run_dir, **trainer)


def describe_resize(data) -> str:  # noqa: ANN001
    """Say that tiles are brought to a larger size than they have on disk; empty if they are not."""
    from ldm.data.images import image_size
    rows, size = getattr(data.train_set, "rows", ()), getattr(data.train_set, "size", None)
    own = image_size(rows[0].mask) if rows and size else size
    if not size or own[0] * own[1] >= size[0] * size[1]:
        return ""
    return (f"tiles of {own[0]}x{own[1]} pixels ({rows[0].mask.name}) are enlarged to {size[0]}x{size[1]}, which takes "
            f"{size[0] * size[1] / (own[0] * own[1]):.0f} times the time. If that is not meant, add "
            f"data.params.size=[{own[0]},{own[1]}], and take a model of that size.")


def main(argv: list[str]) -> int:
    """Train; returns the exit code."""
    started = time.monotonic()
    args = parse_arguments(argv)
    config = merge_config(args)
    from omegaconf import OmegaConf
    if is_rank_zero():
        print(OmegaConf.to_yaml(config, resolve=True))
    if args.dry_run:
        return 0
    from ldm.generation.machine import Stopped
    from ldm.training.budget import Budget
    budget = Budget(config.training.get("max_minutes"), config.lightning.get("checkpoint", {}).get("every_minutes", 10),
                    started)
    budget.catch_signals()
    try:
        return run_training(config, args, budget)
    except Stopped as stop:
        print(f"stopped by {stop}", file=sys.stderr)
        return stop.code
    finally:
        budget.release_signals()


def run_training(config, args: argparse.Namespace, budget) -> int:  # noqa: ANN001
    """Build everything and fit; returns the exit code."""
    from omegaconf import OmegaConf
    checkpoint = find_run(args.resume)[1] if args.resume else None
    run_dir = checkpoint.parent.parent if checkpoint else Path(args.project or Path(args.logdir) / "_".join(
        part for part in (time.strftime("%Y-%m-%dT%H-%M-%S"), args.name, args.postfix) if part))
    if not checkpoint and is_rank_zero() and (run_dir / "checkpoints" / "last.ckpt").exists():
        raise FileExistsError(f"--project {run_dir}: holds a run. Go on with it by -r {run_dir}, or name a new folder.")
    import torch

    from ldm.training.build import build_method, cache_latents, compile_training, start_finetuning
    from ldm.training.module import TrainingModule
    from ldm.util import arguments_of, instantiate_from_config
    from ldm.weights.load import build_skeleton
    settings = OmegaConf.to_container(config.training, resolve=True)
    # those that are not of TrainingModule
    others = ("ema_decay", "ema_warmup", "patience", "preview_every", "channels_last", "cache_latents", "max_minutes",
              "compile")
    check_keys("training", settings, [*others, *(set(arguments_of(TrainingModule)) - {"method", "seed", "left_out"})])
    options = {k: v for k, v in settings.items() if k not in others}
    skeleton = build_skeleton(OmegaConf.to_container(config, resolve=True))
    data = instantiate_from_config(config.data, seed=config.seed, size_factor=skeleton.size_factor,
                                   takes=skeleton.takes, channels=skeleton.image_channels)
    data.setup("fit")  # reads and checks all input before the network is built
    if note := describe_resize(data):
        log.warning("warning: %s", note)
    if "prompt" in skeleton.takes:
        skeleton.check_prompts(data.prompts())
    trainer = build_trainer(config, args, run_dir, data, budget)
    torch.manual_seed(config.seed)
    start = build_method(config, checkpoint, args.pretrain_path or (), args.actual_resume, args.allow_partial,
                         is_filled_later=bool(args.finetune))
    method = start.method
    if args.finetune:
        start_finetuning(start, trainer.callbacks, args.finetune, args.finetune_ema)
    if not checkpoint:
        method.start_training()
    if args.scale_lr:
        options["learning_rate"] *= trainer.accumulate_grad_batches * trainer.world_size * data.batch_size
        log.info("learning rate scaled to %g", options["learning_rate"])
    if settings.get("channels_last", True):
        method = method.to(memory_format=torch.channels_last)
    if settings.get("cache_latents"):
        cache_latents(method, data, trainer, settings["cache_latents"])
    module = TrainingModule(method, seed=config.seed, left_out=start.left_out, **options)
    if settings.get("compile"):
        compile_training(method)
        module.is_compiled = True
    if args.train == "false":
        return 0
    # It means well, but RowSampler does go on in the middle of an epoch, and no state_dict of a loader could.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
    if budget.limit is not None:
        module.time_share = 0.0
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    code = budget.finish(run_dir, trainer.global_step)
    if data.val_set is not None and not args.no_test and not (code or budget.is_over):
        trainer.validate(module, datamodule=data, verbose=False)
    return code


if __name__ == "__main__":
    run_entry_point(main)
