"""gram_trace on Triton's interpreter: kernels and the whole operation against float64, over odd shapes, strides and dtypes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from gram_problems import PROBLEMS, oracle, tensors
from inputs import TRITON_ON_GPU, make_input
from tolerance import assert_accurate

from fam_ext.ops import backends
from fam_ext.ops.gram_trace import gram_trace

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("fam_ext.kernels.gram_trace")

# of an operand split in two parts of bfloat16, 16 bits are kept: up to 2^-16, where float32 rounds by 2^-24; float16 splits both
ROUNDINGS = {torch.float32: 4, torch.float16: 2**9, torch.bfloat16: 2**8}
DTYPES = list(ROUNDINGS)
# around a tile of 64 positions, 64 columns, 32 or 64 features; the last dimension of each is odd
SHAPES = [(1, 1, 1, 1), (1, 5, 3, 7), (2, 64, 32, 33), (1, 65, 70, 5), (2, 130, 17, 35)]


def operands(shape, factors, dtype, layout):
    samples, positions, fan_in, neurons = shape
    phi = make_input((samples, positions, fan_in), dtype, layout)
    s = make_input((samples, positions, factors, neurons), dtype, layout, seed=1)
    root = make_input((neurons, neurons), torch.float64, seed=2)
    return phi, s, root @ root.T


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape, dtype, layout):
    for factors in (1, 3) if layout == "contiguous" and shape[1] < 70 else (2,):
        phi, s, gram = operands(shape, factors, dtype, layout)
        left = (s.double() @ gram).float()
        pairs = torch.einsum("nqi,nri->nqr", phi.double(), phi.double())
        exact = torch.einsum("nqr,nqko,nrko->nk", pairs, left.double(), s.double())
        base = torch.einsum(
            "nqr,nqko,nrko->nk", torch.einsum("nqi,nri->nqr", phi.float(), phi.float()), left, s.float()
        )
        terms = shape[1] * shape[2] * shape[3]
        assert_accurate(kernels.pair_trace(phi, left, s), base, exact, terms, roundings=ROUNDINGS[dtype])
        columns = s.flatten(2)
        exact = pairs @ columns.double()
        base = torch.einsum("nqi,nri->nqr", phi.float(), phi.float()) @ columns.float()
        got = kernels.chain(phi, phi, columns)
        assert_accurate(got, base, exact, shape[1] * shape[2], roundings=ROUNDINGS[dtype])


def test_two_different_operands():
    """x and y of chain, and a sum whose factors are not the same."""
    x, y = make_input((2, 70, 33)), make_input((2, 70, 33), layout="transposed", seed=1)
    z = make_input((2, 70, 81), seed=2)
    exact = x.double() @ y.double().mT @ z.double()
    assert_accurate(kernels.chain(x, y, z), x @ y.mT @ z, exact, 70 * 33)


def test_every_pair_of_tiles_counts_once():
    """Ones: the value is Q^2, exactly."""
    for positions in (1, 63, 64, 65, 129, 64 * 6):
        ones = torch.ones(1, positions, 1)
        value = kernels.pair_trace(ones, ones.unsqueeze(3), ones.unsqueeze(3))
        assert value.item() == positions**2


@pytest.mark.parametrize("name", PROBLEMS)
def test_operation(name):
    for form, stacked, weighted in (("gram", None, True), ("gram", 3, False), ("direct", 2, True)):
        x, factors, weight, options = tensors(name, stacked, torch.float32)
        results = []
        for backend in ("triton", "reference", None):
            inputs = [t.detach().requires_grad_() for t in (x, factors, weight)]
            if backend is None:
                inputs = [t.detach().double().requires_grad_() for t in inputs]
                value = oracle(*inputs, options, weighted)
            else:
                value = gram_trace(
                    *inputs, **options, weighted=weighted, form=form, backend=backend, max_bytes=2**16
                )
            upstream = torch.linspace(0.5, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
            grads = torch.autograd.grad(value, inputs, upstream, allow_unused=True)
            results.append([value, *(g for g in grads[: 3 if weighted else 2])])
        terms = weight[0].numel() * max(1, factors.numel() // len(x))
        for got, base, exact in zip(*results, strict=True):
            assert got.dtype == torch.float32
            assert_accurate(got, base, exact, terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("name", ["tokens", "tokens-narrow", "2d-all"])
def test_half_precision(name, layout, dtype):
    x, factors, weight, options = tensors(name, 2, dtype, layout)
    results = []
    for backend in ("triton", "reference", None):
        inputs = [t.detach().requires_grad_() for t in (x, factors, weight)]
        if backend is None:
            inputs = [t.detach().double().requires_grad_() for t in inputs]
            value = oracle(*inputs, options)
        else:
            value = gram_trace(*inputs, **options, form="gram", backend=backend)
            assert value.dtype == torch.float32
        results.append([value, *torch.autograd.grad(value.sum(), inputs)])
    terms = weight[0].numel() * max(1, factors.numel() // len(x))
    for got, base, exact in zip(*results, strict=True):
        assert_accurate(got, base, exact, terms, roundings=ROUNDINGS[dtype])


def test_chunks_partial_gradients_and_empty():
    x, factors, weight, options = tensors("1d-stride-dilation", 2, torch.float32, samples=5)
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        results = []
        for backend, max_bytes in (("triton", 20000), ("triton", 2**26), ("reference", 1)):
            inputs = [
                t.detach().clone().requires_grad_(w)
                for t, w in zip((x, factors, weight), wanted, strict=True)
            ]
            value = gram_trace(*inputs, **options, form="gram", backend=backend, max_bytes=max_bytes)
            if any(wanted):
                value.sum().backward()
            results.append([value.detach(), *(t.grad for t in inputs if t.requires_grad)])
        for a, b, c in zip(*results, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-3)
    empty = gram_trace(torch.zeros(0, 4, 3), torch.zeros(2, 0, 4, 5), torch.zeros(5, 3), backend="triton")
    assert empty.shape == (2, 0)


def test_opcheck_and_compile():
    x = make_input((2, 1, 4, 6)).requires_grad_()
    s = make_input((2, 2, 1, 5, 6), seed=1).requires_grad_()
    gram = (torch.eye(5) + 0.1).unsqueeze(0).requires_grad_()
    window = ([1], [1], [0], [1])
    operation = torch.ops.fam_ext.gram_trace.default
    torch.library.opcheck(operation, (x, s, gram, *window, "gram_tiles", 1000, True))

    def loss(x, s, w):
        return gram_trace(x, s, w, form="gram", backend="triton").sum()

    inputs = [make_input(shape).requires_grad_() for shape in ((2, 6, 5), (2, 6, 4), (4, 5))]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    with pytest.raises(RuntimeError, match=r"gram_trace.*once"):
        (grad,) = torch.autograd.grad(loss(*inputs), inputs[0], create_graph=True)
        grad.sum().backward()


def test_who_serves():
    expected = "triton" if TRITON_ON_GPU else "native"
    assert backends.choose("gram_trace", "auto", torch.zeros(2)) == expected
    assert backends.choose("gram_trace", "triton", torch.zeros(2)) == "triton"


def test_importing_the_package_leaves_the_kernels_alone():
    """triton itself comes with torch.compiler where it is installed."""
    code = (
        "import sys, fam_ext.functional; assert 'fam_ext.kernels.gram_trace' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
