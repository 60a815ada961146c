"""Runs inference.py in processes that can be killed, without waiting for torch to be imported in each.

A helper process imports everything once and forks a child for every command; it never computes, so that no thread of
torch's is lost in a fork.
"""

import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PATIENCE = 120  # seconds


class Zygote:
    """Starts children; use it as a context manager."""

    def __enter__(self) -> "Zygote":
        paths = os.pathsep.join((str(TESTS.parent), str(TESTS)))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment,
            cwd=TESTS.parent,
        )  # fmt: skip
        assert self.answer() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()

    def answer(self) -> str:
        """Next line of the helper."""
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], "no answer"
        return self.process.stdout.readline().decode().strip()

    def start(self, argv: list[str], log: Path, file_limit: int | None = None, fault: str = "") -> int:
        """Begin a command; returns its process id.

        Args:
            argv: of inference.py.
            log: file for its output.
            file_limit: no file may exceed so many bytes.
            fault: Python code that its process runs first.
        """
        log.write_text("")
        self.process.stdin.write((json.dumps([argv, str(log), file_limit, fault]) + "\n").encode())
        self.pid = int(self.answer())
        return self.pid

    def wait(self, pid: int | None = None) -> int:
        """Exit code of a command, by default of the last one, negative for the signal that killed it.

        `peak` is then the most memory that it had, MiB.
        """
        self.process.stdin.write(f"{json.dumps(pid or self.pid)}\n".encode())
        code, peak = map(int, self.answer().split())
        self.peak = peak / 1024
        return code


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def serve() -> None:
    """Fork a child for every command on stdin, and wait for it when asked to."""
    from painting import MODEL
    from PIL import Image

    import inference
    from ldm.generation import worker  # noqa: F401  imports all that a run needs
    from ldm.sampling import modes  # noqa: F401
    from ldm.util import run_entry_point
    from ldm.weights.load import build_skeleton

    build_skeleton({"model": MODEL})  # torch imports hundreds of modules at the first tensor without memory
    Image.init()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            _, status, usage = os.wait4(request, 0)
            print(os.waitstatus_to_exitcode(status), usage.ru_maxrss, flush=True)
            continue
        argv, log, file_limit, fault = request
        pid = os.fork()
        if pid == 0:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.close(0)
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            exec(fault, {})
            run_entry_point(inference.main, argv)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
