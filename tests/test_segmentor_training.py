"""Training sets of two kinds, mixed pairs, fine-tuning, and the configs that come with the code."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.data.classes import ClassTable
from ldm.util import UserError
from post_processing.segmentation.mixing import RatioSampler, choose_box, choose_classes, paste
from post_processing.segmentation.training import fill_classes

mmengine_config = pytest.importorskip("mmengine.config")
ROOT = Path(__file__).resolve().parents[1]


class Sizes:
    """Stands for a JointSegDataset of these sizes."""

    def __init__(self, *sizes):
        self.datasets = [range(size) for size in sizes]


def draw(sampler, count):
    return list(itertools.islice(iter(sampler), count))


@pytest.mark.parametrize(("ratio", "of_eight"), [(1, 4), (3, 6), (1 / 3, 2), (7, 7)])
def test_every_batch_has_the_ratio_whatever_the_sizes(ratio, of_eight):
    for sizes in ((5, 1000), (1000, 5), (8, 8)):
        drawn = np.array(draw(RatioSampler(Sizes(*sizes), ratio, seed=3), 8 * 50)).reshape(50, 8)
        assert ((drawn >= sizes[0]).sum(axis=1) == of_eight).all()
        assert drawn.min() >= 0 and drawn.max() < sum(sizes)


def test_draws_follow_from_the_seed_and_use_every_image_alike():
    first = draw(RatioSampler(Sizes(10, 7), 1, seed=3), 280)
    assert first == draw(RatioSampler(Sizes(10, 7), 1, seed=3), 280)
    assert first != draw(RatioSampler(Sizes(10, 7), 1, seed=4), 280)
    counts = np.bincount(first)
    assert set(counts[:10]) == {14} and set(counts[10:]) == {20}
    with pytest.raises(ValueError, match="above 0"):
        RatioSampler(Sizes(10, 7), 0)


def test_processes_share_the_images_and_each_has_the_ratio():
    samplers = [RatioSampler(Sizes(10, 6), 1, seed=3) for _ in range(2)]
    for rank, sampler in enumerate(samplers):
        sampler.rank, sampler.world_size = rank, 2
    drawn = [draw(sampler, 10) for sampler in samplers]
    assert all(sum(index >= 10 for index in part) == 5 for part in drawn)
    assert sorted(index for part in drawn for index in part if index < 10) == list(range(10))


def test_pasting_moves_image_and_mask_together():
    np.random.seed(0)
    for kind in ("copy_paste", "cutmix"):
        changed = 0
        for _ in range(20):
            masks = [np.random.randint(0, 4, (12, 10)).astype(np.uint8), np.random.randint(4, 8, (9, 14))]
            masks[1][:2] = 255
            pair, other = ({"img": mask[..., None].repeat(3, 2).astype(np.uint8), "gt_seg_map": mask.astype(np.uint8)}
                           for mask in masks)  # fmt: skip
            paste(pair, other, kind)
            assert np.array_equal(pair["img"][..., 1], pair["gt_seg_map"])
            assert (pair["gt_seg_map"][9:] < 4).all()
            if kind == "copy_paste":
                assert len(set(np.unique(pair["gt_seg_map"])) - set(range(4))) == 2  # of the four
            changed += (pair["gt_seg_map"] > 3).any()
        assert changed > 10
    assert not choose_classes(np.full((4, 4), 255, np.uint8)).any()
    areas = [choose_box(20, 30).mean() for _ in range(2000)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.03) and min(areas) < 0.02 and max(areas) > 0.95


@pytest.fixture(scope="module")
def flags(toy_data):
    """Flags of a training of two steps on the toy data; the last two of its pairs stand for synthesized ones."""
    pytest.importorskip("mmseg")
    return ["--class_table", "mini", "--data_root", toy_data, "--max_steps", 2, "--batch_size", 4,
            "--init_backbone", "none"]  # fmt: skip


def train(*flags):
    from scripts.train_segmentor import main

    main([str(flag) for flag in flags])


def test_joint_training_draws_from_both_sets(flags, toy_data, tmp_path):
    sets = ["--train_txt_file", toy_data / "train_set_items.json", "--synthetic_txt_file",
            toy_data / "val_set_items.json", "--synthetic_ratio", 3]  # fmt: skip
    train(*flags, *sets, "--work_dir", tmp_path)
    loader = json.loads((tmp_path / "config.json").read_text())["train_dataloader"]
    assert loader["sampler"] == {"type": "post_processing.segmentation.mixing.RatioSampler", "ratio": 3.0}
    assert [Path(node["manifest"]).name for node in loader["dataset"]["datasets"]] == [
        "train_set_items.json", "val_set_items.json",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--augment cutmix: mixes pairs of one set"):
        train(*flags, *sets, "--augment", "cutmix", "--work_dir", tmp_path / "b")
    with pytest.raises(SystemExit, match="2"):
        train(*flags, *sets, "--synthetic_ratio", -1, "--work_dir", tmp_path / "c")
    with pytest.raises(UserError, match="no training pairs"):
        train(*flags, "--work_dir", tmp_path / "d")


def test_samples_know_whether_they_are_synthesized(toy_data):
    from post_processing.segmentation.dataset import dataset_config
    from post_processing.segmentation.mixing import JointSegDataset, MixSegDataset
    from post_processing.segmentation.segmentor import require_mmseg

    require_mmseg()
    table, pack = ClassTable.load("mini"), [{"type": "PackSegInputs"}]
    real, synthetic = (dataset_config(table, pack, manifest=toy_data / f"{name}_set_items.json", data_root=toy_data,
                                      is_synthetic=is_synthetic)
                       for name, is_synthetic in (("train", False), ("val", True)))  # fmt: skip
    samples = [sample["data_samples"].metainfo for sample in JointSegDataset([real, synthetic])]
    assert [sample["is_synthetic"] for sample in samples] == [False] * 8 + [True] * 2
    assert samples[0]["img_path"].endswith("0.png")  # what mmseg keeps is kept
    mixed = MixSegDataset({**synthetic, "pipeline": []}, "cutmix", pack)
    assert mixed[0]["data_samples"].is_synthetic is True


def test_classes_reach_heads_that_are_wrapped_and_are_not_dropped_in_silence():
    loss = {"type": "CrossEntropyLoss", "avg_non_ignore": True}
    inner = {"type": "FCNHead", "num_classes": 2, "loss_decode": [dict(loss), {"type": "DiceLoss"}]}
    model = {"decode_head": {"type": "Wrapper", "parts": [{"head": inner}]},
             "auxiliary_head": [{"type": "FCNHead", "loss_decode": dict(loss)}]}  # fmt: skip
    fill_classes(model, 5, [1.0] * 5)
    assert inner["num_classes"] == 5 and inner["loss_decode"][0]["class_weight"] == [1.0] * 5
    assert "num_classes" not in model["decode_head"] and "class_weight" not in inner["loss_decode"][1]
    assert model["auxiliary_head"][0]["num_classes"] == 5
    assert model["auxiliary_head"][0]["loss_decode"]["class_weight"] == [1.0] * 5
    head = {"type": "OtherHead", "loss_decode": {"type": "DiceLoss"}}
    fill_classes({"decode_head": head}, 5, None)
    with pytest.raises(UserError, match="decode_head OtherHead has no CrossEntropyLoss"):
        fill_classes({"decode_head": head}, 5, [1.0] * 5)


@pytest.mark.parametrize("name", ["small", "segformer_b0"])
def test_large_tiles_train_at_the_scale_they_are_predicted_at(name):
    from mmseg.registry import TRANSFORMS

    config = mmengine_config.Config.fromfile(ROOT / f"configs/mmseg/{name}.py")
    step, crop = (TRANSFORMS.build(node) for node in config.train_pipeline[:2])
    low, high = config.train_pipeline[0]["ratio_range"]

    def scaled(height: int, width: int) -> dict:
        np.random.seed(3)
        image = np.zeros((height, width, 3), np.uint8)
        return step({"img": image, "img_shape": (height, width), "seg_fields": ["gt_seg_map"],
                     "gt_seg_map": np.zeros((height, width), np.uint8)})  # fmt: skip

    edge = config.crop_size[0]
    for height, width in ((4 * edge, 4 * edge), (edge, 2 * edge)):
        found = scaled(height, width)
        assert low * height - 1 <= found["img"].shape[0] <= high * height
        assert found["img"].shape[1] == pytest.approx(found["img"].shape[0] * width / height, abs=2)
        assert found["gt_seg_map"].shape == found["img"].shape[:2]
    assert crop(scaled(4 * edge, 4 * edge))["img"].shape[:2] == config.crop_size
    np.random.seed(3)
    fixed = TRANSFORMS.build({"type": "RandomResize", "scale": config.crop_size, "ratio_range": (low, high),
                              "keep_ratio": True})  # fmt: skip
    own = scaled(edge, edge)
    np.random.seed(3)
    same = fixed({"img": np.zeros((edge, edge, 3), np.uint8), "img_shape": (edge, edge)})
    assert own["img"].shape == same["img"].shape  # tiles of the crop's size: as before


def test_hooks_of_the_config_run_beside_ours(flags, toy_data, tmp_path):
    config = mmengine_config.Config.fromfile(ROOT / "configs/mmseg/small.py")
    config.custom_hooks = [{"type": "EMAHook", "momentum": 0.5}]
    config.default_hooks = {"timer": {"type": "IterTimerHook"}, "logger": {"type": "LoggerHook", "interval": 1}}
    config.dump(tmp_path / "config.py")  # JSON would make lists of tuples
    train(*flags, "--train_txt_file", toy_data / "train_set_items.json", "--config", tmp_path / "config.py",
          "--work_dir", tmp_path / "work")  # fmt: skip
    checkpoint = torch.load(tmp_path / "work/iter_2.pth", weights_only=False)
    assert "ema_state_dict" in checkpoint
    hooks = json.loads((tmp_path / "work/config.json").read_text())["default_hooks"]
    assert hooks["logger"]["interval"] == 1 and hooks["checkpoint"]["max_keep_ckpts"] == 2


def test_fine_tuning_starts_from_the_given_weights(flags, toy_data, tmp_path):
    from post_processing.segmentation.segmentor import read_checkpoint

    synthetic = ["--synthetic_txt_file", toy_data / "val_set_items.json"]
    train(*flags, *synthetic, "--augment", "copy_paste", "--work_dir", tmp_path / "first")
    weights = tmp_path / "first/segmentor.pth"
    real = ["--train_txt_file", toy_data / "train_set_items.json", "--learning_rate", 0]
    train(*flags, *real, "--init_from", weights, "--work_dir", tmp_path / "second", "--resume")  # nothing to resume
    before, after = (read_checkpoint(path)["state_dict"] for path in (weights, tmp_path / "second/segmentor.pth"))
    trained = [name for name in before if name.endswith("weight")]
    assert len(trained) > 50 and all(torch.equal(before[name], after[name]) for name in trained)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: does not fit"):
        train(*flags, *real, "--init_from", tmp_path / "other.pth", "--work_dir", tmp_path / "third")


@pytest.mark.parametrize(("name", "million"), [("segformer_b0", 3.7), ("segformer_b1", 13.7), ("segformer_b2", 27.4),
                                               ("pspnet_r50", 49.0), ("small", 1.94)])  # fmt: skip
def test_configs_build_and_learn(name, million):
    from post_processing.segmentation.segmentor import require_mmseg

    require_mmseg()
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    config = mmengine_config.Config.fromfile(ROOT / f"configs/mmseg/{name}.py")
    fill_classes(config.model, 5, None)
    model = MODELS.build(config.model)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(million * 1e6, rel=0.02)
    if name == "segformer_b2":
        return  # the others show the step
    model.data_preprocessor.size = (64, 64)
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo={"img_shape": (64, 64)})
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 5, (1, 64, 64)))
        samples.append(sample)
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in samples]
    batch = {"inputs": images, "data_samples": samples}
    losses = model(**model.data_preprocessor(batch, training=True), mode="loss")
    total = sum(value for key, value in losses.items() if "loss" in key)
    total.backward()
    assert torch.isfinite(total) and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_pair_of_fusu_configs_trains_on_its_own_data(toy_data, tmp_path, monkeypatch):
    base, joint = (mmengine_config.Config.fromfile(ROOT / f"demo/mmseg/fusu_{name}.py") for name in ("base", "joint"))
    assert base.train_cfg == joint.train_cfg and base.param_scheduler == joint.param_scheduler
    assert base.model.decode_head.num_classes == ClassTable.load("fusu").num_classes
    for folder, manifest in (("data/fusu", "train"), ("outputs/fusu_resampled", "val")):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("img", "label"):
            (tmp_path / folder / name).symlink_to(toy_data / name)
        text = (toy_data / f"{manifest}_set_items.json").read_text()
        (tmp_path / folder / "train_set_items.json").write_text(text)
        (tmp_path / folder / "val_set_items.json").write_text(text)
    joint.model.data_preprocessor.size = (32, 32)
    joint.model.backbone.depth = 18
    joint.model.backbone.dilations = joint.model.backbone.strides = (1, 1, 1, 1)
    for head, channels in ((joint.model.decode_head, 512), (joint.model.auxiliary_head, 256)):
        head["in_channels"], head["channels"] = channels, 16
    for node in joint.train_dataloader.dataset.datasets:
        node.pipeline = [{"type": "PackSegInputs"}]
    joint.train_cfg.max_iters = joint.train_cfg.val_interval = 2
    for loader in (joint.train_dataloader, joint.val_dataloader):
        loader.num_workers, loader.persistent_workers = 0, False
    joint.train_dataloader.batch_size = 2
    (tmp_path / "joint.json").write_text(json.dumps(joint.to_dict()))
    monkeypatch.chdir(tmp_path)
    train("--config", "joint.json", "--work_dir", "work")
    from post_processing.segmentation.segmentor import load_segmentor

    segmentor = load_segmentor("work/config.json", "work/segmentor.pth")
    assert segmentor.class_table.name == "fusu"
    assert segmentor.predict(torch.zeros(1, 3, 32, 32).byte()).shape == (1, 32, 32)


@pytest.mark.parametrize("given", ["--max_steps 3", "--data_root . --val_interval 500", "--mask_folder x",
                                   "--augment none", "--synthetic_root x --synthetic_ratio 1.0",
                                   "--num_workers 0"])  # fmt: skip
def test_flags_that_a_config_with_its_own_data_would_not_follow_are_refused(tmp_path, given):
    """Those too whose value is the default, since the config may say something else."""
    (tmp_path / "own.json").write_text(json.dumps({"model": {}, "train_dataloader": {}}))
    names = ", ".join(part for part in given.split() if part.startswith("--"))
    with pytest.raises(UserError, match=f"^{names}: .*own.json has its own data and schedule"):
        train("--config", tmp_path / "own.json", "--work_dir", tmp_path / "work", *given.split())


def test_flags_are_not_abbreviated(tmp_path):
    with pytest.raises(SystemExit):
        train("--work_dir", tmp_path, "--max", 3)


@pytest.mark.parametrize(("warm_up", "expected"), [(0.0, [1.0, 1.0]), (0.02, [1.0, 1.0]), (0.04, [0.01, 1.0])])
def test_the_rate_rises_to_its_peak_however_short_the_warm_up(warm_up, expected):
    from mmengine.optim import OptimWrapper
    from mmengine.registry import PARAM_SCHEDULERS

    from post_processing.segmentation.training import set_schedule

    config = mmengine_config.Config(dict(max_steps=50, warm_up=warm_up, learning_rate=1.0, optimizer=dict(type="SGD")))
    set_schedule(config)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    wrapper = OptimWrapper(optimizer)
    schedulers = [PARAM_SCHEDULERS.build(dict(node, optimizer=wrapper)) for node in config.param_scheduler]
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[:2] == pytest.approx(expected, abs=0.03) and rates[25] == pytest.approx(0.53, abs=0.05)
    assert rates[-1] < 0.05


def test_one_step_is_a_training(flags, toy_data, tmp_path):
    train(*flags, "--train_txt_file", toy_data / "train_set_items.json", "--max_steps", 1, "--work_dir", tmp_path)
    assert (tmp_path / "segmentor.pth").is_file()
