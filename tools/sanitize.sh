#!/usr/bin/env bash
# Usage: sanitize.sh PYTHON [PYTEST ARGUMENTS]      files among them are run instead of tests/ops
#
# Compiles csrc/ for the CPU with the address and undefined-behaviour sanitizers into build/sanitize, and runs the operations' tests
# with it. The first report ends the process that made it, and is printed at the end. torch itself is not instrumented: reads past
# its tensors are seen (its memory comes from the sanitizer's malloc), what happens within it is not. Compiling by torch.compile is
# left out: its compilers would run under the sanitizer, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath -s "$1")
shift
root=$PWD out=$PWD/build/sanitize
arguments=() files=()
for argument in "$@"; do
    if [ -e "$argument" ]; then files+=("$root/$argument"); else arguments+=("$argument"); fi
done
[ "${#files[@]}" -gt 0 ] || files=("$root/tests/ops")
mkdir -p "$out/reports"
rm -f "$out"/reports/*
PATH=$(dirname "$python"):$PATH FAM_EXT_SANITIZE=1 FAM_EXT_CUDA=0 "$python" setup.py -q build --build-base "$out" --build-lib "$out/lib" \
    >"$out/compile.log" 2>&1 || { cat "$out/compile.log"; exit 1; }

library() { realpath "$(${CXX:-c++} -print-file-name="$1")"; }
status=0
cd "$out" # not the root, where fam_ext is the library that is compiled there
# python keeps memory to the end, which is no leak; libstdc++ comes first so that exceptions are seen
env LD_PRELOAD="$(library libasan.so):$(library libstdc++.so)" PYTHONPATH="$out/lib" PYTHONMALLOC=malloc OMP_NUM_THREADS=2 \
    ASAN_OPTIONS="detect_leaks=0:log_path=$out/reports/address" \
    UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:log_path=$out/reports/undefined" \
    "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -k "not compile and not inductor" \
    "${files[@]}" "${arguments[@]}" || status=$?
cat "$out"/reports/* 2>/dev/null || echo "no report of a sanitizer"
exit $status
