"""patch_sqnorm: values and gradients against explicit loops over the kernel in float64, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_memory
from hypothesis import given, settings
from inputs import DTYPES, LAYOUTS, make_input, needs_native
from patch_problems import CASES, check, oracle, problems, run
from tolerance import relative_error
from torch import nn

from fam_ext.ops.patch_sqnorm import patch_sqnorm

pytestmark = pytest.mark.on_devices


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, backend):
    shape, *case = CASES[name]
    check(make_input(shape), case, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    ["1d-stride-dilation", "2d-all", "2d-depthwise-stride", "2d-pointwise-groups", "3d-all", "rows-groups"],
)
def test_layouts_and_dtypes(name, layout, dtype, backend):
    shape, *case = CASES[name]
    check(make_input(shape, dtype, layout), case, backend)


@needs_native
@settings(max_examples=150, deadline=None)
@given(problems())
def test_any_problem(problem):
    x, case = problem
    check(x, case, "native")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["valid", "same", 1, (2, 1)], ids=str)
@pytest.mark.parametrize(
    ("kernel_size", "dilation"), [(3, 1), (2, 1), ((4, 3), (1, 2)), ((2, 4), 3)], ids=str
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_arguments_mean_what_conv_means(mode, padding, kernel_size, dilation, backend):
    """A convolution of the squares with ones sums the squares that the layer's patches hold."""
    conv = nn.Conv2d(
        6, 2, kernel_size, padding=padding, dilation=dilation, groups=2, bias=False, padding_mode=mode
    )
    nn.init.ones_(conv.weight.data).requires_grad_(False)
    x = make_input((2, 6, 11, 12), torch.float64).requires_grad_()
    expected = conv.double()(x.square())
    upstream = torch.rand_like(expected)
    (gradient,) = torch.autograd.grad(expected, x, upstream)
    out = patch_sqnorm(x, kernel_size, 1, padding, dilation, 2, mode, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(out, x, upstream)[0], gradient, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes_in_other_ranks(rank, mode, backend):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](
        2, 1, 4, padding="same", bias=False, padding_mode=mode
    )
    nn.init.ones_(layer.weight.data).requires_grad_(False)
    x = make_input((2, 2, 6, 7, 8)[: rank + 2], torch.float64)
    out = patch_sqnorm(x, 4, padding="same", padding_mode=mode, backend=backend)
    torch.testing.assert_close(out, layer.double()(x.square()), rtol=1e-13, atol=0)


def test_equals_unfolded_patches(backend):
    x = make_input((2, 3, 8, 9), torch.float64)
    patches = F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))
    out = patch_sqnorm(x, (3, 2), (2, 1), (1, 0), (1, 2), backend=backend)
    torch.testing.assert_close(out.flatten(2), patches.square().sum(1, keepdim=True), rtol=1e-14, atol=0)


def test_half_precision_squares_do_not_overflow(backend):
    x = torch.full((1, 4, 5), 3000.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = patch_sqnorm(x, 3, padding=1, backend=backend)
    assert out.dtype == torch.float32
    assert out.flatten().tolist() == [8 * 9e6, 12 * 9e6, 12 * 9e6, 12 * 9e6, 8 * 9e6]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_stay_in_their_patches(bad, backend):
    x = make_input((1, 2, 9, 9))
    x[0, 1, 4, 4] = bad
    finite = patch_sqnorm(x, 3, padding=1, backend=backend)[0, 0].isfinite()
    assert not finite[3:6, 3:6].any() and finite.sum() == 81 - 9


def test_gradcheck(backend):
    for name in ("1d-stride-dilation", "2d-all", "2d-pointwise-stride", "3d", "rows-groups"):
        shape, *case = CASES[name]
        x = make_input((2, *shape[1:]), torch.float64, "channels_last").requires_grad_()
        assert torch.autograd.gradcheck(lambda x, case=case: patch_sqnorm(x, *case, backend=backend), x)


@needs_native
def test_gradient_keeps_the_memory_format():
    x = make_input((2, 4, 5, 6), layout="channels_last").requires_grad_()
    (grad,) = torch.autograd.grad(patch_sqnorm(x, 3, groups=2, backend="native").sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_inputs_are_not_written(backend):
    x = make_input((2, 4, 5, 6)).requires_grad_()
    before, version = x.detach().clone(), x._version
    out = patch_sqnorm(x, 3, padding=1, groups=2, backend=backend)
    upstream = torch.rand_like(out)
    kept, upstream_version = upstream.clone(), upstream._version
    out.backward(upstream)
    assert (x._version, upstream._version) == (version, upstream_version)
    assert torch.equal(x, before) and torch.equal(upstream, kept)


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("groups", [1, 4])
def test_results_do_not_depend_on_how_work_is_split(layout, groups):
    """One sample is cut in pieces for the threads, a batch is not: every sum must have the same order."""
    for shape in ((12, 16, 40, 64), (8, 8, 20000), (8, 4, 20, 24, 24)):
        x = make_input(shape, layout=layout)
        whole, grads = run(x, (3, 1, 1, 2, groups), "native")
        parts = [run(x[i : i + 1], (3, 1, 1, 2, groups), "native") for i in range(len(x))]
        assert torch.equal(whole, torch.cat([out for out, _ in parts]))
        assert torch.equal(grads, torch.cat([grad for _, grad in parts]))


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (8, 1), (8, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_bounded(layout, groups, stride, dtype):
    """Beyond input and output, at most twice their size: forward, and backward with its gradient."""
    x = make_input((4, 8, 40, 40), dtype, layout).requires_grad_()
    out = patch_sqnorm(x, 5, stride, 2, groups=groups)
    size = x.numel() * x.element_size() + out.numel() * out.element_size()
    forward = peak_memory(lambda: patch_sqnorm(x, 5, stride, 2, groups=groups, backend="native"))
    assert forward <= out.numel() * out.element_size() + 2 * size
    backward = peak_memory(lambda: out.sum().backward())
    assert backward <= x.numel() * x.element_size() + 2 * size
    unfolded = peak_memory(lambda: F.unfold(x.detach().float(), 5, padding=2, stride=stride).square().sum(1))
    assert unfolded > 2.5 * size  # the measure sees what it should


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic, backend):
    torch._dynamo.reset()

    def loss(x, mode):
        return (
            patch_sqnorm(x, (3, 2), padding="same", groups=2, padding_mode=mode, backend=backend)
            .square()
            .sum()
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size, layout, mode in (
        (6, "contiguous", "zeros"),
        (9, "channels_last", "zeros"),
        (7, "contiguous", "circular"),
    ):
        x = make_input((3, 4, size, size + 1), torch.float64, layout).requires_grad_()
        expected, got = loss(x, mode), compiled(x, mode)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))


@needs_native
def test_second_derivative_is_refused():
    x = make_input((2, 3, 5)).requires_grad_()
    (grad,) = torch.autograd.grad(patch_sqnorm(x, 3, backend="native").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"patch_sqnorm.*once"):
        grad.sum().backward()


def test_reference_has_second_derivatives():
    x = make_input((2, 3, 5), torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: patch_sqnorm(x, 3, backend="reference"), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**8, 2.0**16])
def test_half_precision_gradient_under_a_loss_scale(scale, dtype, backend):
    """The upstream gradient is known when the input's is rounded: no entry underflows that torch keeps, and none overflows."""
    x = make_input((4, 6, 9, 9), dtype)
    upstream = 1e-6 * scale * make_input((4, 1, 9, 9), seed=1).abs()
    _, exact = oracle(x, (3, 3), (1, 1), (1, 1), (1, 1), 1, upstream)
    assert (exact.abs().max() > 1e-3) == (scale > 1) and exact.abs().max() < torch.finfo(torch.float16).max
    leaf = x.detach().requires_grad_()
    squares = F.conv2d(leaf.float().square(), torch.ones(1, 6, 3, 3), padding=1)
    (base,) = torch.autograd.grad(squares, leaf, upstream)
    _, grad = run(x, ((3, 3), (1, 1), (1, 1), (1, 1), 1), backend, upstream)
    error, of_torch = ((g.double() - exact).norm() / exact.norm() for g in (grad, base))
    assert error <= 1.5 * of_torch
    assert ((grad == 0) & (base != 0)).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padded_half_precision_gradients_are_summed_in_float32(mode, dtype, backend):
    """With replicate a corner stands in 81 places of the padded input: their sum is rounded once."""
    x = make_input((2, 2, 9, 9), dtype)
    case = (3, 1, 8, 1, 1, mode)
    wide = x.double().requires_grad_()
    upstream = torch.rand(2, 1, 23, 23)
    (exact,) = torch.autograd.grad(patch_sqnorm(wide, *case, backend="reference"), wide, upstream.double())
    _, grad = run(x, case, backend, upstream)
    assert relative_error(grad, exact, elementwise=True) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("stride", [1, 150], ids=["dense", "sparse"])
def test_kernels_far_larger_than_the_input(stride, backend):
    """Most of their taps see padding only, and are passed over."""
    for case in (
        ((301,), (stride,), (310,), (1,), 2),
        ((80, 70), (stride, 3), (120, 160), (3, 2), 1),
        ((1, 65, 2), (1, stride, 2), (0, 200, 1), (1, 5, 1), 1),
    ):
        x = make_input((2, 4, 3, 5, 7)[: 2 + len(case[0])])
        check(x, case, backend)
