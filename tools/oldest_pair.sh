#!/usr/bin/env bash
# oldest_pair.sh: test against the authors' numbers on the oldest supported versions, Python 3.8 and nnabla 1.22.0, in a
# separate venv, .venv-oldest. Without Python 3.8, print a line and test nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nnabla=("nnabla==1.22.0" "numpy<1.24" "protobuf<3.21" h5py)    # nnabla 1.22.0 does not declare these bounds
venv=.venv-oldest
stamp=$venv/made-of         # requirements of the venv; written once all are installed
wanted=$(printf '%s\n' "${nnabla[@]}" && cat requirements.txt requirements-dev.txt)

# Print the paths of all python3.8, pyenv's included. pyenv's shims are among them, and may not run.
candidates() {
    type -aP python3.8 || true
    ls -d {"${PYENV_ROOT:-}",~/.pyenv}/versions/3.8.*/bin/python3.8 2> /dev/null || true
}

python=
while read -r candidate; do
    "$candidate" -c "import sys, venv; sys.exit(sys.version_info[:2] != (3, 8))" 2> /dev/null || continue
    python=$candidate && break
done < <(candidates)
if [ -z "$python" ]; then
    echo "no Python 3.8 with the module venv found: the oldest pair is not tested"
    exit 0
fi

if [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]; then
    echo "setting up $venv with $("$python" --version) and nnabla 1.22.0: about a minute"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    grep -h -v -E '^(nnabla|numpy|h5py)==|^-r' requirements.txt requirements-dev.txt > "$venv/others.txt"
    "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check "pip>=20.3"
    "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check -r "$venv/others.txt" "${nnabla[@]}"
    echo "$wanted" > "$stamp"
fi
unset PYTHONDONTWRITEBYTECODE       # so that each package is compiled once, as pip has compiled none
"$venv/bin/python" tools/compile.py training > /dev/null    # or each worker of pytest compiles it all

# The ids of all tests against the authors' numbers contain idr_reference, the name of the data file.
"$venv/bin/python" -m pytest --disable-warnings -k "test_network or idr_reference" \
    tests/test_network.py tests/test_ray_tracer.py tests/test_convert.py
