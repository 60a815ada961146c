#!/bin/sh
# Find or make a python environment and print the path of its python; messages go to stderr.
#
#   PYTHON=$(sh scripts/setup_env.sh GROUP...)       a GROUP is a file requirements/GROUP.txt: demo, train, seg, sd3, test
#
# The active python (virtual environment, conda, or python3) is used when it has the packages, of the pinned or a later
# major version. Otherwise .venv is created in the repository and gets what is missing; the second run takes well under a second.
#
#   PYTHON=python3.12          the python to look at and to build .venv from
#   TISYNTH_TORCH=cpu|cuda|URL the torch build, or the package index to take it from (default: cuda when nvidia-smi finds a GPU)
#   VENV=.venv                 where the environment goes
set -eu
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "setup: $*" >&2; }
die() { say "error: $*"; exit 2; }

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-python3 python python3.12 python3.13 python3.11 python3.10 python3.14}; do
        if is_supported "$candidate"; then command -v "$candidate"; return; fi
    done
    die "no usable python found (looked for: ${PYTHON:-python3, python, python3.10 ... python3.14}). Python 3.10 to 3.14 is needed." \
        "Install one (for example: apt install python3 python3-venv, or conda env create -f environment.yml), or name it: PYTHON=/path/to/python3."
}

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

choose_torch() {
    if [ -n "${TISYNTH_TORCH:-}" ]; then echo "$TISYNTH_TORCH"
    elif has_gpu; then echo cuda
    elif [ "$(uname -s)" = Linux ]; then echo cpu
    else echo default # macOS wheels have no CUDA variant
    fi
}

create_venv() {
    say "creating $VENV with $1"
    # A torch that the machine has already is reused: .venv then sees the machine's packages below its own.
    reuse=
    if "$1" -c 'import sys, importlib.metadata as m; m.version("torch"); sys.exit(sys.prefix != sys.base_prefix)' 2>/dev/null; then
        reuse=--system-site-packages
        say "  on top of the machine's packages, since torch is among them"
    fi
    "$1" -m venv $reuse "$VENV" >&2 || {
        rm -rf "$VENV"
        die "$1 cannot create a virtual environment (message above). On Debian and Ubuntu: apt install python3-venv. Then run this again."
    }
}

install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2; }

install_torch() {
    version=$(sed -n 's/^torch==//p' requirements/torch.txt)
    if [ -n "${TISYNTH_TORCH:-}" ]; then why="TISYNTH_TORCH=$TISYNTH_TORCH"
    elif [ "$1" = cuda ]; then why="GPU found (nvidia-smi)"
    else why="no GPU found (nvidia-smi)"; fi
    case $1 in
    cpu) # "+cpu" can never match the CUDA build, which is several gigabytes
        say "$why: installing the CPU build of torch $version. Set TISYNTH_TORCH=cuda for the CUDA build."
        if install "torch==$version+cpu" 2>/dev/null; then
            say "  taken from pip's configured sources"
        else
            say "  pip's configured sources have no CPU build for this python; taking it from $CPU_INDEX"
            install "torch==$version+cpu" --index-url "$CPU_INDEX" ||
                die "the CPU build of torch $version could not be installed (message above). Check the network, or name an index: TISYNTH_TORCH=https://..."
        fi ;;
    cuda) # "===" matches the text exactly: a wheel marked +cpu in pip's configured sources is passed over
        say "$why: installing the CUDA build of torch $version (several gigabytes). Set TISYNTH_TORCH=cpu for the small one."
        install "torch===$version" || install "torch==$version" || die "torch $version could not be installed (message above)." ;;
    default)
        say "installing torch $version"
        install "torch==$version" || die "torch $version could not be installed (message above)." ;;
    *)
        say "installing torch $version from $1 (TISYNTH_TORCH)"
        install "torch==$version" --index-url "$1" || die "torch $version could not be installed from $1 (message above)." ;;
    esac
}

[ $# -gt 0 ] || die "no group given. Usage: PYTHON=\$(sh scripts/setup_env.sh GROUP...), groups: demo, train, seg, sd3, test."
files=requirements/torch.txt
for group in "$@"; do
    [ -f "requirements/$group.txt" ] || die "unknown group $group: there is no requirements/$group.txt. Groups: demo, train, seg, sd3, test."
    files="$files requirements/$group.txt"
    if [ -f "requirements/$group.nodeps.txt" ]; then files="$files requirements/$group.nodeps.txt"; fi
done

base=$(find_python) || exit 2
# shellcheck disable=SC2086 # file names without spaces
if "$base" scripts/check_environment.py $files >/dev/null; then echo "$base"; exit; fi

torch_build=$(choose_torch)
stamp="$torch_build $(cat requirements/*.txt | cksum)"
stamp_file=$VENV/setup-$(echo "$*" | tr ' ' '-')
if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp_file" 2>/dev/null)" = "$stamp" ]; then echo "$VENV/bin/python"; exit; fi

say "environment for: $* (only what is missing is installed)"
[ -x "$VENV/bin/python" ] || create_venv "$base"
"$VENV/bin/python" scripts/check_environment.py --torch "$torch_build" requirements/torch.txt >/dev/null || install_torch "$torch_build"
"$VENV/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$VENV/keep-torch.txt"
say "installing the packages of requirements/ ..."
for file in ${files#* }; do
    case $file in *.nodeps.txt) flag=--no-deps ;; *) flag= ;; esac
    install $flag -r "$file" -c "$VENV/keep-torch.txt" ||
        die "$file could not be installed (message above). Check the network and pip's settings (pip config list), then run this again."
done
say "$("$VENV/bin/python" -c 'import torch; print("torch", torch.__version__, "ready; GPU:", torch.cuda.is_available())')"
echo "$stamp" >"$stamp_file"
echo "$VENV/bin/python"
