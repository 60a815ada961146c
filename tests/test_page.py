"""The page: what it generates is what inference.py generates, what is uploaded is checked, and a real browser on it."""

import json
import re
import shlex
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from painting import make_workspace, pixels, read_lines
from painting import run as run_inference
from PIL import Image

import inference
from demo.page.runs import find_folders, view_folder
from demo.page.session import Cancelled, Order, Studio, pack
from ldm.util import UserError, run_entry_point

gradio = pytest.importorskip("gradio", reason="the page's packages are not installed (requirements/page.txt)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZE = 32


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_workspace(tmp_path_factory.mktemp("page"))
    random = np.random.default_rng(3)
    for name in ("dune", "quay"):
        (root / "refs").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(root / f"refs/{name}.png")
    (root / "masks").mkdir()
    Image.fromarray(np.full((SIZE, SIZE), 1, np.uint8)).save(root / "masks/plain.png")
    return root


@pytest.fixture(scope="module")
def studio(workspace: Path) -> Studio:
    return Studio(str(workspace / "tiny.safetensors"), device="cpu")


@pytest.fixture(scope="module")
def runs(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run."""
    root = tmp_path_factory.mktemp("runs")
    assert run_inference(workspace, root / "mine") == 0
    return root


def make_order(**changes: object) -> Order:
    random = np.random.default_rng(1)
    mask = np.kron(random.integers(0, 5, (4, 4)), np.ones((8, 8), int)).astype(np.uint8)
    mask[:4] = 255
    references = [(name, random.integers(0, 256, (20, 24, 3), np.uint8)) for name in ("a", "b", "c")]
    order = {"mask": mask, "references": references, "prompt": "a satellite image of road", "seed": 5, "samples": 1,
             "flags": ["--mode", "exact", "--ddim_steps", "2", "--scale", "3"]}  # fmt: skip
    return Order(**{**order, **changes})


def repeat(folder: Path) -> dict[str, np.ndarray]:
    """Run the command of an unpacked job; its images by name."""
    note, line = (folder / "command.txt").read_text().splitlines()
    command = [word.replace("HERE", str(folder)) for word in shlex.split(line)]
    assert note.startswith("# In the repository") and command[:2] == ["python", "inference.py"]
    with pytest.raises(SystemExit) as stop:
        run_entry_point(inference.main, [*command[2:], "--device", "cpu"])
    assert stop.value.code == 0
    return pixels(folder / "again")


STRENGTH = ["--mode", "fast", "--ddim_steps", "4", "--scale", "2", "--strength", "0.5"]


@pytest.mark.parametrize("changes", [
    {}, {"samples": 2}, {"flags": [*make_order().flags, "--fixed_code"]},
    {"flags": STRENGTH, "start": np.full((SIZE, SIZE, 3), 90, np.uint8)},
])  # fmt: skip
def test_the_downloaded_manifest_gives_the_same_images(studio: Studio, tmp_path: Path, changes: dict):
    folder = tmp_path / "job"
    folder.mkdir()
    order, steps = make_order(**changes), []
    paths = list(studio.generate(order, folder, lambda done, all_steps: steps.append((done, all_steps))))
    assert len(paths) == 3 * order.samples and steps and all(done <= everything for done, everything in steps)
    with zipfile.ZipFile(pack(folder)) as archive:
        archive.extractall(tmp_path / "unpacked")
    again = repeat(tmp_path / "unpacked/job")
    records = {record["seed"]: record for record in read_lines(tmp_path / "unpacked/job/again/index.jsonl")}
    assert len(again) == len(paths)
    for path in paths:  # 00_seed_5.png
        record = records[int(path.stem.rpartition("_")[2])]
        assert record["row"] == int(path.stem[:2])
        assert (again[Path(record["image"]).name] == np.asarray(Image.open(path))).all()
    if "--fixed_code" not in order.flags:
        assert len({path.read_bytes() for path in paths}) == len(paths)


def test_a_guide_rectifies_as_inference_does(workspace: Path, tmp_path: Path):
    pytest.importorskip("mmseg", reason="the segmentors' packages are not installed (requirements/seg.txt)")
    from segmentors import make_segmentor

    from ldm.data.classes import ClassTable

    config, checkpoint = make_segmentor(tmp_path, ClassTable.load("mini"))
    guided = Studio(str(workspace / "tiny.safetensors"), device="cpu", guide=[str(config), str(checkpoint)])
    images = {}
    for scale in ("0", "0.4"):
        folder = tmp_path / scale
        folder.mkdir()
        rectify = ["--rectify_window", "0", "1", "--rectify_scale", scale, "--guide", *guided.guide_files]
        flags = make_order().flags + ([] if scale == "0" else rectify)
        paths = guided.generate(make_order(flags=flags), folder, lambda *_: None)
        images[scale] = sorted(np.asarray(Image.open(path)).tobytes() for path in paths)
    assert images["0"] != images["0.4"]
    assert sorted(values.tobytes() for values in repeat(tmp_path / "0.4").values()) == images["0.4"]


def test_orders_that_cannot_be_done_are_sentences(studio: Studio, tmp_path: Path):
    for number, (changes, said) in enumerate([
        ({"references": []}, "no reference"), ({"samples": 20}, "60 images|20 x 3"),
        ({"flags": STRENGTH}, "no image to start from"), ({"flags": ["--mode", "quick"]}, "quick"),
        ({"mask": np.zeros((30, 33), np.uint8)}, "30|33"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=said):
            list(studio.generate(make_order(**changes), folder, lambda *_: None))
        assert not (folder / "images").exists()


def test_a_cancelled_job_leaves_the_model_as_it_was(studio: Studio, tmp_path: Path):
    def stop_at_third(done: int, _: int) -> None:
        if done == 2:
            raise Cancelled

    for name in ("first", "stopped", "second"):
        (tmp_path / name).mkdir()
    first = list(studio.generate(make_order(), tmp_path / "first", lambda *_: None))
    with pytest.raises(Cancelled):
        list(studio.generate(make_order(), tmp_path / "stopped", stop_at_third))
    second = list(studio.generate(make_order(), tmp_path / "second", lambda *_: None))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_memory_that_ends_is_a_sentence(studio: Studio, tmp_path: Path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(studio.method, "sample", fail)
    with pytest.raises(UserError, match="not even one image fits"):
        list(studio.generate(make_order(), tmp_path, lambda *_: None))


def test_a_run_is_shown_with_masks_and_references(workspace: Path, tmp_path: Path):
    assert run_inference(workspace, tmp_path / "runs/mine") == 0
    folders = find_folders(tmp_path)
    assert list(folders) == ["runs/mine (generated)"]
    view = view_folder(folders["runs/mine (generated)"])
    assert "3 images" in view.text and len(view.images) == 3
    parts, caption = view.images[0]
    record = read_lines(tmp_path / "runs/mine/index.jsonl")[0]
    assert caption == f"mask_0, seed {record['seed']}" and parts.shape == (8, 24, 3)
    assert (parts[:, 8:16] == np.asarray(Image.open(tmp_path / "runs/mine" / record["image"]))).all()
    (tmp_path / "runs/mine" / record["image"]).unlink()
    with pytest.raises(UserError, match="cannot be shown"):
        view_folder(tmp_path / "runs/mine")


def test_what_the_filter_dropped_is_magenta(tmp_path: Path):
    from ldm.data.classes import ClassTable

    folder, table = tmp_path / "filtered", ClassTable.load("mini")
    (tmp_path / "images").mkdir()
    folder.mkdir()
    mask = np.ones((8, 8), np.uint8)
    kept = mask.copy()
    kept[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(kept).save(folder / "a_seed_1.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images/a_seed_1.png")
    settings = {"images": str(tmp_path / "images"), "class_table": table.to_dict()}
    (folder / "filter.json").write_text(json.dumps({"settings": settings, "pictures": 1}))
    (folder / "items.jsonl").write_text(json.dumps(
        {"image": "a_seed_1.png", "file": "a_seed_1.png", "mask": str(tmp_path / "mask.png"), "dropped": 0.5}) + "\n")
    (folder / "report.md").write_text("| all | 50% |")
    view = view_folder(find_folders(tmp_path)["filtered (filtered)"])
    (parts, caption), = view.images
    assert caption == "a_seed_1.png: 50% dropped" and view.text == "| all | 50% |"
    marked = parts[:, 16:]
    assert (marked[:, :4] == 0).all() and (marked[:, 4:] == (153, 0, 153)).all()


@pytest.fixture(scope="module")
def page(studio: Studio, workspace: Path, runs: Path):
    from demo.page.app import Page

    references = sorted((workspace / "refs").iterdir())
    shown = Page(studio, [workspace / "masks/plain.png"], references, runs, SIZE)
    served = shown.start("127.0.0.1", None)
    yield served.local_url
    shown.close(served)
    assert not shown.folder.exists()


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements/test.txt)")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with driver.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync"]  # fmt: skip
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, page: str):
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
    tab = context.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    answer = tab.goto(page)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    tab.wait_for_selector("#canvas .status:not(:empty)", timeout=60_000)
    yield tab
    context.close()
    hosts = {re.match(r"\w+://([^/:]*)", url)[1] for url in asked if url.startswith("http")}
    assert hosts == {"127.0.0.1"}, "the page asked another host"
    assert not errors


def prompt_of(tab) -> str:
    return tab.input_value("#prompt textarea")


def wait_for_prompt(tab, text: str) -> None:
    tab.wait_for_function("text => document.querySelector('#prompt textarea').value === text", arg=text)


def draw(tab, points: list[tuple[float, float]]) -> None:
    """A stroke through points in shares of the canvas."""
    box = tab.locator("#canvas .view").bounding_box()
    (x, y), *others = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    tab.mouse.move(x, y)
    tab.mouse.down()
    for x, y in others:
        tab.mouse.move(x, y, steps=5)
    tab.mouse.up()


def test_drawing_undo_fill_and_the_prompt_that_follows(tab):
    assert prompt_of(tab) == "a satellite image of land"
    tab.click("#canvas [data-class='2']")
    draw(tab, [(0.1, 0.5), (0.9, 0.5)])
    wait_for_prompt(tab, "a satellite image of land, road")
    tab.click("#canvas [data-class='4']")
    tab.click("#canvas [data-tool=fill]")
    draw(tab, [(0.5, 0.9)])
    wait_for_prompt(tab, "a satellite image of land, road, water")
    tab.click("#canvas [data-do=undo]")
    wait_for_prompt(tab, "a satellite image of land, road")
    tab.click("#canvas [data-do=redo]")
    wait_for_prompt(tab, "a satellite image of land, road, water")
    tab.focus("#canvas .view")
    tab.keyboard.press("Control+z")
    tab.keyboard.press("Control+z")
    wait_for_prompt(tab, "a satellite image of land")
    tab.click("#canvas [data-do=clear]")
    wait_for_prompt(tab, "a satellite image of water")
    tab.locator("#prompt textarea").press_sequentially("!")
    tab.click("#canvas [data-do=undo]")
    tab.wait_for_timeout(1000)
    assert prompt_of(tab) == "a satellite image of water!"


def test_generate_and_download_what_inference_repeats(tab, tmp_path: Path):
    tab.click("#canvas [data-class='3']")
    draw(tab, [(0.2, 0.2), (0.8, 0.8)])
    wait_for_prompt(tab, "a satellite image of land, vegetation")
    tab.fill("#seed input", "7")
    tab.click("#generate")
    tab.wait_for_function("document.querySelector('#status').innerText.includes('2 images in')", timeout=120_000)
    assert tab.locator("#gallery img").count() >= 2
    with tab.expect_download() as waiting:
        tab.click("#download a")
    waiting.value.save_as(tmp_path / "job.zip")
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        archive.extractall(tmp_path)
    folder, = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [row["prompt"] for row in read_lines(folder / "rows.json")] == ["a satellite image of land, vegetation"] * 2
    assert "--seed 7 " in (folder / "command.txt").read_text()
    shown = sorted(np.asarray(Image.open(path)).tobytes() for path in (folder / "images").iterdir())
    assert sorted(values.tobytes() for values in repeat(folder).values()) == shown


def test_cancel_ends_a_job_before_its_images(tab, studio: Studio, monkeypatch):
    prepare = type(studio.method).prepare

    def prepare_slowly(self, *args, **kwargs):
        predict = prepare(self, *args, **kwargs)
        return lambda *inputs: (time.sleep(0.5), predict(*inputs))[1]

    monkeypatch.setattr(type(studio.method), "prepare", prepare_slowly)
    begun = time.monotonic()
    tab.click("#generate")
    tab.wait_for_timeout(2500)
    tab.click("#cancel")
    said = "document.querySelector('#status').innerText.includes('Cancelled after 0 of 2')"
    tab.wait_for_function(said, timeout=20_000)
    assert time.monotonic() - begun < 10  # 20 steps would take it


def test_a_finished_run_can_be_looked_into(tab):
    tab.click("[role=tab]:visible >> text=Look into a run")
    tab.wait_for_function("document.querySelector('#run_text')?.innerText.includes('3 images')", timeout=20_000)
    assert tab.locator("#run_gallery img").count() >= 3


def test_an_emptied_prompt_is_worded_from_the_mask(tab, tmp_path: Path):
    tab.locator("#prompt textarea").fill("")
    tab.click("#generate")
    tab.wait_for_function("document.querySelector('#status').innerText.includes('2 images in')", timeout=120_000)
    with tab.expect_download() as waiting:
        tab.click("#download a")
    waiting.value.save_as(tmp_path / "job.zip")
    with zipfile.ZipFile(tmp_path / "job.zip") as archive:
        name, = [name for name in archive.namelist() if name.endswith("rows.json")]
        assert archive.read(name).decode().count('"a satellite image of land"') == 2


def test_uploads_are_read_or_named(tab, tmp_path: Path):
    Image.fromarray(np.full((SIZE, SIZE), 2, np.uint8)).save(tmp_path / "roads.png")
    tab.set_input_files("#mask_file input[type=file]", tmp_path / "roads.png")
    wait_for_prompt(tab, "a satellite image of road")
    tab.reload()
    tab.wait_for_selector("#canvas .status:not(:empty)")
    Image.fromarray(np.full((SIZE, SIZE), 77, np.uint8)).save(tmp_path / "strange.png")
    tab.set_input_files("#mask_file input[type=file]", tmp_path / "strange.png")
    toast = tab.wait_for_selector(".toast-body", timeout=20_000)
    said = toast.inner_text()
    assert "77" in said and "strange.png" in said and str(tmp_path) not in said

    tab.reload()
    tab.wait_for_selector("#canvas .status:not(:empty)")
    (tmp_path / "broken.png").write_bytes(b"this is no image")
    Image.fromarray(np.full((30, 20, 3), 200, np.uint8)).save(tmp_path / "mine.png")
    tab.set_input_files("#reference_files input[type=file]", [tmp_path / "broken.png", tmp_path / "mine.png"])
    toast = tab.wait_for_selector(".toast-body", timeout=20_000)
    assert "broken.png: not readable" in toast.inner_text()
    tab.wait_for_function("document.querySelectorAll('#picker button').length === 3")
    first = tab.locator("#picker button").first
    assert first.inner_text() == "mine" and first.get_attribute("aria-checked") == "true"
    first.click()
    tab.wait_for_function("document.querySelector('#picker button').getAttribute('aria-checked') === 'false'")
