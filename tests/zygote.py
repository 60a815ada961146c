"""Runs inference.py in processes that can be killed, without waiting for torch to be imported in each.

A helper process imports everything once and forks a child for every command; it never computes, so that no thread of
torch's is lost in a fork.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


class Zygote:
    """Starts children one after another; use it as a context manager."""

    def __enter__(self) -> "Zygote":
        paths = os.pathsep.join((str(TESTS.parent), str(TESTS)))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=TESTS.parent,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def start(self, argv: list[str], log: Path, file_limit: int | None = None) -> int:
        """Begin a command; returns its process id. Its output goes to `log`; no file may exceed file_limit bytes."""
        self.process.stdin.write(json.dumps([argv, str(log), file_limit]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Exit code of the command, negative for the signal that killed it."""
        return int(self.process.stdout.readline())


def serve() -> None:
    """Fork a child for every line of stdin."""
    import inference
    from ldm.models import worker  # noqa: F401  imports all that a run needs
    from ldm.sampling import modes  # noqa: F401
    from ldm.util import run_entry_point

    print("ready", flush=True)
    for line in sys.stdin:
        argv, log, file_limit = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.close(0)
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            run_entry_point(inference.main, argv)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
