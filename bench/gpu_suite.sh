#!/usr/bin/env bash
# Everything that needs a GPU, without the network, in two calls of at most 9 minutes each:
#
#     bench/gpu_suite.sh 1 [PYTHON]      build, tests of the operations and of the device
#     bench/gpu_suite.sh 2 [PYTHON]      build (kept from the first call), Triton's tests, compute-sanitizer, benchmarks
#     bench/gpu_suite.sh 1 --dry         the parts and their bounds, nothing is run
#     bench/gpu_suite.sh 1 --rehearse [PYTHON]      the parts on the CPU, small, with what this tree has compiled
#
# PYTHON (default: python3) holds torch with CUDA, triton, pytest, hypothesis, numpy, setuptools, pip and ninja. The package is built
# for the GPUs of this machine into an environment of its own, as with `make ENV=`. Each part has a bound; one that fails does not
# stop the rest. Logs and CSV go to $OUT or bench/results/gpu, and from there into one archive, gpu-1.tar.gz or gpu-2.tar.gz. The table
# at the end has a line for each part; the exit status is 0 if all passed, 1 if one did not, 2 if this machine lacks something.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() { echo "usage: $0 1|2 [--dry | --rehearse] [PYTHON]" >&2; exit 2; }
call=${1:-} mode=run
[[ $call == [12] ]] || usage
shift
case "${1:-}" in
    --dry) mode=dry; shift ;;
    --rehearse) mode=rehearse; shift ;;
    -*) usage ;;
esac
python=$(command -v "${1:-python3}" || echo "${1:-python3}")
out=$(realpath -m "${OUT:-bench/results/gpu}")
env_python=.venv-env/bin/python device=cuda
[ "$mode" != rehearse ] || { env_python=$python device=cpu; }
limit=540 bounds=0
shorten=${SHORTEN:-1} # a rehearsal of a part that takes too long
names=() statuses=() times=() remarks=()
# one thread for each process: as many test files as cores run side by side
export CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1

part() { # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2 start status
    shift 2
    bounds=$((bounds + seconds))
    if [ "$mode" = dry ]; then
        printf '%-12s %4d s  %s\n' "$name" "$seconds" "$*"
        return
    fi
    start=$SECONDS
    echo "== $name (at most $seconds s) -> $out/$name.log"
    timeout -k 5 $(((seconds + shorten - 1) / shorten)) "$@" >"$out/$name.log" 2>&1
    status=$?
    names+=("$name")
    times+=($((SECONDS - start)))
    remarks+=("$(grep -v '^ *$' "$out/$name.log" | tail -n 1 | tr -d '=' | cut -c1-90)")
    case $status in
        0) statuses+=(passed) ;;
        124 | 137) statuses+=("out of time") ;;
        *) statuses+=("failed ($status)") ;;
    esac
}

missing() { # what this machine lacks, a line each
    command -v "$python" >/dev/null || { echo "python: $python is no command"; return; }
    command -v make >/dev/null || echo "make"
    command -v "${CXX:-c++}" >/dev/null || echo "a C++ compiler: ${CXX:-c++}"
    [ "$device" = cpu ] || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || command -v nvcc >/dev/null || echo "nvcc (CUDA_HOME or PATH)"
    "$python" - "$device" <<'PYTHON'
import importlib.util
import sys

for name in ("torch", "pytest", "hypothesis", "numpy", "setuptools", "pip", "ninja", *["triton"] * (sys.argv[1] == "cuda")):
    if importlib.util.find_spec(name) is None:
        print(f"{name}: not installed for this python")
if importlib.util.find_spec("torch") is not None and sys.argv[1] == "cuda":
    import torch

    if torch.version.cuda is None:
        print(f"torch with CUDA: this is torch {torch.__version__}")
    elif not torch.cuda.is_available():
        print("a GPU: torch sees none")
PYTHON
}

one_file() { # one_file PATH: a process and a log of its own; a CUDA error in one file leaves the others alone
    local file=$1 log status workers=() few=()
    [ "$device" = cuda ] || few=(-k "${REHEARSE:-schedules or full_hessian}")
    log=${file#tests/} log=$out/$(tr / _ <<<"${log%.py}").log
    if [[ $file == tests/kernels/* ]]; then # Triton compiles on the CPU, a kernel for every dtype and shape: in several processes
        "$env_python" -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)")
        "$env_python" -m pytest "$file" -p no:cacheprovider "${workers[@]}" "${few[@]}" >"$log" 2>&1
    else
        FAM_EXT_TEST_DEVICE=$device "$env_python" -m pytest "$file" -p no:cacheprovider -m "on_devices or gpu" "${few[@]}" >"$log" 2>&1
    fi
    status=$?
    case $status in 0 | 5) ;; *) echo "failed ($status): $file"; return 1 ;; esac # 5: nothing of the file is left here
}

all_files() { # all_files PATH...: side by side, and the sum of their results
    local status=0 file
    printf '%s\n' "$@" | xargs -P "$(nproc)" -I FILE bash -c 'one_file FILE' || status=1
    for file in "$@"; do file=${file#tests/}; tail -n 1 "$out/$(tr / _ <<<"${file%.py}").log"; done |
        grep -oE '[0-9]+ (passed|failed|errors?|skipped)' |
        awk '{ sum[$2] += $1 } END { for (word in sum) printf "%d %s  ", sum[word], word; print "" }'
    return $status
}

tests() { # the files that hold tests with the marker on_devices or gpu
    local files
    mapfile -t files < <(FAM_EXT_TEST_DEVICE=$device "$env_python" -m pytest tests --collect-only -q -p no:cacheprovider \
        -m "on_devices or gpu" --ignore=tests/kernels | grep -oE '^tests/[^:]+\.py' | sort -u | grep -v '^tests/test_other_device.py$')
    echo "${#files[@]} files"
    [ "${#files[@]}" -gt 0 ] || return 1
    [ "$device" = cuda ] || files=(tests/test_schedules.py tests/ops/test_softmax_trace.py)
    all_files "${files[@]}"
}

triton() {
    "$env_python" - <<'PYTHON' || return 0
import importlib.metadata as metadata
import sys

import numpy

try:
    version = metadata.version("triton")
except metadata.PackageNotFoundError:
    sys.exit("Triton is not installed: skipped")
print("triton", version, "numpy", numpy.__version__)
PYTHON
    # on the CPU in the interpreter, which in Triton 3.6 fails with NumPy 2.5
    if [ "$device" = cuda ]; then export FAM_EXT_TEST_TRITON=gpu; else export TRITON_INTERPRET=1 REHEARSE=leaves_the_kernels; fi
    all_files tests/kernels/test_*.py
}

sanitize() { # sanitize TOOL: every kernel once, on small sizes
    local tool
    [ "$device" = cuda ] || { "$env_python" bench/gpu_kernels.py cpu; return; }
    tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    [ -x "$tool" ] || { echo "compute-sanitizer is not installed"; return 1; }
    # torch's allocator hands out parts of large blocks, past whose ends nothing is seen; other libraries' kernels are theirs
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --kernel-name kns=fam_ext --error-exitcode 9 --print-limit 20 \
        "$env_python" bench/gpu_kernels.py
}

benchmarks() { "$env_python" bench/gpu.py --out "$out" $([ "$device" = cuda ] || echo --rehearse); }

build() { # FORCE_CUDA: no kernels would be an error, not a suite that tests nothing
    if [ "$device" = cuda ]; then FORCE_CUDA=1 MAX_JOBS=$(nproc) make setup ENV="$python"; else make -n setup ENV="$python" | tail -n 1; fi
}

if [ "$mode" != dry ]; then
    lacks=$(missing)
    if [ -n "$lacks" ]; then
        echo "$0: this machine lacks"
        echo "$lacks" | sed 's/^/  - /'
        exit 2
    fi
    mkdir -p "$out"
    rm -f "$out"/*.log "$out/gpu-$call.tar.gz"
fi
export -f one_file all_files tests triton sanitize benchmarks build
export out env_python device python

part build 180 bash -c build
part info 30 "$env_python" -m fam_ext
if [ "$call" = 1 ]; then
    part tests 300 bash -c tests
else
    part triton 120 bash -c triton
    part memcheck 60 bash -c "sanitize memcheck"
    part racecheck 50 bash -c "sanitize racecheck"
    part bench 100 bash -c benchmarks
fi
[ "$bounds" -le "$limit" ] || { echo "the bounds sum to $bounds s, more than $limit s" >&2; exit 2; }
if [ "$mode" = dry ]; then
    echo "at most $bounds s in all"
    exit 0
fi

[ ! -f "$out/bench.log" ] || cat "$out/bench.log"
echo
"$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "torch", torch.__version__)'
worst=0
{
    printf '%-12s %-13s %6s  %s\n' part result time "last line of its log"
    for k in "${!names[@]}"; do
        printf '%-12s %-13s %4d s  %s\n' "${names[$k]}" "${statuses[$k]}" "${times[$k]}" "${remarks[$k]}"
        [ "${statuses[$k]}" = passed ] || worst=1
    done
} >"$out/summary-$call.txt"
for k in "${!names[@]}"; do [ "${statuses[$k]}" = passed ] || worst=1; done
cat "$out/summary-$call.txt"
(cd "$out" && tar czf "gpu-$call.tar.gz" --exclude='*.tar.gz' ./*.log ./*.csv "summary-$call.txt" 2>/dev/null)
rm -f "$out"/*.log
echo "logs: $out/gpu-$call.tar.gz"
exit $worst
