import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segmentors import ColourModel, colour_segmentor, make_segmentor, table_of
from torch.nn import functional as F

from ldm.data.classes import read_mask
from ldm.data.images import Pair
from ldm.files import append_lines, file_identity, read_lines
from ldm.run_folder import RunFolder
from ldm.util import UserError, run_entry_point
from post_processing.filter import main
from post_processing.segmentation.loading import find_generated
from post_processing.segmentation.segmentor import Segmentor
from post_processing.selection.hardness import fingerprint_of, get_hardness, measure_hardness, pixel_loss
from post_processing.selection.rules import PixelFilter, encode_mask, judge_batch

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((12, 16), (16, 16), (8, 20))


def make_images(folder, count, classes, seed, name="{}", absent=()):
    """Images and masks of mixed sizes in folder/img and folder/label; the third mask is ignored everywhere."""
    random = np.random.default_rng(seed)
    items = []
    for part in ("img", "label"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        mask = random.integers(0, classes, size).astype(np.uint8)
        mask[np.isin(mask, absent)] = 255
        mask[:2] = 255
        if number == 2:
            mask[:] = 255
        image, label = folder / f"img/{name.format(number)}.png", folder / f"label/{number}.png"
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(image)
        Image.fromarray(mask).save(label)
        items.append(Pair(image, label))
    return items


def slow_losses(segmentor, item):
    """Loss of every pixel, one at a time in double precision: (H, W), and the mask."""
    image = np.asarray(Image.open(item.image))
    mask = np.asarray(Image.open(item.mask))
    logits = segmentor.logits(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])[0].double().numpy()
    loss = np.zeros(mask.shape)
    for y, x in np.ndindex(mask.shape):
        if mask[y, x] != 255:
            loss[y, x] = np.log(np.exp(logits[:, y, x]).sum()) - logits[mask[y, x], y, x]
    return loss, mask


def upstream_filter(segmentor, real, synthesized, margin):
    """What the filter of TISynth does: class loops over float32 losses; a class without real pixels has mean 0."""
    count = segmentor.class_table.num_classes
    sums, pixels = [0.0] * count, [0.0] * count

    def losses(item):
        image = torch.from_numpy(np.array(Image.open(item.image))).permute(2, 0, 1)[None]
        mask = torch.from_numpy(np.array(Image.open(item.mask))).long()[None]
        return F.cross_entropy(segmentor.logits(image), mask, ignore_index=255, reduction="none"), mask

    for item in real:
        loss, mask = losses(item)
        for index in range(count):
            sums[index] += loss[mask == index].sum().item()
            pixels[index] += (mask == index).sum().item()
    means = [sums[index] / (pixels[index] + 1e-5) for index in range(count)]
    results = []
    for item in synthesized:
        loss, mask = losses(item)
        for index in range(count):
            mask[(mask == index) & (loss > margin * means[index])] = 255
        results.append(mask[0].to(torch.uint8).numpy())
    return results


@pytest.mark.parametrize("count", [2, 7, 24, 150])
def test_masks_equal_a_slow_reimplementation_and_upstream(tmp_path, count):
    segmentor = colour_segmentor(count)
    absent = [count - 1]
    real = make_images(tmp_path / "real", 7, count, 0, absent=absent)
    synthesized = make_images(tmp_path / "syn", 8, count, 1, "{}_seed_5")
    hardness = measure_hardness({}, segmentor, real, batch_size=2, workers=2)
    sums, pixels = np.zeros(count), np.zeros(count, int)
    for item in real:
        loss, mask = slow_losses(segmentor, item)
        for index in range(count):
            sums[index] += loss[mask == index].sum()
            pixels[index] += (mask == index).sum()
    assert hardness.pixels.tolist() == pixels.tolist()
    missing = {index for index in range(count) if not pixels[index]}
    assert {*absent} <= missing == set(np.flatnonzero(np.isnan(hardness.mean)))
    known = pixels > 0
    np.testing.assert_allclose(hardness.mean[known], sums[known] / pixels[known], rtol=1e-6)

    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    pixel_filter = PixelFilter(hardness.limits(1.25), segmentor.class_table, out, 3, 2)
    assert pixel_filter.run(segmentor, out / "work", synthesized) == []
    records = read_lines(out / "items.jsonl", "image")
    upstream = upstream_filter(segmentor, real, synthesized, 1.25)
    dropped = 0
    for item, theirs in zip(synthesized, upstream, strict=True):
        loss, mask = slow_losses(segmentor, item)
        expected = mask.copy()
        for y, x in np.ndindex(mask.shape):
            index = mask[y, x]
            if index != 255 and index not in missing:
                limit = 1.25 * sums[index] / pixels[index]
                assert abs(loss[y, x] - limit) > 1e-5  # not decided by rounding
                if loss[y, x] > limit:
                    expected[y, x] = 255
        ours = np.asarray(Image.open(out / f"{item.image.stem}.png"))
        np.testing.assert_array_equal(ours, expected)
        left_alone = np.isin(mask, list(missing))
        np.testing.assert_array_equal(ours[~left_alone], theirs[~left_alone])
        assert (theirs[left_alone] == 255).all()  # which upstream erases
        record = records[item.image.name]
        for index in np.unique(mask[mask != 255]):
            own = mask == index
            assert record["classes"][f"class {index}"] == [own.sum(), (own & (expected == 255)).sum()]
        dropped += ((expected == 255) & (mask != 255)).sum()
    assert dropped > 50
    assert records["2_seed_5.png"]["classes"] == {}  # ignored everywhere


def test_loss_of_a_sigmoid_head_is_binary_cross_entropy():
    segmentor, mask = Segmentor(ColourModel(2, channels=1), table_of(2)), torch.randint(0, 2, (2, 4, 5))
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    score = segmentor.model.inference(images.flip(1).float() / 128 - 1, [])
    expected = F.binary_cross_entropy_with_logits(score[:, 0], mask.float(), reduction="none")
    torch.testing.assert_close(pixel_loss(segmentor.logits(images), mask), expected)


@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_a_sigmoid_head_predicts_at_its_own_threshold(threshold):
    segmentors = pytest.importorskip("mmseg.models.segmentors")
    model = ColourModel(2, channels=1)
    model.decode_head.threshold, model.decode_head.out_channels, model.align_corners = threshold, 1, False
    segmentor = Segmentor(model, table_of(2))
    images = torch.randint(0, 256, (2, 3, 9, 11), dtype=torch.uint8)
    found = segmentors.EncoderDecoder.postprocess_result(model, segmentor.logits(images)[:, 1:])
    expected = torch.stack([one.pred_sem_seg.data[0] for one in found])
    assert torch.equal(segmentor.predict(images), expected.to(torch.uint8)) and 0 < expected.mean() < 1
    assert not torch.equal(expected, (segmentor.logits(images)[:, 1] > 0).float())


class SmallMemory(Segmentor):
    """Has memory for `room` images at once."""

    room = 2

    def logits(self, images):
        if len(images) > self.room:
            raise torch.cuda.OutOfMemoryError("too many images")
        return super().logits(images)


def test_where_memory_ends_the_batch_is_halved(tmp_path):
    real = [item for item in make_images(tmp_path, 21, 4, 0) if int(item.image.stem) % 3 == 0]  # seven of one size
    whole, small = colour_segmentor(4), SmallMemory(ColourModel(4), table_of(4))
    expected, found = (measure_hardness({}, segmentor, real, 7, 1) for segmentor in (whole, small))
    assert found.pixels.tolist() == expected.pixels.tolist()
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6)  # float32 of other batch sizes
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    masks = torch.randint(0, 4, (5, 8, 8), dtype=torch.uint8)
    limits = expected.limits(1.25)
    for one, other in zip(*(judge_batch(s, images, masks, limits) for s in (whole, small)), strict=True):
        np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=1e-6)
    small.room = 0
    with pytest.raises(UserError, match="not even one image fits"):
        measure_hardness({}, small, real, 7, 1)


@pytest.mark.parametrize("size", [(7, 5), (130, 200), (3, 9000)])
def test_loss_in_strips_is_that_of_torch_to_the_last_bit(size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 40, *size, generator=generator) * 5
    mask = torch.randint(0, 40, (2, *size), generator=generator)
    mask[:, 1] = 255
    assert torch.equal(pixel_loss(logits, mask), F.cross_entropy(logits, mask, ignore_index=255, reduction="none"))


@pytest.mark.parametrize("align_corners", [False, True])
def test_loss_is_that_of_the_head_at_the_size_of_the_mask(tmp_path, align_corners):
    pytest.importorskip("mmseg")
    from post_processing.segmentation.segmentor import load_segmentor

    segmentor = load_segmentor(*make_segmentor(tmp_path, table_of(5), align_corners))
    images = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8)
    mask = torch.randint(0, 5, (2, 24, 32))
    mask[:, :3] = 255
    with torch.no_grad():
        small = segmentor.model.decode_head(segmentor.model.extract_feat((images.float() - 120) / 60))
        logits = F.interpolate(small, (24, 32), mode="bilinear", align_corners=align_corners)
        expected = F.cross_entropy(logits, mask, ignore_index=255, reduction="none")
    assert small.shape[-1] < 32
    torch.testing.assert_close(pixel_loss(segmentor.logits(images), mask), expected)


@pytest.mark.parametrize("form", ["8 bit", "16 bit", "palette", "colours", "moved", "one bit"])
def test_filtered_masks_are_read_by_the_table_of_their_source(tmp_path, form):
    ids = np.random.default_rng(0).integers(0, 2, (9, 7)).astype(np.uint8)
    source_ids = {"16 bit": {300: 0, 7: 1, 0: 255}, "moved": {0: 0, 255: 1, 3: 255}}.get(form)
    table = table_of(2, source_ids=source_ids) if source_ids else table_of(2)
    raw = {"16 bit": np.array([300, 7], np.uint16)[ids], "moved": np.array([0, 255], np.uint8)[ids],
           "colours": table.colourise(ids)}.get(form, ids)  # fmt: skip
    image = Image.fromarray(raw)
    if form == "palette":
        image.putpalette([1, 2, 3, 4, 5, 6])
    elif form == "one bit":
        image = Image.fromarray(ids * 255).convert("1")
    image.save(tmp_path / "a.png")
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(tmp_path / "b.png")
    from post_processing.segmentation.loading import load_pair

    loaded = load_pair(Pair(tmp_path / "b.png", tmp_path / "a.png"), table)
    is_dropped = np.random.default_rng(1).random(ids.shape) < 0.4
    (tmp_path / "c.png").write_bytes(encode_mask(loaded.raw, is_dropped, table))
    np.testing.assert_array_equal(read_mask(tmp_path / "c.png", table), np.where(is_dropped, 255, ids))


def test_a_table_without_a_number_for_ignored_pixels_is_an_error():
    table = table_of(2, source_ids={0: 0, 255: 1})
    with pytest.raises(UserError, match="Expected one for ignored pixels"):
        encode_mask(np.zeros((2, 2), np.uint8), np.ones((2, 2), bool), table)


def test_only_the_last_seed_is_no_part_of_the_masks_name(tmp_path):
    for part, names in (("img", ["a_seed_1.png", "a_seed_1_seed_22.jpg", "b.png", "c_seed_x.png", "d_seed_3.png"]),
                        ("label", ["a.png", "a_seed_1.png", "b.png", "c_seed_x.png"])):  # fmt: skip
        (tmp_path / part).mkdir()
        for name in names:
            (tmp_path / part / name).touch()
    found = {item.image.name: item.mask.name for item in find_generated(tmp_path / "img", tmp_path / "label")}
    assert found == {"a_seed_1.png": "a.png", "a_seed_1_seed_22.jpg": "a_seed_1.png", "b.png": "b.png",
                     "c_seed_x.png": "c_seed_x.png", "d_seed_3.png": "d.png"}  # fmt: skip
    with pytest.raises(FileNotFoundError, match="none of the 5 images"):
        find_generated(tmp_path / "img", tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import post_processing.selection.rules as filtering
from post_processing.segmentation.loading import find_generated
from segmentors import colour_segmentor

folder, out, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
write, count = filtering.atomic_write, 0

def write_or_die(path, content, temporary, is_synced):
    global count
    count += 1
    if count == last:
        temporary.write_bytes(content[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content, temporary, is_synced)

filtering.atomic_write = write_or_die
segmentor = colour_segmentor(4)
(out / ".shard-0-of-1.partial").mkdir(parents=True)
limits = torch.full((256,), 1.0)
pairs = find_generated(folder / "img", folder / "label")
filtering.PixelFilter(limits, segmentor.class_table, out, 2, 1).run(segmentor, out / ".shard-0-of-1.partial", pairs)
"""


def test_a_killed_filter_leaves_whole_masks_and_goes_on(tmp_path):
    from post_processing.selection.rules import is_finished

    items = make_images(tmp_path / "syn", 9, 4, 1, "{}_seed_5")
    segmentor, limits = colour_segmentor(4), torch.full((256,), 1.0)

    def run(out, todo):
        out.mkdir(exist_ok=True)
        folder = RunFolder(out)
        with folder.claim(".shard-0-of-1"):
            work = folder.work(".shard-0-of-1")
            PixelFilter(limits, segmentor.class_table, out, 2, 1).run(segmentor, work, todo)

    run(tmp_path / "whole", items)
    out = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "syn", out, "8"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": "tests"},
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    written = sorted(path.name for path in out.glob("*.png"))
    assert len(written) == 7
    for name in written:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    records = read_lines(out / "items.jsonl", "image")
    (out / next(iter(records.values()))["file"]).write_bytes(b"damaged afterwards")
    todo = [item for item in items if not is_finished(records.get(item.image.name, {}), item, out)]
    assert 9 - len(records) + 1 == len(todo) < 9
    run(out, todo)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for path in (tmp_path / "whole").glob("*.png"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert read_lines(out / "items.jsonl", "image") == read_lines(tmp_path / "whole/items.jsonl", "image")


SIGNALLED = """
import os, signal, sys
import post_processing.filter as entry
import post_processing.selection.rules as filtering
from segmentors import colour_segmentor

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started all this with it ignored
number, last, *flags = sys.argv[1:]
write, count = filtering.atomic_write, 0

def write_and_signal(*args, **options):
    global count
    count += 1
    if count == int(last):
        os.kill(os.getpid(), int(number))
    write(*args, **options)

filtering.atomic_write = write_and_signal
entry.load_segmentor, entry.fingerprint_of = (lambda *args: colour_segmentor(4)), (lambda *args: {})
sys.exit(entry.main(flags))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_the_command_goes_on_after_a_signal_and_ends_with_the_same_files(tmp_path, colours, number, code):
    make_images(tmp_path / "real", 4, 4, 0)
    make_images(tmp_path / "syn", 9, 4, 1, "{}_seed_5")
    (tmp_path / "syn/label/7.png").unlink()
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(int(number)), "6", *flags(tmp_path, tmp_path / "out", tmp_path / "syn")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "tests"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) < 8 and not (tmp_path / "out/report.json").exists()
    for name in ("out", "whole"):
        assert main(flags(tmp_path, tmp_path / name, tmp_path / "syn")) == 3
    out, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    means = [json.loads(files.pop("hardness.json"))["classes"] for files in (out, whole)]
    for name, one in means[0].items():  # of two processes, whose numbers of threads may differ
        assert one == pytest.approx(means[1][name], rel=1e-6)
    assert out == whole
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_ray_actors_make_the_same_masks(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from post_processing.filter import build_parser, filter_on_ray

    args = build_parser().parse_args([*flags(tmp_path, tmp_path, tmp_path), "--batch_size", "1", "--ray_workers", "2"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    items = make_images(tmp_path / "syn", 20, 4, 1, "{}_seed_5")
    (tmp_path / "syn/label/7.png").unlink()

    failures = []
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
        with RunFolder(tmp_path / name).claim("part"):
            work = tmp_path / name / "part.partial"
            (work / "own").mkdir()
            pixel_filter = PixelFilter(torch.full((256,), 1.0), table_of(4), tmp_path / name, 2, 1)
            failures.append(
                filter_on_ray(args, pixel_filter, lambda: colour_segmentor(4), work, items) if name == "ray"
                else pixel_filter.run(colour_segmentor(4), work / "own", items))  # fmt: skip
    assert failures[0] == failures[1] and len(failures[0]) == 1
    assert contents(tmp_path / "ray").keys() == contents(tmp_path / "local").keys()
    assert read_lines(tmp_path / "ray/items.jsonl", "image") == read_lines(tmp_path / "local/items.jsonl", "image")


def test_a_cut_off_line_is_dropped_and_the_next_one_is_not(tmp_path):
    path = tmp_path / "items.jsonl"
    append_lines(path, [{"image": "a"}])
    with path.open("a") as file:
        file.write('{"image": "b", "mas')
    append_lines(path, [{"image": "c"}])
    assert list(read_lines(path, "image")) == ["a", "c"]


def test_hardness_is_measured_once_for_the_same_inputs(tmp_path, monkeypatch):
    real = make_images(tmp_path / "real", 4, 3, 0)
    segmentor, path = colour_segmentor(3), tmp_path / "hardness.json"
    first = get_hardness(path, {"real": 1}, [(segmentor, real)], 2, 1)
    calls = []
    monkeypatch.setattr("post_processing.selection.hardness.measure_hardness",
                        lambda *args: calls.append(args) or first)
    again = get_hardness(path, {"real": 1}, [(segmentor, real)], 2, 1)
    assert not calls and again.mean.tolist() == first.mean.tolist() and again.pixels.tolist() == first.pixels.tolist()
    get_hardness(path, {"real": 2}, [(segmentor, real)], 2, 1)
    assert len(calls) == 1
    path.write_text("{}")
    with pytest.raises(UserError, match="not a hardness file"):
        get_hardness(path, {"real": 1}, [(segmentor, real)], 2, 1)


def test_hardness_of_folds_is_that_of_all_their_pixels(tmp_path):
    parts = [(colour_segmentor(3), make_images(tmp_path / f"fold{n}", 4 + n, 3, n, absent=[n])) for n in range(2)]
    pooled = get_hardness(tmp_path / "hardness.json", {}, iter(parts), 2, 1)
    sums, pixels = np.zeros(3), np.zeros(3)
    for segmentor, items in parts:
        for item in items:
            loss, mask = slow_losses(segmentor, item)
            for number in range(3):
                sums[number] += loss[mask == number].sum()
                pixels[number] += (mask == number).sum()
    assert pooled.pixels.tolist() == pixels.tolist()
    np.testing.assert_allclose(pooled.mean, sums / pixels, rtol=1e-5)


def test_fingerprint_follows_masks_weights_and_class_table(tmp_path):
    pytest.importorskip("mmseg")
    config, checkpoint = make_segmentor(tmp_path / "segmentor", table_of(3))
    real = make_images(tmp_path / "real", 2, 3, 0)
    first = fingerprint_of(config, checkpoint, table_of(3), real)
    assert fingerprint_of(config, checkpoint, table_of(3), real[::-1]) == first

    def changes(table=None):
        new = fingerprint_of(config, checkpoint, table or table_of(3), real)
        return {key for key in first if new[key] != first[key]}

    assert changes(table_of(3, source_ids={0: 0, 1: 1, 2: 2, 7: 255})) == {"class_table_sha256"}
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["decode_head.conv_seg.bias"][1] += 1e-3
    torch.save(content, checkpoint)
    assert changes() == {"segmentor_sha256"}
    mask = np.array(Image.open(real[1].mask))
    mask[5, 5] = (mask[5, 5] + 1) % 3
    Image.fromarray(mask).save(real[1].mask)
    assert changes() == {"segmentor_sha256", "real_pairs_sha256"}


def test_identity_sees_every_byte_but_the_middle_of_large_compressed_images(tmp_path, monkeypatch):
    def is_seen(name):
        content = bytearray(np.random.default_rng(0).bytes(100_000))
        (tmp_path / name).write_bytes(content)
        before = file_identity(tmp_path / name)
        content[50_000] ^= 1
        (tmp_path / name).write_bytes(content)
        return file_identity(tmp_path / name) != before

    assert is_seen("a.png") and is_seen("a.JPG") and is_seen("a.tif")
    monkeypatch.setattr("ldm.files.WHOLE_BYTES", 90_000)
    assert is_seen("b.tif") and is_seen("b.json") and not is_seen("b.png") and not is_seen("b.JPG")


def test_real_pairs_that_cannot_be_read_are_all_named(tmp_path):
    real = make_images(tmp_path, 4, 3, 0)
    (tmp_path / "img/1.png").write_bytes((tmp_path / "img/1.png").read_bytes()[:100])
    (tmp_path / "label/3.png").unlink()
    with pytest.raises(UserError, match=r"2 of 4 pairs.*img/1\.png.*label/3\.png"):
        measure_hardness({}, colour_segmentor(3), real, 2, 1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A real mmseg segmentor with random weights, real pairs and synthesized images."""
    pytest.importorskip("mmseg")
    root = tmp_path_factory.mktemp("filter")
    make_segmentor(root / "segmentor", table_of(5))
    make_images(root / "real", 6, 5, 0, absent=[4])
    return root


@pytest.fixture
def colours(monkeypatch):
    """The command line with a segmentor that needs no mmseg."""
    monkeypatch.setattr("post_processing.filter.load_segmentor", lambda *args: colour_segmentor(4))
    monkeypatch.setattr("post_processing.filter.fingerprint_of", lambda *args: {})


def flags(root, out, syn, *extra):
    arguments = [root / "segmentor/config.json", root / "segmentor/segmentor.pth", "--real-img-path", root / "real/img",
                 "--real-label-path", root / "real/label", "--syn-img-path", syn / "img", "--syn-mask-path",
                 syn / "label", "--filtered-mask-path", out, "--device", "cpu", "--batch_size", 2, *extra]  # fmt: skip
    return [str(argument) for argument in arguments]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_command_line_shards_and_settings(workspace, tmp_path):
    make_images(tmp_path, 8, 5, 1, "{}_seed_7")
    out = tmp_path / "out"
    assert main(flags(workspace, out, tmp_path, "--overlays", "2")) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["pictures"] == 8 and report["classes"]["class 4"]["mean_loss"] is None
    assert report["classes"]["class 4"]["dropped"] == 0 < report["classes"]["class 0"]["dropped"]
    assert "| class 4 | 0 | none | left alone |" in (out / "report.md").read_text()
    assert sorted(path.name for path in (out / "overlays").iterdir()) == ["0_seed_7.png", "1_seed_7.png"]
    before, times = contents(out), {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert main(flags(workspace, out, tmp_path)) == 0
    assert contents(out) == before and all(path.stat().st_mtime_ns == time for path, time in times.items())
    with pytest.raises(FileExistsError, match=r"tolerance_margin was 1\.25, is 1\.5"):
        main(flags(workspace, out, tmp_path, "--tolerance-margin", "1.5"))
    for number in range(2):
        shared = flags(workspace, tmp_path / "shards", tmp_path, "--shard", f"{number}/2")
        assert main(shared) == 0
    assert contents(tmp_path / "shards") == before
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(tmp_path / "img/0_seed_7.png")  # generated again
    assert main(flags(workspace, out, tmp_path)) == 0
    after = contents(out)
    assert {name for name in before if after[name] != before[name] and name.endswith(".png")} == {"0_seed_7.png"}


def test_hardness_in_the_folder_is_used_again(workspace, tmp_path, monkeypatch):
    make_images(tmp_path, 3, 5, 1, "{}_seed_7")
    assert main(flags(workspace, tmp_path / "out", tmp_path)) == 0
    before = contents(tmp_path / "out")

    def refuse(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr("post_processing.selection.hardness.measure_hardness", refuse)
    for path in (tmp_path / "out").glob("*.png"):
        path.unlink()
    assert main(flags(workspace, tmp_path / "out", tmp_path)) == 0
    assert contents(tmp_path / "out") == before
    with pytest.raises(AssertionError, match="measured again"):
        main(flags(workspace, tmp_path / "other", tmp_path))


def test_class_means_of_pairs_that_were_not_trained_on(workspace, tmp_path):
    """--hardness_txt_file and --fold take the place of the training pairs, which need not be named then."""
    make_images(tmp_path, 3, 5, 1, "{}_seed_7")
    make_images(tmp_path / "val", 5, 5, 9)
    rows = [{"source": f"val/label/{n}.png", "target": f"val/img/{n}.png"} for n in range(5)]
    for name, part in (("val", rows), ("a", rows[:2]), ("b", rows[2:])):
        (tmp_path / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    segmentor = [workspace / "segmentor/config.json", workspace / "segmentor/segmentor.pth"]
    own = [*segmentor, "--syn-img-path", tmp_path / "img", "--syn-mask-path", tmp_path / "label", "--device", "cpu",
           "--data_root", tmp_path]  # fmt: skip
    held_out = ["--hardness_txt_file", tmp_path / "val.json"]
    folds = [word for name in "ab" for word in ("--fold", *segmentor, tmp_path / f"{name}.json")]
    found = {}
    for name, extra in (("val", held_out), ("folds", folds)):
        assert main([str(word) for word in (*own, *extra, "--filtered-mask-path", tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name / "hardness.json").read_text())
    assert main(flags(workspace, tmp_path / "train", tmp_path)) == 0
    trained = json.loads((tmp_path / "train/hardness.json").read_text())
    assert found["val"]["classes"]["class 4"]["pixels"] > 0  # the training pairs have none of it
    assert found["val"]["classes"] != trained["classes"]
    for name, entry in found["val"]["classes"].items():  # one segmentor in both: the same pixels, the same means
        assert found["folds"]["classes"][name] == pytest.approx(entry, rel=1e-5)
    assert len(found["folds"]["fingerprint"]["folds"]) == 2
    with pytest.raises(UserError, match="expected one of the two. The class means"):
        main([str(word) for word in (*own, *held_out, *folds, "--filtered-mask-path", tmp_path / "both")])


def test_tables_with_numbers_of_their_own_on_disk_go_on_too(tmp_path, colours, monkeypatch):
    table = {"source_ids": {0: 0, 1: 1, 2: 2, 3: 3, 9: 255, 255: 255}}
    monkeypatch.setattr("post_processing.filter.load_segmentor", lambda *args: colour_segmentor(4, **table))
    make_images(tmp_path / "real", 3, 4, 0)
    make_images(tmp_path, 5, 4, 1, "{}_seed_7")
    for shard in ("0/2", "1/2", "0/1"):
        assert main(flags(tmp_path, tmp_path / "out", tmp_path, "--shard", shard)) == 0
    table["source_ids"] = {**table["source_ids"], 8: 255}
    with pytest.raises(FileExistsError, match="class_table.source_ids.8 was null, is 255"):
        main(flags(tmp_path, tmp_path / "out", tmp_path))


def test_images_that_left_the_run_leave_the_reports(tmp_path, colours):
    from post_processing.resample import main as resample

    make_images(tmp_path / "real", 3, 4, 0)
    make_images(tmp_path, 6, 4, 1, "{}_seed_7")
    out = tmp_path / "out"
    assert main(flags(tmp_path, out, tmp_path)) == 0
    (tmp_path / "img/4_seed_7.png").unlink()
    assert main(flags(tmp_path, out, tmp_path)) == 0
    assert "4_seed_7.png" not in read_lines(out / "items.jsonl", "image")
    assert json.loads((out / "report.json").read_text())["pictures"] == 5
    assert json.loads((out / "filter.json").read_text())["pictures"] == 5
    assert resample(["--filtered-mask-path", str(out), "--out-dir", str(tmp_path / "set"), "--rare", "none",
                     "--valid-ratio", "0"]) == 0  # fmt: skip


def test_faulty_images_are_set_aside_and_the_others_filtered(workspace, tmp_path):
    make_images(tmp_path, 8, 5, 1, "{}_seed_7")
    good = {path: path.read_bytes() for folder in ("img", "label") for path in (tmp_path / folder).iterdir()}
    image, label = tmp_path / "img", tmp_path / "label"
    (label / "0.png").unlink()
    (image / "1_seed_7.png").write_bytes(good[image / "1_seed_7.png"][:200])
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(label / "3.png")
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(label / "4.png")
    out = tmp_path / "out"
    assert main(flags(workspace, out, tmp_path)) == 3
    reasons = {name: record["reason"] for name, record in read_lines(out / "failures.jsonl", "image").items()}
    expected = {"0": "not found", "1": "not readable", "3": "Expected equal sizes", "4": "ids 77"}
    assert reasons.keys() == {f"{number}_seed_7.png" for number in expected}
    assert all(text in reasons[f"{number}_seed_7.png"] for number, text in expected.items())
    assert len(list(out.glob("*.png"))) == 4
    for path, content in good.items():
        path.write_bytes(content)
    assert main(flags(workspace, out, tmp_path)) == 0
    assert len(list(out.glob("*.png"))) == 8 and not (out / "failures.jsonl").exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_segmentors_that_do_not_fit_or_carry_code_stop_before_anything_is_written(workspace, tmp_path):
    make_images(tmp_path, 2, 5, 1, "{}_seed_7")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="trained on classes"):
        main(flags(workspace, out, tmp_path, "--classes", "mini"))
    nameless = torch.load(workspace / "segmentor/segmentor.pth", weights_only=True)["state_dict"]
    torch.save(nameless, tmp_path / "nameless.pth")
    arguments = flags(workspace, out, tmp_path, "--classes", "gid24")
    arguments[1] = str(tmp_path / "nameless.pth")
    with pytest.raises(ValueError, match=r"it has 5 classes\. Expected the 24"):
        main(arguments)
    torch.save({"state_dict": nameless, "meta": Payload(tmp_path / "ran")}, tmp_path / "payload.pth")
    arguments[1] = str(tmp_path / "payload.pth")
    with pytest.raises(ValueError, match="nothing was run"):
        main(arguments)
    assert not (tmp_path / "ran").exists() and not out.exists()


def test_a_run_of_inference_is_read_through_its_index(workspace, tmp_path):
    items = make_images(tmp_path, 2, 5, 1)
    (tmp_path / "run/images").mkdir(parents=True)
    rows = []
    for row, item in enumerate(items):
        image = Image.open(item.image).resize((24, 20))
        image.save(tmp_path / f"run/images/{row}_x_seed_{row}.png")
        rows.append({"row": row, "copy": 0, "seed": row, "image": f"images/{row}_x_seed_{row}.png",
                     "mask": f"label/{row}.png", "reference": None, "width": 24, "height": 20})  # fmt: skip
    (tmp_path / "run/index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"data_root": str(tmp_path), "class_table": table_of(5).to_dict(), "fingerprint": {"H": 20, "W": 24}}
    (tmp_path / "run/run.json").write_text(json.dumps(run))
    arguments = flags(workspace, tmp_path / "out", tmp_path)
    place = arguments.index("--syn-img-path")
    arguments[place : place + 4] = ["--run", str(tmp_path / "run"), "--tolerance-margin", "1e9"]
    assert main(arguments) == 0
    for row, item in enumerate(items):
        mask = Image.fromarray(read_mask(item.mask, table_of(5)))
        expected = np.asarray(mask.resize((24, 20), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out/{row}_x_seed_{row}.png")), expected)
    run["fingerprint"] = {"H": None, "W": None}  # generated at the size of the mask, which has changed since
    (tmp_path / "run/run.json").write_text(json.dumps(run))
    arguments[arguments.index("--filtered-mask-path") + 1] = str(tmp_path / "other")
    assert main(arguments) == 3
    (tmp_path / "label/0.png").unlink()
    (tmp_path / "label/1.png").unlink()
    with pytest.raises(FileNotFoundError, match="none of the masks"):
        main(arguments)


def test_a_full_disk_is_reported_and_nothing_is_lost(workspace, tmp_path, monkeypatch, capsys):
    make_images(tmp_path, 6, 5, 1, "{}_seed_7")
    from post_processing.selection import rules as filtering

    write = filtering.atomic_write

    def full(path, *others, **options):
        if path.name.startswith("3"):
            raise OSError(28, "No space left on device", str(path))
        write(path, *others, **options)

    monkeypatch.setattr(filtering, "atomic_write", full)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        run_entry_point(main, flags(workspace, out, tmp_path, "--num_workers", "1"))
    assert end.value.code == 4
    assert "No space left" in capsys.readouterr().err
    assert not (out / "3_seed_7.png").exists() and (out / "0_seed_7.png").exists()
    monkeypatch.undo()
    assert main(flags(workspace, out, tmp_path)) == 0
    assert len(list(out.glob("*.png"))) == 6 and not [path for path in out.iterdir() if path.name.startswith(".shard")]


@pytest.mark.parametrize("wrong", [["--shard", "2/2"], ["--batch_size", "0"], ["--tolerance-margin", "nan"],
                                   ["--run", "x"], ["--real_txt_file", "x"]])  # fmt: skip
def test_impossible_flags_are_refused(tmp_path, wrong, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        main(flags(tmp_path, tmp_path / "out", tmp_path, *wrong))
    assert wrong[0] in str(error.value) + capsys.readouterr().err
    assert not os.listdir(tmp_path)
