"""Folders that revision 7fb62f5 wrote: today's code continues them, reads them, or refuses them with the remedy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from ldm.util import UserError
from post_processing.gain.stages import Stage, StageRunner, make_slots
from post_processing.run_index import read_run

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--ckpt", "model.safetensors", "--data_root", "pairs", "--txt_file", "pairs/rows.json", "--ddim_steps", "2",
         "--device", "cpu", "--outdir", "run"]  # fmt: skip
SEGMENTOR = ["segmentor/config.json", "segmentor/segmentor.pth"]
FILTER = [*SEGMENTOR, "--real_txt_file", "pairs/rows.json", "--run", "run", "--run_root", "pairs", "--device", "cpu",
          "--batch_size", "2", "--num_workers", "1", "--filtered-mask-path", "filtered"]  # fmt: skip
RESAMPLE = ["--filtered-mask-path", "filtered", "--syn-img-path", "run/images", "--out-dir", "resampled",
            "--rare", "none"]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old folders, which is the working directory."""
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "tests/data/old_folders", folder)
    monkeypatch.chdir(folder)
    return folder


def snapshot(*folders: str) -> dict[str, tuple[bytes, int]]:
    """Content and time of all files but locks."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for folder in folders
            for path in Path(folder).rglob("*") if path.is_file() and not path.name.endswith("lock")}  # fmt: skip


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_finished_run_has_nothing_to_do_and_is_read(capsys):
    before = snapshot("run")
    assert inference.main([*FLAGS, "--status"]) == 0 and "3 done" in capsys.readouterr().out
    assert inference.main([*FLAGS, "--verify"]) == 0 and "6 files checked, 0 damaged" in capsys.readouterr().out
    assert inference.main(FLAGS) == 0
    after = snapshot("run")
    assert {name: content for name, (content, _) in after.items()} == {name: it[0] for name, it in before.items()}
    assert all(after[name][1] == before[name][1] for name in before if "images" in name or "shards" in name)
    samples, _ = read_run("run", "pairs")
    assert [(s.image.name, s.mask, s.reference, s.size) for s in samples][0] == (
        "0_seed_42.png", Path("pairs/label/0.png"), Path("pairs/img/2.png"), (32, 32))


def test_a_half_finished_run_goes_on_and_other_settings_are_refused(here):
    index = Path("run/index.jsonl").read_text()
    lost = pixels("run/images/5_seed_47.png")
    for name in ("shards/000002.json", "images/5_seed_47.png"):
        Path("run", name).unlink()
    Path("run/shards/000002.partial").mkdir()  # as a killed process leaves it
    Path("run/shards/000002.partial/.tmp-7-8").write_bytes(b"half")
    Path("run/shards/000002.lock").write_text("{}")
    Path("run/index.jsonl").write_text("".join(index.splitlines(True)[:4]) + index.splitlines()[4][:40])
    before = snapshot("run/images")
    assert inference.main(FLAGS) == 0
    assert Path("run/index.jsonl").read_text() == index
    after = snapshot("run/images")
    assert {name: after[name] for name in before} == before and len(after) == 6
    assert np.abs(pixels("run/images/5_seed_47.png") - lost).max() <= 2
    assert sorted(path.name for path in Path("run/shards").iterdir()) == [f"00000{i}.json" for i in range(3)]
    with pytest.raises(FileExistsError, match="seed was 42, is 7.*Choose another --outdir"):
        inference.main([*FLAGS, "--seed", "7"])


def at_home(here: Path) -> None:
    """Absolute paths of the filtered folder as they are here."""
    for name in ("filter.json", "items.jsonl"):
        path = Path("filtered", name)
        path.write_text(path.read_text().replace("/data/", f"{here}/"))


def test_a_filtered_folder_goes_on_and_other_settings_are_refused(here):
    pytest.importorskip("mmseg")
    from post_processing.filter import main

    at_home(here)
    lines = Path("filtered/items.jsonl").read_text()
    masks = {path.name: pixels(path) for path in Path("filtered").glob("*.png")}
    before = snapshot("filtered")
    assert main(FILTER) == 0
    after = snapshot("filtered")
    assert all(after[name] == before[name] for name in before if name.endswith(".png") or "hardness" in name)
    assert Path("filtered/items.jsonl").read_text() == lines

    Path("filtered/items.jsonl").write_text("".join(lines.splitlines(True)[:3]) + lines.splitlines()[3][:50])
    for name in ("4_seed_46.png", "5_seed_47.png"):
        Path("filtered", name).unlink()
    assert main(FILTER) == 0
    records = [json.loads(line) for line in Path("filtered/items.jsonl").read_text().splitlines()]
    assert [record["image"] for record in records] == [json.loads(line)["image"] for line in lines.splitlines()]
    for name, mask in masks.items():
        assert (pixels(Path("filtered", name)) != mask).mean() <= 0.01
    with pytest.raises(FileExistsError, match="tolerance_margin was 1.25, is 2.0.*Choose another"):
        main([*FILTER, "--tolerance-margin", "2"])


def test_a_filtered_folder_is_resampled_and_an_old_choice_known():
    from post_processing.resample import main

    assert main([*RESAMPLE, "--valid-ratio", "0.3"]) == 0
    assert sorted(path.name for path in Path("resampled/images").iterdir()) == [
        f"{i}_seed_{42 + i}.png" for i in (3, 4, 5)]
    with pytest.raises(FileExistsError, match="valid_ratio was 0.3, is 0.1.*--overwrite"):
        main([*RESAMPLE, "--valid-ratio", "0.1"])


def test_predicted_masks_go_on_and_other_settings_are_refused():
    pytest.importorskip("mmseg")
    from scripts.predict_masks import main

    flags = ["--segmentor", *SEGMENTOR, "--images", "pairs/img", "--outdir", "predicted", "--device", "cpu"]
    before = snapshot("predicted/masks")
    assert len(before) == 4
    main(flags)
    after = snapshot("predicted/masks")
    assert len(after) == 6 and all(after[name] == before[name] for name in before)
    assert len(Path("predicted/items.json").read_text().splitlines()) == 6
    with pytest.raises((UserError, FileExistsError), match="threshold"):
        main([*flags, "--threshold", "0.5"])


def test_stages_of_a_measurement_go_on_and_others_are_refused(here):
    done = here / "done"

    def stages(word: str = "b") -> list[Stage]:
        return [Stage("a", (("python", "-c", "print('a')"),), inputs=("pairs/rows.json",)),
                Stage("b", (("python", "-c", f"print('{word}')", "{outdir}"),), ("a",)),
                Stage("c", action=lambda: done.touch(), needs=("b",), settings={"k": {"1": 2}})]  # fmt: skip

    begun = [*stages()[:2], Stage("c", (("python", "-c", "print('c')"),), ("b",), settings={"k": {"1": 2}})]
    runner = StageRunner(begun, Path("gain"), make_slots(1))
    assert [runner.state(name) for name in "abc"] == ["done", "done", "begun"]
    runner = StageRunner(stages(), Path("gain"), make_slots(1))
    assert [runner.state(name) for name in "abc"] == ["done", "done", "changed"]
    with pytest.raises(UserError, match="1 stages were run with other settings .c: .*--overwrite"):
        runner.run(False)
    runner.run(True)
    assert done.exists() and [runner.state(name) for name in "abc"] == ["done"] * 3
