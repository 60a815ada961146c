"""Self-training between domains: the average, the labels, the mixtures, and a training that is killed and resumed."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_noise_training import config, data, weights_of  # noqa: F401  fixtures

from ldm.util import UserError
from post_processing.segmentation import self_training
from post_processing.segmentation.dlc import CORRECTED_LOSS, PSEUDO, decode_labels

pytest.importorskip("mmseg")


def test_the_teacher_is_the_average_of_its_students():
    torch.manual_seed(0)
    student = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    teacher = copy.deepcopy(student)
    expected = None
    for step in range(5):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        student(torch.randn(8, 3))
        self_training.update_average(teacher, student, step)
        now = student[0].weight.detach().double()
        expected = now.clone() if expected is None else step / (step + 1) * expected + now / (step + 1)
        assert torch.allclose(teacher[0].weight.double(), expected, atol=1e-6)
        assert torch.equal(teacher[1].running_var, student[1].running_var)
        assert teacher[1].num_batches_tracked == step + 1
    before = teacher[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1)
    self_training.update_average(teacher, student, 10**6)
    assert torch.allclose(teacher[0].weight - before, (student[0].weight - before) * 1e-3, atol=1e-6)


def test_labels_of_a_teacher_count_as_much_as_it_is_sure_of_the_image():
    logits = torch.zeros(2, 5, 4, 4)
    logits[0, 3, :2] = 20.0  # sure of half of the first image
    logits[1, 1] = 20.0
    is_image = torch.ones(2, 4, 4, dtype=torch.bool)
    is_image[1, :, 2:] = False
    labels = self_training.make_pseudo_labels(logits, is_image)
    label, domain, weight, is_valid = decode_labels(labels)
    assert torch.equal(is_valid, is_image) and (domain[is_valid] == PSEUDO).all()
    assert (weight[0] == 0.5).all() and (weight[1][is_valid[1]] == 1).all()
    assert (label[0, :2] == 3).all() and (label[1, :, :2] == 1).all()


def test_half_of_the_classes_of_each_mask_are_chosen():
    generator = torch.Generator().manual_seed(0)
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.integers(0, 5, (6, 8, 8)))
    labels[labels == 4] = 255
    labels[3] = 255
    labels[5] = 2 + 64
    chosen = self_training.choose_half(labels, 5, generator)
    for mask, picked in zip(labels, chosen, strict=True):
        present = set(mask[mask != 255].tolist())
        found = set(mask[picked].tolist())
        assert found <= present and len(found) == (len(present) + 1) // 2
        assert torch.equal(picked, torch.isin(mask, torch.tensor(sorted(found), dtype=torch.long)))  # whole classes
    assert len({tuple(mask[picked].unique().tolist()) for mask, picked in zip(labels, chosen, strict=True)}) > 2


def test_a_mixture_shows_what_its_labels_say(monkeypatch):
    monkeypatch.setattr(self_training, "JITTER_CHANCE", -1.0)
    monkeypatch.setattr(self_training, "BLUR_CHANCE", -1.0)
    generator = torch.Generator().manual_seed(0)
    source_labels = torch.randint(0, 5, (3, 16, 16), generator=generator)
    source = torch.full((3, 3, 16, 16), 10, dtype=torch.uint8), source_labels
    target = torch.full((3, 3, 16, 16), 200, dtype=torch.uint8), torch.full((3, 16, 16), 2 + 64 * PSEUDO + 256 * 64)
    (mixed, labels), (masked, same) = self_training.mix_batch(source, target, 5, torch.tensor([7.0, 8, 9]), generator)
    _, domain, weight, _ = decode_labels(labels)
    is_target = (mixed == 200).all(1)
    assert torch.equal(domain == PSEUDO, is_target) and 0 < is_target.float().mean() < 1
    assert (weight[is_target] == 0.75).all() and (weight[~is_target] == 1).all()
    assert torch.equal(same, target[1])
    is_hidden = (masked == torch.tensor([7, 8, 9], dtype=torch.uint8).view(1, 3, 1, 1)).all(1)
    assert torch.equal(is_hidden, ~(masked == 200).all(1)) and 0.5 < is_hidden.float().mean() < 0.9
    blocks = is_hidden.view(3, 8, 2, 8, 2)
    assert torch.equal(blocks, blocks[:, :, :1, :, :1].expand_as(blocks))


def test_colours_change_by_image_and_stay_in_range():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=generator).to(torch.uint8)
    changed = self_training.change_colours(images, generator)
    assert changed.dtype == torch.uint8 and changed.shape == images.shape
    distance = (changed.float() - images.float()).abs().mean((1, 2, 3))
    assert len(set(distance.round(decimals=3).tolist())) > 4 and distance.max() > 3
    flat = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert len(self_training.change_colours(flat, generator).unique()) == 1  # blur and contrast leave it flat


def train(data, config, work_dir, *flags):  # noqa: F811
    from scripts.train_segmentor import main

    main([str(flag) for flag in (
        "--config", config, "--classes", "mini", "--data_root", data, "--train_txt_file", data / "train.json",
        "--target_txt_file", data / "val.json", "--max_steps", 3, "--batch_size", 2, "--threads", 1, "--work_dir",
        work_dir, *flags,
    )])  # fmt: skip


def test_a_killed_self_training_goes_on_with_its_teacher(data, config, tmp_path, monkeypatch):  # noqa: F811
    from mmengine.runner import IterBasedTrainLoop

    monkeypatch.setattr(self_training, "CONFIDENT", 0.0)  # else a new teacher says nothing
    synthetic = ("--synthetic_txt_file", data / "synthetic.json", "--label_smoothing", 0.1)
    train(data, config, tmp_path / "whole", *synthetic)
    run_iter, sizes = IterBasedTrainLoop.run_iter, []

    def killed(self, batch):
        if self._iter == 2:
            raise KeyboardInterrupt
        run_iter(self, batch)
        sizes.append(len(batch["inputs"]))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IterBasedTrainLoop, "run_iter", killed)
        train(data, config, tmp_path / "killed", *synthetic)
    assert sizes == [6, 6]
    train(data, config, tmp_path / "killed", *synthetic, "--resume")
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    checkpoints = [torch.load(tmp_path / name / "iter_3.pth", weights_only=False) for name in ("whole", "killed")]
    teachers = [checkpoint["teacher"] for checkpoint in checkpoints]
    assert teachers[0]["moves"] == teachers[1]["moves"] == 3
    states = [teacher["state_dict"] for teacher in teachers]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    trained = "decode_head.conv_seg.weight"
    assert not torch.equal(states[0][trained], whole[trained])
    written = json.loads((tmp_path / "whole/config.json").read_text())
    assert written["model"]["decode_head"]["loss_decode"]["type"] == CORRECTED_LOSS


def test_targets_that_are_not_there_are_named_before_the_training(data, config, tmp_path):  # noqa: F811
    (tmp_path / "bad.json").write_text('{"target": "img/0.png"}\n{"source": "a"}\n{"target": "img/no.png"}\n')
    with pytest.raises(UserError, match="line 2 has no `target`; line 3: .*no.png does not exist"):
        train(data, config, tmp_path / "a", "--target_txt_file", tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="not found"):
        train(data, config, tmp_path / "b", "--target_txt_file", tmp_path / "none.json")
    assert len(self_training.list_targets(data / "img", data)) == 24
    (tmp_path / "mixed").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"mixed/{name}.png").write_bytes((data / "img/0.png").read_bytes()[:200 if name == "a" else None])
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "mixed/c.tif")
    with pytest.raises(UserError, match="2 images cannot be used: .*a.png.*c.tif"):
        self_training.list_targets(tmp_path / "mixed", data)
