"""The package as built, shipped and installed: sdist, wheel, pure Python, and libraries that must not be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from fam_ext.ops import backends

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"fam_ext": "fam_ext", "kernels": "fam_ext/kernels"}
SAY_INFO = "import fam_ext, json; i = fam_ext.info(); print(json.dumps([fam_ext.__file__, i.native, i.reason, i.build]))"


def run(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(kind: str, source: Path, out: Path, **env: str) -> Path:
    """Call the build backend as pip does; `kind` is "sdist" or "wheel". The path of what was built."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    out.mkdir(exist_ok=True)
    return out / run(sys.executable, "-c", code, out, cwd=source, **env).split()[-1]


def say_info(folder: Path, **env: str) -> tuple[Path, bool, str, dict[str, object]]:
    """(file, native, reason, build record) of the fam_ext that lies in `folder`."""
    file, *rest = json.loads(run(sys.executable, "-c", SAY_INFO, cwd=folder, **env).splitlines()[-1])
    assert Path(file).is_relative_to(folder)
    return Path(file), *rest


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, built from a copy of the tracked kinds of files and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    skip = shutil.ignore_patterns(
        ".*", "build", "dist", "out", "*.egg-info", "__pycache__", "_C*", "_build.json"
    )
    tree = shutil.copytree(ROOT, folder / "tree", ignore=skip)
    with tarfile.open(build("sdist", tree, folder / "dist", FAM_EXT_BUILD="0")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return source


@pytest.fixture(scope="module")
def pure_wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pure")
    return build("wheel", shutil.copytree(unpacked, out / "tree"), out / "dist", FAM_EXT_BUILD="0")


def installed(wheel: Path, folder: Path) -> Path:
    """A folder that holds the wheel's files, as an install does."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_sdist_holds_what_a_build_needs(unpacked: Path) -> None:
    wanted = [
        path
        for pattern in ("csrc/**/*", "fam_ext/**/*.py", "kernels/*.py", "tests/**/*.py")
        for path in ROOT.glob(pattern)
    ]
    wanted += [ROOT / name for name in ("setup.py", "pyproject.toml", "Makefile", "fam_ext/py.typed")]
    missing = [
        p.relative_to(ROOT) for p in wanted if p.is_file() and not (unpacked / p.relative_to(ROOT)).exists()
    ]
    assert not missing
    assert not [*unpacked.rglob("*.so"), *unpacked.rglob("_build.json")]


def test_pure_python_wheel(pure_wheel: Path, tmp_path: Path) -> None:
    assert pure_wheel.name.endswith("-none-any.whl")
    folder = installed(pure_wheel, tmp_path)
    for source, target in PACKAGES.items():
        modules = {path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*.py")}
        assert modules <= {path.relative_to(folder / target) for path in (folder / target).rglob("*.py")}
    assert (folder / "fam_ext/py.typed").exists()
    _, native, reason, record = say_info(folder)
    assert not native
    assert reason == "nothing was compiled: FAM_EXT_BUILD=0 was set"
    assert record["built"] is False


def test_no_compiler_gives_pure_python_and_says_so(unpacked: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(unpacked, tmp_path / "tree")
    wheel = build("wheel", tree, tmp_path / "dist", CXX="no-such-compiler")
    _, native, reason, _ = say_info(installed(wheel, tmp_path / "site"))
    assert not native
    assert reason == "nothing was compiled: no C++ compiler was found (looked for no-such-compiler)"


@pytest.mark.parametrize("pure", [False, True])
def test_without_torch(unpacked: Path, tmp_path: Path, pure: bool) -> None:
    """As in an isolated build environment: the sdist and the pure wheel build, the extension says what to do."""
    tree = shutil.copytree(unpacked, tmp_path / "tree")
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', *sys.argv[1:]]; exec(open('setup.py').read())"
    run(sys.executable, "-c", code, "-q", "sdist", cwd=tree)
    command = [sys.executable, "-c", code, "-q", "build"]
    env = {**os.environ, "FAM_EXT_BUILD": "0" if pure else "1", "CXX": sys.executable}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == pure
    assert pure or "pip install --no-build-isolation ." in done.stderr


def test_unknown_simd_level_is_refused(unpacked: Path) -> None:
    command = [sys.executable, "setup.py", "--version"]
    env = {**os.environ, "FAM_EXT_SIMD": "avx1024", "CXX": sys.executable}
    done = subprocess.run(command, cwd=unpacked, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "FAM_EXT_SIMD must be one of native, avx512, avx2, default, got 'avx1024'" in done.stderr


def record(**changes: object) -> dict[str, object]:
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "built": True,
        "torch": str(torch.__version__),
        "python": python,
        "simd": "default",
        "schemas": backends.SCHEMAS,
        **changes,
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "_build.json is missing"),
        ("{", "cannot be read"),
        ("[1]", "cannot be read"),
        (json.dumps({"built": True}), "cannot be read"),
        (json.dumps({"built": False, "reason": "a reason"}), "nothing was compiled: a reason"),
        (
            json.dumps(record(torch="2.1.0+cpu")),
            f"compiled for torch 2.1.0+cpu, this is torch {torch.__version__}",
        ),
        (json.dumps(record(python="3.8.1")), "compiled for Python 3.8.1"),
        (json.dumps(record(simd="avx512")), "compiled for AVX512 processors, torch reports DEFAULT"),
        (json.dumps(record(simd="avx2")), "compiled for AVX2 processors, torch reports DEFAULT"),
        (json.dumps(record()), None),
    ],
)
def test_records_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(backends, "_RECORD", tmp_path / "_build.json")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    if text is not None:
        (tmp_path / "_build.json").write_text(text)
    said = backends._read_record()[1]
    assert said is None if reason is None else reason in str(said)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (record(torch="2.1.0"), "compiled for torch 2.1.0"),
        (record(simd="avx512"), "compiled for AVX512 processors, torch reports DEFAULT"),
        (record(), "the compiled library cannot be imported"),
    ],
)
def test_a_library_that_does_not_fit_is_not_imported(
    pure_wheel: Path, tmp_path: Path, facts: dict[str, object], reason: str
) -> None:
    """The library beside the record is garbage: importing it gives the last reason, whatever the record says."""
    folder = installed(pure_wheel, tmp_path)
    (folder / f"fam_ext/_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    (folder / "fam_ext/_build.json").write_text(json.dumps(facts))
    _, native, said, _ = say_info(folder, ATEN_CPU_CAPABILITY="default")
    assert not native
    assert reason in said


@pytest.mark.skipif(not backends.native_loaded(), reason="the compiled library is not loaded")
def test_the_facts_in_the_library_are_compared_too(pure_wheel: Path, tmp_path: Path) -> None:
    folder = installed(pure_wheel, tmp_path)
    (folder / "fam_ext/_build.json").write_text(json.dumps(record()))
    (folder / "fam_ext/_C.py").write_text("def facts(): return {'torch': '2.1.0'}\n")
    _, native, reason, _ = say_info(folder)
    assert not native
    assert "the library itself was compiled for torch 2.1.0" in reason


def test_the_session_stops_without_the_compiled_library(pure_wheel: Path, tmp_path: Path) -> None:
    folder = installed(pure_wheel, tmp_path)
    (folder / "fam_ext/_build.json").unlink()
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("test_*", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)  # pytest's settings
    (folder / "tests/test_nothing.py").write_text("def test_nothing(): pass\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "pythonpath=tests/helpers",
        "tests",
    ]
    env = {key: value for key, value in os.environ.items() if key != "FAM_EXT_TEST_BACKEND"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stdout
    assert "has no compiled library" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not backends.native_loaded(), reason="nothing was compiled here")
def test_a_wheel_compiled_from_the_sdist_serves(unpacked: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(unpacked, tmp_path / "tree")
    wheel = build("wheel", tree, tmp_path / "dist", FAM_EXT_SIMD="default", MAX_JOBS="2")
    _, native, reason, facts = say_info(installed(wheel, tmp_path / "site"))
    assert native, reason
    assert facts["simd"] == "default"
