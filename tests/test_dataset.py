"""Dataset, transforms and data module."""
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.classes import ClassTable
from ldm.data.dataset import PairDataset, collate_batch
from ldm.data.manifest import Row, read_manifest
from ldm.data.transforms import (
    change_colours,
    draw_colour_change,
    encode_mask,
    hint_channels,
    match_colours,
    normalize_batch,
    to_uint8,
)
from ldm.util import UserError

COUNT = 7


@pytest.fixture
def data_root(tmp_path):
    """Images whose red channel is 40 times the mask's id, so that a wrong alignment shows."""
    random = np.random.default_rng(0)
    lines = []
    for index in range(COUNT):
        mask = random.integers(0, 5, (32, 48), np.uint8)
        image = np.stack([mask * 40, random.integers(0, 255, (32, 48), np.uint8), np.full((32, 48), index)], -1)
        Image.fromarray(mask).save(tmp_path / f"m{index}.png")
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"i{index}.png")
        lines.append({"source": f"m{index}.png", "target": f"i{index}.png", "prompt": f"row {index}",
                      "ref_image": f"i{(index + 1) % COUNT}.png"})
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


def make_dataset(data_root, **options):
    rows = read_manifest(data_root / "rows.json", data_root, need=("image", "reference", "prompt"))
    return PairDataset(rows, ClassTable.load("dubai"), **options)


def test_item_keys_shapes_and_types(data_root):
    item = make_dataset(data_root)[2]
    assert {key: (tuple(item[key].shape), item[key].dtype) for key in ("image", "reference", "mask")} == {
        "image": ((3, 32, 48), torch.uint8), "reference": ((3, 32, 48), torch.uint8), "mask": ((32, 48), torch.uint8)}
    assert (item["prompt"], item["name"], item["row"]) == ("row 2", "m2", 2)


@pytest.mark.parametrize("options", [
    {}, {"flip": 1.0}, {"size": (16, 24), "random_crop": True}, {"size": (16, 24), "random_crop": True, "flip": 0.5},
    {"size": (20, 20), "centre_crop": True},
])
def test_image_mask_and_target_reference_stay_aligned(data_root, options):
    dataset = make_dataset(data_root, **options)
    for index in range(COUNT):
        item = dataset[index]
        assert torch.equal(item["image"][0], item["mask"] * 40)
        assert torch.equal(item["reference"], item["image"])


def test_flip_mirrors_columns(data_root):
    plain, flipped = make_dataset(data_root)[0], make_dataset(data_root, flip=1.0)[0]
    assert torch.equal(flipped["mask"], plain["mask"].flip(1)) and not torch.equal(flipped["mask"], plain["mask"])


def test_draws_depend_on_seed_epoch_and_row_alone(data_root):
    dataset = make_dataset(data_root, size=(16, 16), random_crop=True, seed=1)
    first = [dataset[(index, 3)]["mask"] for index in range(COUNT)]
    again = [dataset[(index, 3)]["mask"] for index in reversed(range(COUNT))][::-1]
    later = [dataset[(index, 4)]["mask"] for index in range(COUNT)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


def test_resizing_keeps_the_ids(data_root):
    item = make_dataset(data_root, size=(64, 32))[0]
    assert item["image"].shape == (3, 64, 32) and item["mask"].shape == (64, 32)
    assert set(item["mask"].unique().tolist()) <= set(range(5))


@pytest.mark.parametrize("options", [{"size": (64, 64)}, {"size": (16, 16), "random_crop": True}, {}])
def test_manifest_reference_is_another_image_of_the_right_size(data_root, options):
    item = make_dataset(data_root, reference="manifest", **options)[2]
    assert item["reference"].shape == item["image"].shape
    assert (item["image"][2] == 2).all() and (item["reference"][2] == 3).all()


def test_without_image_and_reference(data_root):
    rows = read_manifest(data_root / "rows.json", data_root, need=())
    item = PairDataset(rows, ClassTable.load("dubai"), reference="none")[0]
    assert "image" not in item and "reference" not in item
    with pytest.raises(UserError, match="needs an image"):
        PairDataset(rows, ClassTable.load("dubai"), reference="target")
    with pytest.raises(UserError, match="reference"):
        PairDataset(rows, ClassTable.load("dubai"), reference="other")


def test_batches_stack_and_mixed_sizes_are_named(data_root):
    dataset = make_dataset(data_root)
    batch = collate_batch([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 3, 32, 48) and batch["prompt"] == ["row 0", "row 1"]
    with pytest.raises(UserError, match="mask m0 is 32x48, mask m1 is 16x16"):
        collate_batch([dataset[0], make_dataset(data_root, size=(16, 16))[1]])


def test_normalize_batch_and_back(data_root):
    batch = collate_batch([make_dataset(data_root)[0]])
    ready = normalize_batch(batch, "cpu")
    assert ready["image"].dtype == torch.float32 and ready["mask"].dtype == torch.int64
    assert ready["image"].min() >= -1 and ready["image"].max() <= 1
    assert torch.equal(to_uint8(ready["image"]), batch["image"])
    with pytest.raises(ValueError, match="Expected torch.uint8"):
        normalize_batch({"image": ready["image"]}, "cpu")


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.003, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 128, 255, 255]


def test_hints():
    table = ClassTable.load("dubai")
    mask = torch.tensor([[[0, 2], [4, 255]]])
    rgb_id, palette, one_hot = (encode_mask(mask, mode, table) for mode in ("rgb_id", "palette", "one_hot"))
    assert [hint_channels(mode, table) for mode in ("rgb_id", "palette", "one_hot")] == [3, 3, 5]
    assert rgb_id.shape == (1, 3, 2, 2) and torch.allclose(rgb_id[0, 1], torch.tensor([[0, 2 / 255], [4 / 255, 1.0]]))
    assert torch.allclose(palette[0, :, 0, 1] * 255, torch.tensor([110.0, 193.0, 228.0]))
    assert palette[0, :, 1, 1].sum() == 0
    assert one_hot[0, :, 1, 1].sum() == 0 and one_hot[0].sum() == 3 and one_hot[0, 4, 1, 0] == 1
    for hint in (rgb_id, palette, one_hot):
        assert hint.dtype == torch.float32 and hint.min() >= 0 and hint.max() <= 1
    with pytest.raises(UserError, match="onehot"):
        encode_mask(mask, "onehot", table)


def make_module(data_root, **options):
    from ldm.data.datamodule import DataModule

    manifest = str(data_root / "rows.json")
    settings = {"batch_size": 2, "num_workers": 0, "size": (16, 16), "random_crop": True, "val_manifest": manifest}
    return DataModule(str(data_root), manifest, "dubai", **{**settings, **options})


def test_loaders_of_the_data_module(data_root):
    data = make_module(data_root)
    data.setup()
    assert len(data.train_dataloader()) == 3 and len(data.val_dataloader()) == 4
    names = [name for batch in data.val_dataloader() for name in batch["name"]]
    assert names == [f"m{index}" for index in range(COUNT)]
    small = make_module(data_root, batch_size=2 * COUNT)  # more than there are: rows are repeated
    small.setup()
    (batch,) = small.train_dataloader()
    assert sorted(batch["name"]) == sorted(names * 2)


def test_ranks_share_the_rows_and_a_resumed_sampler_goes_on():
    from ldm.data.datamodule import RowSampler

    def epoch_of(sampler):  # it has no end
        return list(itertools.islice(sampler, len(sampler)))

    ranks = [epoch_of(RowSampler(8, 2, num_replicas=2, rank=rank, seed=5)) for rank in (0, 1)]
    assert sorted(index for rank in ranks for index, _, _ in rank) == list(range(8))
    done = [0]
    sampler = RowSampler(8, 2, num_replicas=2, rank=1, seed=5, batches_done=lambda: done[0])
    first = epoch_of(sampler)
    done[0] = 2
    second = epoch_of(sampler)
    assert first == ranks[1] and [epoch for _, epoch, _ in second] == [1] * 4
    done[0] = 1
    assert epoch_of(sampler) == first[2:] + second[:2]


@pytest.mark.parametrize(("num_workers", "when"), [(0, "after fit"), (1, "after fit"), (1, "at the step")])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_training_sees_the_batches_of_an_uninterrupted_one(data_root, stop, num_workers, when):
    """Three batches an epoch: stop in the middle of the first epoch, at its end, and in the second."""
    import pytorch_lightning as pl

    class Recorder(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def training_step(self, batch, batch_idx):
            self.seen.append((batch["row"].tolist(), batch["mask"].long().sum().item()))
            return self.layer(torch.ones(1, 1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(steps, checkpoint=None):
        module = Recorder()
        saver = pl.callbacks.ModelCheckpoint(data_root, "last", every_n_train_steps=steps)
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
                             enable_model_summary=False, callbacks=[saver] if when == "at the step" else [],
                             enable_checkpointing=when == "at the step")
        data = make_module(data_root, val_manifest=None, num_workers=num_workers)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        if when == "after fit":
            trainer.save_checkpoint(data_root / "last.ckpt")
        return module.seen

    straight = train(7)
    assert len(straight) == 7
    (data_root / "last.ckpt").unlink()
    assert train(stop) + train(7, data_root / "last.ckpt") == straight


def test_colour_change_is_shared_by_image_and_reference_and_only_in_half_of_the_draws(tmp_path):
    random = np.random.default_rng(0)
    table = ClassTable.load("mini")
    rows = []
    for index in range(40):  # the reference is the image itself, so equal changes keep them equal
        Image.fromarray(random.integers(60, 200, (8, 8, 3), np.uint8)).save(tmp_path / f"{index}.png")
        Image.fromarray(random.integers(0, 5, (8, 8), np.uint8)).save(tmp_path / f"m{index}.png")
        rows.append(Row(index, index + 1, tmp_path / f"m{index}.png", tmp_path / f"{index}.png", "water",
                        tmp_path / f"{index}.png", f"m{index}.png"))
    plain = PairDataset(rows, table, reference="manifest")
    changed = PairDataset(rows, table, reference="manifest", colour_jitter=0.3)
    differs = 0
    for index in range(40):
        item = changed[index]
        assert torch.equal(item["image"], item["reference"]) and torch.equal(item["mask"], plain[index]["mask"])
        differs += not torch.equal(item["image"], plain[index]["image"])
    assert 10 <= differs <= 30
    assert not torch.equal(changed[0, 1]["image"], changed[0, 2]["image"]) or not torch.equal(
        changed[1, 1]["image"], changed[1, 2]["image"])


def test_colour_change_keeps_greys_apart_from_gains_and_clips():
    image = torch.tensor([[[[0, 100]], [[128, 100]], [[255, 100]]]], dtype=torch.uint8)
    nothing = torch.from_numpy(draw_colour_change(np.random.default_rng(1), 0.0))[None]
    assert torch.equal(change_colours(image, nothing), image.float())  # strength 0 changes nothing
    assert change_colours(image, 10 * torch.eye(3, 4)[None]).max() == 255
    change = draw_colour_change(np.random.default_rng(2), 0.5)
    pixels = np.stack([change[:, :3] @ column + change[:, 3] for column in ([0, 128, 255], [100, 100, 100])], axis=1)
    found = change_colours(image, torch.from_numpy(change)[None])[0, :, 0]
    np.testing.assert_allclose(found, pixels.clip(0, 255).round(), atol=0)


def test_target_share_makes_the_image_its_own_reference_in_that_share_of_the_draws(tmp_path):
    random = np.random.default_rng(0)
    table = ClassTable.load("mini")
    for name in ("image", "other"):
        Image.fromarray(random.integers(60, 200, (8, 8, 3), np.uint8)).save(tmp_path / f"{name}.png")
    Image.fromarray(random.integers(0, 5, (8, 8), np.uint8)).save(tmp_path / "mask.png")
    rows = [Row(index, index + 1, tmp_path / "mask.png", tmp_path / "image.png", "water", tmp_path / "other.png",
                "mask.png") for index in range(60)]  # fmt: skip
    items = list(PairDataset(rows, table, flip=0.5, reference="manifest", target_share=0.25))
    own = sum(torch.equal(item["image"], item["reference"]) for item in items)  # flipped together
    assert 6 <= own <= 24
    for settings in ({"reference": "target", "target_share": 0.5}, {"reference": "manifest", "target_share": 1.5}):
        with pytest.raises(UserError, match="target_share"):
            PairDataset(rows, table, **settings)
    dataset = PairDataset(rows, table, size=(8, 8), reference="manifest", target_share=0.25)
    with pytest.raises(UserError, match="cache_latents"):
        dataset.cacheable_paths()


OPTIONS = [{"flip": 0.5}, {"size": (16, 24), "random_crop": True, "flip": 0.5, "colour_jitter": 0.3},
           {"size": (40, 56), "random_crop": True, "reference": "manifest", "target_share": 0.4, "flip": 0.5},
           {"size": (20, 20), "reference": "manifest", "colour_jitter": 0.3}, {"reference": "none", "flip": 0.5}]


@pytest.mark.parametrize("options", OPTIONS)
def test_batches_are_the_items_and_decoded_once_the_same(data_root, tmp_path, monkeypatch, options):
    """What is drawn for a batch and done on the device is what an item shows, with and without the decoded tiles."""
    from ldm.data.cache import open_tiles, remove_tiles, write_tiles

    dataset, indices = make_dataset(data_root, **options, seed=3), [(2, 1), (5, 4), (0, 0), (2, 1, 1)]
    expected = normalize_batch(collate_batch([dataset[index] for index in indices]), "cpu")
    assert not torch.equal(expected["image"][0], expected["image"][3]) or not options.get("flip")  # a copy's own draws

    def check():
        batch = collate_batch(dataset.__getitems__(indices))
        assert batch["image"].dtype == torch.uint8 and batch["image"].is_contiguous(memory_format=torch.channels_last)
        found = normalize_batch(batch, "cpu")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key

    check()
    write_tiles(tmp_path / "tiles", dataset.tile_keys(), dataset.read_tile, 1e9)
    dataset.tiles = open_tiles(tmp_path / "tiles")
    remove_tiles(tmp_path / "tiles")
    assert not list(tmp_path.glob("tiles*"))
    for name in ("read_image", "read_mask"):  # no file is opened again
        monkeypatch.setattr(f"ldm.data.dataset.{name}", None)
    check()


def test_decoded_tiles_have_a_limit(data_root, tmp_path):
    from ldm.data.cache import write_tiles

    dataset = make_dataset(data_root)
    with pytest.raises(UserError, match="Expected all in at most 1e-05 GB. Raise data.params.cache_limit_gb"):
        write_tiles(tmp_path / "tiles", dataset.tile_keys(), dataset.read_tile, 1e4)
    assert not list(tmp_path.glob("tiles*"))
    with pytest.raises(UserError, match="cache: 'disk' is unknown"):
        make_module(data_root, cache="disk")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_stream_goes_on_between_epochs_and_a_cache_changes_nothing(data_root, num_workers):
    plain, cached = (make_module(data_root, num_workers=num_workers, cache=cache) for cache in (None, "memory"))
    for data in (plain, cached):
        data.setup()
    streams = [data.train_dataloader() for data in (plain, cached)]
    workers = []
    for epoch in range(3):
        for first, second in zip(*streams, strict=True):
            assert first["name"] == second["name"] and torch.equal(first["image"], second["image"])
            assert torch.equal(first["flip"], second["flip"]), epoch
        workers.append([worker.pid for worker in getattr(streams[1].batches, "_workers", [])])
    assert workers[0] == workers[2] and len(workers[0]) == num_workers
    assert len(cached.train_set.tiles) == 2 * COUNT
    for data in (plain, cached):
        data.teardown("fit")


def test_rows_with_a_weight_come_more_often_with_draws_of_their_own(data_root):
    from ldm.data.datamodule import RowSampler

    lines = (data_root / "rows.json").read_text().splitlines()
    weighted = {**json.loads(lines[2]), "weight": 3}
    (data_root / "rows.json").write_text("\n".join([*lines[:2], json.dumps(weighted), *lines[3:]]))
    data = make_module(data_root, batch_size=1)
    data.setup()
    assert [row.weight for row in data.train_set.rows] == [1, 1, 3, 1, 1, 1, 1]
    sampler = data.train_dataloader().loader.sampler
    epoch = list(itertools.islice(sampler, len(sampler)))
    assert sorted(row for row, _, _ in epoch) == [0, 1, 2, 2, 2, 3, 4, 5, 6]
    assert sorted(copy for row, _, copy in epoch if row == 2) == [0, 1, 2]
    assert isinstance(sampler, RowSampler)
    for weight in (0, 2.5, "3", True, 1001):
        (data_root / "rows.json").write_text(json.dumps({**weighted, "weight": weight}))
        with pytest.raises(UserError, match="weight is .* Expected a whole number, 1 to 1000"):
            read_manifest(data_root / "rows.json", data_root)


def test_matched_colours_have_the_mean_and_covariance_of_the_target():
    random = np.random.default_rng(0)
    source = random.normal(size=(5000, 3)) @ np.diag([20, 10, 5]) @ random.normal(size=(3, 3)) + [90, 120, 60]
    target = random.normal(size=(3000, 3)) @ np.diag([15, 12, 8]) @ random.normal(size=(3, 3)) + [150, 80, 100]
    def match(source, target, **limit):
        change = match_colours(*(torch.from_numpy(colours)[None] for colours in (source, target)), **limit)[0].numpy()
        return change[:, :3], change[:, 3]

    matrix, offset = match(source, target, limit=1e3)
    changed = source @ matrix.T + offset
    np.testing.assert_allclose(changed.mean(0), target.mean(0), atol=1e-2)
    np.testing.assert_allclose(np.cov(changed.T), np.cov(target.T), rtol=0.05, atol=3)
    # Of all maps that do this the one that moves colours least: its matrix is symmetric and positive.
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-4)
    assert np.linalg.eigvalsh(matrix).min() > 0
    plain = np.full((100, 3), 70.0)
    matrix, offset = match(plain, target)  # a plain surface is not blown up
    assert np.linalg.eigvalsh(matrix).max() <= 3.001
    np.testing.assert_allclose(plain[0] @ matrix.T + offset, target.mean(0), atol=1e-2)
    both = match_colours(*(torch.from_numpy(np.stack(pair)) for pair in ((source[:100], plain), (target, target))))
    np.testing.assert_allclose(both[1], np.column_stack([matrix, offset]), atol=1e-4)  # each image by itself


def test_recolour_share_brings_images_to_the_colours_of_other_rows(tmp_path):
    random = np.random.default_rng(0)
    rows = []
    for index in range(60):  # every image has a colour of its own
        mean = random.integers(40, 200, 3)
        image = np.clip(random.normal(mean, 8, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"i{index}.png")
        Image.fromarray(random.integers(0, 5, (16, 16), np.uint8)).save(tmp_path / f"m{index}.png")
        rows.append(Row(index, index + 1, tmp_path / f"m{index}.png", tmp_path / f"i{index}.png", "water",
                        tmp_path / f"i{(index + 1) % 60}.png", f"m{index}.png"))  # fmt: skip
    table = ClassTable.load("mini")
    plain = PairDataset(rows, table, reference="manifest")
    dataset = PairDataset(rows, table, reference="manifest", target_share=0.2, recolour_share=0.5)
    kinds = {"own": 0, "manifest": 0, "recoloured": 0}
    for index in range(60):
        item, usual = dataset[index], plain[index]
        assert torch.equal(item["mask"], usual["mask"])
        if torch.equal(item["image"], item["reference"]):
            kinds["own"] += 1
        elif torch.equal(item["reference"], usual["reference"]) and torch.equal(item["image"], usual["image"]):
            kinds["manifest"] += 1
        else:
            kinds["recoloured"] += 1
            image, reference = (item[key].float().flatten(1) for key in ("image", "reference"))
            assert (image.mean(1) - reference.mean(1)).abs().max() < 2
            assert (image.std(1) - reference.std(1)).abs().max() < 2
    assert 4 <= kinds["own"] <= 22 and 8 <= kinds["manifest"] <= 28 and 18 <= kinds["recoloured"] <= 42
    with pytest.raises(UserError, match="recolour_share: 0.6"):
        PairDataset(rows, table, reference="manifest", target_share=0.5, recolour_share=0.6)
    with pytest.raises(UserError, match="cache_latents"):
        PairDataset(rows, table, size=(16, 16), reference="manifest", recolour_share=0.5).cacheable_paths()
