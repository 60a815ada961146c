"""Tiles of many bands (.npy, as prepare_dataset.py --bands writes them) through filter, segmentor training and gain."""
from pathlib import Path

import numpy as np
import pytest
import torch
from segmentors import table_of
from torch import nn

from ldm.data.classes import ClassTable, read_mask
from ldm.data.images import Pair
from ldm.data.manifest import read_manifest, write_manifest
from ldm.util import UserError
from post_processing.gain.sets import write_mixtures
from post_processing.segmentation.loading import load_batches, stack_batch
from post_processing.segmentation.segmentor import Segmentor

BANDS, SIZE = 5, 16


class BandModel(nn.Module):
    """Looks like an mmseg segmentor of five bands: the class is that of the largest of its first three."""

    def __init__(self, turns_colours: bool = False) -> None:
        super().__init__()
        self.decode_head = type("Head", (), {"num_classes": 3})()
        self.data_preprocessor = nn.Module()
        self.data_preprocessor.register_buffer("mean", torch.zeros(BANDS, 1, 1))
        self.data_preprocessor.channel_conversion = turns_colours
        self.data_preprocessor.forward = lambda data, training: {"inputs": torch.stack(data["inputs"]).float()}

    def inference(self, inputs: torch.Tensor, metas: list) -> torch.Tensor:
        return inputs[:, :3]


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    from PIL import Image

    items = []
    for number in range(3):
        rng = np.random.default_rng(number)
        image = rng.integers(0, 200, (SIZE, SIZE, BANDS), dtype=np.uint8)
        ids = image[:, :, :3].argmax(2).astype(np.uint8)
        np.save(tmp_path / f"{number}.npy", image)
        Image.fromarray(ids).save(tmp_path / f"{number}.png")
        items.append(Pair(tmp_path / f"{number}.npy", tmp_path / f"{number}.png"))
    return items


def test_filter_and_evaluation_see_all_bands(pairs: list[Pair]) -> None:
    segmentor = Segmentor(BandModel(), table_of(3))
    failures: list = []
    (batch,) = load_batches(pairs, segmentor.class_table, 8, 1, lambda *wrong: failures.append(wrong))
    images, masks = stack_batch(batch, torch.device("cpu"))
    assert images.shape == (3, BANDS, SIZE, SIZE) and not failures
    assert torch.equal(segmentor.predict(images), masks)
    with pytest.raises(ValueError, match=r"Expected uint8, \(B, 5, H, W\)"):
        segmentor.logits(images[:, :3])
    with pytest.raises(UserError, match="5 means and turns BGR to RGB"):
        Segmentor(BandModel(turns_colours=True), table_of(3))


def test_mixed_masks_of_the_gain_keep_all_bands(pairs: list[Pair], tmp_path: Path) -> None:
    write_manifest(tmp_path / "all.json", [{"source": item.mask.name, "target": item.image.name} for item in pairs])
    table = table_of(3)
    rows = read_manifest(tmp_path / "all.json", tmp_path, table=table)
    items = [{"source": row.mask_name, "target": row.image.name, "prompt": "x"} for row in rows]
    mixed = write_mixtures(tmp_path / "mixed", items, rows, str(tmp_path), table)
    write_manifest(tmp_path / "mixed/all.json", mixed)
    for row in read_manifest(tmp_path / "mixed/all.json", tmp_path / "mixed", table=table):
        assert np.load(row.image).shape == (SIZE, SIZE, BANDS)
    seen: list[np.ndarray] = []
    items = [{**item, "ref_image": "none.npy"} for item in items]
    matched = write_mixtures(tmp_path / "matched", items, rows, str(tmp_path), table,
                             lambda mask: seen.append(mask) or [items[0]["target"]])
    assert {item["ref_image"] for item in matched} == {f"references/{items[0]['target']}"}
    for mask, row in zip(seen, read_manifest_of(tmp_path / "matched", matched, table), strict=True):
        assert np.array_equal(mask, read_mask(row.mask, table))  # of the mixed mask, not of the one it began with


def read_manifest_of(folder: Path, items: list[dict], table: ClassTable) -> list:
    write_manifest(folder / "all.json", items)
    return read_manifest(folder / "all.json", folder, table=table)


def test_a_segmentor_trains_on_bands_in_their_order(pairs: list[Pair], tmp_path: Path) -> None:
    pytest.importorskip("mmengine")
    from post_processing.segmentation.dataset import TableSegDataset

    write_manifest(tmp_path / "all.json", [{"source": item.mask.name, "target": item.image.name} for item in pairs])
    data = TableSegDataset(table_of(3).to_dict(), manifest=str(tmp_path / "all.json"), data_root=str(tmp_path))
    np.testing.assert_array_equal(data[1]["img"], np.load(pairs[1].image))
