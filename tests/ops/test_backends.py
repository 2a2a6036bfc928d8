"""Which backend is taken, what is said when one cannot, and info()."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fam_ext
from fam_ext.ops import backends

native = pytest.mark.skipif(not backends.native_loaded(), reason="the compiled library is not loaded")


@native
@pytest.mark.parametrize("op", backends.OPERATIONS)
def test_every_operation_is_native_on_the_cpu(op: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert backends.choose(op, "auto", torch.zeros(2, 3, dtype=dtype)) == "native"
        assert backends.choose(op, "native", torch.zeros(2, 3, dtype=dtype)) == "native"
    assert backends.choose(op, "reference", torch.zeros(2, 3)) == "reference"


@native
def test_loaded_library_has_the_facts_of_its_record() -> None:
    from fam_ext import _C

    facts, record = _C.facts(), fam_ext.info().build
    assert facts["torch"] == record["torch"] == str(torch.__version__)
    assert facts["simd"].lower() == record["simd"]
    assert (facts["cuda"], facts["arch_list"]) == (record["cuda"], record["arch_list"])


def test_a_criterion_takes_no_other_backend_than_the_one_it_was_given() -> None:
    layer, x, y = torch.nn.Linear(5, 4), torch.randn(6, 5), torch.arange(6) % 4
    criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), layer, 0.1, backend="triton")
    with pytest.raises(
        RuntimeError, match="head_cross_entropy: backend 'triton' is not available: it has no Triton kernel"
    ):
        criterion(layer(x), y)


def test_auto_takes_the_reference_where_no_kernel_is() -> None:
    assert backends.choose("softmax_trace", "auto", torch.zeros(2, 3, device="meta")) == "reference"
    assert backends.choose("softmax_trace", "auto", torch.zeros(2, 3, dtype=torch.int64)) == "reference"
    assert backends.choose("no_such_operation", "auto", torch.zeros(2, 3)) == "reference"


@native
@pytest.mark.parametrize(
    ("op", "backend", "tensor", "reason"),
    [
        ("softmax_trace", "triton", torch.zeros(2), "it has no Triton kernel"),
        ("gram_trace", "triton", torch.zeros(2, dtype=torch.float64), "no float64"),
        ("gram_trace", "triton", torch.zeros(2, device="meta"), "no meta device"),
        ("gram_trace", "triton", torch.zeros(2), "set TRITON_INTERPRET=1"),
        ("linear_cross_entropy", "triton", torch.zeros(2), "set TRITON_INTERPRET=1"),
        ("softmax_trace", "native", torch.zeros(2, device="meta"), "no meta kernel"),
        ("softmax_trace", "native", torch.zeros(2, dtype=torch.int64), "no kernel for int64"),
        ("no_such_operation", "native", torch.zeros(2), "no cpu kernel"),
    ],
)
def test_a_backend_asked_for_by_name_is_an_error(
    op: str, backend: str, tensor: torch.Tensor, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=f"{op}: backend '{backend}' is not available: .*{reason}"):
        backends.choose(op, backend, tensor)


@pytest.mark.parametrize("name", ["cuda", "", "Native", None])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match="softmax_trace: backend must be one of 'auto', 'reference'"):
        backends.choose("softmax_trace", name, torch.zeros(2))


@native
@pytest.mark.parametrize("transform", [torch.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_torch_func_transforms_use_the_reference(transform: object) -> None:
    taken: list[str] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        taken.append(backends.choose("softmax_trace", "auto", x))
        with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
            backends.choose("softmax_trace", "native", x)
        return x * x

    transform(f)(torch.ones(2, 3))  # type: ignore[operator]
    assert taken == ["reference"]
    assert backends.choose("softmax_trace", "auto", torch.ones(2, 3)) == "native"


def test_choose_is_traced_whole_by_torch_compile() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if backends.choose("softmax_trace", "auto", x) == "native" else x + 2

    x = torch.zeros(3)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["8.0", "9.0"], (8, 0), True),
        (["8.0", "9.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0", "9.0"], (10, 0), False),
        (["8.0", "9.0+PTX"], (10, 0), True),
        (["8.0", "9.0+PTX"], (7, 5), False),
        (["9.0a"], (9, 0), True),
        (["Hopper"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_library_has_code_for(
    architectures: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert backends.runs_on(architectures, capability) is runs


def test_why_there_is_no_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_kernels", frozenset())
    monkeypatch.setattr(backends, "_reason", None)
    monkeypatch.setattr(backends, "_record", {"no_cuda": "no nvcc was found (CUDA_HOME)"})
    expected = "the compiled library has no cuda kernel for it: no nvcc was found (CUDA_HOME)"
    assert backends._answer("patch_sqnorm", "cuda") == ("reference", expected)
    assert backends._answer("patch_sqnorm", "cpu") == (
        "reference",
        "the compiled library has no cpu kernel for it",
    )


def test_info_says_who_serves_and_why() -> None:
    info = fam_ext.info()
    assert info.versions["fam_ext"] == fam_ext.__version__
    assert info.versions["torch"] == str(torch.__version__)
    assert set(info.operations) == set(backends.OPERATIONS)
    for op, device, backend, why in info.rows():
        assert backend == backends.choose(op, "auto", torch.zeros(2, 3, device=device))
        assert why
        assert any(line.split()[:3] == [op, device, backend] for line in repr(info).splitlines())


@pytest.mark.parametrize("rich", [True, False])
def test_the_command_prints_info(rich: bool) -> None:
    without_rich = "" if rich else "import sys; sys.modules['rich'] = None; "
    code = without_rich + "import runpy; runpy.run_module('fam_ext', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for text in (fam_ext.__version__, str(torch.__version__), *backends.OPERATIONS):
        assert text in done.stdout


def test_the_schemas_of_python_and_of_the_library_are_the_same() -> None:
    """A changed registration.cpp needs its hash in backends.py, so that a library from before is not loaded."""
    source = Path(__file__).parents[2] / "csrc/registration.cpp"
    assert hashlib.sha256(source.read_bytes()).hexdigest()[:12] == backends.SCHEMAS


def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "_build.json"
    fits = {
        "built": True,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "simd": "default",
    }
    monkeypatch.setattr(backends, "_RECORD", record)
    for schemas, reason in (
        (backends.SCHEMAS, None),
        ("another", "another version"),
        (None, "another version"),
    ):
        record.write_text(json.dumps({**fits, "schemas": schemas}))
        got = backends._read_record()[1]
        assert got is None if reason is None else got is not None and reason in got
