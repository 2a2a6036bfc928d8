#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without the network, in at most 9 minutes:
#
#     bench/gpu_suite.sh [PYTHON]      PYTHON (default: python3) holds torch with CUDA, triton, pytest, hypothesis, setuptools, pip, ninja
#     bench/gpu_suite.sh --dry         the parts and their bounds, nothing is run
#     bench/gpu_suite.sh --rehearse    the machinery with stand-ins for the parts
#
# Builds the package for the GPUs of this machine (into an environment of its own, as `make ENV=`), runs the tests on the GPU, a few
# of them under compute-sanitizer, and the benchmarks. Each part has a bound; one that fails does not stop the rest. Logs and CSV go
# to $OUT or bench/results/gpu. The table at the end has a line per part; the exit status is 0 if all passed, 1 if one did not, 2 if
# this machine lacks something.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mode=run python=python3
case "${1:-}" in
    --dry) mode=dry ;;
    --rehearse) mode=rehearse ;;
    -*) echo "usage: $0 [PYTHON | --dry | --rehearse]" >&2; exit 2 ;;
    ?*) python=$1 ;;
esac
python=$(command -v "$python" || echo "$python")
out=$(realpath -m "${OUT:-bench/results/gpu}")
env_python=.venv-env/bin/python
limit=540 bounds=0
names=() statuses=() times=() remarks=()
export CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1

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
    timeout -k 5 "$seconds" "$@" >"$out/$name.log" 2>&1
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
    [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || command -v nvcc >/dev/null || echo "nvcc (CUDA_HOME or PATH)"
    "$python" - <<'PYTHON'
import importlib.util

for name in ("torch", "triton", "pytest", "hypothesis", "expecttest", "numpy", "setuptools", "pip", "ninja"):
    if importlib.util.find_spec(name) is None:
        print(f"{name}: not installed for this python")
if importlib.util.find_spec("torch") is not None:
    import torch

    if torch.version.cuda is None:
        print(f"torch with CUDA: this is torch {torch.__version__}")
    elif not torch.cuda.is_available():
        print("a GPU: torch sees none")
PYTHON
}

tests() { # the operations' files side by side: each is a process with its own log
    local status=0 file log triton pids=() files=()
    for file in $(grep -rl --include='test_*.py' mark.on_devices tests) tests/cuda/test_device.py tests/kernels/test_*.py; do
        [[ $file == tests/test_other_device.py ]] && continue
        files+=("$file")
        log=${file#tests/}
        triton=$([[ $file == */kernels/* ]] && echo gpu)
        FAM_EXT_TEST_TRITON=$triton "$env_python" -m pytest "$file" -p no:cacheprovider -k "cuda or device" \
            >"$out/$(tr / _ <<<"${log%.py}").log" 2>&1 &
        pids+=($!)
    done
    for k in "${!pids[@]}"; do
        wait "${pids[$k]}"
        case $? in
            0 | 5) ;; # 5: nothing in the file is about a device
            *) status=1; echo "failed: ${files[$k]}" ;;
        esac
    done
    grep -hE '[0-9]+ (passed|failed|error)' "$out"/*test_*.log | grep -oE '[0-9]+ (passed|failed|errors?|skipped)' |
        awk '{ sum[$2] += $1 } END { for (word in sum) printf "%d %s  ", sum[word], word; print "" }'
    return $status
}

sanitize() { # sanitize TOOL: a small subset, every kernel in it
    local tool
    tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    [ -x "$tool" ] || { echo "compute-sanitizer is not installed"; return 1; }
    "$tool" --tool "$1" --error-exitcode 9 --print-limit 20 "$env_python" bench/gpu_kernels.py
}

if [ "$mode" = run ]; then
    lacks=$(missing)
    if [ -n "$lacks" ]; then
        echo "$0: this machine lacks"
        echo "$lacks" | sed 's/^/  - /'
        exit 2
    fi
fi
[ "$mode" = dry ] || mkdir -p "$out"
export -f tests sanitize
export out env_python

if [ "$mode" = rehearse ]; then
    part first 5 echo "one that passes"
    part second 5 bash -c 'echo "one that fails"; exit 3'
    part third 1 sleep 5
    part fourth 5 echo "one that comes after them"
else
    # FORCE_CUDA: no kernels would be an error, not a suite that tests nothing
    part build 180 env FORCE_CUDA=1 MAX_JOBS="$(nproc)" make setup ENV="$python"
    part info 20 "$env_python" -m fam_ext
    part tests 170 bash -c tests
    part memcheck 50 bash -c "sanitize memcheck"
    part racecheck 50 bash -c "sanitize racecheck"
    part bench 60 "$env_python" bench/gpu.py --out "$out"
fi
[ "$bounds" -le "$limit" ] || { echo "the bounds sum to $bounds s, more than $limit s" >&2; exit 2; }
if [ "$mode" = dry ]; then
    echo "at most $bounds s in all"
    exit 0
fi

[ ! -f "$out/bench.log" ] || cat "$out/bench.log"
echo
"$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)' 2>/dev/null
printf '%-12s %-13s %6s  %s\n' part result time "last line of its log"
worst=0
for k in "${!names[@]}"; do
    printf '%-12s %-13s %4d s  %s\n' "${names[$k]}" "${statuses[$k]}" "${times[$k]}" "${remarks[$k]}"
    [ "${statuses[$k]}" = passed ] || worst=1
done
exit $worst
