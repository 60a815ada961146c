"""Weights of other origin for the transformer with a mask stream: SD3.5's folder, and the public code of CRFM."""
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cldm.sd3 import split_table
from ldm.util import UserError
from ldm.weights.files import StoredTensor, read_folder
from ldm.weights.names import from_diffusers

NETWORK, TABLE = "network.", "pos_embed.pos_embed"
# Numbers of a transformer that decide its weights; others of its config.json are of no importance here.
SIZES = ("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads",
         "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
         "dual_attention_layers", "qk_norm", "sample_size")
# The public code of CRFM -> ours, in this order.
CRFM_NAMES = (
    (r"mmdit_blocks\.(\d+)\.sd3_block\.(.+)", r"base.transformer_blocks.\1.\2"),
    (r"mmdit_blocks\.(\d+)\.attn\.sd3_attn\.(.+)", r"base.transformer_blocks.\1.attn.\2"),
    (r"mmdit_blocks\.(\d+)\.(attn2\..+)", r"base.transformer_blocks.\1.\2"),
    (r"mmdit_blocks\.(\d+)\.norm1\.linear\.(.+)", r"mask_blocks.\1.norm1.\2"),
    (r"mmdit_blocks\.(\d+)\.ff\.net\.0\.proj\.(.+)", r"mask_blocks.\1.ff.0.\2"),
    (r"mmdit_blocks\.(\d+)\.ff\.net\.2\.(.+)", r"mask_blocks.\1.ff.2.\2"),
    (r"mmdit_blocks\.(\d+)\.attn\.to_out\.0\.(.+)", r"mask_blocks.\1.to_out.\2"),
    (r"mmdit_blocks\.(\d+)\.attn\.(.+)", r"mask_blocks.\1.\2"),
    (r"msk_pos_embed\.proj\.(.+)", r"mask_proj.\1"),
    (r"sd3_transformer\.(.+)", r"base.\1"),
)


def from_crfm(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Weights of the public code of CRFM under our names; a mapping of other weights comes back as it is.

    Of the last block only what makes keys and values of mask tokens is of use there: the first two of the six parts of
    norm1, to_k, to_v and norm_k. The rest never has a gradient and is set aside.

    Args:
        tensors: by the names in the file.
    Returns:
        Tensors by our names, and notes on what was set aside.
    """
    if not any(name.startswith("mmdit_blocks.") for name in tensors):
        return dict(tensors), []
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("mmdit_blocks."))
    result, unused = {}, 0
    for name, stored in tensors.items():
        ours = next((re.sub(pattern, place, name) for pattern, place in CRFM_NAMES if re.fullmatch(pattern, name)), name)
        own = ours.removeprefix(f"mask_blocks.{last}.")
        if own != ours and own.startswith("norm1."):
            stored = first_rows(stored, stored.shape[0] // 3)
        elif own != ours and not own.startswith(("to_k.", "to_v.", "norm_k.")):
            unused += 1
            continue
        result[NETWORK + ours if ours != name else name] = stored
    return result, [f"weights of the public code of CRFM; set aside {unused} of the last block that nothing depends on"]


def first_rows(stored: StoredTensor, count: int) -> StoredTensor:
    """The first rows of a stored tensor."""
    return StoredTensor((count, *stored.shape[1:]), stored.dtype, lambda: stored.read()[:count].clone())


def read_sd35(folder: str | Path, transformer: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Weights of transformer and autoencoder of an SD3.5 folder under our names, not yet read.

    Args:
        folder: in diffusers' layout.
        transformer: sizes of the network that they are for; the folder's must be the same.
    Raises:
        UserError: if parts are missing, or sizes differ (all are named).
    """
    folder = Path(folder)
    found = {part: read_folder(folder / part) for part in ("transformer", "vae")}
    missing = [part for part, raw in found.items() if raw is None]
    if missing:
        raise UserError(f"weights_dir: {folder} has no weights in {' and '.join(missing)}. Expected a folder of Stable "
                        "Diffusion 3.5 in diffusers' layout. Check the path.")
    check_sizes(folder / "transformer/config.json", transformer)
    tensors = {f"{NETWORK}base.{name}": stored for name, stored in found["transformer"].tensors.items()
               if name != TABLE}
    table = found["transformer"].tensors.get(TABLE)
    if table is not None:
        parts = split_table(table.read())
        tensors |= {f"{NETWORK}base.pos_embed.{name}": StoredTensor(tuple(part.shape), part.dtype, lambda part=part: part)
                    for name, part in zip(("columns", "rows"), parts, strict=True)}
    vae = found["vae"].tensors
    return tensors | {ours: vae[theirs] for theirs, ours in from_diffusers("vae", vae).items()}


def check_sizes(path: Path, transformer: Mapping[str, Any]) -> None:
    """UserError with both values of every size in which a folder's config.json differs from the config."""
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"weights_dir: {path} cannot be read ({error}). Expected the transformer's config. Fetch the "
                        "folder again.") from error
    plain = {name: list(value) if isinstance(value := transformer[name], (list, tuple)) else value
             for name in SIZES if name in transformer}
    wrong = [f"{name} {theirs[name]} (config: {value})" for name, value in plain.items()
             if name in theirs and theirs[name] != value]
    if wrong:
        raise UserError(f"weights_dir: {path} has {', '.join(wrong)}. Expected the sizes of "
                        "model.params.transformer. Choose the config of this model, or another folder.")


