"""Segmentors for tests: one without MMSegmentation whose scores follow from colour, and a real, random one."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from ldm.data.classes import ClassTable
from post_processing.segmentation.segmentor import Segmentor, save_checkpoint


def table_of(count: int, **changes: object) -> ClassTable:
    """A class table with any number of classes."""
    classes = [{"id": i, "name": f"class {i}", "colour": [i, 255 - i, i * 37 % 256]} for i in range(count)]
    return ClassTable.load({"name": f"table{count}", "classes": classes, "ignore_colour": [9, 9, 9], **changes})


class ColourModel(nn.Module):
    """Looks like an mmseg segmentor: scores are a fixed random map of each pixel's colour."""

    def __init__(self, count: int, channels: int | None = None) -> None:
        super().__init__()
        self.decode_head = SimpleNamespace(num_classes=count)
        generator = torch.Generator().manual_seed(count)
        self.weight = nn.Parameter(torch.randn((channels or count), 3, 1, 1, generator=generator) * 3)

    def data_preprocessor(self, data: dict, training: bool) -> dict:
        return {"inputs": torch.stack(data["inputs"]).float() / 128 - 1}

    def inference(self, inputs: torch.Tensor, metas: list) -> torch.Tensor:
        return nn.functional.conv2d(inputs, self.weight)


def colour_segmentor(count: int, **changes: object) -> Segmentor:
    return Segmentor(ColourModel(count), table_of(count, **changes))


def make_segmentor(folder: Path, table: ClassTable, align_corners: bool = False) -> tuple[Path, Path]:
    """Write config.json and segmentor.pth of a small mmseg model with random weights."""
    from mmengine.config import Config

    from post_processing.segmentation.segmentor import build_model, require_mmseg

    require_mmseg()
    torch.manual_seed(0)
    model = {
        "type": "EncoderDecoder",
        "data_preprocessor": {"type": "SegDataPreProcessor", "mean": [120.0] * 3, "std": [60.0] * 3,
                              "bgr_to_rgb": True, "pad_val": 0, "seg_pad_val": 255, "size_divisor": 1},
        "backbone": {"type": "MobileNetV2", "widen_factor": 0.1, "strides": [1, 2, 1, 1, 1, 1, 1],
                     "out_indices": [1, 2], "norm_cfg": {"type": "BN"}},
        "decode_head": {"type": "FCNHead", "in_channels": 8, "channels": 8, "num_convs": 0, "concat_input": False,
                        "in_index": 0, "num_classes": table.num_classes, "norm_cfg": {"type": "BN"},
                        "align_corners": align_corners},
        "test_cfg": {"mode": "whole"},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    Config({"model": model}).dump(folder / "config.json")
    built = build_model(folder / "config.json")
    with torch.no_grad():
        built.decode_head.conv_seg.weight.normal_(0, 3)
    save_checkpoint(folder / "segmentor.pth", built, table)
    return folder / "config.json", folder / "segmentor.pth"
