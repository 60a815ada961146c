"""Segmentors of other people: configs of MMSegmentation 0.x, and class names that are spelled in another way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.classes import ClassTable, name_key, same_names
from ldm.util import UserError
from post_processing.evaluation.buildings import find_class
from post_processing.segmentation.segmentor import build_model, load_segmentor

pytest.importorskip("mmseg")
MODEL = """
model = dict(type="EncoderDecoder", pretrained=None,{preprocessor}
  backbone=dict(type="MixVisionTransformer", in_channels=3, embed_dims=8, num_stages=4, num_layers=[1, 1, 1, 1],
    num_heads=[1, 1, 1, 1], patch_sizes=[7, 3, 3, 3], sr_ratios=[8, 4, 2, 1], out_indices=(0, 1, 2, 3), mlp_ratio=2),
  decode_head=dict(type="SegformerHead", in_channels=[8, 8, 8, 8], in_index=[0, 1, 2, 3], channels=16, num_classes=6,
    norm_cfg=dict(type="BN"), align_corners=False),
  train_cfg=dict(), test_cfg=dict(mode="whole"))
"""
NEW = 'data_preprocessor=dict(type="SegDataPreProcessor", mean=[10, 20, 30], std=[2, 4, 8], bgr_to_rgb=True),'
WHOLE = MODEL.replace("{preprocessor}", NEW)
OLD = "img_norm_cfg = dict(mean=[10, 20, 30], std=[2, 4, 8], to_rgb={to_rgb})\n"
STEP = "data = dict(train=dict(pipeline=[dict(type='Normalize', mean=[10, 20, 30], std=[2, 4, 8], to_rgb=True)]))\n"
POTSDAM = ["impervious_surface", "Building", "low-vegetation", "TREE", "car", "clutter"]


def write(folder: Path, name: str, preprocessor: str = "", extra: str = "", classes: list[str] = POTSDAM, **meta):
    """A config and weights that differ with nothing but what is asked for."""
    path = folder / f"{name}.py"
    path.write_text(WHOLE)
    torch.manual_seed(0)
    weights = build_model(path).state_dict()
    path.write_text(MODEL.replace("{preprocessor}", preprocessor) + extra)
    torch.save({"state_dict": weights, "meta": meta or {"dataset_meta": {"classes": tuple(classes)}}},
               folder / f"{name}.pth")  # fmt: skip
    return path, folder / f"{name}.pth"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64)).astype(np.uint8))


def test_normalisation_of_an_old_config_is_taken_from_it(tmp_path: Path, images: torch.Tensor):
    def scores(*settings: str) -> torch.Tensor:
        return load_segmentor(*write(tmp_path, "m", *settings), class_table=ClassTable.load("potsdam")).logits(images)

    expected = scores(NEW)
    assert torch.equal(scores("", OLD.format(to_rgb=True)), expected)
    assert torch.equal(scores("", STEP), expected)
    top = NEW.rstrip(",").partition("=")[2]
    assert torch.equal(scores("", f"data_preprocessor = {top}\n"), expected)
    assert not torch.allclose(scores("", OLD.format(to_rgb=False)), expected)  # channels in the other order
    with pytest.raises(UserError, match="no data_preprocessor, as in MMSegmentation 0.x.*mean, std and bgr_to_rgb"):
        scores("", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "no `model`. Expected a config of MMSegmentation"),
        ("model = 1/0\n", "cannot be read .ZeroDivisionError"),
        ("_base_ = ['../gone/potsdam.py']\n", "_base_ files beside it"),
        (WHOLE.replace("SegformerHead", "HeadOfMyFork"), "cannot be built .*HeadOfMyFork"),
        (WHOLE.replace("embed_dims=8", "embed_dims=8, of_old=1"), "cannot be built .*of_old"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_used_end_in_a_sentence(text: str, message: str, tmp_path: Path):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises((UserError, FileNotFoundError), match=message):
        build_model(tmp_path / "c.py")


def test_class_names_are_compared_without_case_and_separators(tmp_path: Path):
    table = ClassTable.load("potsdam")
    segmentor = load_segmentor(*write(tmp_path, "m", NEW), class_table=table)
    assert segmentor.class_table is table
    old = write(tmp_path, "old", NEW, CLASSES=POTSDAM, PALETTE=[[0, 0, 0]] * 6)  # where 0.x keeps them
    assert load_segmentor(*old, class_table=table).class_table is table
    for classes in (POTSDAM[::-1], [*POTSDAM[:5], "lake"], POTSDAM[:5]):
        for wrong in (write(tmp_path, "w", NEW, classes=classes), write(tmp_path, "v", NEW, CLASSES=classes)):
            with pytest.raises(UserError, match="trained on classes"):
                load_segmentor(*wrong, class_table=table)
    with pytest.raises(UserError, match="no class table inside. Give it with --classes"):
        load_segmentor(*write(tmp_path, "m", NEW))


def test_evaluate_segmentor_takes_a_table_that_is_not_stored(tmp_path: Path, capsys):
    from scripts.evaluate import main

    config, checkpoint = write(tmp_path, "m", NEW)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 6, (64, 64)).astype(np.uint8)).save(tmp_path / "mask.png")
    Image.fromarray(random.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(tmp_path / "image.png")
    (tmp_path / "real.json").write_text('{"source": "mask.png", "target": "image.png"}\n')
    flags = ["segmentor", "--segmentor", config, checkpoint, "--real", tmp_path / "real.json", "--outdir",
             tmp_path / "out", "--device", "cpu"]  # fmt: skip
    main([*map(str, flags), "--classes", "potsdam"])
    assert set(json.loads((tmp_path / "out/results.json").read_text())["IoU"]) == set(ClassTable.load("potsdam").names)
    with pytest.raises(UserError, match="Give it with --classes"):
        main([str(flag) for flag in flags])
    table = ClassTable.load("potsdam")
    assert load_segmentor(config, checkpoint, default_table=table).class_table is table


def test_names_at_the_other_doors(tmp_path: Path):
    table = ClassTable.load("potsdam")
    assert find_class(table, "Low_Vegetation", "--building") == table.find("lowvegetation") == 2
    assert table.find("low vegetations") is None and name_key("Low - vegetation_") == "lowvegetation"
    assert same_names(["a b", "C"], ("A_B", "c")) and not same_names(["a", "b"], ["a"])
    near = {"name": "n", "classes": [{"id": i, "name": name, "colour": [i, i, i + 1]} for i, name in enumerate(
        ("lake", "Lake"))]}  # fmt: skip
    assert ClassTable.load(near).find("Lake") == 1  # the exact name wins
    names = ("Green", "Impervious_Surface")
    classes = [{"id": i, "name": name, "colour": [i, i, i + 1]} for i, name in enumerate(names)]
    target = {"name": "t", "classes": classes, "mappings": {"potsdam": {
        "low_vegetation": "green", "Tree": "Green", "building": "ignore", "car": "ignore", "clutter": "ignore"}}}
    lookup = ClassTable.load(target).map_from(table)
    assert lookup[:6].tolist() == [1, 255, 0, 0, 255, 255] and (lookup[6:] == 255).all()
