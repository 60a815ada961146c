"""Runs that are killed, stopped, shared by several processes: the files at the end are always the same.

Faults 1 to 5, 8 and 20 of the table in test_faults.py.
"""

import errno
import fcntl
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
from painting import REPOSITORY, arguments, contents, finished_shards, make_workspace, png, read_lines, run, write_rows
from zygote import Zygote, wait_until

import inference
from ldm import ray_pool
from ldm.files import take_lock
from ldm.generation import worker
from ldm.generation.machine import find_share
from ldm.generation.plan import plan_layout
from ldm.generation.store import ShardStore
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


def test_fault_1_killed_twenty_times_at_random_and_continued(workspace, zygote, finished, tmp_path):
    dice = random.Random("folder")
    (reference, seconds), kills = finished, 20
    killed = trial = 0
    while killed < kills:
        outdir, trial, target = tmp_path / f"{trial}", trial + 1, min(kills, killed + 5)
        while killed < target:
            extra = ["--num_workers", str(dice.randint(0, 1))]
            pid = zygote.start(arguments(workspace, outdir, *FLAGS, *extra), tmp_path / "log")
            time.sleep(dice.uniform(0.1, 0.9) * seconds)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = zygote.wait()
            assert code in (-signal.SIGKILL, 0), (tmp_path / "log").read_text()
            killed += code != 0
            for image in (outdir / "images").glob("*"):
                assert image.read_bytes() == (reference / "images" / image.name).read_bytes()  # whole under its name
            if code == 0:  # it was faster, which does not count: on with another folder
                seconds *= 0.8
                break
        zygote.start(arguments(workspace, outdir, *FLAGS), tmp_path / "log")
        assert zygote.wait() == 0, (tmp_path / "log").read_text()
        assert contents(outdir) == contents(reference)
        assert finished_shards(outdir) == finished_shards(reference)
    assert killed == kills


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


def test_fault_8_bombs_take_no_memory(workspace, zygote, tmp_path):
    good = {"source": "mask_0.png", "prompt": "road", "ref_image": "ref_0.png"}
    rows = {"small": [good], "large": [good]}
    pixels = bytes(13_001 * 13_000)  # each row of a PNG begins with a byte that says how it is packed
    (workspace / "bomb.png").write_bytes(png(13_000, 13_000, data=pixels))
    text = (b"zTXt", b"comment\0\0" + zlib.compress(bytes(600 << 20), 1))
    (workspace / "text.png").write_bytes(png(8, 8, text, data=bytes(9 * 8)))
    rows["large"] += [good | {key: f"{name}.png"} for key in ("source", "ref_image") for name in ("bomb", "text")]
    peaks = {}
    for name, code in (("small", 0), ("large", 3)):
        write_rows(workspace / f"{name}.json", rows[name])
        argv = arguments(workspace, tmp_path / name, "--bad_rows", "skip", manifest=f"{name}.json")
        limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))"  # bytes
        zygote.start(argv, tmp_path / "log", fault=limit)  # one that is generated would take the machine's whole memory
        assert zygote.wait() == code, (tmp_path / "log").read_text()
        peaks[name] = zygote.peak
    assert len(read_lines(tmp_path / "large/failures.jsonl")) == 4
    assert peaks["large"] - peaks["small"] < 500, peaks  # MiB


# What breaks a process after a moment, with the last line of its traceback.
BREAKAGES = {
    "loader raises": ('raise ZeroDivisionError("in the loader")', "ZeroDivisionError: in the loader"),
    "loader dies": ("os.kill(os.getpid(), signal.SIGKILL)", "is killed by signal: Killed|exited unexpectedly"),
    "writer raises": ('raise MemoryError("no room to encode")', "MemoryError: no room to encode"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_fault_20_what_breaks_reaches_the_exit_code_in_5_seconds(workspace, zygote, finished, tmp_path, breakage):
    action, text = BREAKAGES[breakage]
    place = "writer.encode_image" if "writer" in breakage else "synthesis.ConditionDataset.__getitem__"
    fault = (f"import os, signal\nfrom pathlib import Path\nfrom ldm.generation import generator as synthesis\n"
             f"from ldm.generation import writer\ndef fail(*_):\n    Path({str(tmp_path / 'moment')!r}).touch()\n"
             f"    {action}\n{place} = fail")  # fmt: skip
    argv = arguments(workspace, tmp_path / "out", *FLAGS, "--num_workers", "1")
    zygote.start(argv, tmp_path / "log", fault=fault)
    assert zygote.wait() == 1
    # On a machine so busy that a whole run takes longer, the end of one may too.
    assert time.time() - (tmp_path / "moment").stat().st_mtime < max(5, finished[1])
    assert re.search(text, (tmp_path / "log").read_text())
    assert [name for name in finished_shards(tmp_path / "out") if name.endswith("json")] == []


def test_a_process_without_a_shard_has_nothing_to_do(workspace, tmp_path):
    assert run(workspace, tmp_path / "out", "--shard", "7/8") == 0
    assert not (tmp_path / "out").exists()


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
    with store.claim_shard(2) as claim:
        claim.report(1, 6)
        for moment in (0, 4e9):
            os.utime(tmp_path.joinpath("shards/000002.lock"), (moment, moment))
            with store.claim_shard(2) as second:
                assert second is None
        assert run(workspace, tmp_path, *FLAGS) == 0
        assert finished_shards(tmp_path) == ["000000.json", "000001.json", "000002.lock", "000002.partial"]
    assert "1 shards are left" in caplog.text
    tmp_path.joinpath("shards/000002.lock").write_text("{}")  # of a process that died: nobody holds it
    assert run(workspace, tmp_path, *FLAGS) == 0
    assert contents(tmp_path) == contents(finished[0])
    assert finished_shards(tmp_path) == finished_shards(finished[0])


def test_fault_4_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    ShardStore(tmp_path, {"seed": 1}).begin({"rows": 1, "shard_size": 1, "copies": 1})
    with ShardStore(tmp_path).claim_shard(0) as claim:
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
        plan.store().begin(plan.layout | {"shard_size": 2})
        whole(plan)

    monkeypatch.setattr(worker, "begin", meanwhile)
    assert run(workspace, tmp_path, *FLAGS) == 2
    assert "with 2 rows a shard. Expected 3. Start this again" in capsys.readouterr().err


def test_status_counts_shards_and_estimates(workspace, finished, tmp_path, capsys):
    assert run(workspace, tmp_path, *FLAGS, "--shard", "0/3") == 0
    store = ShardStore(tmp_path)
    tmp_path.joinpath("shards/000002.lock").write_text(json.dumps({"host": "a", "pid": 1, "done": 2, "total": 2}))
    with store.claim_shard(1) as claim:
        claim.report(4, 6)
        capsys.readouterr()
        assert run(workspace, tmp_path, "--status") == 0
    text = capsys.readouterr().out
    assert "3 shards of 3 rows, 2 images each row" in text
    assert "1 done (0 with failures), 1 running, 1 interrupted, 0 to do" in text
    assert "6 images in finished shards, 0 failed" in text and "images/hour a process, about 0:00:0" in text
    assert f"shard 000001 running, 4 of 6 images, {os.uname().nodename} pid {os.getpid()}" in text
    assert "shard 000002 interrupted, 2 of 2 images, a pid 1" in text


def test_status_counts_all_copies_of_a_row_that_failed(workspace, tmp_path, capsys):
    row = {"source": "mask_0.png", "prompt": "road", "ref_image": "ref_0.png"}
    write_rows(workspace / "one_bad.json", [row, row | {"source": "absent.png"}])
    flags = ["--bad_rows", "skip", "--num_per_mask", "3"]
    assert run(workspace, tmp_path, *flags, manifest="one_bad.json") == 3
    statistics = tmp_path / "shards/000000.json"
    statistics.write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 10800', statistics.read_text()))
    capsys.readouterr()
    assert run(workspace, tmp_path, "--status") == 3
    text = capsys.readouterr().out
    assert "3 images in finished shards, 3 failed\n  1 images/hour a process, about 0:00:00 left" in text


def test_torchrun_ranks_take_their_shards(workspace, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "inference.py"]
    done = subprocess.run([*command, *arguments(workspace, tmp_path, *FLAGS)], cwd=REPOSITORY, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 shards to generate, 4 rows" in done.stderr and "1 shards to generate, 3 rows" in done.stderr
    assert contents(tmp_path) == contents(finished[0])
    assert finished_shards(tmp_path) == finished_shards(finished[0])


@pytest.mark.parametrize(("ending", "requeued"), [("late", ["requeue 7_3"]), ("cancelled", []), ("finished", [])])
def test_the_slurm_script_passes_flags_on_and_requeues_at_the_time_limit(tmp_path, ending, requeued):
    log = tmp_path / "log"
    for name, text in (
        ("srun", 'exec "$@"'),
        ("scontrol", f'echo "$@" >> {log}'),
        ("stub", f'trap "sleep 0.2; echo stopped >> {log}; exit 143" USR1 TERM\n'
                 f'echo "$@ on $SRUN_CPUS_PER_TASK CPUs" >> {log}\n'
                 "for i in $(seq 600); do [ $ENDING = finished ] && exit 0; sleep 0.1; done"),
    ):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "stub", "ENDING": ending,
                                "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3",
                                "SLURM_CPUS_PER_TASK": "6"}  # fmt: skip
    job = subprocess.Popen(["bash", REPOSITORY / "scripts/synthesize.sbatch", "--outdir", "a b"], env=environment)
    wait_until(lambda: log.exists() and log.read_text())
    if ending != "finished":
        job.send_signal(signal.SIGUSR1 if ending == "late" else signal.SIGTERM)
    assert job.wait(60) == (0 if ending == "finished" else 143)
    stopped = [] if ending == "finished" else ["stopped"]
    assert log.read_text().splitlines() == ["inference.py --outdir a b on 6 CPUs", *stopped, *requeued]


def settings_of(workspace, *flags):
    return inference.build_parser().parse_args([*arguments(workspace, workspace / "new", *flags), "--shard", "0/1"])


def test_ray_workers_all_get_a_shard(workspace):
    settings = settings_of(workspace, "--engine", "ray")
    assert plan_layout(settings, processes=3) == {"rows": 7, "shard_size": 3, "copies": 1}
    assert plan_layout(settings)["shard_size"] == 7


def test_ray_actors_ask_for_what_a_node_has():
    assert ray_pool.actor_needs(True, 8, 512) == {"num_cpus": 1, "num_gpus": 1}  # of any node, however few CPUs
    assert ray_pool.actor_needs(True, 8, 5) == {"num_cpus": 0.5, "num_gpus": 1}
    assert ray_pool.actor_needs(False, 2, 9) == {"num_cpus": 4, "num_gpus": 0}


def test_ray_is_told_a_size_only_where_it_starts_a_cluster():
    assert ray_pool.connection({"RAY_ADDRESS": "10.0.0.1:6379"}) == {}
    for environment in ({}, {"RAY_ADDRESS": ""}):
        own = ray_pool.connection(environment)
        assert own["address"] == "local" and own["object_store_memory"] == ray_pool.OBJECT_STORE


def test_ray_without_gpus_is_no_place_for_cuda():
    assert [ray_pool.count_gpus(device, {"GPU": 2.0}) for device in ("cpu", "auto", "cuda")] == [0, 2, 2]
    assert ray_pool.count_gpus("auto", {"CPU": 4.0}) == 0
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"--device: {device}, but the Ray cluster has no GPU"):
            ray_pool.count_gpus(device, {"CPU": 4.0})


class RayTaskError(Exception):
    """Stands for Ray's, which comes from an actor that lives."""


def fake_ray(paint):
    """As much of Ray as ray_pool uses; `generate(build, number)` runs when its result is asked for."""

    def start_actor(build, *_):
        return SimpleNamespace(run=SimpleNamespace(remote=lambda number: partial(paint, build, number)))

    actor_class = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start_actor))
    return SimpleNamespace(
        put=lambda value: value, get=lambda future: future(), wait=lambda futures: (futures[:1], futures[1:]),
        remote=lambda _: actor_class, kill=lambda _: None, shutdown=lambda: None,
        cluster_resources=lambda: {"CPU": 4.0}, available_resources=lambda: {"CPU": 4.0},
        exceptions=SimpleNamespace(RayError=RayTaskError, RayTaskError=RayTaskError),
    )  # fmt: skip


def test_ray_records_a_shard_that_always_fails_and_paints_the_others(workspace, finished, tmp_path, monkeypatch):
    tried = []

    def paint(build, number):
        tried.append(number)
        if number == 1:
            raise RayTaskError("traceback\nits memory is gone")
        return build()(number)

    monkeypatch.setattr(ray_pool, "connect", lambda: fake_ray(paint))
    flags = [*FLAGS, "--engine", "ray", "--ray_workers", "2"]
    assert run(workspace, tmp_path, *flags) == 3
    assert sorted(tried) == [0, 1, 1, 1, 2]
    failures = read_lines(tmp_path / "failures.jsonl")
    assert [(record["row"], record["copy"]) for record in failures] == [(row, c) for row in (3, 4, 5) for c in (0, 1)]
    assert failures[0]["reason"] == "its worker failed 3 times, last with: its memory is gone"
    assert len(read_lines(tmp_path / "index.jsonl")) == 8
    assert run(workspace, tmp_path, *FLAGS) == 0
    assert contents(tmp_path) == contents(finished[0])


def test_ray_ends_where_every_shard_fails(workspace, tmp_path, monkeypatch):
    tried = []

    def paint(_, number):
        tried.append(number)
        raise RayTaskError("no such package")

    monkeypatch.setattr(ray_pool, "connect", lambda: fake_ray(paint))
    assert run(workspace, tmp_path, "--shard_size", "1", "--engine", "ray") == 3
    assert tried == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed: requirements/ray.txt")
def test_ray_paints_the_same_files_though_a_worker_dies(workspace, finished, tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
import inference
from ldm import ray_pool
from ldm.util import run_entry_point

class Mortal(ray_pool.Actor):
    def run(self, number):
        marker = Path(os.environ["MARKER"])
        if number == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(number)

ray_pool.Actor = Mortal
run_entry_point(inference.main)
"""
    argv = arguments(workspace, tmp_path / "out", *FLAGS, "--engine", "ray", "--ray_workers", "2")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MARKER": str(tmp_path / "marker"), "RAY_worker_niceness": "0"}
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=REPOSITORY, capture_output=True, text=True,
                          env=environment, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "marker").exists() and "unit 1 of 3:" in done.stderr
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
