"""Configs for published weights of pixel-space methods, which carry none: all that matters is in their shapes."""
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.data.classes import ClassTable
from ldm.util import UserError
from ldm.weights.names import PARTS


def infer_model(shapes: Mapping[str, Sequence[int]], table: ClassTable, edge: str = "semantic") -> dict[str, Any]:
    """Config of the network that these weights belong to: SDM (ISDM), or segmentation-guided diffusion.

    The width of attention heads leaves no trace in the weights: it is taken to be that of the public code, as are
    sampler and guidance.

    Args:
        shapes: of the tensors, by our names.
        table: the classes that the network was trained with.
        edge: what SDM's channel of edges shows if there is one, see PixelDiffusion.
    Returns:
        `target` and `params`.
    Raises:
        UserError: if the weights are of another kind, or of another number of classes.
    """
    shapes = {name.removeprefix(PARTS["unet"]): tuple(shape) for name, shape in shapes.items()
              if name.startswith(PARTS["unet"])}
    if "out.2.weight" not in shapes or any("transformer_blocks" in name for name in shapes):
        raise UserError("--class_table: these are no weights of SDM or segmentation-guided diffusion. Expected a "
                        "pixel-space U-Net. Leave the flag out, or give --config.")
    params = {"class_table": table.to_dict(), "unet": infer_unet(shapes)}
    width_in, width_out = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
    spade = shapes.get("middle_block.0.in_norm.mlp_shared.0.weight")
    if spade is None:
        extra = check_classes(width_in - width_out, table, {table.num_classes: "one_hot", 1: "single255"})
        params |= {"image_channels": width_out, "hint_mode": extra,
                   "sampling": {"solver": "ddim", "num_steps": 50, "spacing": "leading0", "end": "clean"}}
        return {"target": "cldm.seg_guided.SegGuided", "params": params}
    if width_out != 2 * width_in:
        raise UserError(f"--class_table: the network makes {width_out} channels of {width_in}. Expected twice as many, "
                        "as learn_sigma makes them.")
    edge = check_classes(spade[1], table, {table.num_classes: None, table.num_classes + 1: edge})
    params |= {"image_channels": width_in, "edge": edge, "spade_hidden": spade[0],
               "sampling": {"solver": "ddpm", "num_steps": 300, "spacing": "uniform", "end": "clean"}}
    return {"target": "cldm.sdm.SDM", "params": params}


def check_classes(channels: int, table: ClassTable, meanings: Mapping[int, Any]) -> Any:
    """What so many channels of a hint mean with this table; UserError if nothing."""
    if channels not in meanings:
        expected = " or ".join(str(count) for count in meanings)
        raise UserError(f"--class_table: the network takes hints of {channels} channels, the table {table.name} has "
                        f"{table.num_classes} classes. Expected {expected}. Give the table it was trained with.")
    return meanings[channels]


def infer_unet(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Arguments of UNetEncoder from the shapes of a pixel-space U-Net, by its own names.

    Raises:
        UserError: if its widths are no whole multiples of model_channels.
    """
    count = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("output_blocks."))
    # The last block of a level in the decoder ends with the way up: a convolution, or a second residual block.
    endings = (".conv.weight", ".in_layers.1.weight")
    ups = [index for index in range(count) if any(
        f"output_blocks.{index}.{member}{ending}" in shapes for member in (1, 2) for ending in endings)]
    blocks = ups[0] if ups else count - 1  # of a level in the encoder; the decoder has one more
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}." for level in range(count // (blocks + 1))]
    width = shapes["input_blocks.0.0.weight"][0]
    widths = [shapes[f"{first}0.in_layers.2.weight"][0] for first in firsts]
    base = shapes.get("time_embed.0.weight", (4 * width, width))[1]  # model_channels of the public code
    if base != width or any(level % width for level in widths):
        raise UserError(f"--class_table: the levels of the network are {', '.join(map(str, widths))} wide, the first "
                        f"layer {width}, model_channels is {base}. Expected whole multiples of one width. A fraction "
                        "in channel_mult (as of 512 pixels) cannot be loaded.")
    attending = [2**level for level, first in enumerate(firsts) if f"{first}1.norm.weight" in shapes
                 or f"{first}1.group_norm.weight" in shapes]
    return {"model_channels": width, "num_res_blocks": blocks, "attention_resolutions": attending,
            "channel_mult": [level // width for level in widths]}
