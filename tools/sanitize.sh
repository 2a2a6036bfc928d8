#!/usr/bin/env bash
# Usage: sanitize.sh PYTHON [PYTEST ARGUMENTS]      files, or tests of them (file::name), are run instead of tests/ops
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
    if [ -e "${argument%%::*}" ]; then files+=("$root/$argument"); else arguments+=("$argument"); fi
done
[ "${#files[@]}" -gt 0 ] || files=("$root/tests/ops")
mkdir -p "$out/reports"
rm -f "$out"/reports/*
PATH=$(dirname "$python"):$PATH FAM_EXT_SANITIZE=1 FAM_EXT_CUDA=0 "$python" setup.py -q build --build-base "$out" --build-lib "$out/lib" \
    >"$out/compile.log" 2>&1 || { cat "$out/compile.log"; exit 1; }

cat >"$out/overflow.cpp" <<'CPP'
extern "C" int read_past(int n) { int* p = new int[n]; int last = p[n]; delete[] p; return last; }
CPP
library() { realpath "$(${CXX:-c++} -print-file-name="$1")"; }
# python keeps memory to the end, which is no leak; libstdc++ comes first so that exceptions are seen
sanitized() {
    env LD_PRELOAD="$(library libasan.so):$(library libstdc++.so)" PYTHONPATH="$out/lib" PYTHONMALLOC=malloc OMP_NUM_THREADS=2 \
        ASAN_OPTIONS="detect_leaks=0:log_path=$out/reports/address" \
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:log_path=$out/reports/undefined" "$python" "$@"
}
status=0
cd "$out" # not the root, where fam_ext is the library that is compiled there
${CXX:-c++} -shared -fPIC -fsanitize=address overflow.cpp -o overflow.so
sanitized -c 'import ctypes; ctypes.CDLL("./overflow.so").read_past(5)' && { echo "the sanitizer sees no overflow here"; exit 1; }
grep -q heap-buffer-overflow reports/* || { echo "the sanitizer reports nothing here"; exit 1; }
rm reports/*
sanitized -c 'import fam_ext, sys; from fam_ext.ops import backends as b; print(b.__file__); sys.exit(b.native_reason())'
sanitized -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -k "not compile and not inductor" \
    "${files[@]}" "${arguments[@]}" || status=$?
cat "$out"/reports/* 2>/dev/null || echo "no report of a sanitizer"
exit $status
