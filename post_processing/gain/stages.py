"""A measurement as stages: commands with what they need, run side by side, each skipped once it is finished.

A stage owns a folder. `stage.json` in it says which settings it was begun with, and is written anew, as finished, when
all else is there. A stopped measurement goes on with the stages that are not finished.
"""

import contextlib
import logging
import os
import queue
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.files import digest_of, file_identity, take_lock
from ldm.run_folder import RunFolder
from ldm.util import UserError

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
SHOWN_LINES = 5


@dataclass(frozen=True)
class Stage:
    """One step of a measurement.

    Attributes:
        name: its folder below the output folder.
        commands: argument lists, run one after the other in the repository; their output goes to log.txt.
        needs: names of the stages that must be finished first.
        inputs: files from outside whose content belongs to the settings.
        is_sharded: run the command in as many processes as there are slots, each with `--shard i/n`.
        action: a function to call in place of commands.
        settings: what the action depends on.
    """

    name: str
    commands: tuple[tuple[str, ...], ...] = ()
    needs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    is_sharded: bool = False
    action: Callable[[], None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slot:
    """A share of the machine for one process: its cores, and what is added to its environment."""

    cores: frozenset[int]
    environment: Mapping[str, str]


def make_slots(count: int, gpus: Sequence[str] = ()) -> list[Slot]:
    """Divide the cores that this process may use among `count` slots (at least one core each), a GPU each if named."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    slots = []
    for number in range(count):
        own = cores[number::count] or [cores[number % len(cores)]]
        environment = {"OMP_NUM_THREADS": str(len(own))}
        slots.append(Slot(frozenset(own), environment | ({"CUDA_VISIBLE_DEVICES": gpus[number]} if gpus else {})))
    return slots


class StageRunner:
    """Runs stages in an output folder.

    Args:
        stages: in an order in which each comes after what it needs.
        folder: output folder.
        slots: shares of the machine; as many processes run at once.
    """

    def __init__(self, stages: Sequence[Stage], folder: Path, slots: Sequence[Slot]) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.folder, self.slots = folder, list(slots)
        self.settings: dict[str, dict[str, Any]] = {}
        for stage in stages:
            self.settings[stage.name] = self.settings_of(stage)
        self.free: queue.Queue[Slot] = queue.Queue()
        for slot in slots:
            self.free.put(slot)
        self.processes: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.is_stopping = False

    def settings_of(self, stage: Stage) -> dict[str, Any]:
        """What the results of a stage depend on; neither interpreters nor the place of the output folder."""
        commands = [
            [argument.replace(str(self.folder), "{outdir}") for argument in command[1:]] for command in stage.commands
        ]
        return {
            "commands": commands,
            "settings": dict(stage.settings),
            "inputs": {path: file_identity(Path(path)) for path in stage.inputs},
            "needs": {name: digest_of(self.settings[name]) for name in stage.needs},
        }

    def state(self, name: str) -> str:
        """`done`, `begun`, `open`, or `changed` when the folder comes from other settings."""
        place = self.place(name)
        record = place.read()
        return "open" if not record else "changed" if place.changes(record) else record["state"]

    def place(self, name: str) -> RunFolder:
        """The folder of a stage; its record says the `state`."""
        return RunFolder(self.folder / name, self.settings[name], record="stage.json")

    def describe(self) -> str:
        """The plan: state and commands of every stage."""
        lines = []
        for name, stage in self.stages.items():
            lines.append(f"{self.state(name):8} {name}" + (f"   after {', '.join(stage.needs)}" if stage.needs else ""))
            shards = f" --shard i/{len(self.slots)}" if stage.is_sharded and len(self.slots) > 1 else ""
            lines += [f"         {shlex.join(command)}{shards}" for command in stage.commands]
        return "\n".join(lines)

    def run(self, overwrite: bool) -> None:
        """Run what is not finished.

        Args:
            overwrite: delete the folders of stages with other settings and run these again.
        Raises:
            UserError: if there are such and overwrite is false, another process works in the folder, or a stage fails.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        held = take_lock(self.folder / ".lock")  # the kernel frees it when a process dies
        if held is None:
            raise UserError(f"{self.folder}: another measurement works here. Wait for it to end.")
        with held:
            changed = [name for name in self.stages if self.state(name) == "changed"]
            if changed and not overwrite:
                first = self.place(changed[0])
                differences = first.changes(first.read())
                raise UserError(f"{self.folder}: {len(changed)} stages were run with other settings ({changed[0]}: "
                                f"{differences}). Give another --outdir, or --overwrite to run them again.")
            for name in changed:
                if (self.folder / name).exists():  # not any more if it lay in another one's folder
                    shutil.rmtree(self.folder / name)
            self.run_open()

    def run_open(self) -> None:
        """Start every stage as soon as what it needs is finished, and wait for all."""
        done = {name for name in self.stages if self.state(name) == "done"}
        logger.info("%d of %d stages are finished", len(done), len(self.stages))
        running: dict[Future, str] = {}
        left: dict[str, int] = {}
        started: dict[str, float] = {}
        # On the way out the pool waits for its threads: their processes must have been told to stop by then.
        with ThreadPoolExecutor(len(self.slots)) as pool, contextlib.ExitStack() as on_exit:
            on_exit.callback(self.stop)
            while len(done) < len(self.stages):
                for name, stage in self.stages.items():
                    if name not in done and name not in left and done.issuperset(stage.needs):
                        (self.folder / name).mkdir(parents=True, exist_ok=True)
                        self.place(name).write(state="begun")
                        shards = len(self.slots) if stage.is_sharded else 1
                        left[name], started[name] = shards, time.time()
                        running |= {pool.submit(self.run_stage, stage, i, shards): name for i in range(shards)}
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    name = running.pop(future)
                    future.result()
                    left[name] -= 1
                    if not left[name]:
                        seconds = round(time.time() - started[name], 1)
                        self.place(name).write(state="done", seconds=seconds)
                        done.add(name)
                        logger.info("%s: finished after %.0f s (%d of %d)", name, seconds, len(done), len(self.stages))

    def run_stage(self, stage: Stage, shard: int, shards: int) -> None:
        """Run a stage, or one shard of it, in a free slot; UserError if a command fails."""
        slot = self.free.get()
        try:
            if stage.action:
                stage.action()
            for command in stage.commands:
                own = [*command, "--shard", f"{shard}/{shards}"] if shards > 1 else command
                self.run_command(stage.name, own, slot, f"log_{shard}.txt" if shards > 1 else "log.txt")
        finally:
            self.free.put(slot)

    def run_command(self, name: str, command: Sequence[str], slot: Slot, log_name: str) -> None:
        """Run one command to its end; UserError with the last lines of its output if it fails."""
        log_path = self.folder / name / log_name
        with self.lock:
            if self.is_stopping:
                raise UserError(f"stage {name}: not run, since the measurement stops.")
            with open(log_path, "ab") as log:
                log.write(f"$ {shlex.join(command)}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | dict(slot.environment), stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT,
                )  # fmt: skip
            self.processes.add(process)
        if hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(OSError):  # it may have ended already
                os.sched_setaffinity(process.pid, slot.cores)
        code = process.wait()
        with self.lock:
            self.processes.discard(process)
        if code:
            lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
            raise UserError(f"stage {name}: exit code {code} ({' / '.join(lines[-SHOWN_LINES:])}). All output is in "
                            f"{log_path}. Mend the cause and give the same command again.")

    def stop(self) -> None:
        """End the processes that still run, and start no others."""
        with self.lock:
            self.is_stopping = True
            for process in self.processes:
                process.terminate()
