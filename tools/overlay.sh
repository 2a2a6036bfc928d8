#!/usr/bin/env bash
# Usage: overlay.sh PYTHON FOLDER. Makes a virtual environment that sees the packages of PYTHON, itself perhaps one of a
# virtual environment, without writing to them and without the network.
set -euo pipefail
python=$1 folder=$2
"$python" -c 'import torch, setuptools, pip' || {
    echo "ENV=$python must be an interpreter that holds torch, setuptools and pip" >&2
    exit 1
}
rm -rf "$folder"
"$python" -m venv --without-pip "$folder"
"$python" - "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PYTHON'
import sys
from pathlib import Path

folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
lines = [f"import site; site.addsitedir({path!r})\n" for path in folders]
Path(sys.argv[1], "_parent_packages.pth").write_text("".join(lines))
PYTHON
