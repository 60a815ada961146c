import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmentors import make_segmentor, table_of

from ldm.util import UserError
from post_processing.resample import link_or_copy, main
from post_processing.segmentation.dataset import list_pairs
from post_processing.selection.choice import Candidate, cap, keep_by_hardness, keep_by_rule, mask_hardness

ROOT = Path(__file__).resolve().parents[1]
COUNT = 5
SIZE = (8, 10)


def make_candidates(masks=12, copies=6, seed=0):
    """Random candidates of all kinds; the first mask is ignored everywhere, one image has lost every pixel."""
    random = np.random.default_rng(seed)
    candidates = []
    for mask in range(masks):
        before = random.integers(0, 30, COUNT) * random.integers(0, 2, COUNT) * (mask > 0)
        for copy in range(copies):
            after = random.binomial(before, random.random()) * (mask + copy != 1)
            name = f"{mask}_seed_{copy}"
            candidates.append(Candidate(Path(f"img/{name}.png"), Path(f"f/{name}.png"), str(mask), 200, before, after))
    return candidates


def names_of(candidates):
    return [candidate.image.stem for candidate in candidates]


@pytest.mark.parametrize("rare", [[], [3], [0, 4]])
def test_rule_counting_ignored_pixels_is_upstreams(rare):
    candidates = make_candidates()
    expected = []
    for candidate in candidates:
        flat = np.repeat([*range(COUNT), 255], [*candidate.after, candidate.area - candidate.after.sum()])
        if np.isin(flat, rare).any() or (flat != 255).mean() > 0.25:
            expected.append(candidate)
    kept = keep_by_rule(candidates, rare, 1, 0.25, True)
    assert names_of(kept) == names_of(expected)
    assert 0 < len(kept) < len(candidates)


def test_rule_leaves_out_what_was_ignored_from_the_start():
    def candidate(before, after):
        return Candidate(Path("a.png"), Path("b.png"), "m", 100, np.array(before), np.array(after))

    third_ignored = candidate([60, 7], [55, 6])
    assert keep_by_rule([third_ignored], [], 1, 0.8, False) and not keep_by_rule([third_ignored], [], 1, 0.8, True)
    exactly = candidate([50, 0], [40, 0])
    assert not keep_by_rule([exactly], [], 1, 0.8, False)
    assert not keep_by_rule([candidate([0, 0], [0, 0])], [0, 1], 1, 0.0, False)
    few = candidate([0, 90], [3, 1])
    assert keep_by_rule([few], [0], 3, 0.8, False) and not keep_by_rule([few], [0], 4, 0.8, False)


def test_hardness_gives_each_mask_freemasks_budget():
    candidates, mean = make_candidates(masks=7), np.array([0.1, 0.2, 0.5, np.nan, 2.0])
    before = {candidate.mask: candidate.before for candidate in candidates}

    def slow(mask):
        pairs = [(n, loss) for n, loss in zip(before[mask], mean, strict=True) if not np.isnan(loss)]
        pixels = sum(n for n, _ in pairs)
        return sum(n * loss for n, loss in pairs) / pixels if pixels else 0.0

    for mask in before:
        assert mask_hardness(before[mask], mean) == pytest.approx(slow(mask))
    kept = keep_by_hardness(candidates, mean, seed=3)
    for place, mask in enumerate(sorted(before, key=slow), start=1):
        assert sum(one.mask == mask for one in kept) == min(1 + round(6 * place / 7), 6)
    assert names_of(kept) == names_of(keep_by_hardness(candidates[::-1], mean, seed=3))
    assert set(names_of(kept)) != set(names_of(keep_by_hardness(candidates, mean, seed=4)))


def test_caps_hold_and_do_not_spend_rare_classes_on_common_ones():
    candidates = make_candidates()
    capped = cap(candidates, 2, None, seed=0)
    assert len(capped) == 24 and max(sum(one.mask == mask for one in capped) for mask in {c.mask for c in capped}) == 2
    shown = np.sum([one.after > 0 for one in candidates], axis=0)
    capped = cap(candidates, None, 3, seed=0)
    counts_for = [min(np.flatnonzero(one.after), key=lambda index: shown[index], default=-1) for one in capped]
    available = [min(np.flatnonzero(one.after), key=lambda index: shown[index], default=-1) for one in candidates]
    assert {index: counts_for.count(index) for index in set(available)} == {
        index: min(3, available.count(index)) for index in set(available)
    }
    assert len(counts_for) > 10
    assert names_of(cap(candidates, 2, 3, 0)) == names_of(cap(candidates[::-1], 2, 3, 0))
    assert cap([], 1, 1, 0) == []


@pytest.fixture
def filtered(tmp_path):
    """Images, masks and filtered masks of 3 masks with 4 copies each, as filter.py leaves them."""
    random = np.random.default_rng(0)
    masks = [random.integers(0, COUNT - (number == 0), SIZE).astype(np.uint8) for number in range(3)]
    return write_filtered(tmp_path, masks, table_of(COUNT), random)


def write_filtered(tmp_path, masks, table, random):
    """Write 4 images of each mask; of the i-th, the filter has dropped 30 i % of the pixels."""
    records = []
    for folder in ("img", "label", "filtered"):
        (tmp_path / folder).mkdir()
    for number, mask in enumerate(masks):
        mask[0] = 255
        Image.fromarray(mask).save(tmp_path / f"label/{number}.png")
        for copy in range(4):
            after = np.where(random.random(SIZE) < 0.3 * copy, 255, mask).astype(np.uint8)
            name = f"{number}_seed_{copy}.png"
            Image.fromarray(random.integers(0, 256, (*SIZE, 3), np.uint8)).save(tmp_path / f"img/{name}")
            Image.fromarray(after).save(tmp_path / f"filtered/{name}")
            classes = {
                table.names[index]: [int((mask == index).sum()), int(((mask == index) & (after == 255)).sum())]
                for index in np.unique(mask[mask != 255])
            }
            records.append({"image": name, "file": name, "mask": str(tmp_path / f"label/{number}.png"),
                            "height": SIZE[0], "width": SIZE[1], "classes": classes})  # fmt: skip
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "filtered/items.jsonl").write_text(lines)
    settings = {"images": str(tmp_path / "img"), "class_table": table.to_dict()}
    (tmp_path / "filtered/filter.json").write_text(json.dumps({"settings": settings}))
    return tmp_path


def slow_choice(root, policy, rare, losses):
    """Names of the images that each policy keeps, from the pixels of the PNG files one at a time."""
    kept, groups = [], {}
    for path in sorted((root / "filtered").glob("*.png")):
        before, after = (np.asarray(Image.open(file)).ravel().tolist()
                         for file in (root / f"label/{path.name.split('_')[0]}.png", path))  # fmt: skip
        labelled = survived = 0
        is_rare, hardness, known = False, 0.0, 0
        for old, new in zip(before, after, strict=True):
            labelled, survived = labelled + (old != 255), survived + (new != 255)
            is_rare = is_rare or new in rare
            if losses.get(old) is not None:
                hardness, known = hardness + losses[old], known + 1
        if policy == "rule":
            if is_rare or survived > 0.5 * labelled:
                kept.append(path.name)
        elif survived:
            mask = (hardness / known if known else 0.0, str(root / f"label/{path.name.split('_')[0]}.png"))
            groups.setdefault(mask, []).append(path.name)
    for place, mask in enumerate(sorted(groups), start=1):
        names = sorted(groups[mask], key=lambda name: hashlib.sha256(f"7/{name}".encode()).digest())
        kept += names[: min(1 + round(len(names) * place / len(groups)), len(names))]
    return sorted(kept)


@pytest.mark.parametrize("count", [2, 7, 24, 150])
@pytest.mark.parametrize("policy", ["rule", "hardness"])
def test_kept_images_are_those_of_a_slow_loop_over_pixels(tmp_path, count, policy):
    random = np.random.default_rng(count)
    masks = [random.integers(0, count - number % 2, SIZE).astype(np.uint8) for number in range(6)]  # odd: last missing
    masks[1][:, 3:] = 255
    masks[2][:] = 255
    masks.append(np.full(SIZE, count - 1, np.uint8))
    table = table_of(count)
    write_filtered(tmp_path, masks, table, random)
    # None of class 1; the sums of the others are exact, so that no order is decided by rounding.
    losses = {index: None if index == 1 else int(random.integers(1, 64)) / 64 for index in range(count)}
    classes = {f"class {index}": {"mean": loss, "pixels": 9} for index, loss in losses.items()}
    (tmp_path / "filtered/hardness.json").write_text(json.dumps({"fingerprint": {}, "classes": classes}))
    flags = ["--policy", policy, "--valid-ratio", 0.5, "--rare", f"class {count - 1}", "--seed", 7]
    expected = slow_choice(tmp_path, policy, {count - 1}, losses)
    assert not [name for name in expected if name.startswith("2_")] and 6 < len(expected) < 24
    folders = ["--syn-img-path", tmp_path / "img", "--syn-mask-path", tmp_path / "label"]
    for out, more in (("records", []), ("files", folders)):
        run(tmp_path, *flags, *more, out=out)
        assert sorted(path.name for path in (tmp_path / out / "images").iterdir()) == expected


def test_an_unfinished_filter_is_refused(filtered):
    path = filtered / "filtered/filter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pictures": 13}))
    with pytest.raises(UserError, match=r"not finished \(12 of 13 images are judged\)"):
        run(filtered, "--rare", "none")
    failure = {"image": "9_seed_0.png", "mask": "9.png", "reason": "damaged"}
    (filtered / "filtered/failures.jsonl").write_text(json.dumps(failure) + "\n")
    assert run(filtered, "--rare", "none") == 0


def test_the_script_passes_names_with_spaces_on(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\ncase $1 in -m) printf "%s\\n" "$@" ;; esac\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stand_in), "RARE": "agriculture construction, *,grass"}
    command = ["sh", ROOT / "resample.sh", "--policy", "rule"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[words.index("--policy") :] == ["--policy", "rule", "--rare", "agriculture construction", " *", "grass"]


def run(root, *flags, out="out"):
    return main(["--filtered-mask-path", str(root / "filtered"), "--out-dir", str(root / out), *map(str, flags)])


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_is_a_training_set_and_is_the_same_every_time(filtered):
    assert run(filtered, "--rare", "class 4", "--valid-ratio", "0.6") == 0
    out = filtered / "out"
    pairs = list_pairs(table_of(COUNT), manifest=out / "train_set_items.json", data_root=out)
    assert 2 < len(pairs) < 12
    for image, mask in [(pair.image, pair.mask) for pair in pairs]:
        assert image.read_bytes() == (filtered / "img" / image.name).read_bytes()
        assert mask.read_bytes() == (filtered / "filtered" / mask.name).read_bytes()
        assert os.stat(image).st_ino == os.stat(filtered / "img" / image.name).st_ino
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pictures"] == {"painted": 12, "filtered": 12, "resampled": len(pairs)}
    shown = summary["classes"]["class 4"]
    kept = [np.asarray(Image.open(pair.mask)) for pair in pairs]
    assert shown["resampled"]["pixels"] == sum((mask == 4).sum() for mask in kept)
    assert shown["resampled"]["pictures"] == sum((mask == 4).any() for mask in kept)
    assert shown["painted"]["pixels"] == 4 * sum(
        (np.asarray(Image.open(path)) == 4).sum() for path in (filtered / "label").iterdir()
    )
    assert Image.open(out / "summary.png").size[1] > 40 * COUNT
    before = files_of(out)
    assert run(filtered, "--rare", "class 4", "--valid-ratio", "0.6") == 0
    assert files_of(out) == before
    assert run(filtered, "--rare", "class 4", "--valid-ratio", "0.6", out="other") == 0
    assert files_of(filtered / "other") == before


def test_masks_that_filter_did_not_report_on_give_the_same_choice(filtered):
    flags = ("--rare", "class 4", "--valid-ratio", "0.6")
    run(filtered, *flags)
    (filtered / "filtered/items.jsonl").unlink()
    with pytest.raises(UserError, match="no items.jsonl"):
        run(filtered, *flags, out="other")
    folders = ("--syn-img-path", filtered / "img", "--syn-mask-path", filtered / "label")
    run(filtered, *flags, *folders, out="other")
    assert (filtered / "other/train_set_items.json").read_text() == (filtered / "out/train_set_items.json").read_text()
    (filtered / "filtered/filter.json").unlink()
    with pytest.raises(UserError, match="no filter.json"):
        run(filtered, *flags, *folders, out="third")


def test_another_choice_or_other_files_in_the_folder_are_not_replaced(filtered):
    run(filtered, "--rare", "none", "--valid-ratio", "0.5")
    before = files_of(filtered / "out")
    with pytest.raises(FileExistsError, match=r"valid_ratio was 0\.5, is 0\.1"):
        run(filtered, "--rare", "none", "--valid-ratio", "0.1")
    assert files_of(filtered / "out") == before
    run(filtered, "--rare", "none", "--valid-ratio", "0.1", "--overwrite")
    assert len(files_of(filtered / "out")) > len(before)
    (filtered / "out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        run(filtered, "--rare", "none", "--valid-ratio", "0.1", "--overwrite")
    assert (filtered / "out/notes.txt").read_text() == "mine"


def test_a_failed_layout_leaves_the_old_one(filtered, monkeypatch):
    run(filtered, "--rare", "none", "--valid-ratio", "0.5")
    before = files_of(filtered / "out")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("post_processing.resample.draw_balance", full)
    with pytest.raises(OSError, match="No space left"):
        run(filtered, "--rare", "none", "--valid-ratio", "0.1", "--overwrite")
    assert files_of(filtered / "out") == before
    assert not [path for path in filtered.iterdir() if path.name.startswith(".")]


def test_images_are_copied_where_links_are_not_possible(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"content")

    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"
    assert os.stat(tmp_path / "a").st_ino != os.stat(tmp_path / "b").st_ino


def test_rare_classes_are_those_of_lowest_iou(filtered, capsys):
    iou = {"class 0": 50.0, "class 1": 20.0, "class 2": None, "class 3": 10.0, "class 4": 60.0}
    for place, content in enumerate((iou, {"IoU": iou}, {"real": {"mIoU": 35.0, "IoU": iou}})):
        (filtered / "iou.json").write_text(json.dumps(content))
        run(filtered, "--iou", filtered / "iou.json", "--num-rare", 2, out=f"out{place}")
        settings = json.loads((filtered / f"out{place}/resample.json").read_text())["settings"]
        assert settings["rare"] == ["class 1", "class 3"]
    (filtered / "iou.json").write_text(json.dumps({"mIoU": 3}))
    run(filtered, "--rare", "class 3", " class 1", out="named")
    assert json.loads((filtered / "named/resample.json").read_text())["settings"]["rare"] == ["class 1", "class 3"]
    for flags, text in ((["--iou", filtered / "iou.json"], "no IoU of every class"), ([], "needs the IoU"),
                        (["--rare", "class5"], "Did you mean class"), (["--segmentor", "a", "b"], "needs real pairs"),
                        (["--rare", "none", "--valid-ratio", "1"], "none of 12 images"),
                        (["--max-per-mask", "0"], "at least 1"),
                        (["--valid-ratio", "80"], "between 0 and 1")):  # fmt: skip
        with pytest.raises((UserError, SystemExit)) as error:
            run(filtered, *flags)
        assert text in str(error.value) + capsys.readouterr().err
    assert not (filtered / "out").exists()


def test_iou_is_measured_by_mmsegs_metric(filtered, monkeypatch):
    pytest.importorskip("mmseg")
    from mmseg.evaluation.metrics import IoUMetric

    from post_processing.segmentation.segmentor import load_segmentor

    segmentor = make_segmentor(filtered / "segmentor", table_of(COUNT))
    rows = [{"source": f"label/{number}.png", "target": f"img/{number}_seed_0.png"} for number in range(3)]
    (filtered / "val.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--segmentor", *segmentor, "--iou_txt_file", filtered / "val.json", "--num-rare", 1, "--device", "cpu")
    run(filtered, *flags)
    import torch

    loaded = load_segmentor(*segmentor)
    images = np.stack([np.asarray(Image.open(filtered / row["target"])) for row in rows])
    masks = np.stack([np.asarray(Image.open(filtered / row["source"])) for row in rows])
    prediction = loaded.predict(torch.from_numpy(images).permute(0, 3, 1, 2))
    intersection, union, *_ = IoUMetric.intersect_and_union(prediction, torch.from_numpy(masks), COUNT, 255)
    worst = int((intersection / union).argmin())
    settings = json.loads((filtered / "out/resample.json").read_text())["settings"]
    assert settings["rare"] == [f"class {worst}"]

    def predict_one(segmentor, images):
        if len(images) > 1:
            raise torch.cuda.OutOfMemoryError("too many images")
        return predict(segmentor, images)

    predict = type(loaded).predict
    monkeypatch.setattr(type(loaded), "predict", predict_one)
    run(filtered, *flags, out="halves")
    assert json.loads((filtered / "halves/resample.json").read_text())["settings"] == settings


def test_hardness_of_other_classes_is_refused(filtered):
    (filtered / "filtered/hardness.json").write_text(
        json.dumps({"fingerprint": {}, "classes": {"a": {"mean": 1.0, "pixels": 3}}})
    )
    with pytest.raises(UserError, match="of classes a. Expected class 0"):
        run(filtered, "--policy", "hardness")
    classes = {f"class {index}": {"mean": 0.5 * index, "pixels": 3} for index in range(COUNT)}
    (filtered / "filtered/hardness.json").write_text(json.dumps({"fingerprint": {}, "classes": classes}))
    run(filtered, "--policy", "hardness")
    names = [json.loads(line)["target"] for line in (filtered / "out/train_set_items.json").read_text().splitlines()]
    assert sorted(sum(f"images/{mask}_" in name for name in names) for mask in range(3)) == [2, 4, 4]


def test_images_that_went_missing_are_named(filtered):
    (filtered / "img/1_seed_2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files of 12 images.*1_seed_2\.png"):
        run(filtered, "--rare", "none")
