"""Runs that are killed, stopped, shared by several processes: the files at the end are always the same.

Faults 1 to 5 of the table in test_faults.py.
"""

import errno
import fcntl
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from painting import REPOSITORY, arguments, contents, finished_shards, make_workspace, run
from zygote import Zygote, wait_until

from ldm.models import worker
from ldm.models.machine import find_share
from ldm.sampling.run import open_run
from ldm.sampling.shards import ShardStore, take_lock
from ldm.util import UserError

pytest.importorskip("tokenizers")

FLAGS = ("--num_per_mask", "2", "--shard_size", "3")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("scale"), [(8, 8), (8, 16)] * 3 + [(8, 8)])


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
    assert finished_shards(outdir) == [f"00000{number}.json" for number in range(3)]
    return outdir, time.monotonic() - begun


@pytest.mark.parametrize(("form", "runs"), [("folder", 3), ("tar", 1)])
def test_fault_1_killed_at_random_and_continued_in_other_batches(workspace, zygote, finished, tmp_path, form, runs):
    dice = random.Random(form)
    flags = [*FLAGS, "--format", form]
    reference, seconds = finished
    if form == "tar":
        reference = workspace / "tar"
        zygote.start(arguments(workspace, reference, *flags), workspace / "log")
        assert zygote.wait() == 0
    killed = 0
    for run_number in range(runs):
        outdir = tmp_path / f"{run_number}"
        for _ in range(5):
            extra = ["--batch_size", str(dice.randint(1, 9)), "--num_workers", str(dice.randint(0, 1))]
            pid = zygote.start(arguments(workspace, outdir, *flags, *extra), tmp_path / "log")
            time.sleep(dice.uniform(0.1, 0.9) * seconds)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
            killed += zygote.wait() == -signal.SIGKILL
            for image in (outdir / "images").glob("*"):
                assert image.read_bytes() == (reference / "images" / image.name).read_bytes()  # whole under its name
        zygote.start(arguments(workspace, outdir, *flags), tmp_path / "log")
        assert zygote.wait() == 0, (tmp_path / "log").read_text()
        assert contents(outdir) == contents(reference)
        assert finished_shards(outdir) == finished_shards(reference)
    assert killed >= runs


def test_fault_1_killed_between_publishing_and_tidying_up(workspace, finished, tmp_path):
    assert run(workspace, tmp_path, *FLAGS) == 0
    (tmp_path / "shards/000001.lock").write_text("{}")
    (tmp_path / "shards/000001.partial").mkdir()
    (tmp_path / "shards/000001.partial/.tmp-1-2").touch()
    (tmp_path / ".index.jsonl.tmp").touch()
    lines = (tmp_path / "index.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "index.jsonl").write_text("".join([*lines[5:], lines[5], lines[0][:20]]))
    assert run(workspace, tmp_path, *FLAGS) == 0
    assert contents(tmp_path) == contents(finished[0])
    assert finished_shards(tmp_path) == finished_shards(finished[0])


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_fault_2_a_signal_stops_a_run_within_a_step(workspace, zygote, finished, tmp_path, number, code):
    slow = arguments(workspace, tmp_path / "slow", *FLAGS, "--ddim_steps", "999", "--num_workers", "1")
    pid = zygote.start(slow, tmp_path / "log")
    wait_until(lambda: "0/6" in (tmp_path / "log").read_text())
    time.sleep(0.3)
    begun = time.monotonic()
    os.kill(pid, getattr(signal, number))
    wait_until(lambda: f"stopped by {number}; the same command goes on" in (tmp_path / "log").read_text())
    assert time.monotonic() - begun < 5
    assert zygote.wait() == code
    assert finished_shards(tmp_path / "slow") == []


def test_fault_2_what_is_finished_stays(workspace, zygote, finished, tmp_path):
    pid = zygote.start(arguments(workspace, tmp_path / "out", *FLAGS), tmp_path / "log")
    wait_until(lambda: list((tmp_path / "out").glob("images/*.png")))
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait() in (143, 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").iterdir()}
    assert run(workspace, tmp_path / "out", *FLAGS) == 0
    assert before and all(path.stat().st_mtime_ns == moment for path, moment in before.items())


def test_fault_5_a_full_disk(workspace, zygote, tmp_path):
    flags = ["--H", "48", "--W", "48"]
    zygote.start(arguments(workspace, tmp_path / "out", *flags), tmp_path / "log", file_limit=6_000)
    assert zygote.wait() == 4
    text = (tmp_path / "log").read_text()
    assert "error: " in text and "_seed_4" in text and "the disk is full" in text and "bytes were needed" in text
    assert not list((tmp_path / "out").rglob("*tmp*")) and finished_shards(tmp_path / "out") == []
    assert run(workspace, tmp_path / "out", *flags) == 0
    assert len(list((tmp_path / "out/images").iterdir())) == 7


def test_several_processes_share_one_folder_and_one_of_them_dies(workspace, zygote, finished, tmp_path):
    argv = arguments(workspace, tmp_path / "out", *FLAGS)
    pids = [zygote.start(argv, tmp_path / f"log{number}") for number in range(3)]
    wait_until(lambda: list((tmp_path / "out").glob("images/*.png")))
    os.kill(pids[0], signal.SIGKILL)
    assert [zygote.wait(pid) for pid in pids] == [-signal.SIGKILL, 0, 0]
    if finished_shards(tmp_path / "out") != finished_shards(finished[0]):
        assert run(workspace, tmp_path / "out", *FLAGS) == 0  # the others had left before it died
    assert contents(tmp_path / "out") == contents(finished[0])
    assert finished_shards(tmp_path / "out") == finished_shards(finished[0])


def test_static_shards_give_the_same_files(workspace, finished, tmp_path):
    for part in ("2/3", "0/3", "1/3"):
        assert run(workspace, tmp_path, *FLAGS, "--shard", part) == 0
    assert contents(tmp_path) == contents(finished[0])


def test_fault_4_a_lock_keeps_others_off_whatever_the_clock_says(workspace, finished, tmp_path, caplog):
    caplog.set_level("INFO")
    assert run(workspace, tmp_path, *FLAGS, "--shard", "0/3") == 0
    store = ShardStore(tmp_path)
    with store.claim(2) as claim:
        claim.report(1, 6)
        for moment in (0, 4e9):
            os.utime(store.path(2, "lock"), (moment, moment))
            with store.claim(2) as second:
                assert second is None
        assert run(workspace, tmp_path, *FLAGS) == 0
        assert finished_shards(tmp_path) == ["000000.json", "000001.json", "000002.lock", "000002.partial"]
    assert "1 shards are left" in caplog.text
    store.path(2, "lock").write_text("{}")  # of a process that died: nobody holds it
    assert run(workspace, tmp_path, *FLAGS) == 0
    assert contents(tmp_path) == contents(finished[0])
    assert finished_shards(tmp_path) == finished_shards(finished[0])


def test_fault_4_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    open_run(tmp_path, {"seed": 1}, {}, {"rows": 1, "shard_size": 1, "copies": 1})
    with ShardStore(tmp_path).claim(0) as claim:
        assert claim is not None
    assert "no locks on this file system (No locks available); give every process a --shard" in caplog.text


def test_fault_4_a_lock_that_is_just_removed_is_not_taken_for_one(tmp_path, monkeypatch):
    """Its holder removes the file between our open and our flock: we would lock a file that nobody else can see."""
    path, real, calls = tmp_path / "1.lock", fcntl.flock, []

    def after_removal(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            path.unlink()
        real(file, operation)

    monkeypatch.setattr("fcntl.flock", after_removal)
    with take_lock(path) as lock:
        assert len(calls) == 2 and os.path.samestat(os.fstat(lock.fileno()), path.stat())


def test_processes_that_disagree_on_the_shards_are_refused(workspace, tmp_path, monkeypatch, capsys):
    whole = worker.begin

    def meanwhile(plan):
        open_run(plan.folder, plan.fingerprint, plan.details(), plan.layout | {"shard_size": 2})
        whole(plan)

    monkeypatch.setattr(worker, "begin", meanwhile)
    assert run(workspace, tmp_path, *FLAGS) == 2
    assert "with 2 rows a shard. Expected 3. Start this again" in capsys.readouterr().err


def test_status_counts_shards_and_estimates(workspace, finished, tmp_path, capsys):
    assert run(workspace, tmp_path, *FLAGS, "--shard", "0/3") == 0
    store = ShardStore(tmp_path)
    store.path(2, "lock").write_text(json.dumps({"host": "a", "pid": 1, "done": 2, "total": 2}))
    with store.claim(1) as claim:
        claim.report(4, 6)
        capsys.readouterr()
        assert run(workspace, tmp_path, "--status") == 0
    text = capsys.readouterr().out
    assert "3 shards of 3 rows, 2 images each row" in text
    assert "1 done (0 with failures), 1 running, 1 interrupted, 0 to do" in text
    assert "6 images in finished shards, 0 failed" in text and "images/hour a process, about 0:00:0" in text
    assert f"shard 000001 running, 4 of 6 images, {os.uname().nodename} pid {os.getpid()}" in text
    assert "shard 000002 interrupted, 2 of 2 images, a pid 1" in text


def test_torchrun_ranks_take_their_shards(workspace, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "inference.py"]
    done = subprocess.run([*command, *arguments(workspace, tmp_path, *FLAGS)], cwd=REPOSITORY, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 shards to paint, 4 rows" in done.stderr and "1 shards to paint, 3 rows" in done.stderr
    assert contents(tmp_path) == contents(finished[0])
    assert finished_shards(tmp_path) == finished_shards(finished[0])


@pytest.mark.parametrize(("ending", "requeued"), [("late", ["requeue 7_3"]), ("cancelled", []), ("finished", [])])
def test_the_slurm_script_passes_flags_on_and_requeues_at_the_time_limit(tmp_path, ending, requeued):
    log = tmp_path / "log"
    for name, text in (
        ("srun", 'exec "$@"'),
        ("scontrol", f'echo "$@" >> {log}'),
        ("stub", f'trap "sleep 0.2; echo stopped >> {log}; exit 143" USR1 TERM\necho "$@" >> {log}\n'
                 "for i in $(seq 600); do [ $ENDING = finished ] && exit 0; sleep 0.1; done"),
    ):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "stub", "ENDING": ending,
                                "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # fmt: skip
    job = subprocess.Popen(["bash", REPOSITORY / "scripts/synthesize.sbatch", "--outdir", "a b"], env=environment)
    wait_until(lambda: log.exists() and log.read_text())
    if ending != "finished":
        job.send_signal(signal.SIGUSR1 if ending == "late" else signal.SIGTERM)
    assert job.wait(60) == (0 if ending == "finished" else 143)
    stopped = [] if ending == "finished" else ["stopped"]
    assert log.read_text().splitlines() == ["inference.py --outdir a b", *stopped, *requeued]


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed: requirements/ray.txt")
def test_ray_paints_the_same_files_though_a_worker_dies(workspace, finished, tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
import inference
from ldm.models import ray_engine
from ldm.util import run_entry_point
whole = ray_engine.RayWorker.paint_shard

class Mortal(ray_engine.RayWorker):
    def paint_shard(self, number):
        marker = Path(os.environ["MARKER"])
        if number == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().paint_shard(number)

ray_engine.RayWorker = Mortal
run_entry_point(inference.main)
"""
    argv = arguments(workspace, tmp_path / "out", *FLAGS, "--engine", "ray", "--ray_workers", "2")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MARKER": str(tmp_path / "marker"), "RAY_worker_niceness": "0"}
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=REPOSITORY, capture_output=True, text=True,
                          env=environment, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists() and "shard 1:" in done.stderr
    assert contents(tmp_path / "out") == contents(finished[0])
    assert finished_shards(tmp_path / "out") == finished_shards(finished[0])


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
