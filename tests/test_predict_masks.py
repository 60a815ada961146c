"""scripts/predict_masks.py with a segmentor that knows the classes by their colours."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.data.classes import ClassTable, read_mask
from ldm.data.manifest import read_manifest
from ldm.util import UserError
from post_processing.evaluation.images import segmentor_features
from post_processing.segmentation.segmentor import Segmentor
from scripts.predict_masks import main

COLOURS = [[60, 60, 60], [220, 60, 60], [60, 60, 220]]
TABLE = {"name": "toy", "classes": [{"id": i, "name": name, "colour": colour} for i, (name, colour) in enumerate(
    zip(("background", "building", "lake"), COLOURS, strict=True))]}  # fmt: skip
TARGET = {"name": "cover", "classes": [{"id": 0, "name": "water", "colour": [0, 0, 255]},
                                       {"id": 1, "name": "land", "colour": [0, 255, 0]}],
          "mappings": {"toy": {"background": "land", "building": "ignore", "lake": "water"}}}  # fmt: skip


class NearestColour(torch.nn.Module):
    """An mmseg model in form: its head scores the distance to each colour, which is linear but for a common term."""

    def __init__(self) -> None:
        super().__init__()
        colours = torch.tensor(COLOURS).float() / 10
        self.decode_head = torch.nn.Module()
        self.decode_head.num_classes = len(COLOURS)
        self.decode_head.conv_seg = torch.nn.Conv2d(3, len(COLOURS), 1)
        self.decode_head.conv_seg.weight.data = 2 * colours[:, :, None, None]
        self.decode_head.conv_seg.bias.data = -colours.square().sum(1)

    def data_preprocessor(self, batch: dict, training: bool) -> dict:
        return {"inputs": torch.stack(batch["inputs"]).flip(1).float() / 10}

    def inference(self, inputs: torch.Tensor, metas: list) -> torch.Tensor:
        return self.decode_head.conv_seg(inputs)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images (one of another size), known buildings, and the segmentor; predictions are counted in `calls`."""
    segmentor = Segmentor(NearestColour(), ClassTable.load(TABLE))
    monkeypatch.setattr("post_processing.segmentation.segmentor.load_segmentor", lambda *args, **kwargs: segmentor)
    (tmp_path / "seg.pth").write_bytes(b"weights")
    for folder in ("img", "known/masks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "known/classes.yaml").write_text(yaml.safe_dump(ClassTable.load("oam_building").to_dict()))
    for number, size in enumerate((16, 16, 24)):
        mask = np.zeros((size, size), np.uint8)
        mask[:, : 4 * number + 2] = 2  # more and more lake
        mask[:4, -4:] = 1  # a building
        image = np.array(COLOURS, np.uint8)[mask]
        image[-1, -1] = (140, 60, 60)  # half background, half building
        Image.fromarray(image).save(tmp_path / f"img/{number}.png")
        known = np.zeros((size, size), np.uint8)
        known[8:12, -8:-2] = 1
        Image.fromarray(known).save(tmp_path / f"known/masks/{number}.png")
    return tmp_path


def run(source: Path, out: str, *flags: str) -> list[np.ndarray]:
    main(["--segmentor", "config", str(source / "seg.pth"), "--images", str(source / "img"), "--outdir",
          str(source / out), "--device", "cpu", "--batch_size", "2", *flags])  # fmt: skip
    table = ClassTable.load(source / out / "classes.yaml")
    return [read_mask(source / out / f"masks/{number}.png", table) for number in range(3)]


def test_predicted_ids_threshold_and_manifest(source: Path, capsys: pytest.CaptureFixture):
    masks = run(source, "plain")
    assert (masks[1][:, :6] == 2).all() and (masks[1][:4, -4:] == 1).all() and masks[2].shape == (24, 24)
    assert not (masks[0] == 255).any()
    unsure = run(source, "sure", "--threshold", "0.9")
    assert all((mask == 255).sum() == 1 and mask[-1, -1] == 255 for mask in unsure)
    shares = [(mask == 0).mean() for mask in masks]
    run(source, "kept", "--max_background", str(shares[1]))  # the limit itself is not kept
    said = capsys.readouterr().out
    assert "1 of 3 pairs kept, 2 left out with too much background (--max_background)" in said
    root = said.rpartition("--data_root ")[2].strip().rstrip(")")
    rows = read_manifest(source / "kept/items.json", root, need=("image", "prompt"), table=ClassTable.load(TABLE))
    assert Path(root) == source and [row.mask_name for row in rows] == ["kept/masks/2.png"]
    assert rows[0].prompt == "a satellite image of background, building, lake"


def test_known_buildings_replace_predicted_ones_and_classes_are_mapped(source: Path):
    for number, mask in enumerate(run(source, "burnt", "--buildings", str(source / "known"))):
        assert (mask == 1).sum() == 24 and (mask[8:12, -8:-2] == 1).all()
        assert (mask[:4, -4:] == 0).all() and (mask[-4:, : 4 * number + 2] == 2).all()
    (source / "cover.yaml").write_text(json.dumps(TARGET))
    mapped = run(source, "mapped", "--map_to", str(source / "cover.yaml"))[1]
    assert (mapped[:, :6] == 0).all() and (mapped[:4, -4:] == 255).all() and mapped[5, 8] == 1
    (source / "known/masks/1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 masks are missing"):
        run(source, "other", "--buildings", str(source / "known"))


def test_a_second_run_predicts_what_is_missing(source: Path, monkeypatch: pytest.MonkeyPatch):
    before = run(source, "out")
    (source / "out/masks/1.png").unlink()
    seen = []
    logits = Segmentor.logits
    monkeypatch.setattr(Segmentor, "logits", lambda self, images: seen.append(len(images)) or logits(self, images))
    after = run(source, "out")
    assert seen == [1] and all((a == b).all() for a, b in zip(before, after, strict=True))
    assert not list((source / "out").rglob("*.partial"))
    with pytest.raises(FileExistsError, match="threshold was 0.0, is 0.5"):
        run(source, "out", "--threshold", "0.5")


def test_images_of_one_stem_are_named(source: Path):
    (source / "again").mkdir()
    (source / "again/1.png").write_bytes((source / "img/1.png").read_bytes())
    rows = [{"source": "known/masks/0.png", "target": name} for name in ("img/0.png", "img/1.png", "again/1.png")]
    (source / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="^--txt_file: several images have the stem 1. Expected one. Rename"):
        main(["--segmentor", "config", str(source / "seg.pth"), "--txt_file", str(source / "rows.json"), "--outdir",
              str(source / "out")])  # fmt: skip


def test_features_are_what_the_last_layer_sees():
    segmentor = Segmentor(NearestColour(), ClassTable.load(TABLE))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.allclose(segmentor_features(segmentor, images), images.float().mean(dim=(2, 3)) / 10, atol=1e-4)
