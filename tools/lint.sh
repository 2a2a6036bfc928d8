#!/usr/bin/env bash
# Usage: lint.sh PYTHON [ENV]. With ENV, an environment that nothing is installed into, missing tools are skipped.
set -uo pipefail
status=0
folders=()
for python in "$@"; do folders+=("$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"); done

check() { # check TOOL ARGUMENTS...
    local tool=$1 folder
    shift
    for folder in "${folders[@]}"; do
        if [ -x "$folder/$tool" ]; then
            echo "$tool $1"
            "$folder/$tool" "$@" || status=1
            return
        fi
    done
    echo "$tool is not installed: skipped"
    [ "${#folders[@]}" -gt 1 ] || status=1
}

check ruff check
check ruff format --check
check mypy --strict fam_ext
mapfile -t sources < <(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | sort)
check clang-format --dry-run -Werror "${sources[@]}"
exit $status
