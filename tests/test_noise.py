"""Coded labels, the corrected loss and the estimates of label noise, each against an independent calculation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from ldm.data.classes import ClassTable, read_mask
from ldm.util import UserError
from post_processing.segmentation import noise
from post_processing.segmentation.dlc import (
    BORDER,
    PSEUDO,
    SYNTHETIC,
    CorrectedCrossEntropy,
    MarkDomain,
    decode_labels,
    encode_domain,
    find_borders,
)
from post_processing.segmentation.mixing import paste


def random_transition(count: int, seed: int, diagonal: float = 0.7) -> torch.Tensor:
    """Diagonally dominant rows of probabilities."""
    rows = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows.fill_diagonal_(0)
    rows = rows / rows.sum(1, keepdim=True) * (1 - diagonal)
    return rows + diagonal * torch.eye(count, dtype=torch.float64)


def random_batch(count: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of a third ignored pixels, all of the trusted domain."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, count, 7, 6, generator=generator)
    labels = torch.randint(0, count, (3, 7, 6), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    return logits, labels


def in_domain(labels: torch.Tensor, domain: int) -> torch.Tensor:
    return torch.where(labels == 255, labels, labels + 64 * domain)


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0, 0.7, 1.1]])
def test_without_noise_the_loss_is_the_cross_entropy(weights):
    logits, labels = random_batch()
    given = None if weights is None else torch.tensor(weights)
    expected = functional.cross_entropy(logits, labels, weight=given, ignore_index=255)
    loss = CorrectedCrossEntropy(5, class_weight=weights, loss_weight=0.4)
    for domain in range(4):
        assert loss(logits, in_domain(labels, domain), ignore_index=255) == pytest.approx(0.4 * float(expected), 1e-6)
    losses = pytest.importorskip("mmseg.models.losses")
    theirs = losses.CrossEntropyLoss(class_weight=weights, avg_non_ignore=weights is None)
    assert float(loss(logits, labels)) == pytest.approx(0.4 * float(theirs(logits, labels, ignore_index=255)), rel=1e-6)


def test_forward_correction_is_the_likelihood_of_the_noisy_label():
    logits, labels = random_batch()
    transition = random_transition(5, 1)
    loss = CorrectedCrossEntropy(5)
    loss.set_transition({SYNTHETIC: transition})
    noisy = logits.double().softmax(1).movedim(1, -1) @ transition
    is_valid = labels != 255
    expected = functional.nll_loss(noisy[is_valid].log(), labels[is_valid])
    assert float(loss(logits, in_domain(labels, SYNTHETIC))) == pytest.approx(float(expected), abs=1e-6)
    smooth = CorrectedCrossEntropy(5, label_smoothing=0.1)
    softness = functional.cross_entropy(logits, labels, ignore_index=255, label_smoothing=0.1)
    assert float(smooth(logits, in_domain(labels, SYNTHETIC))) == pytest.approx(float(softness), abs=1e-6)
    plain = functional.cross_entropy(logits, labels, ignore_index=255)
    assert float(smooth(logits, labels)) == pytest.approx(float(plain), abs=1e-6)  # trusted labels stay as they are


def test_trusted_pixels_have_the_same_gradient_whatever_the_noise_of_the_others():
    logits, labels = random_batch()
    labels[1] = in_domain(labels[1], SYNTHETIC)
    gradients = []
    for transitions in ({}, {SYNTHETIC: random_transition(5, 1)}):
        loss, leaf = CorrectedCrossEntropy(5), logits.clone().requires_grad_()
        loss.set_transition(transitions)
        loss(leaf, labels).backward()
        gradients.append(leaf.grad)
        assert torch.equal(loss.transition[0], torch.eye(5))
    assert torch.equal(gradients[0][[0, 2]], gradients[1][[0, 2]]) and not torch.equal(gradients[0][1], gradients[1][1])
    with pytest.raises(ValueError, match="trusted"):
        loss.set_transition({0: torch.eye(5)})


def test_class_weights_mean_the_same_with_and_without_noise():
    """Fitted to what is expected of clean and of noisy labels, the network says w_i P(i) either way."""
    truth, weights = torch.tensor([0.3, 0.6, 0.1]), torch.tensor([1.6, 0.6, 1.5])
    transition = torch.tensor([[0.55, 0.40, 0.05], [0.10, 0.80, 0.10], [0.05, 0.45, 0.50]])
    expected = truth * weights / (truth * weights).sum()
    for domain, shares in ((0, truth), (SYNTHETIC, truth @ transition)):
        loss, logits = CorrectedCrossEntropy(3, class_weight=weights.tolist()), torch.zeros(3, requires_grad=True)
        loss.set_transition({SYNTHETIC: transition})
        labels = torch.arange(3).repeat_interleave((shares * 1000).round().int()).view(1, 1, -1) + 64 * domain
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            loss(logits.view(1, 3, 1, 1).expand(1, 3, 1, labels.numel()), labels).backward()
            optimizer.step()
        assert torch.allclose(logits.detach().softmax(0), expected, atol=0.01), domain


def test_nothing_but_ignored_pixels_costs_nothing_and_teaches_nothing():
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = CorrectedCrossEntropy(5)(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_weights_in_the_upper_bits_scale_a_pixel():
    logits, labels = random_batch()
    half = torch.where(labels == 255, labels, in_domain(labels, PSEUDO) + 256 * 128)
    loss = CorrectedCrossEntropy(5)
    assert float(loss(logits, half)) == pytest.approx(0.5 * float(loss(logits, labels)), rel=1e-6)


def test_what_does_not_fit_into_a_byte_is_refused():
    MarkDomain(PSEUDO, 63)
    with pytest.raises(UserError, match="64 classes in domain 3. Expected at most 63"):
        MarkDomain(PSEUDO, 64)
    with pytest.raises(UserError, match="65 classes"):
        CorrectedCrossEntropy(65)
    with pytest.raises(ValueError, match=r"m.png: ids \[5, 9\]. Expected 0..4"):
        MarkDomain(SYNTHETIC, 5)({"gt_seg_map": np.array([[5, 9, 255, 0]], np.uint8), "seg_map_path": "m.png"})
    with pytest.raises(ValueError, match=r"labels \[5\]"):
        CorrectedCrossEntropy(5)(torch.zeros(1, 5, 1, 1), torch.full((1, 1, 1), 5))


def test_labels_come_back_from_their_codes():
    mask = np.array([[0, 62, 255], [3, 61, 7]], np.uint8)
    for domain in range(4):
        code = encode_domain(mask, domain)
        assert code.dtype == np.uint8
        label, found, weight, is_valid = decode_labels(torch.from_numpy(code).long())
        assert np.array_equal(label.numpy()[is_valid], mask[mask != 255]) and (found[is_valid] == domain).all()
        assert (weight == 1).all() and np.array_equal(is_valid.numpy(), mask != 255)


def test_borders_get_their_own_domain():
    mask = np.zeros((20, 30), np.uint8)
    mask[:, 15:] = 4
    coded = MarkDomain(SYNTHETIC, 5, border=3)({"gt_seg_map": mask})["gt_seg_map"]
    assert (coded[:, :12] == 64).all() and (coded[:, 12:15] == 128).all()
    assert (coded[:, 15:18] == 4 + 64 * BORDER).all() and (coded[:, 18:] == 4 + 64).all()
    assert not find_borders(np.full((5, 5), 3, np.uint8), 2).any()


def test_cutmix_carries_the_domain_of_every_pixel():
    random = np.random.default_rng(0)
    np.random.seed(0)
    for kind in ("cutmix", "copy_paste"):
        masks = [random.integers(0, 5, (16, 16)).astype(np.uint8) for _ in range(2)]
        pair, other = ({"img": np.full((16, 16, 3), domain, np.uint8), "gt_seg_map": encode_domain(mask, domain)}
                       for domain, mask in enumerate(masks))  # fmt: skip
        paste(pair, other, kind)
        _, domain, _, _ = decode_labels(torch.from_numpy(pair["gt_seg_map"]).long())
        assert np.array_equal(domain.numpy(), pair["img"][..., 0])
        assert 0 < domain.float().mean() < 1


@pytest.mark.parametrize("count", [3, 5, 8])
def test_consensus_and_teacher_give_the_noise_back(count):
    transition = random_transition(count, count)
    prior = torch.linspace(1, 2, count, dtype=torch.float64)
    prior /= prior.sum()
    exact = torch.einsum("i,ij,ik,il->jkl", prior, transition, transition, transition)
    assert torch.allclose(noise.estimate_hoc(exact), transition, atol=1e-2)
    confusion = random_transition(count, count + 100, diagonal=0.8)
    predicted = confusion.T @ torch.diag(prior) @ transition
    assert torch.allclose(noise.estimate_from_teacher(predicted * 1e6, confusion), transition, atol=2e-2)


def test_neighbours_are_counted_as_a_double_loop_counts_them(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 4, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    monkeypatch.setattr(noise, "ROWS_AT_ONCE", 7)
    counts = noise.count_consensus(labels, features, 3)
    expected = np.zeros((3, 3, 3))
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    for here in range(60):
        order = sorted((other for other in range(60) if other != here), key=lambda other: -unit[here] @ unit[other])
        expected[labels[here], labels[order[0]], labels[order[1]]] += 1
    assert np.array_equal(counts.numpy(), expected)
    with pytest.raises(ValueError, match="2 points"):
        noise.count_consensus(labels[:2], features[:2], 3)


def test_rows_that_must_not_be_trusted_become_rows_of_the_identity():
    transition = torch.tensor([[0.1, 0.9, 0.0], [0.3, 0.7, 0.0], [0.0, float("nan"), 0.5]], dtype=torch.float64)
    safe, notes = noise.make_safe(transition, torch.tensor([500, 500, 500]), ["a", "b", "c"])
    assert torch.equal(safe[[0, 2]], torch.eye(3, dtype=torch.float64)[[0, 2]])
    assert torch.equal(safe[1], transition[1])
    assert len(notes) == 2 and "a: " in notes[0] and "0.10" in notes[0] and "c: " in notes[1]
    _, notes = noise.make_safe(torch.eye(3), torch.tensor([500, 199, 500]), ["a", "b", "c"])
    assert notes == ["b: taken to be free of noise (199 points, at least 200 are needed)"]


def test_estimates_are_written_and_read_back(tmp_path):
    transition = random_transition(3, 0)
    noise.write_noise(tmp_path / "noise.json", {1: transition, 2: torch.eye(3)}, ["a", "b", "c"], "hoc", seed=4)
    found = noise.read_noise(tmp_path / "noise.json", ["a", "b", "c"])
    assert set(found) == {1, 2} and torch.allclose(found[1], transition, atol=1e-6)
    content = json.loads((tmp_path / "noise.json").read_text())
    assert content["domains"]["1"]["distance_from_identity"] == pytest.approx(0.3, abs=1e-3) and content["seed"] == 4
    with pytest.raises(UserError, match="of classes"):
        noise.read_noise(tmp_path / "noise.json", ["a", "b", "d"])
    content["domains"]["1"]["transition"][0] = [2.0, 0.0, 0.0]
    (tmp_path / "noise.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="domain 1: not a transition matrix"):
        noise.read_noise(tmp_path / "noise.json", ["a", "b", "c"])
    (tmp_path / "noise.json").write_text("[]")
    with pytest.raises(UserError, match="not an estimate"):
        noise.read_noise(tmp_path / "noise.json", ["a", "b", "c"])


def test_an_audit_is_painted_over_and_read_back(toy_data: Path, tmp_path: Path, capsys):
    from scripts.audit_masks import main

    table = ClassTable.load("mini")
    flags = ["--synthetic_txt_file", str(toy_data / "train_set_items.json"), "--classes", "mini", "--count", "3"]
    main(["--outdir", str(tmp_path / "audit"), *flags])
    main(["--outdir", str(tmp_path / "again"), *flags])
    names = sorted(path.name for path in (tmp_path / "audit/corrected").iterdir())
    assert len(names) == 3 and names == sorted(path.name for path in (tmp_path / "again/corrected").iterdir())
    assert str(table.colours[1]) in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing is drawn"):
        main(["--outdir", str(tmp_path / "audit"), "--read"])
    with pytest.raises(UserError, match="is not empty"):
        main(["--outdir", str(tmp_path / "audit"), *flags])
    expected = np.zeros((5, 5), int)
    for name in names:
        given = read_mask(tmp_path / "audit/masks" / name, table)
        assert (read_mask(tmp_path / "audit/corrected" / name, table) == 255).all()
        truth = (given.astype(int) + 1) % 5  # every label is wrong, as far as it is generated
        truth[:, 16:], truth[given == 255] = 255, 255
        Image.fromarray(table.colourise(truth.astype(np.uint8))).save(tmp_path / "audit/corrected" / name)
        for label in range(5):
            expected[(label + 1) % 5, label] += (given[:, :16] == label).sum()
    from post_processing.segmentation.audit import read_audit

    counts = read_audit(tmp_path / "audit", table)
    assert np.array_equal(counts, expected) and counts.sum() > 500
    transition = noise.estimate_from_counts(counts)
    assert float(transition[1, 0]) == pytest.approx(expected[1, 0] / (expected[1, 0] + 1))
    main(["--outdir", str(tmp_path / "audit"), "--read"])
    assert "taken to be free of noise" in capsys.readouterr().out  # a diagonal of nearly 0 is refused
    assert set(noise.read_noise(tmp_path / "audit/noise.json", table.names)) == {1}
    Image.fromarray(np.full((32, 32, 3), 77, np.uint8)).save(tmp_path / "audit/corrected" / names[0])
    with pytest.raises(UserError, match=f"{names[0]}: colours"):
        read_audit(tmp_path / "audit", table)


@pytest.mark.slow
def test_correction_recovers_nearly_all_that_the_noise_of_a_toy_costs():
    from benchmarks.noise_toy import run_arm

    clean, noisy, corrected = (run_arm(arm, seed=1) for arm in ("clean", "noisy", "hoc"))
    assert corrected["tv"] <= 0.10 and noisy["tv"] == pytest.approx(0.364)
    assert corrected["OA"] >= noisy["OA"] + 0.05 and corrected["mIoU"] >= noisy["mIoU"] + 0.08
    assert corrected["OA"] >= clean["OA"] - 0.03
