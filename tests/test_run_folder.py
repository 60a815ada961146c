"""Folders of results: refuse or continue, parts of the work, lists of what is done and what failed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.files import atomic_folder, find_changes
from ldm.run_folder import RunFolder
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_of_long_lists_what_differs_is_named():
    old = {"commands": [["inference.py", "--ckpt", "a" * 100, "--scale", "2"], ["b"]]}
    assert find_changes(old, {"commands": [["inference.py", "--ckpt", "a" * 100, "--scale", "3"], ["b"]]}) == (
        'commands was "2", is "3"')
    longer = [*old["commands"][0][:3], "--strength", "0.5", *old["commands"][0][3:]]
    assert find_changes(old, {"commands": [longer, ["b"]]}) == 'commands was [], is ["--strength", "0.5"]'
    assert find_changes({"size": [1, 1]}, {"size": [1]}) == "size was [1, 1], is [1]"
    assert find_changes({"a": [None, "x" * 90]}, {"a": ["y", "x" * 90]}) == 'a was null, is "y"'
    assert find_changes({"a": "x" * 90 + "1"}, {"a": "x" * 90 + "2"}) == f'a was "...{"x" * 20}1", is "...{"x" * 20}2"'
    assert not find_changes(old, {"commands": [list(command) for command in old["commands"]]})


def test_the_same_settings_go_on_and_others_are_named(tmp_path: Path):
    def folder(**settings: object) -> RunFolder:
        return RunFolder(tmp_path / "out", {"size": [1, 2], "ids": {1: 2}, **settings}, details={"config": settings})

    assert folder(seed=1).open(lambda old: {"images": old.get("images", 0) + 1}) == {"images": 1}
    assert folder(seed=1).open(lambda old: {"images": old["images"] + 1}) == {"images": 2}
    assert folder(seed=1).read() == {"settings": {"size": [1, 2], "ids": {"1": 2}, "seed": 1}, "images": 2,
                                     "config": {"seed": 1}}  # fmt: skip
    before = (tmp_path / "out/run.json").stat().st_mtime_ns
    folder(seed=1).open(lambda old: {"images": 2})
    assert (tmp_path / "out/run.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match=r"seed was 1, is 2, config.seed was 1, is 2.*Choose another --outdir"):
        folder(seed=2).open()
    (tmp_path / "out/run.json").write_text("[1]")
    with pytest.raises(FileExistsError, match="not the record of a run"):
        folder(seed=1).check()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        RunFolder(tmp_path / "file").check()


def test_older_forms_of_the_record_are_read(tmp_path: Path):
    for content in ({"fingerprint": {"seed": 1}, "layout": 3}, {"settings": {"seed": 1}}, {"seed": 1}):
        (tmp_path / "run.json").write_text(json.dumps(content))
        record = RunFolder(tmp_path, {"seed": 1}).check()
        assert record["settings"] == {"seed": 1} and record.get("layout") == content.get("layout")
        with pytest.raises(FileExistsError, match="seed was 1, is 3"):
            RunFolder(tmp_path, {"seed": 3}).check()


def test_a_part_has_one_process_and_its_files_go_with_it(tmp_path: Path):
    folder = RunFolder(tmp_path)
    code = ("import sys, time; from pathlib import Path; from ldm.run_folder import RunFolder\n"
            "with RunFolder(Path(sys.argv[1])).claim('a') as held:\n"
            "    (Path(sys.argv[1]) / 'a.partial/half').touch(); print(held is not None, flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"True\n"
    with folder.claim("a") as held:
        assert held is None
    with folder.claim("b") as held:
        assert held is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "a.partial/half").exists()
    with folder.claim("a") as held:
        assert held is not None and folder.work("a").is_dir() and not list(folder.work("a").iterdir())
    assert not [path for path in tmp_path.iterdir() if path.name != ".lock"]


def test_lists_end_with_a_line_an_item(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.add([{"image": name, "n": 1} for name in "cab"], [{"image": "d", "reason": "old"}])
    with folder.items.open("a") as file:
        file.write('{"image": "e", "n"')  # a killed process
    folder.add([{"image": "a", "n": 2}, {"image": "gone"}], [{"image": "f", "reason": "another process"}])
    failed = folder.finish("abcdef", [{"image": "b", "reason": "broken since"}])
    assert [json.loads(line) for line in folder.items.read_text().splitlines()] == [
        {"image": "a", "n": 2}, {"image": "c", "n": 1}]  # fmt: skip
    assert [record["image"] for record in failed] == ["b", "d", "f"] and failed == list(folder.failed().values())
    assert folder.finish("ac", []) == [] and not folder.failures.exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    out = tmp_path / "new/set"
    for word in ("first", "second"):
        with atomic_folder(out) as partial:
            (partial / word).touch()
    with pytest.raises(UserError), atomic_folder(out) as partial:
        (partial / "third").touch()
        raise UserError("stopped")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set"]
    assert [path.name for path in out.iterdir()] == ["second"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, rename = tmp_path / "set", Path.rename
    with atomic_folder(out) as partial:
        (partial / "first").touch()

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("another process was faster")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="faster"), atomic_folder(out) as partial:
        (partial / "second").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and [path.name for path in out.iterdir()] == ["first"]
