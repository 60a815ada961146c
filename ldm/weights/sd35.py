"""Weights of Stable Diffusion 3.5's transformer, and of the public code of CRFM, under our names."""
import functools
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.util import UserError
from ldm.weights.files import StoredTensor

NETWORK, BASE = "network.", "network.base."
TABLE = "pos_embed.pos_embed"
SIGN = "transformer_blocks.0.norm1_context."  # no other transformer has it
# The public code of CRFM -> ours, behind NETWORK; the first that fits counts.
BLOCK = r"mmdit_blocks\.(\d+)\."
CRFM_NAMES = (
    (BLOCK + r"sd3_block\.(.+)", r"base.transformer_blocks.\1.\2"),
    (BLOCK + r"attn\.sd3_attn\.(.+)", r"base.transformer_blocks.\1.attn.\2"),
    (BLOCK + r"(attn2\..+)", r"base.transformer_blocks.\1.\2"),
    (BLOCK + r"norm1\.linear\.(.+)", r"mask_blocks.\1.norm1.\2"),
    (BLOCK + r"ff\.net\.0\.proj\.(.+)", r"mask_blocks.\1.ff.0.\2"),
    (BLOCK + r"ff\.net\.2\.(.+)", r"mask_blocks.\1.ff.2.\2"),
    (BLOCK + r"attn\.to_out\.0\.(.+)", r"mask_blocks.\1.to_out.\2"),
    (BLOCK + r"attn\.(.+)", r"mask_blocks.\1.\2"),
    (r"msk_pos_embed\.proj\.(.+)", r"mask_proj.\1"),
    (r"sd3_transformer\.(.+)", r"base.\1"),
)


def adopt(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Give weights of the two kinds our names and shapes, others come back as they are; and notes."""
    if any(name.startswith("mmdit_blocks.") for name in tensors):
        return from_crfm(tensors)
    if any(name.startswith(SIGN) for name in tensors):
        return from_sd35(tensors), []
    return dict(tensors), []


def from_sd35(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stock transformer; its table of positions becomes one of columns and one of rows."""
    result = {BASE + name: stored for name, stored in tensors.items() if name != TABLE}
    if TABLE in tensors:
        table = tensors[TABLE]
        shape = (math.isqrt(table.shape[1]), table.shape[2] // 2)
        parts = functools.cache(lambda: split_table(table.read()))
        for number, name in enumerate(("columns", "rows")):
            result[f"{BASE}pos_embed.{name}"] = StoredTensor(shape, table.dtype, lambda number=number: parts()[number])
    return result


def split_table(table: Tensor) -> tuple[Tensor, Tensor]:
    """Take a table of positions (1, S * S, D) apart into columns and rows, (S, D / 2) each.

    The first half of a vector follows from the column, the other from the row; UserError if they do not.
    """
    side, half = math.isqrt(table.shape[1]), table.shape[-1] // 2
    grid = table[0, :side * side].unflatten(0, (side, side))  # (row, column, D)
    columns, rows = grid[0, :, :half].clone(), grid[:, 0, half:].clone()
    for row in range(side):  # one at a time: the whole table has a quarter of a billion values
        if not (torch.equal(grid[row, :, :half], columns)
                and torch.equal(grid[row, :, half:], rows[row].expand(side, -1))):
            raise UserError(f"{TABLE}: this table of positions is no product of rows and columns. Expected that of a "
                            "transformer of Stable Diffusion 3.5. Check the folder.")
    return columns, rows


def from_crfm(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], list[str]]:
    """What the public code of CRFM saves: the parts that train there.

    Of the last block only what makes keys and values of mask tokens is of use: the first two of the six parts of norm1,
    to_k, to_v and norm_k. The rest never had a gradient and is set aside.
    """
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("mmdit_blocks."))
    result, unused = {}, 0
    for name, stored in tensors.items():
        fitting = (re.sub(pattern, place, name) for pattern, place in CRFM_NAMES if re.fullmatch(pattern, name))
        ours = next(fitting, name)
        own = ours.removeprefix(f"mask_blocks.{last}.")
        if own != ours and own.startswith("norm1."):
            rows = stored.shape[0] // 3
            stored = StoredTensor((rows, *stored.shape[1:]), stored.dtype,
                                  lambda read=stored.read, rows=rows: read()[:rows].clone())
        elif own != ours and not own.startswith(("to_k.", "to_v.", "norm_k.")):
            unused += 1
            continue
        result[NETWORK + ours if ours != name else name] = stored
    return result, [f"weights of the public code of CRFM; set aside {unused} of the last block that nothing depends on"]
