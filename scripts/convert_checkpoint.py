"""Convert weights: any layout that is read to our safetensors, a torch file or a diffusers folder, and back.

    python scripts/convert_checkpoint.py GID.ckpt gid.safetensors --config configs/model/tisynth_sd15_upstream.yaml
    python scripts/convert_checkpoint.py run/checkpoints/last.safetensors small.safetensors --dtype fp16
    python scripts/convert_checkpoint.py run/checkpoints/last.safetensors delta.safetensors --only_trainable
    python scripts/convert_checkpoint.py v1-5.ckpt delta.safetensors whole.safetensors   # later inputs win
    python scripts/convert_checkpoint.py gid.safetensors gid_diffusers/                  # and with both swapped: back
    python scripts/convert_checkpoint.py ema_0.9999_060204.pt isdm.safetensors --classes loveda   # SDM, ISDM
    python scripts/convert_checkpoint.py ddim-loveda-256-segguided/ sg.safetensors --classes loveda
"""
import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cldm.published import infer_model  # noqa: E402
from ldm.cli import add_classes  # noqa: E402
from ldm.data.classes import ClassTable  # noqa: E402
from ldm.files import atomic_write  # noqa: E402
from ldm.methods.pixel import EDGES  # noqa: E402
from ldm.util import UserError, check_targets, load_config, run_entry_point  # noqa: E402
from ldm.weights.base import open_whole  # noqa: E402
from ldm.weights.checkpoint import REST, Checkpoint, save_safetensors  # noqa: E402
from ldm.weights.files import StoredTensor  # noqa: E402
from ldm.weights.load import build_skeleton  # noqa: E402
from ldm.weights.names import PARTS, to_diffusers  # noqa: E402
from ldm.weights.report import SCHEDULE, fill, group_name, groups_of  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UPSTREAM = "configs/model/tisynth_sd15_upstream.yaml"


def build_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="inputs, files or diffusers folders, then the output: .safetensors, "
        ".ckpt/.pth, or a folder (diffusers)")
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


def trainable_names(skeleton: nn.Module) -> set[str]:
    """Names of the parameters in the groups that train."""
    ids = {id(p) for group in skeleton.trainable_groups().values() for p in group}
    group_of = {name: group_name(name, groups_of(skeleton)) for name, _ in skeleton.named_parameters()}
    trained = {group_of[name] for name, p in skeleton.named_parameters() if id(p) in ids}
    return {name for name, group in group_of.items() if group in trained}


def diffusers_configs(skeleton: nn.Module) -> dict[str, dict[str, Any]]:
    """config.json of every part of a diffusers folder, by part.

    Raises:
        UserError: if a part computes something that diffusers cannot express.
    """
    if not hasattr(skeleton, "first_stage_model"):
        raise UserError(f"diffusers folder: cannot be written for {type(skeleton).__name__}. Expected a TISynth. Give "
                        "an output that ends in .safetensors.")
    unet, vae, text = skeleton.model.diffusion_model, skeleton.first_stage_model, skeleton.cond_stage_model
    if not hasattr(text, "transformer"):
        raise UserError(f"diffusers folder: the text encoder is a {type(text).__name__}. Expected ClipTextEncoder.")
    levels = unet.downsampling.bit_length()
    n = len(unet.output_blocks) // levels - 1  # residual blocks a level
    channels = [unet.feature_channels[level * (n + 1) + n] for level in range(levels)]
    attends = [hasattr(unet.input_blocks[1 + level * (n + 1)], "1") for level in range(levels)]
    shared = {
        "block_out_channels": channels, "layers_per_block": n, "cross_attention_dim": unet.context_dim,
        "attention_head_dim": [unet.count_heads(width) for width in channels], "in_channels": unet.in_channels,
        "norm_num_groups": norm_groups(unet, "U-Net"),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
    }  # fmt: skip
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
    stem = [layer for layer in skeleton.control_model.input_hint_block if isinstance(layer, nn.Conv2d)]
    stem_widths, strides = [layer.out_channels for layer in stem[:-1]], [layer.stride[0] for layer in stem]
    pairs = stem_widths[0::2]
    if stem_widths != [pairs[0], *(w for a, b in zip(pairs, pairs[1:], strict=False) for w in (a, b))] \
            or strides != [1, 1, 2, 1, 2, 1, 2, 1]:
        raise UserError(f"diffusers folder: the hint stem has widths {stem_widths} and strides {strides}. Expected "
                        "pairs of widths and an autoencoder of factor 8. diffusers' ControlNet cannot express it.")
    stages = len(vae.encoder.down)
    return {
        "unet": {"_class_name": "UNet2DConditionModel", **shared, "up_block_types": up,
                 "out_channels": unet.out[2].out_channels},
        "controlnet": {"_class_name": "ControlNetModel", **shared, "conditioning_channels": stem[0].in_channels,
                       "conditioning_embedding_out_channels": pairs},
        "vae": {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
                "block_out_channels": [stage.block[-1].conv1.out_channels for stage in vae.encoder.down],
                "layers_per_block": len(vae.encoder.down[0].block), "latent_channels": vae.latent_channels,
                "norm_num_groups": norm_groups(vae, "autoencoder"), "scaling_factor": skeleton.scale_factor,
                "down_block_types": ["DownEncoderBlock2D"] * stages, "up_block_types": ["UpDecoderBlock2D"] * stages},
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
                         "vocab_size": text.transformer.text_model.embeddings["token_embedding"].num_embeddings,
                         "hidden_size": text.width, "intermediate_size": 4 * text.width,
                         "num_hidden_layers": len(text.transformer.text_model.encoder["layers"]),
                         "num_attention_heads": text.heads, "max_position_embeddings": text.max_length,
                         "hidden_act": text.activation},
    }  # fmt: skip


def norm_groups(module: nn.Module, what: str) -> int:
    """The number of groups of all group norms; UserError if there are several, which diffusers cannot express."""
    found = sorted({layer.num_groups for layer in module.modules() if isinstance(layer, nn.GroupNorm)})
    if len(found) != 1:
        raise UserError(f"diffusers folder: the {what} normalises in {' or '.join(map(str, found))} groups. Expected "
                        "one number: diffusers would compute something else. Set model.params.norm_groups before the "
                        "training, or use a model of at least 128 channels.")
    return found[0]


def write_folder(folder: Path, weights: dict[str, Tensor], config: DictConfig) -> list[str]:
    """Write a diffusers folder; what diffusers has no place for goes to `tisynth/` in it, so that nothing is lost.

    Returns:
        A line a part.
    """
    configs = diffusers_configs(build_skeleton(OmegaConf.to_container(config, resolve=True)))
    lines = []
    for part, prefix in PARTS.items():
        inside = [name for name in weights if name.startswith(prefix)]
        names = to_diffusers(part, [name[len(prefix):] for name in inside])
        if not names:
            continue
        tensors = {}
        for ours, theirs in names.items():
            tensor = weights.pop(prefix + ours)
            is_matrix = part == "vae" and ".attentions." in theirs and tensor.ndim == 4
            tensors[theirs] = tensor[:, :, 0, 0] if is_matrix else tensor
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save_safetensors(folder / part / f"{stem}.safetensors", tensors, metadata={"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(configs[part], indent=2) + "\n")
        lines.append(f"{part}: {len(tensors)} tensors")
    save_safetensors(folder / REST / "model.safetensors", weights, config)
    return [*lines, f"{REST}: {len(weights)} tensors that diffusers has no place for. Without them its pipelines do "
            "not compute what TISynth does: unet/ alone is the U-Net without all-in-attention"]


def write(path: Path, weights: dict[str, Tensor], config: DictConfig | None, metadata: Mapping[str, str]) -> list[str]:
    """Write a file or folder of the kind that its name says."""
    if path.suffix == ".safetensors":
        save_safetensors(path, weights, config, metadata)
    elif path.suffix in (".ckpt", ".pth", ".pt"):
        content: dict[str, Any] = {"state_dict": weights, **metadata}
        if config is not None:
            content["config"] = OmegaConf.to_container(config, resolve=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: torch.save(content, file))
    elif path.suffix == "":
        if config is None:
            raise UserError(f"{path}: a diffusers folder needs the model's config. Add --config {UPSTREAM}.")
        return write_folder(path, weights, config)
    else:
        raise UserError(f"{path}: ending {path.suffix} is unknown. Expected .safetensors, .ckpt, .pth or a folder.")
    return []


def main(argv: list[str]) -> None:
    """Convert."""
    args = build_parser().parse_args(argv)
    *sources, target = map(Path, args.paths)
    if not sources:
        raise UserError(f"convert_checkpoint: only one path ({target}). Expected inputs and an output.")
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
            chosen = trainable_names(skeleton)
            stored = {name: tensor for name, tensor in stored.items() if name in chosen}
            metadata["kind"] = "delta"
            print(f"delta: {len(stored)} tensors; give it behind its base to train.py --pretrain_path or this script")
    weights = {name: cast(name, tensor.read(), DTYPES.get(args.dtype)) for name, tensor in stored.items()}
    print("\n".join([*write(target, weights, config, metadata), f"wrote {target}"]))


if __name__ == "__main__":
    run_entry_point(main)
