#!/usr/bin/env bash
# Usage: test_torch.sh PYTHON "TORCH" [PYTEST ARGUMENTS]
#
# Runs the library's tests with another torch, e.g. "torch==2.14.1" (pip's options may follow it), in an environment of its own,
# .venv-torch-2.14.1, and on a copy of the tree in there: what is compiled here stays. The operations are compiled for the CPU, or
# left out with FAM_EXT_BUILD=0. Tests of packaging, the benchmarks, the study, the documents and the examples are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1 torch=$2
shift 2
name=${torch%% *}
folder=$PWD/.venv-$(sed 's/==/-/; s/[^A-Za-z0-9._-]//g' <<<"$name")
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
export FAM_EXT_BUILD=${FAM_EXT_BUILD:-1} FAM_EXT_CUDA=${FAM_EXT_CUDA:-0} OMP_NUM_THREADS=1

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
"$folder/bin/python" -c 'import torch' 2>/dev/null || {
    "${pip[@]}" install -q "setuptools>=77" wheel ninja
    # shellcheck disable=SC2086
    "${pip[@]}" install $torch
}

tree=$folder/tree # compiled files stay in tree/build from one run to the next
mkdir -p "$tree"
find "$tree" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
for path in *; do
    case $path in build | dist | out | *.egg-info) ;; *) cp -pR "$path" "$tree" ;; esac
done
cd "$tree"
find . -path ./build -prune -o \( -name '_C*.so' -o -name _build.json -o -name __pycache__ \) -print0 | xargs -0 rm -rf

"$folder/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$folder/constraints.txt"
FAM_EXT_BUILD=0 "${pip[@]}" install -q --no-build-isolation --no-deps -e .
"$folder/bin/python" tools/extras.py test >"$folder/tools.txt"
"${pip[@]}" install -q -c "$folder/constraints.txt" -r "$folder/tools.txt"
[ "$FAM_EXT_BUILD" = 0 ] || {
    PATH=$folder/bin:$PATH "$folder/bin/python" setup.py -q build_ext --inplace >"$folder/compile.log" 2>&1 || {
        cat "$folder/compile.log"
        exit 1
    }
}
left_out=()
for part in packaging bench docs examples cuda studies; do left_out+=(--ignore="tests/$part"); done
exec "$folder/bin/python" -m pytest -n auto --dist loadfile "${left_out[@]}" "$@"
