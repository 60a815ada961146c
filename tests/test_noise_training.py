"""Noise correction in real trainings: through mmseg's heads, pipelines and runner, killed and resumed, and loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.util import UserError
from post_processing.segmentation import dlc_training
from post_processing.segmentation.dlc import SYNTHETIC, CorrectedCrossEntropy, decode_labels, find_losses
from post_processing.segmentation.noise import read_noise
from post_processing.segmentation.segmentor import build_model, load_segmentor, read_checkpoint
from post_processing.segmentation.training import find_checkpoint

mmengine_config = pytest.importorskip("mmengine.config")
pytest.importorskip("mmseg")
ROOT = Path(__file__).resolve().parents[1]
NAMES = ["building", "land", "road", "vegetation", "water"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 tiles of 64 x 64 whose colours follow their masks; the masks of the synthetic ones call a third of 0 a 1."""
    root = tmp_path_factory.mktemp("noisy")
    random = np.random.default_rng(0)
    colours = random.integers(30, 220, (5, 3))
    for folder in ("img", "label"):
        (root / folder).mkdir()
    rows = []
    for number in range(24):
        mask = np.kron(random.integers(0, 5, (8, 8)), np.ones((8, 8), int)).astype(np.uint8)
        image = (colours[mask] + random.integers(-9, 9, (64, 64, 3))).clip(0, 255).astype(np.uint8)
        if 8 <= number < 20:
            mask[(mask == 0) & (random.random((64, 64)) < 1 / 3)] = 1
        mask[:2] = 255
        Image.fromarray(mask).save(root / f"label/{number}.png")
        Image.fromarray(image).save(root / f"img/{number}.png")
        rows.append({"source": f"label/{number}.png", "target": f"img/{number}.png"})
    for name, part in (("train", rows[:8]), ("synthetic", rows[8:20]), ("val", rows[20:])):
        (root / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """small.py without anything random, at 64 x 64, a checkpoint after every step."""
    content = mmengine_config.Config.fromfile(ROOT / "configs/mmseg/small.py")
    content.train_pipeline = [dict(type="PackSegInputs")]
    content.model.data_preprocessor.size = (64, 64)
    content.model.decode_head.dropout_ratio = 0.0
    content.init_backbone = "none"
    content.default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1, max_keep_ckpts=2))
    path = tmp_path_factory.mktemp("config") / "config.py"
    content.dump(path)
    return path


def train(data, config, work_dir, *flags, steps=4):
    from scripts.train_segmentor import main

    main([str(flag) for flag in (
        "--config", config, "--classes", "mini", "--data_root", data, "--train_txt_file", data / "train.json",
        "--synthetic_txt_file", data / "synthetic.json", "--max_steps", steps, "--batch_size", 4, "--threads", 1,
        "--work_dir", work_dir, *flags,
    )])  # fmt: skip


def weights_of(work_dir):
    return read_checkpoint(work_dir / "segmentor.pth")["state_dict"]


def test_a_killed_training_goes_on_with_the_t_that_it_had(data, config, tmp_path, monkeypatch):
    flags = ("--noise_correction", "hoc")
    train(data, config, tmp_path / "whole", *flags)
    estimates = []
    estimate = dlc_training.estimate_hoc
    monkeypatch.setattr(dlc_training, "estimate_hoc", lambda *a: estimates.append(1) or estimate(*a))
    from mmengine.runner import IterBasedTrainLoop

    run_iter = IterBasedTrainLoop.run_iter

    def killed(self, batch):
        if self._iter == 3:
            raise KeyboardInterrupt
        run_iter(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IterBasedTrainLoop, "run_iter", killed)
        train(data, config, tmp_path / "killed", *flags)
    assert len(estimates) == 1
    train(data, config, tmp_path / "killed", *flags, "--resume")
    assert len(estimates) == 1
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    transition = whole["decode_head.loss_decode.transition"]
    assert torch.equal(transition[[0, 2, 3]], torch.eye(5).repeat(3, 1, 1))
    noise = json.loads((tmp_path / "whole/noise.json").read_text())
    assert noise["estimator"] == "hoc" and noise["step"] == 2 and sum(noise["counts"]["1"]) > 1000
    assert torch.allclose(read_noise(tmp_path / "whole/noise.json", NAMES)[1].float(), transition[1], atol=1e-5)


def test_the_warm_up_is_the_training_without_correction(data, config, tmp_path):
    train(data, config, tmp_path / "plain", steps=2)
    train(data, config, tmp_path / "late", "--noise_correction", "hoc", "--warm_up_share", 0.99, steps=2)
    plain, late = weights_of(tmp_path / "plain"), weights_of(tmp_path / "late")
    new = {"decode_head.loss_decode.transition", "decode_head.loss_decode.is_estimated"}
    assert set(late) - set(plain) == new
    assert all(torch.allclose(plain[name].float(), late[name].float(), atol=1e-4) for name in plain)
    written = json.loads((tmp_path / "plain/config.json").read_text())
    assert written["model"]["decode_head"]["loss_decode"]["type"] == "CrossEntropyLoss"
    assert "custom_hooks" not in written and "segmentation.dlc" not in json.dumps(written)


def test_what_it_writes_passes_the_filter_and_the_evaluation(data, config, tmp_path):
    from post_processing.filter import main as run_filter
    from scripts.evaluate import main as evaluate

    matrix = tmp_path / "noise.json"
    rows = torch.eye(5)
    rows[0, :2] = torch.tensor([2 / 3, 1 / 3])
    dlc_training.write_noise(matrix, {SYNTHETIC: rows}, NAMES, "by hand")
    with pytest.raises(UserError, match="no matrix of domain 2"):
        train(data, config, tmp_path / "border", "--noise_matrix", matrix, "--noise_border", 3)
    train(data, config, tmp_path / "work", "--noise_matrix", matrix, steps=2)
    segmentor = [str(tmp_path / "work" / name) for name in ("config.json", "segmentor.pth")]
    loaded = load_segmentor(*segmentor)
    assert torch.allclose(find_losses(loaded.model)[0].transition[SYNTHETIC], rows)
    evaluate(["segmentor", "--segmentor", *segmentor, "--real", str(data / "val.json"), "--real_root", str(data),
              "--outdir", str(tmp_path / "scores")])  # fmt: skip
    assert (tmp_path / "scores/results.json").is_file()
    assert not run_filter([*segmentor, "--syn-img-path", str(data / "img"), "--syn-mask-path", str(data / "label"),
                           "--real_txt_file", str(data / "train.json"), "--data_root", str(data), "--device", "cpu",
                           "--filtered-mask-path", str(tmp_path / "masks"), "--classes", "mini"])  # fmt: skip
    assert len(list((tmp_path / "masks").glob("*.png"))) == 24


def test_a_training_is_not_resumed_with_another_way_to_find_t(data, config, tmp_path):
    """The checkpoint's T, or the noise.json of the other way, would be in force without a word."""
    train(data, config, tmp_path, "--noise_correction", "hoc", steps=2)
    for flags in (("--noise_correction", "audit", "--audit", tmp_path), ("--noise_correction", "learned"), (),
                  ("--noise_matrix", tmp_path / "noise.json")):  # fmt: skip
        with pytest.raises(UserError, match="--resume: .* has --noise_correction hoc. Expected the same"):
            train(data, config, tmp_path, *flags, "--resume", steps=4)
    train(data, config, tmp_path, "--noise_correction", "hoc", "--resume", steps=4)


def test_a_training_goes_on_from_its_newest_whole_checkpoint(data, config, tmp_path):
    """A kill while one is written leaves a part of it; a moved folder has a note of mmengine with the old path."""
    train(data, config, tmp_path / "old", steps=4)
    (tmp_path / "old/segmentor.pth").unlink()
    (tmp_path / "old").rename(tmp_path / "new")
    broken = tmp_path / "new/iter_4.pth"
    broken.write_bytes(broken.read_bytes()[:1000])
    assert find_checkpoint(tmp_path / "new") == tmp_path / "new/iter_3.pth"
    train(data, config, tmp_path / "new", "--resume")
    train(data, config, tmp_path / "whole")
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "new")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for path in (tmp_path / "new").glob("iter_*.pth"):
        path.write_bytes(b"PK")
    assert find_checkpoint(tmp_path / "new") is None


def test_a_training_is_not_resumed_with_other_labels(data, config, tmp_path):
    """Its second half would be another training than its first, and nothing in the folder would say so."""
    one, two, three = (tmp_path / f"{name}.json" for name in ("one", "two", "three"))
    for path, right, other in ((one, 0.6, 1), (two, 0.8, 1), (three, 0.6, 2)):
        rows = torch.eye(5)
        rows[0, 0], rows[0, other] = right, 1 - right
        dlc_training.write_noise(path, {SYNTHETIC: rows}, NAMES, "by hand")
    train(data, config, tmp_path / "matrix", "--noise_matrix", one, steps=2)
    for path, right in ((two, "0.8"), (three, "0.6")):
        expected = rf"--noise_matrix \w+ of the diagonal 0.6 1 1 1 1, not \w+ of the diagonal {right} 1"
        with pytest.raises(UserError, match=expected):
            train(data, config, tmp_path / "matrix", "--noise_matrix", path, "--resume", steps=4)
    table = tmp_path / "reversed.yaml"
    classes = [{"id": number, "name": name, "colour": [number + 1, 0, 0]} for number, name in enumerate(NAMES[::-1])]
    table.write_text(json.dumps({"name": "reversed", "classes": classes}))  # JSON is YAML
    train(data, config, tmp_path / "plain", steps=2)
    with pytest.raises(UserError, match="begun with --classes building, .*, not water"):
        train(data, config, tmp_path / "plain", "--classes", table, "--resume", steps=4)
    train(data, config, tmp_path, "--label_smoothing", 0.1, steps=2)
    for flags, named in (((), "--label_smoothing 0.1, not 0.0"),
                         (("--label_smoothing", 0.1, "--synthetic_ratio", 3), "--synthetic_ratio 1.0, not 3.0"),
                         (("--label_smoothing", 0.1, "--target_txt_file", data / "val.json"),
                          "--target_txt_file False, not True")):  # fmt: skip
        with pytest.raises(UserError, match=f"--resume: .* was begun with {named}. Expected the same"):
            train(data, config, tmp_path, *flags, "--resume", steps=4)
    train(data, config, tmp_path, "--label_smoothing", 0.1, "--resume", steps=4)


def test_other_ways_to_find_t(data, config, tmp_path):
    train(data, config, tmp_path / "learned", "--noise_correction", "learned", "--warm_up_share", 0.25)
    learned = weights_of(tmp_path / "learned")
    logits = learned["decode_head.loss_decode.transition_logits"]
    assert torch.allclose(logits.softmax(1), learned["decode_head.loss_decode.transition"][SYNTHETIC], atol=1e-6)
    moved = (logits - CorrectedCrossEntropy(5, is_learned=True).transition_logits).abs().max()
    assert 0.02 < moved < 0.1  # steps of a rate that falls from 5e-2 to 0
    assert read_noise(tmp_path / "learned/noise.json", NAMES)[1].shape == (5, 5)

    train(data, config, tmp_path / "border", "--noise_correction", "hoc", "--noise_border", 2)
    assert set(read_noise(tmp_path / "border/noise.json", NAMES)) == {1, 2}

    teacher = [tmp_path / "border" / name for name in ("config.json", "segmentor.pth")]
    train(data, config, tmp_path / "teacher", "--noise_correction", "teacher", "--teacher", *teacher, "--val_txt_file",
          data / "val.json", steps=1)  # fmt: skip
    assert json.loads((tmp_path / "teacher/noise.json").read_text())["estimator"] == "teacher"

    train(data, config, tmp_path / "smooth", "--label_smoothing", 0.1, "--init_from", tmp_path / "border/segmentor.pth",
          steps=1)  # fmt: skip
    loss = json.loads((tmp_path / "smooth/config.json").read_text())["model"]["decode_head"]["loss_decode"]
    assert loss["label_smoothing"] == 0.1 and len(loss["class_weight"]) == 5
    assert (weights_of(tmp_path / "smooth")["decode_head.loss_decode.transition"] == torch.eye(5)).all()


def test_an_audit_becomes_t(data, config, tmp_path):
    from scripts.audit_masks import main

    main(["--outdir", str(tmp_path / "audit"), "--synthetic_txt_file", str(data / "synthetic.json"),
          "--classes", "mini", "--count", "12"])  # fmt: skip
    for path in (tmp_path / "audit/masks").iterdir():
        truth = np.asarray(Image.open(path)).copy()
        for top in range(0, 64, 8):  # a cell of the drawing has one class: the less frequent one of two is wrong
            for left in range(0, 64, 8):
                cell = truth[top : top + 8, left : left + 8]
                values, counts = np.unique(cell.reshape(-1, 3), axis=0, return_counts=True)
                if len(values) == 2 and top:
                    cell[:] = values[counts.argmax()]
        Image.fromarray(truth).save(tmp_path / "audit/corrected" / path.name)
    train(data, config, tmp_path / "work", "--noise_correction", "audit", "--audit", tmp_path / "audit", steps=1)
    transition = read_noise(tmp_path / "work/noise.json", NAMES)[1]
    assert transition[0, 1] == pytest.approx(1 / 3, abs=0.03) and transition[1, 1] > 0.97


@pytest.mark.parametrize(("flags", "message"), [
    ("--noise_correction audit", "--audit: expected together"),
    ("--audit x", "--audit: expected together"),
    ("--noise_correction teacher --teacher a b", "expected --val_txt_file"),
    ("--noise_correction hoc --noise_matrix x", "--noise_matrix: gives T"),
    ("--noise_correction hoc --warm_up_share 1", "--warm_up_share: 1.0"),
    ("--label_smoothing 1", "--label_smoothing: 1.0"),
    ("--noise_border 3", "--noise_border: expected with"),
])  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(data, config, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(data, config, tmp_path / "work", *flags.split())


def test_real_pairs_alone_have_nothing_to_correct(data, config, tmp_path):
    from scripts.train_segmentor import main

    with pytest.raises(UserError, match="no synthesized pairs"):
        main(["--config", str(config), "--classes", "mini", "--train_txt_file", "x", "--work_dir", str(tmp_path),
              "--noise_correction", "hoc"])  # fmt: skip


def test_heads_and_losses_that_cannot_read_the_codes_are_refused():
    config = mmengine_config.Config.fromfile(ROOT / "configs/mmseg/small.py")
    plain = dict(type="CrossEntropyLoss")
    for loss in (dict(type="DiceLoss"), [plain, plain], plain | dict(use_sigmoid=True)):
        config.model.decode_head.loss_decode = loss
        with pytest.raises(UserError, match="decode_head SegformerHead has the loss"):
            dlc_training.correct_losses(config, 5, 0.0, False)
    model = torch.nn.Module()
    model.decode_head = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="Linear does not compute its loss"):
        dlc_training.check_heads(model)


@pytest.mark.parametrize("name", ["small", "pspnet_r50"])
def test_every_head_gets_the_loss_of_the_noise(name):
    """With T = I equal to mmseg's loss, also in auxiliary heads with their own weight."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    from post_processing.segmentation.training import fill_classes

    config = mmengine_config.Config.fromfile(ROOT / f"configs/mmseg/{name}.py")
    if name == "pspnet_r50":
        config.model.backbone.depth = 18
        config.model.backbone.strides = config.model.backbone.dilations = (1, 1, 1, 1)
        for head, channels in ((config.model.decode_head, 512), (config.model.auxiliary_head, 256)):
            head["in_channels"], head["channels"] = channels, 16
    config.model.data_preprocessor.size = (32, 32)
    weights = None if name == "small" else [0.5, 1.0, 2.0, 1.0, 1.5]
    fill_classes(config.model, 5, weights)
    plain = build_model({"model": config.model}).eval()
    dlc_training.correct_losses(config, 5, 0.0, False)
    model = build_model({"model": config.model}).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    dlc_training.check_heads(model)
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (2, 1, 32, 32))
    labels[:, :, :9] = 255
    images = torch.randn(2, 3, 32, 32)

    def losses_of(network, domain):
        samples = []
        for label in labels:
            samples.append(SegDataSample(metainfo={"img_shape": (32, 32)}))
            samples[-1].gt_sem_seg = PixelData(data=torch.where(label == 255, label, label + 64 * domain))
        return {key: float(value) for key, value in network.loss(images, samples).items() if "loss" in key}

    with torch.no_grad():
        expected, found = losses_of(plain, 0), losses_of(model, SYNTHETIC)
        assert set(expected) == set(found) and len(found) == (1 if name == "small" else 2)
        assert all(found[key] == pytest.approx(expected[key], rel=1e-5) for key in expected)
        for loss in find_losses(model):
            loss.set_transition({SYNTHETIC: torch.full((5, 5), 0.2)})
        assert losses_of(model, 0) == pytest.approx(expected, rel=1e-5)
        ratio = 1.0 if name == "small" else 0.4
        changed = losses_of(model, SYNTHETIC)
        assert changed["decode.loss_ce"] == pytest.approx(np.log(5), rel=1e-5)  # p T is uniform whatever p is
        assert changed.get("aux.loss_ce", ratio * np.log(5)) == pytest.approx(ratio * np.log(5), rel=1e-5)


def test_the_domain_survives_the_whole_pipeline(data):
    """Rotation, crops, flips and padding of small.py: every pixel stays in its domain, or is ignored."""
    from ldm.data.classes import ClassTable
    from post_processing.segmentation.dataset import dataset_config
    from post_processing.segmentation.mixing import JointSegDataset
    from post_processing.segmentation.segmentor import require_mmseg

    require_mmseg()
    config = mmengine_config.Config.fromfile(ROOT / "configs/mmseg/small.py")
    table = ClassTable.load("mini")
    args = type("Args", (), {"noise_border": 0, "label_smoothing": 0.0, "noise_correction": "hoc", "warm_up_share": 0.5,
                             "seed": 1, "noise_matrix": None, "target_txt_file": None})  # fmt: skip
    nodes = [dataset_config(table, config.train_pipeline, manifest=data / f"{name}.json", data_root=data,
                            is_synthetic=name == "synthetic") for name in ("train", "synthetic")]  # fmt: skip
    dlc_training.add_noise_correction(config, table, args, nodes)
    np.random.seed(0)
    seen = set()
    for number, sample in enumerate(JointSegDataset(nodes)):
        label, domain, weight, is_valid = decode_labels(sample["data_samples"].gt_sem_seg.data)
        assert set(domain[is_valid].unique().tolist()) == {int(number >= 8)} and (weight == 1).all()
        assert sample["data_samples"].is_synthetic == (number >= 8)
        seen |= set(label[is_valid].unique().tolist())
    assert seen == set(range(5))
    assert isinstance(find_losses(build_model({"model": config.model}))[0], CorrectedCrossEntropy)
