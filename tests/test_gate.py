"""The gate for faster sampling: does it see a drop, does it keep quiet without one, does it compare like with like?"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import make_pairs, make_run, nearest_colour

from ldm.data.classes import ClassTable
from ldm.util import UserError
from post_processing.evaluation.gate import class_areas, iou_of, judge, mean_iou, paired_drops, verdict
from post_processing.segmentation.segmentor import Segmentor
from scripts.evaluate import main

RANDOM = np.random.default_rng(0)


def areas_of(errors, count=60, size=64):
    """Areas of a segmentor that is wrong in a share of the pixels; truth is the same for every share."""
    truth = np.random.default_rng(1).choice(4, (count, size, size), p=[0.5, 0.3, 0.18, 0.02])
    wrong = RANDOM.random(truth.shape) < np.asarray(errors)[truth]
    prediction = np.where(wrong, (truth + 1) % 4, truth)
    return class_areas(torch.from_numpy(prediction), torch.from_numpy(truth), 4)


def test_areas_give_the_iou_of_a_plain_count():
    prediction, mask = RANDOM.integers(0, 4, (5, 9, 7)), RANDOM.integers(0, 3, (5, 9, 7))
    mask[:, :2] = 255
    areas = class_areas(torch.from_numpy(prediction), torch.from_numpy(mask.astype(np.uint8)), 4)
    assert areas.shape == (5, 3, 4)
    for index in range(5):
        p, m = prediction[index][mask[index] != 255], mask[index][mask[index] != 255]
        expected = [100 * ((p == k) & (m == k)).sum() / ((p == k) | (m == k)).sum() for k in range(3)]
        np.testing.assert_allclose(iou_of(areas[index])[:3], expected)
        assert np.isnan(iou_of(areas[index])[3])  # predicted, but in no mask
        assert mean_iou(areas[index]) == pytest.approx(np.mean(expected))


def test_interval_holds_the_drop_and_finds_none_where_there_is_none():
    groups = [index // 2 for index in range(60)]
    exact, same, worse = areas_of([0.1] * 4), areas_of([0.1] * 4), areas_of([0.2] * 4)
    assert (paired_drops(exact, exact, groups)["mIoU"] == 0).all()
    drop, low, high = paired_drops(exact, same, groups)["mIoU"]
    assert low < 0 < high and abs(drop) < 1
    drop, low, high = paired_drops(exact, worse, groups)["mIoU"]
    assert 5 < low < drop < high < 40
    assert drop == pytest.approx(mean_iou(exact.sum(0)) - mean_iou(worse.sum(0)))
    assert paired_drops(worse, exact, groups)["mIoU"] == pytest.approx(-np.array([drop, high, low]))
    # More images of the same masks are no more masks: the interval must not shrink.
    width = np.diff(paired_drops(exact, same, range(60))["mIoU"][1:])
    twice = np.diff(paired_drops(np.tile(exact, (4, 1, 1)), np.tile(same, (4, 1, 1)), [*range(60)] * 4)["mIoU"][1:])
    assert twice == pytest.approx(width, rel=0.1)
    with pytest.raises(ValueError, match="two or more"):
        paired_drops(exact, worse, [0] * 60)


def test_a_rare_class_alone_can_fail_the_gate():
    def gate(errors):
        return judge(areas_of([0.02] * 4), areas_of(errors), range(60), "abcd", max_drop=5.0, rare=1,
                     max_rare_drop=3.0, draws=500, seed=0)  # fmt: skip

    lost = gate([0.02, 0.02, 0.02, 0.15])
    assert lost["verdict"] == "pass" and lost["gate"] == "fail"
    assert list(lost["rare"]) == ["d"] and lost["rare"]["d"]["share"] == pytest.approx(2, abs=0.5)
    assert gate([0.02] * 4)["gate"] == "pass"
    assert [verdict(drop, 0.5) for drop in ((0.1, -0.1, 0.3), (0.4, 0.2, 0.6), (0.6, 0.2, 0.9))] == [
        "pass", "open", "fail"]  # fmt: skip


def test_consistency_of_runs(tmp_path, monkeypatch):
    table = ClassTable.load("mini")
    make_pairs(tmp_path, 6)
    images = [np.asarray(Image.open(tmp_path / f"img/{number}.png")) for number in range(6)]
    segmentor = Segmentor.__new__(Segmentor)
    segmentor.class_table, segmentor.device, segmentor.head = table, torch.device("cpu"), None
    monkeypatch.setattr("post_processing.segmentation.segmentor.Segmentor.logits", nearest_colour)
    monkeypatch.setattr("post_processing.segmentation.segmentor.load_segmentor", lambda *_, **__: segmentor)

    def paint(name, order, seed=1):
        make_run(tmp_path / name, tmp_path, [(f"label/{i}.png", None, images[j]) for i, j in enumerate(order)], table)
        content = json.loads((tmp_path / name / "run.json").read_text())
        (tmp_path / name / "run.json").write_text(json.dumps(content | {"fingerprint": {"seed": seed, "num_steps": 3}}))

    def flags(*names):
        runs = [str(tmp_path / name) for name in names]
        return ["consistency", "--segmentor", "a", "b", "--exact", runs[0], "--run", *runs[1:], "--draws", "200"]

    paint("exact", range(6))
    paint("same", range(6))
    paint("swapped", [0, 1, 2, 3, 5, 4])
    main(flags("exact", "same", "swapped"))
    results = json.loads((tmp_path / "same/consistency/results.json").read_text())["runs"]
    same, swapped = (results[str(tmp_path / name)] for name in ("same", "swapped"))
    assert same["drop"] == 0 and same["interval"] == [0, 0] and same["gate"] == "pass"
    assert swapped["drop"] > 5 and swapped["gate"] == "fail" and len(swapped["rare"]) == 3
    text = (tmp_path / "same/consistency/results.md").read_text()
    assert "+0.00 (+0.00 to +0.00) | pass |" in text and "| fail |" in text
    paint("other_seed", range(6), seed=2)
    with pytest.raises(UserError, match="another seed"):
        main(flags("exact", "other_seed"))
    paint("short", range(5))
    with pytest.raises(UserError, match="differ in 1 images"):
        main(flags("exact", "short"))
