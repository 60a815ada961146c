"""The habits of the house that a program can check: who imports whom, what an import may do, file sizes, scripts."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ldm", "cldm", "post_processing", "scripts")
FILES = sorted([path for package in PACKAGES for path in (ROOT / package).rglob("*.py")] + list(ROOT.glob("*.py")))
SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh")])
LIGHTNING_FILES = ("ldm/training/module.py", "ldm/data/datamodule.py", "ldm/training/callbacks.py",
                   "ldm/training/average.py", "ldm/training/budget.py", "train.py")
# package -> prefixes of our own modules that it may import; a longer package name wins
MAY_IMPORT = {
    "ldm": ("ldm.util", "ldm.files"),
    "ldm.weights": ("ldm.weights", "ldm.util", "ldm.files", "ldm.methods", "ldm.diffusion"),  # names of a schedule
    "ldm.modules": ("ldm.modules", "ldm.util", "ldm.files", "ldm.weights.files"),
    "ldm.diffusion": ("ldm.diffusion", "ldm.util"),
    "ldm.data": ("ldm.data", "ldm.util", "ldm.files", "ldm.run_folder", "ldm.cli"),
    "ldm.sampling": ("ldm.sampling", "ldm.diffusion", "ldm.util"),
    "ldm.methods": ("ldm.methods", "ldm.modules", "ldm.diffusion", "ldm.sampling", "ldm.data", "ldm.util"),
    "ldm.training": ("ldm",),
    "ldm.generation": ("ldm",),
    "cldm": ("cldm", "ldm"),
    # Wide on purpose: where it could not reach a helper, it grew a second copy.
    "post_processing": ("post_processing", "ldm.data", "ldm.util", "ldm.files", "ldm.run_folder", "ldm.ray_pool",
                        "ldm.sheet", "ldm.cli",
                        "ldm.modules.perceptual", "ldm.weights.files", "ldm.generation.machine"),
    "scripts": ("scripts", "post_processing", "cldm", "ldm", "train", "inference"),  # gpu_check runs the entry points
    "train": ("cldm", "ldm"),
    "inference": ("cldm", "ldm"),
}
SLOW = {"mmseg", "mmengine", "mmcv", "open_clip", "diffusers", "transformers", "torchmetrics", "peft", "timm", "cv2"}
LIGHTNING = {"pytorch_lightning", "lightning"}
MAX_LINES = 500


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


def imported_modules(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the file is imported, those in class bodies and `if` and `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from top_level(node.orelse)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While, ast.ClassDef)):
            for field in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, field, []))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path):
    module = name_of(path).removesuffix(".py").replace("/", ".")
    package = max((p for p in MAY_IMPORT if module == p or module.startswith(p + ".")), key=len)
    for node in ast.walk(parse(path)):
        for name in imported_modules(node):
            if name.split(".")[0] in (*PACKAGES, "train", "inference"):
                allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in MAY_IMPORT[package])
                assert allowed, f"{name_of(path)}:{node.lineno}: {package} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_slow_packages_are_imported_late(path: Path):
    tree = parse(path)
    for node in ast.walk(tree):
        for name in imported_modules(node):
            if name.split(".")[0] in LIGHTNING:
                assert name_of(path) in LIGHTNING_FILES, f"{name_of(path)}:{node.lineno}: imports {name}"
            assert name.split(".")[0] != "torchvision", f"{name_of(path)}:{node.lineno}: see requirements/demo.txt"
    for node in top_level(tree.body):
        late = SLOW | (LIGHTNING if name_of(path) == "train.py" else set())
        for name in imported_modules(node):
            assert name.split(".")[0] not in late, f"{name_of(path)}:{node.lineno}: import {name} inside a function"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_import_has_no_side_effect(path: Path):
    for node in top_level(parse(path).body):
        where = f"{name_of(path)}:{node.lineno}: runs at import: {ast.unparse(node)[:80]}"
        if isinstance(node, ast.Expr):
            # A script may add the repository to the path, so that `python scripts/x.py` works as well as `-m`.
            is_path = name_of(path).startswith("scripts/") and ast.unparse(node).startswith("sys.path.insert(")
            assert isinstance(node.value, ast.Constant) or is_path, where
        assert not isinstance(node, (ast.For, ast.While, ast.With, ast.Delete, ast.AugAssign)), where
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assert all(isinstance(part, (ast.Name, ast.Tuple)) for part in targets), where
            assert not re.search(r"mkdir|os\.environ|\.cuda\(|manual_seed|\bopen\(", ast.unparse(node)), where


def test_packages_have_empty_init_files():
    for package in PACKAGES:
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        for folder in folders:
            init = folder / "__init__.py"
            assert init.is_file() and not init.read_bytes(), f"{name_of(init)}: expected an empty file"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name_of(path)}: {lines} lines, at most {MAX_LINES}"


def parsed_flags(tree: ast.Module) -> Iterator[str]:
    """The `dest` of every argument, also of those added through a local name such as `add = parser.add_argument`."""
    aliases = {
        target.id
        for node in ast.walk(tree) if isinstance(node, ast.Assign) and ast.unparse(node.value).endswith("add_argument")
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        if getattr(node.func, "attr", "") != "add_argument" and getattr(node.func, "id", "") not in aliases:
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if "dest" in keywords:
            yield ast.literal_eval(keywords["dest"])
            continue
        names = [ast.literal_eval(argument) for argument in node.args]
        long = [name for name in names if name.startswith("--")] or names
        yield long[0].lstrip("-").replace("-", "_")


# entry -> files that read its `args` too
READERS = {"inference.py": [f"ldm/generation/{name}.py" for name in ("plan", "generator", "worker")],
           "scripts/train_segmentor.py": ["post_processing/segmentation/training.py",
                                          "post_processing/segmentation/dlc_training.py",
                                          "post_processing/segmentation/self_training.py"],
           "post_processing/resample.py": ["post_processing/segmentation/segmentor.py"],
           "scripts/measure_gain.py": [f"post_processing/gain/{name}.py" for name in ("plan", "report", "sets")]}
ENTRIES = ["train.py", "inference.py", "post_processing/filter.py", "post_processing/resample.py",
           "scripts/measure_gain.py", "scripts/train_segmentor.py"]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_flag_is_read(entry: str):
    tree = parse(ROOT / entry)
    flags = list(parsed_flags(tree))
    trees = [tree, *(parse(ROOT / name) for name in READERS.get(entry, ()))]
    read = {
        node.attr for part in trees for node in ast.walk(part)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in ("args", "settings")
    }  # fmt: skip
    read.add("debug")  # by ldm.util.run_entry_point, from the command line itself
    for node in (node for part in trees for node in part.body):  # flags that replace the config's, in a loop
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SETTINGS":
            read |= set(ast.literal_eval(node.value))
    assert len(flags) > 15
    assert not set(flags) - read, f"{entry}: parsed and never read: {sorted(set(flags) - read)}"


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_shell_scripts_are_posix(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/sh\n")
    shell = shutil.which("dash") or shutil.which("sh")
    done = subprocess.run([shell, "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = re.sub(r"(^|\s)#.*", "", text)
    for bashism in (r"\[\[", r"\bfunction\s+\w+", r"\bsource\s", r"<\(", r"<<<", r"&>", r"\$'", r"^\s*local\s",
                    r"\w+=\(", r"\$\{\w+\[", r"\$\{\w+//", r"pipefail", r"\$RANDOM", r"\[ [^]]* == "):  # fmt: skip
        found = re.search(bashism, code, re.MULTILINE)
        assert not found, f"{name_of(path)}: not POSIX: {found.group()!r}"


def test_setup_uses_an_environment_that_has_everything(tmp_path: Path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "requirements").mkdir()
    for name in ("setup_env.sh", "check_environment.py"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "requirements" / "torch.txt").write_text("torch==2.13.0\n")
    (tmp_path / "requirements" / "demo.txt").write_text("# comment\npytest==1000.0\n")
    command = ["sh", "scripts/setup_env.sh", "demo"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    major = pytest.__version__.split(".")[0]
    (tmp_path / "requirements" / "demo.txt").write_text(f"pytest=={major}.0.0\n")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, sys.executable, "")
    assert not (tmp_path / ".venv").exists()

    done = subprocess.run([*command, "nothing"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no requirements/nothing.txt" in done.stderr

    environment["PYTHON"] = "python-that-is-not-there"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Python 3.10 to 3.14 is needed" in done.stderr and not done.stdout


STUB = r"""#!/bin/sh
case "$*" in
*"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
*"-m pip install"*) echo "$*" >>pip.log; case "$*" in $FAIL) exit 1 ;; esac ;;
*check_environment*) exit 1 ;;
esac
"""
CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a CPU and a CUDA build")
@pytest.mark.parametrize(
    ("has_gpu", "forced", "fail", "expected"),
    [
        (False, "", "", ["torch==2.13.0+cpu"]),
        (False, "", "*+cpu", ["torch==2.13.0+cpu", f"torch==2.13.0+cpu {CPU_INDEX}"]),  # pip's own sources: only CUDA
        (False, "cuda", "", ["torch===2.13.0"]),
        (True, "", "", ["torch===2.13.0"]),
        (True, "cpu", "", ["torch==2.13.0+cpu"]),
        (True, "https://host/cu130", "", ["torch==2.13.0 --index-url https://host/cu130"]),
    ],
)
def test_setup_takes_the_right_torch(tmp_path: Path, has_gpu: bool, forced: str, fail: str, expected: list[str]):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "requirements").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "scripts" / "setup_env.sh", tmp_path / "scripts")
    (tmp_path / "requirements" / "torch.txt").write_text("torch==2.13.0\n")
    (tmp_path / "requirements" / "demo.txt").write_text("einops==1.0\n")
    answer = "echo 'GPU 0: some'" if has_gpu else "echo 'No devices were found'"  # the tool may be there without a GPU
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "bin" / "python").write_text(STUB)
    for file in (tmp_path / "bin").iterdir():
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYTHON": f"{tmp_path}/bin/python", "FAIL": fail}
    command = ["sh", "scripts/setup_env.sh", "demo"]
    environment |= {"TISYNTH_TORCH": forced} if forced else {}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path}/.venv/bin/python"
    lines = (tmp_path / "pip.log").read_text().splitlines()
    log = [line.partition("--disable-pip-version-check ")[2] for line in lines]
    assert [line for line in log if line.startswith("torch")] == expected
    assert log[-1].startswith("-r requirements/demo.txt")

    (tmp_path / "pip.log").unlink()  # the second run installs nothing
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.stdout == done.stdout and not (tmp_path / "pip.log").exists()


def test_check_environment_names_what_is_missing(tmp_path: Path):
    file = tmp_path / "some.txt"
    base = tmp_path / "base.txt"
    base.write_text('not-a-package==1.0 # reason\npytest==1.0; python_version < "3.0"\n')
    file.write_text("-r base.txt\nnumpy==1000.1\ntorch==2.13.0\n")
    command = [sys.executable, ROOT / "scripts" / "check_environment.py", file]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and len(lines) == 2
    assert lines[0].startswith("not-a-package: not installed") and lines[1].startswith("numpy: ")
    file.write_text("numpy>=2\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot read 'numpy>=2'" in done.stderr


def test_demo_inputs_are_drawn_by_the_committed_script(tmp_path: Path):
    shutil.copytree(ROOT / "demo" / "ref", tmp_path / "ref")
    command = [sys.executable, "-m", "demo.make.make_demo_masks", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from ldm.data.classes import ClassTable, read_mask
    from ldm.data.manifest import read_manifest

    table = ClassTable.load("mini")
    rows = read_manifest(ROOT / "demo" / "demo.json", ROOT / "demo", need=("reference", "prompt"), table=table)
    assert len({row.mask for row in rows}) == 4 and len(rows) == 4 * len(list((tmp_path / "ref").iterdir()))
    assert (tmp_path / "demo.json").read_text() == (ROOT / "demo" / "demo.json").read_text()
    for mask in {row.mask for row in rows}:
        assert (read_mask(mask, table) == read_mask(tmp_path / "label" / mask.name, table)).all()


def test_files_of_users_find_what_has_moved(tmp_path: Path):
    pytest.importorskip("mmengine")
    from ldm.methods.autoencoder import AutoencoderMethod
    from ldm.util import MOVED, current_path, locate
    from post_processing.segmentation.segmentor import read_config

    assert locate("ldm.models.autoencoder.AutoencoderMethod") is AutoencoderMethod
    for old, new in MOVED.items():
        assert current_path(old + "X") == new + "X" and (ROOT / (new[:-1].replace(".", "/") + ".py")).is_file()
    old = '{"a": [{"type": "post_processing.mixing.RatioSampler", "n": {"type": "X"}}]}'
    (tmp_path / "config.json").write_text(old)
    config = read_config(tmp_path / "config.json")
    assert config.a[0].type == "post_processing.segmentation.mixing.RatioSampler" and config.a[0].n.type == "X"
