#!/usr/bin/env bash
# python_env.sh [PYTHON]: create .venv with the packages of requirements-dev.txt, from PYTHON or any CPython 3.8 to 3.10
# found; nnabla has wheels for these versions only. Do nothing if .venv is up to date. Without such a Python, print what
# to install and exit with status 2.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${1:-}
stamp=.venv/made-by-make    # requirements of .venv; empty until all are installed
wanted=$(cat requirements.txt requirements-dev.txt)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

fail() {
    echo "$1" >&2
    exit 2
}

# Print the version and prefix of the Python "$1"; fail if it is unsuitable or does not run (unselected pyenv shims).
identify() {
    "$1" -c 'import sys
usable = sys.implementation.name == "cpython" and (3, 8) <= sys.version_info[:2] <= (3, 10)
sys.exit(not usable or print("Python %d.%d.%d" % sys.version_info[:3], "in", sys.base_prefix))' 2> /dev/null
}

candidates() {
    for version in 3.10 3.9 3.8; do
        type -aP "python$version"
        ls -d {"${PYENV_ROOT:-}",~/.pyenv}/versions/"$version".*/bin/"python$version" 2> /dev/null
    done
}

empty_venv() {
    rm -rf .venv && mkdir .venv && touch "$stamp"
}

# Debian's Python may lack the module venv, or the pip that venv installs.
with_venv() {
    empty_venv && "$1" -m venv .venv && .venv/bin/python -m pip --version
} &> /dev/null

# uv needs neither, and can often download an interpreter. If uv is missing, install it with the pip of any Python.
with_uv() {
    uv=$(type -P uv) && "$uv" --version || for any in $(type -aP python3); do
        "$any" -m venv "$scratch/env" && any=$scratch/env/bin/python
        "$any" -m pip install --timeout 10 --retries 1 --target "$scratch" uv && uv=$scratch/bin/uv && break
    done
    empty_venv && UV_HTTP_RETRIES=1 timeout 300 "$uv" venv --allow-existing --seed --python "$1" .venv \
        && .venv/bin/python -m pip --version
} &> /dev/null

if [ -n "$python" ]; then
    chosen=$(identify "$python") || fail "PYTHON=$python is not CPython 3.8 to 3.10, which nnabla needs"
fi
if [ "$(cat "$stamp" 2> /dev/null)" = "$wanted" ] && present=$(identify .venv/bin/python) \
        && [ "${chosen:-$present}" = "$present" ]; then
    exit 0
fi
if [ -e .venv ] && [ ! -e "$stamp" ] && ! rmdir .venv 2> /dev/null; then
    fail ".venv was not created by make: move or remove it, then try again"
fi

made='' without_venv=''
while read -r candidate; do
    identify "$candidate" > /dev/null || continue
    with_venv "$candidate" && made=yes && break
    without_venv=${without_venv:-$candidate}
done < <(if [ -n "$python" ]; then echo "$python"; else candidates; fi)
if [ -z "$made" ] && ! with_uv "${python:->=3.8,<3.11}"; then
    rm -rf .venv
    [ -z "$without_venv" ] || fail "$without_venv has no venv: install ${without_venv##*/}-venv (apt) or uv"
    fail "no Python 3.8 to 3.10 found; nnabla has wheels for no other: install python3.10 (apt, pyenv) or uv"
fi

echo "Setting up .venv with $(identify .venv/bin/python): about a minute"
# Without --no-compile, pip compiles all of each package, of which little is imported. Python keeps what it compiles at
# the first import, unless it is told not to.
install() {
    .venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check "$@" \
        || fail "pip install $* failed in .venv; see pip's message above"
}
unset PYTHONDONTWRITEBYTECODE
install "pip>=20.3"     # older versions do not support the platform tag of nnabla's wheels

# First what a training step imports. Compiling it takes one core, and longer than all that follows beside it.
install --constraint=requirements.txt nnabla numpy h5py scipy numba opencv-python-headless pillow PyYAML threadpoolctl \
    tqdm
.venv/bin/python tools/compile.py training &> /dev/null &
compiling=$!
trap 'kill "$compiling" 2> /dev/null; rm -rf "$scratch"' EXIT
install --requirement=requirements-dev.txt
.venv/bin/python tools/compile.py scripts &> /dev/null      # if compiling fails, the first run reports why
wait "$compiling"
echo "$wanted" > "$stamp"
