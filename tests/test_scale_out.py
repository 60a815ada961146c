"""Runs that are killed, stopped, shared by several processes: the files at the end are always the same."""

import json
import os
import random
import signal
import time
from contextlib import ExitStack, suppress

import pytest
from painting import arguments, contents, finished_shards, make_workspace, run
from zygote import Zygote

from ldm.models.machine import find_share
from ldm.sampling.shards import ShardStore
from ldm.util import UserError

pytest.importorskip("tokenizers")

FLAGS = ("--num_per_mask", "2", "--shard_size", "3")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("scale"), [(8, 8), (8, 16)] * 5)


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as process:
        yield process


@pytest.fixture(scope="module")
def finished(workspace, zygote):
    """Folder of an uninterrupted run, and its seconds."""
    outdir = workspace / "finished"
    begun = time.monotonic()
    zygote.start(arguments(workspace, outdir, *FLAGS), workspace / "log")
    assert zygote.wait() == 0, (workspace / "log").read_text()
    assert finished_shards(outdir) == [f"00000{number}.json" for number in range(4)]
    return outdir, time.monotonic() - begun


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_fault_1_killed_at_random_times_and_continued_in_other_batches(workspace, zygote, finished, tmp_path, form):
    dice = random.Random(form)
    flags = [*FLAGS, "--format", form]
    reference, seconds = finished
    if form == "tar":
        reference = workspace / "tar"
        zygote.start(arguments(workspace, reference, *flags), workspace / "log")
        assert zygote.wait() == 0
    killed = 0
    for trial in range(20):
        outdir = tmp_path / f"{trial // 5}"
        extra = ["--batch_size", str(dice.randint(1, 9)), "--num_workers", str(dice.randint(0, 1))]
        pid = zygote.start(arguments(workspace, outdir, *flags, *extra), tmp_path / "log")
        time.sleep(dice.uniform(0, seconds))
        with suppress(ProcessLookupError):  # it was faster
            os.kill(pid, signal.SIGKILL)
        killed += zygote.wait() == -signal.SIGKILL
    assert killed >= 10
    for outdir in sorted(path for path in tmp_path.iterdir() if path.is_dir()):
        for image in (outdir / "images").glob("*"):
            assert image.read_bytes() == (reference / "images" / image.name).read_bytes()  # whole under its name
        zygote.start(arguments(workspace, outdir, *flags), tmp_path / "log")
        assert zygote.wait() == 0, (tmp_path / "log").read_text()
        assert contents(outdir) == contents(reference)
        assert finished_shards(outdir) == finished_shards(reference)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_fault_2_a_signal_stops_a_run_within_a_step(workspace, zygote, finished, tmp_path, number, code):
    slow = arguments(workspace, tmp_path / "slow", *FLAGS, "--ddim_steps", "999", "--num_workers", "1")
    pid = zygote.start(slow, tmp_path / "log")
    while "0/6" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    time.sleep(0.3)
    begun = time.monotonic()
    os.kill(pid, getattr(signal, number))
    assert zygote.wait() == code
    assert time.monotonic() - begun < 5
    assert f"stopped by {number}; the same command goes on" in (tmp_path / "log").read_text()
    assert finished_shards(tmp_path / "slow") == []


def test_fault_2_what_is_finished_stays(workspace, zygote, finished, tmp_path):
    pid = zygote.start(arguments(workspace, tmp_path / "out", *FLAGS), tmp_path / "log")
    while not list((tmp_path / "out").glob("images/*.png")):
        time.sleep(0.005)
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait() in (143, 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    assert run(workspace, tmp_path / "out", *FLAGS) == 0
    assert before and all(path.stat().st_mtime_ns == moment for path, moment in before.items())


def test_several_processes_share_one_folder_and_one_of_them_dies(workspace, zygote, finished, tmp_path):
    with ExitStack() as stack:
        others = [stack.enter_context(Zygote()) for _ in range(2)]
        workers = [zygote, *others]
        argv = arguments(workspace, tmp_path / "out", *FLAGS)
        pids = [worker.start(argv, tmp_path / f"log{number}") for number, worker in enumerate(workers)]
        while not list((tmp_path / "out").glob("shards/*.lock")):
            time.sleep(0.005)
        os.kill(pids[0], signal.SIGKILL)
        codes = [worker.wait() for worker in workers]
    assert codes[1:] == [0, 0]
    if codes[0] == -signal.SIGKILL and len(finished_shards(tmp_path / "out")) != 4:
        assert run(workspace, tmp_path / "out", *FLAGS) == 0  # both others had left before it died
    assert contents(tmp_path / "out") == contents(finished[0])
    assert finished_shards(tmp_path / "out") == finished_shards(finished[0])


def test_static_shards_give_the_same_files(workspace, finished, tmp_path):
    for part in ("2/3", "0/3", "1/3"):
        assert run(workspace, tmp_path, *FLAGS, "--shard", part) == 0
    assert contents(tmp_path) == contents(finished[0])


def test_fault_4_a_lock_keeps_others_off_whatever_the_clock_says(workspace, finished, tmp_path, caplog):
    assert run(workspace, tmp_path, *FLAGS, "--shard", "0/4") == 0
    store = ShardStore(tmp_path)
    with store.claim(2) as claim:
        claim.report(1, 6)
        for moment in (0, 4e9):
            os.utime(store.path(2, "lock"), (moment, moment))
            with store.claim(2) as second:
                assert second is None
        assert run(workspace, tmp_path, *FLAGS) == 0
        others = ["000000.json", "000001.json", "000003.json"]
        assert finished_shards(tmp_path) == sorted([*others, "000002.lock", "000002.partial"])
    assert "1 shards are left" in caplog.text
    store.path(2, "lock").write_text("{}")  # of a process that died: nobody holds it
    assert run(workspace, tmp_path, *FLAGS) == 0
    assert contents(tmp_path) == contents(finished[0])
    assert finished_shards(tmp_path) == finished_shards(finished[0])


def test_status_counts_shards_and_estimates(workspace, finished, tmp_path, capsys):
    assert run(workspace, tmp_path, *FLAGS, "--shard", "0/2") == 0
    store = ShardStore(tmp_path)
    store.path(3, "lock").write_text(json.dumps({"host": "a", "pid": 1, "done": 2, "total": 2}))
    with store.claim(1) as claim:
        claim.report(4, 6)
        capsys.readouterr()
        assert run(workspace, tmp_path, "--status") == 0
    text = capsys.readouterr().out
    assert "4 shards of 3 rows, 2 images each row" in text
    assert "2 done, 1 running, 1 interrupted, 1 to do" in text
    assert "12 images in finished shards, 0 failed" in text and "images/hour a process, about 0:00:0" in text
    assert f"shard 000001 running, 4 of 6 images, {os.uname().nodename} pid {os.getpid()}" in text
    assert "shard 000003 interrupted, 2 of 2 images, a pid 1" in text


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "0",
          "SLURM_ARRAY_TASK_MAX": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (5, 8)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0",
          "SLURM_ARRAY_TASK_MAX": "1", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (7, 8)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "5", "WORLD_SIZE": "8"}, (5, 8)),
    ],
)  # fmt: skip
def test_the_share_of_a_process_follows_from_what_started_it(environment, share):
    assert find_share(environment) == share


def test_part_of_an_array_needs_a_shard():
    part = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3",
            "SLURM_ARRAY_TASK_MAX": "5"}  # fmt: skip
    with pytest.raises(UserError, match=r"task 5 of a SLURM array from 3 to 5 with 2 tasks.*add --shard"):
        find_share(part)
