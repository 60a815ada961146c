"""Say whether the running python has the packages of some requirement files. Standard library only.

Usage: python scripts/check_environment.py [--torch cpu|cuda] requirements/demo.txt ...
Prints one line for each package that is missing or too different, and exits 1 when there is any.
"""
import argparse
import operator
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LINE = re.compile(r'([\w.-]+)==([\w.]+)\s*(?:;\s*python_version\s*(<|>=)\s*"([\d.]+)")?')
OLDEST_TORCH = (2, 4)


def read_requirements(path: Path) -> dict[str, str]:
    """Pins of a requirement file and of those it includes, for the running python.

    Args:
        path: file of lines `name==version`, optionally with a `python_version` marker, and `-r other.txt`.
    Returns:
        Package name -> pinned version.
    Raises:
        ValueError: for a line of any other form.
    """
    pins: dict[str, str] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        if line.startswith("-r "):
            pins.update(read_requirements(path.parent / line[3:].strip()))
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path} line {number}: cannot read {line!r}. Expected name==version.")
        name, pin, sign, bound = match.groups()
        holds = {"<": operator.lt, ">=": operator.ge}.get(sign or "")
        if holds is None or holds(sys.version_info[:2], numbers(bound)):
            pins[name] = pin
    return pins


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` -> (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*", text).group().split(".") if part)


def problem(name: str, pin: str, torch_build: str | None) -> str | None:
    """What is wrong with an installed package, or None.

    Args:
        name: package name.
        pin: tested version. This or a later major version will do; torch needs 2.4 or newer.
        torch_build: `cuda` refuses a torch that is marked as a CPU build; None accepts any build.
    Returns:
        A line for the user, or None when the package will do.
    """
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"{name}: not installed (tested version {pin})"
    if name == "torch":
        if numbers(found)[:2] < OLDEST_TORCH:
            return f"torch: {found} is installed, 2.4 or newer is needed"
        if torch_build == "cuda" and found.endswith("+cpu"):
            return f"torch: {found} is a build without CUDA"
        return None
    if numbers(found)[:1] < numbers(pin)[:1]:
        return f"{name}: {found} is installed, {pin} is the tested version"
    return None


def main() -> int:
    """Check the files of the command line; 0 when everything is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default=None, help="cuda: a torch built for CPU only does not count (default: any)")
    parser.add_argument("files", nargs="+", type=Path, help="requirement files")
    args = parser.parse_args()
    pins: dict[str, str] = {}
    for file in args.files:
        pins.update(read_requirements(file))
    problems = [text for name, pin in pins.items() if (text := problem(name, pin, args.torch))]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
