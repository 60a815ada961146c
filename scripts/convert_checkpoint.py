"""Convert weights: any layout that is read, diffusers folders among them, to our safetensors or to a torch file.

    python scripts/convert_checkpoint.py GID.ckpt gid.safetensors --config configs/model/tisynth_sd15_upstream.yaml
    python scripts/convert_checkpoint.py run/checkpoints/last.safetensors small.safetensors --dtype fp16
    python scripts/convert_checkpoint.py run/checkpoints/last.safetensors delta.safetensors --only_trainable
    python scripts/convert_checkpoint.py v1-5.ckpt delta.safetensors whole.safetensors   # later inputs win
    python scripts/convert_checkpoint.py stable-diffusion-v1-5/ v1-5.safetensors         # a diffusers folder
    python scripts/convert_checkpoint.py ema_0.9999_060204.pt isdm.safetensors --classes loveda   # SDM, ISDM
    python scripts/convert_checkpoint.py ddim-loveda-256-segguided/ sg.safetensors --classes loveda
"""
import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cldm.published import infer_model  # noqa: E402
from ldm.cli import add_classes  # noqa: E402
from ldm.data.classes import ClassTable  # noqa: E402
from ldm.files import atomic_write  # noqa: E402
from ldm.methods.pixel import EDGES  # noqa: E402
from ldm.util import UserError, check_targets, load_config, run_entry_point  # noqa: E402
from ldm.weights.checkpoint import open_whole, save_safetensors  # noqa: E402
from ldm.weights.files import Checkpoint, StoredTensor  # noqa: E402
from ldm.weights.load import SCHEDULE, build_skeleton, fill, group_name, groups_in_training  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ENDINGS = (".safetensors", ".ckpt", ".pth", ".pt")
UPSTREAM = "configs/model/tisynth_sd15_upstream.yaml"


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="inputs, files or diffusers folders, then the output: .safetensors "
        "or .ckpt/.pth")
    add("--config", help="model yaml; default: the config inside the last input that has one")
    add_classes(add, "that of published weights of SDM, ISDM or segmentation-guided diffusion; the rest of the config "
                "follows from the shapes")
    add("--edge", choices=EDGES, default="semantic", help="with --classes: what SDM's channel of edges shows, if "
        "there is one (default: %(default)s). Published weights for Cityscapes and COCO: instance")
    add("--dtype", choices=sorted(DTYPES), help="precision of the output; default: as it is. Schedules stay float32")
    add("--ema", action="store_true", help="put averaged weights (model_ema.) in the place of the plain ones")
    add("--only_trainable", action="store_true", help="write only the groups that train; needs a config")
    add("--allow_partial", action="store_true", help="write files that do not fill the config's model")
    add("--allow_modules", action="append", default=[], metavar="MODULE", help="module of your own that the config "
        "may name; may be given several times")
    add("--drop_objects", action="store_true", help="keep the tensors of a pickle that holds other objects too")
    add("--overwrite", action="store_true", help="replace the output")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def merge(checkpoints: Iterable[Checkpoint]) -> tuple[dict[str, StoredTensor], DictConfig | None]:
    """All tensors and the config; later inputs win."""
    tensors: dict[str, StoredTensor] = {}
    config = None
    for checkpoint in checkpoints:
        tensors |= checkpoint.tensors
        config = checkpoint.config if checkpoint.config is not None else config
    return tensors, config


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another precision; the schedule stays as it is.

    Raises:
        UserError: if values leave the range of float16.
    """
    if dtype is None or not tensor.is_floating_point() or name in SCHEDULE:
        return tensor
    result = tensor.to(dtype)
    if not result.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"--dtype: {name} has values up to {float(tensor.abs().max()):.3g}, too large for fp16. "
                        "Expected at most 65504. Use bf16.")
    return result


def write(path: Path, weights: dict[str, Tensor], config: DictConfig | None, metadata: Mapping[str, str]) -> None:
    """Write a file of the kind that its name says."""
    if path.suffix == ".safetensors":
        save_safetensors(path, weights, config, metadata)
        return
    content: dict[str, Any] = {"state_dict": weights, **metadata}
    if config is not None:
        content["config"] = OmegaConf.to_container(config, resolve=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: torch.save(content, file))


def main(argv: list[str]) -> None:
    """Convert."""
    args = build_parser().parse_args(argv)
    *sources, target = map(Path, args.paths)
    if not sources:
        raise UserError(f"convert_checkpoint: only one path ({target}). Expected inputs and an output.")
    if target.suffix not in ENDINGS:
        raise UserError(f"{target}: its ending {target.suffix!r} is unknown. Expected one of {', '.join(ENDINGS)}.")
    if target.exists() and not args.overwrite:
        raise FileExistsError(f"{target} exists. Give another output or --overwrite.")
    if args.config and args.classes:
        raise UserError("--classes: the config of --config names the classes already. Give one of the two.")
    config = load_config([args.config]) if args.config else None
    check_targets(config, f"--config {args.config}", args.allow_modules)
    known = build_skeleton(OmegaConf.to_container(config, resolve=True)).state_dict() if config else {}
    checkpoints = [file for source in sources  # with the files that it stands on: what is written is whole
                   for file in open_whole(source, known, use_ema=args.ema, drop_objects=args.drop_objects)]
    stored, inner = merge(checkpoints)
    if args.classes:
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        model = infer_model(shapes, ClassTable.load(args.classes), args.edge)
        config = OmegaConf.create({"model": model})
    if config is None and inner is not None:
        check_targets(inner, f"checkpoint {sources[-1]}", args.allow_modules)
        config = inner
    metadata = {}
    if config is None:
        print("\n".join(f"{c.name}: {len(c.tensors)} tensors. {'; '.join(c.notes)}" for c in checkpoints))
        if args.only_trainable:
            raise UserError(f"--only_trainable: the inputs have no config. Add --config {UPSTREAM}, for example.")
    else:
        skeleton = build_skeleton(OmegaConf.to_container(config, resolve=True))
        account = fill(skeleton, checkpoints, is_required=lambda name: not (args.allow_partial or args.only_trainable),
                       allow_partial=args.allow_partial)
        print(account)
        if args.only_trainable:
            groups, free = skeleton.weight_groups(), groups_in_training(skeleton)
            stored = {name: stored[name] for name, _ in skeleton.named_parameters()
                      if name in stored and group_name(name, groups) in free}
            metadata["kind"] = "delta"
            print(f"delta: {len(stored)} tensors; give it behind its base to train.py --pretrain_path or this script")
    weights = {name: cast(name, tensor.read(), DTYPES.get(args.dtype)) for name, tensor in stored.items()}
    write(target, weights, config, metadata)
    print(f"wrote {target}")


if __name__ == "__main__":
    run_entry_point(main)
