"""Builds the distributions, and checks what can be checked of a release here: check_release.py PYTHON

PYTHON is an interpreter that holds torch; the packages are installed beside it in an environment of their own, without the
network. Run by `make check-release` in an environment with build, twine and PyYAML (the extra `release`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
CLEAN = ROOT / "build" / "release-source"
FRESH = ROOT / "build" / "release-check"
NOT_DISTRIBUTED = (".ci/", ".github/", ".gitignore", ".clang-format")
TRIAL = """
import importlib.metadata as metadata, torch, fam_ext
assert fam_ext.__file__.startswith({prefix!r}), fam_ext.__file__
assert metadata.version("fam_ext") == fam_ext.__version__ == {version!r}
assert metadata.metadata("fam_ext")["License-Expression"] == "Apache-2.0"
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), layer=model[2], strength=0.1)
loss = criterion(model(torch.randn(4, 6)), torch.tensor([0, 1, 2, 0]))
loss.backward()
assert criterion.last.flatness > 0 and model[0].weight.grad.abs().sum() > 0
print("   ", fam_ext.__version__, "native" if fam_ext.info().native else fam_ext.info().reason)
"""


def run(*command: str | Path, **options: str | Path) -> str:
    """Standard output; the whole output and an exit where the command fails."""
    environment = {**os.environ, "FAM_EXT_BUILD": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        env=environment,
        cwd=options.get("cwd", ROOT),
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def step(text: str) -> None:
    print(f"-- {text}", flush=True)


def version() -> str:
    names: dict[str, str] = {}
    exec((ROOT / "fam_ext" / "_version.py").read_text(), names)
    return names["__version__"]


def built() -> tuple[Path, Path]:
    """(source distribution, plain wheel made from it), from a copy of the repository's files.

    In the clone itself setuptools would add what an earlier build wrote down in fam_ext.egg-info.
    """
    for folder in (DIST, CLEAN):
        shutil.rmtree(folder, ignore_errors=True)
    for name in run("git", "ls-files").splitlines():
        (CLEAN / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, CLEAN / name)
    options = ("--no-isolation", "--skip-dependency-check", "--outdir", DIST)
    run(sys.executable, "-m", "build", *options, CLEAN)  # the wheel is made from the sdist
    (source,) = DIST.glob("*.tar.gz")
    (wheel,) = DIST.glob("*.whl")
    return source, wheel


def check_contents(source: Path, wheel: Path) -> None:
    """The source distribution holds every file of the repository but those of its host; the wheel the package alone."""
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files").splitlines()
    missing = [name for name in tracked if name not in names and not name.startswith(NOT_DISTRIBUTED)]
    if missing:
        sys.exit(f"MANIFEST.in leaves out of {source.name}: {', '.join(missing)}")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    if not wheel.name.endswith("-py3-none-any.whl"):
        sys.exit(f"the plain wheel is not pure Python: {wheel.name}")
    stray = {name.split("/")[0] for name in inside} - {"fam_ext", f"fam_ext-{version()}.dist-info"}
    modules = [name for name in tracked if name.startswith(("fam_ext/", "kernels/")) and name.endswith(".py")]
    absent = [
        name
        for name in modules
        if name.replace("kernels/", "fam_ext/kernels/") not in inside and name not in inside
    ]
    licence = f"fam_ext-{version()}.dist-info/licenses/LICENSE" in inside
    if stray or absent or not licence or "fam_ext/py.typed" not in inside:
        sys.exit(f"{wheel.name}: stray {stray}, absent {absent}, licence {licence}")


def check_install(python: str, distribution: Path) -> None:
    """Installed in a fresh environment beside torch, it trains a step from another folder."""
    shutil.rmtree(FRESH, ignore_errors=True)
    run("bash", ROOT / "tools" / "overlay.sh", python, FRESH)
    fresh = FRESH / "bin" / "python"
    run(fresh, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", distribution)
    trial = TRIAL.format(prefix=str(FRESH), version=version())
    print(run(fresh, "-c", trial, cwd=FRESH), end="")
    run(fresh, "-m", "fam_ext", cwd=FRESH)


def main() -> None:
    python = sys.argv[1]
    step("workflows parse")
    for path in sorted((ROOT / ".github").rglob("*.yml")):
        yaml.safe_load(path.read_text())
    step("source distribution and plain wheel")
    source, wheel = built()
    step(f"contents of {source.name} and {wheel.name}")
    check_contents(source, wheel)
    step("metadata, and the README as the index shows it")
    run(sys.executable, "-m", "twine", "check", "--strict", source, wheel)
    for distribution in (source, wheel):
        step(f"{distribution.name} in a fresh environment")
        check_install(python, distribution)
    step(f"{version()} can be released: {source.name}, {wheel.name} in dist/")


if __name__ == "__main__":
    main()
