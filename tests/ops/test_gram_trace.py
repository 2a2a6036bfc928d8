"""gram_trace: values and gradients against every sample's weight gradient in float64, in both forms, on every backend."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_memory
from gram_problems import PROBLEMS, apply, by_patches, check, exact, oracle, run, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, LAYOUTS, make_input

from fam_ext.ops.gram_trace import choose_form, gram_trace
from fam_ext.ops.reference import gram_trace as reference

FORMS = ["direct", "gram"]


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """Nothing of this operation is compiled: both are there on every build."""
    return request.param


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_value_and_gradients(name, form, weighted, backend):
    for stacked in (None, 3):
        got = run(*tensors(name, stacked), backend=backend, form=form, weighted=weighted)
        want = exact(*tensors(name, stacked), weighted)
        for g, w in zip(got, want, strict=True):
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PROBLEMS)
def test_both_ways_to_the_products_of_patches(name):
    """Which one is taken depends on the sizes; here both serve every problem, several samples in a chunk or one."""
    x, factors, weight, options = tensors(name, 2)
    rank, groups = weight.dim() - 2, options.get("groups", 1)
    if rank and options.get("padding_mode"):
        pytest.skip("padded before the operation")
    each = lambda key, default: (  # noqa: E731
        (v,) * rank if isinstance(v := options.get(key, default), int) else tuple(v)
    )
    if options.get("padding") == "same":
        options["padding"] = (weight.shape[2] - 1) // 2
    window = [tuple(weight.shape[2:]), each("stride", 1), each("padding", 0), each("dilation", 1)]
    if rank == 0:
        x = x.reshape(len(x), 1, -1, x.shape[-1]).mT
        factors = factors.reshape(2, len(x), 1, -1, factors.shape[-1]).mT
        window = [(1,), (1,), (0,), (1,)]
    else:
        x = x.unflatten(1, (groups, -1))
        factors = factors.unflatten(2, (groups, -1))
    gram = torch.eye(factors.shape[3], dtype=torch.float64).repeat(groups, 1, 1) + 0.1
    results = []
    for form, max_bytes in itertools.product(("direct", "gram_shifts", "gram_patches"), (1, 2**26)):
        inputs = [t.detach().clone().requires_grad_() for t in (x, factors, gram)]
        values, _ = torch.ops.fam_ext.gram_trace(*inputs, *window, form, max_bytes, True)
        # scaled: entries of up to 1e7 cancel to a few tens, and atol would be less than an eps of the largest
        results.append((values, *torch.autograd.grad(1e-3 * values.square().sum(), inputs)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-10)


def test_equals_unfolded_patches(backend):
    x, factors, weight, options = tensors("2d-all")
    expected = by_patches(x, factors, weight, options)
    for form in FORMS:
        value = gram_trace(x, factors, weight, **options, form=form, backend=backend)
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["tokens", "tokens-narrow", "1d-stride-dilation", "2d-narrow"])
def test_sum_over_factors_is_that_of_the_full_gauss_newton_matrix(name, backend):
    """J^T Lambda J of a network built in float64, its relative flatness, and the sum over Lambda's square root."""
    x, _, weight, options = tensors(name)
    weight.requires_grad_()
    mix = make_input((3, apply(x, weight, options)[0].numel()), torch.float64, seed=3) / 10
    z = apply(x, weight, options)
    p = (z.tanh().flatten(1) @ mix.T).softmax(1)
    lambdas = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    groups = options.get("groups", 1)

    def outputs(w):
        return apply(x, w, options).tanh().flatten(1) @ mix.T

    jacobian = torch.func.jacrev(outputs)(weight).reshape(len(x), 3, groups, len(weight) // groups, -1)
    w = weight.reshape(groups, len(weight) // groups, -1)
    expected = torch.einsum("bkgsi,bkl,blgti,gsj,gtj->b", jacobian, lambdas, jacobian, w, w)
    factors = []
    for k in range(3):
        unit = F.one_hot(torch.tensor(k), 3).to(p)
        (s,) = torch.autograd.grad(
            outputs_of(z, mix), z, p[:, k : k + 1].sqrt().detach() * (unit - p.detach()), retain_graph=True
        )
        factors.append(s)
    value = gram_trace(x, torch.stack(factors), weight, **options, backend=backend)
    torch.testing.assert_close(value.sum(0), expected, rtol=1e-10, atol=0)


def outputs_of(z, mix):
    return z.tanh().flatten(1) @ mix.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tokens", "tokens-narrow", "2d-all", "2d-pointwise", "3d"])
def test_layouts_and_dtypes(name, form, layout, dtype, backend):
    check(*tensors(name, 2, dtype, layout), backend, form)


def test_mixed_dtypes(backend):
    x, factors, weight, options = tensors("2d", 2, torch.float32)
    for dtypes in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float64),
    ):
        mixed = [t.to(d) for t, d in zip((x, factors, weight), dtypes, strict=True)]
        for form in FORMS:
            check(*mixed, options, backend, form)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_problem(data):
    rank = data.draw(st.integers(0, 3))
    ints = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    kernel, stride, padding, dilation = ints(1, 3), ints(1, 3), ints(0, 3), ints(1, 3)
    groups = data.draw(st.sampled_from([1, 1, 2, 3])) if rank else 1
    channels, neurons = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)) * groups
    samples, stacked = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([None, 1, 3]))
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    if rank:
        smallest = (
            max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)
        )
        sizes = tuple(data.draw(st.integers(least, least + 4)) for least in smallest)
        shape: tuple[int, ...] = (samples, channels * groups, *sizes)
        weight_shape: tuple[int, ...] = (neurons, channels, *kernel)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    else:
        shape, weight_shape, options = (
            (samples, data.draw(st.integers(1, 9)), channels),
            (neurons, channels),
            {},
        )
    x, weight = make_input(shape, dtype, layout), make_input(weight_shape, dtype, seed=1)
    out = apply(x.double(), weight.double(), options).shape
    factors = make_input(out if stacked is None else (stacked, *out), dtype, layout, seed=2)
    form, max_bytes = data.draw(st.sampled_from(["auto", *FORMS])), data.draw(st.sampled_from([1, 2**26]))
    check(x, factors, weight, options, "native", form, data.draw(st.booleans()), max_bytes=max_bytes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tokens", "tokens-narrow", "1d-stride-dilation", "2d-reflect"])
def test_gradcheck(name, form, backend):
    x, factors, weight, options = tensors(name, 2, samples=2)
    inputs = [t.clone().requires_grad_() for t in (x, factors, weight)]
    assert torch.autograd.gradcheck(lambda *a: gram_trace(*a, **options, form=form, backend=backend), inputs)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_partial_gradients(wanted, backend):
    x, factors, weight, options = tensors("2d", 2)
    want = exact(x, factors, weight, options)
    for form in FORMS:
        inputs = [t.clone().requires_grad_(w) for t, w in zip((x, factors, weight), wanted, strict=True)]
        value = gram_trace(*inputs, **options, form=form, backend=backend)
        assert value.requires_grad == any(wanted)
        torch.testing.assert_close(value.detach(), want[0])
        if any(wanted):
            upstream = torch.linspace(0.5, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
            value.backward(upstream)
        for t, g, w in zip(inputs, want[1:], wanted, strict=True):
            if w:
                torch.testing.assert_close(t.grad, g, rtol=1e-11, atol=1e-11)
            else:
                assert t.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_empty(form, backend):
    for x, s, w in (
        ((0, 4, 3), (0, 4, 5), (5, 3)),
        ((2, 0, 3), (2, 0, 5), (5, 3)),
        ((2, 4, 0), (2, 4, 5), (5, 0)),
        ((0, 2, 5, 5), (3, 0, 4, 3, 3), (4, 2, 3, 3)),
    ):
        inputs = [make_input(shape) for shape in (x, s, w)]
        value, *grads = run(*inputs, {}, form=form, backend=backend)
        assert value.shape == s[: 1 + (len(s) > len(x))] and not value.any()
        for g, t in zip(grads, inputs, strict=True):
            assert g.shape == t.shape and not g.any()


def test_one_position_is_a_product_of_norms(backend):
    x, factors, weight, _ = tensors("rows")
    value = gram_trace(x, factors, weight, backend=backend)
    torch.testing.assert_close(value, x.square().sum(1) * (factors @ weight).square().sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padded_half_precision_gradients_are_summed_in_float32(mode, dtype, backend):
    """A position stands in several places of the padded input: the sum of their gradients is rounded once."""
    x, weight = make_input((2, 2, 9), dtype), make_input((3, 2, 3), dtype, seed=1)
    options = {"padding": 8, "padding_mode": mode}
    factors = make_input((2, 3, 23), dtype, seed=2)
    for form in FORMS:
        grad = run(x, factors, weight, options, backend=backend, form=form)[1]
        want = exact(x, factors, weight, options)[1]
        # cancelling sums: of the entries' size, one rounding at the end
        assert (grad.double() - want).norm() <= torch.finfo(dtype).eps / 2 * want.norm()


@pytest.mark.parametrize("scale", [1.0, 2.0**8, 2.0**16])
@pytest.mark.parametrize("name", ["tokens", "2d-all"])
def test_float16_gradients_under_a_loss_scale(name, scale, backend):
    """The upstream gradient is known when gradients are rounded: no underflow that torch's own backward pass has not."""
    x, factors, weight, options = tensors(name, None, torch.float16)
    upstream = 1e-9 * scale * torch.linspace(0.5, 1, len(x))
    for form in FORMS:
        got = run(x, factors, weight, options, upstream, backend=backend, form=form)[1:]
        wide = [t.float().requires_grad_() for t in (x, factors, weight)]
        base = torch.autograd.grad(oracle(*(t.double() for t in wide), options), wide, upstream.double())
        for g, b in zip(got, base, strict=True):
            exact_error = (b.half().double() - b.double()).norm()
            assert (g.double() - b.double()).norm() <= 1.5 * exact_error


def test_autocast_does_not_reach_inside(backend):
    inputs = [t.requires_grad_() for t in tensors("2d", None, torch.float32)[:3]]
    plain = gram_trace(*inputs, padding=1, backend=backend)
    grads = torch.autograd.grad(plain.sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = gram_trace(*inputs, padding=1, backend=backend)
        if backend == "native":  # plain PyTorch's backward pass belongs outside
            again = gram_trace(*inputs, padding=1, backend=backend)
            assert torch.equal(torch.autograd.grad(again.sum(), inputs[1])[0], grads[1])
    assert torch.equal(value, plain)
    for a, b in zip(torch.autograd.grad(value.sum(), inputs), grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_stay_in_their_sample(bad, backend):
    x, factors, weight, options = tensors("2d", 2, torch.float32)
    x[1, 0, 3, 3] = bad
    for form in FORMS:
        value = gram_trace(x, factors, weight, **options, form=form, backend=backend)
        assert value.isfinite().all(0).tolist() == [True, False, True]


def test_inputs_are_not_written(backend):
    for form in FORMS:
        x, factors, weight, options = tensors("2d", 2)
        inputs = [t.requires_grad_() for t in (x, factors, weight)]
        before = [(t.detach().clone(), t._version) for t in inputs]
        gram_trace(*inputs, **options, form=form, backend=backend).sum().backward()
        for t, (kept, version) in zip(inputs, before, strict=True):
            assert t._version == version and torch.equal(t, kept)


@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_the_chunks(form):
    x, factors, weight, options = tensors("2d", 2, samples=7)
    whole = run(x, factors, weight, options, form=form, backend="native")
    for max_bytes in (1, 40000):
        parts = run(x, factors, weight, options, form=form, backend="native", max_bytes=max_bytes)
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_bounded(form):
    """Beyond gradients and what is kept, max_bytes: far less than the patches of all samples, or their Gram matrices."""
    x, weight = (
        make_input((64, 8, 12, 12)).requires_grad_(),
        make_input((16, 8, 3, 3), seed=1).requires_grad_(),
    )
    factors = make_input((64, 16, 12, 12), seed=2).requires_grad_()
    bound = 2**19
    results = 4 * (x.numel() + weight.numel() + factors.numel())
    kept = 4 * 64 * (16 * 72 if form == "direct" else 16 * 144)

    def step(backend):
        gram_trace(x, factors, weight, 1, 1, form=form, max_bytes=bound, backend=backend).sum().backward()

    for t in (x, weight, factors):
        t.grad = torch.zeros_like(t)
    step("native")
    assert peak_memory(lambda: step("native")) <= results + kept + 2 * bound
    assert peak_memory(lambda: step("reference")) > 2 * (
        results + kept + 2 * bound
    )  # the measure sees what it should


@pytest.mark.parametrize(("form", "dynamic"), [("direct", False), ("gram", True)])
def test_compiles_to_one_graph(form, dynamic, backend):
    def loss(x, factors, weight):
        return gram_trace(x, factors, weight, 1, 1, groups=2, form=form, backend=backend).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for samples, size in ((2, 5), (3, 6)):
        shapes = ((samples, 4, size, size), (2, samples, 6, size, size), (6, 2, 3, 3))
        inputs = [
            make_input(shape, torch.float64, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)
        ]
        expected, got = loss(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivative_is_refused():
    x, factors, weight, options = tensors("tokens")
    x.requires_grad_()
    value = gram_trace(x, factors, weight, **options, backend="native")
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gram_trace.*once"):
        grad.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_reference_has_second_derivatives(form):
    x, factors, weight, options = tensors("1d-stride-dilation", None, samples=1)
    inputs = [t.requires_grad_() for t in (x[..., :15], factors[..., :7], weight)]
    options["padding"] = 3
    inputs[1] = make_input(apply(inputs[0], weight, options).shape, torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda *a: gram_trace(*a, **options, form=form, backend="reference"), inputs
    )


def test_reference_patches_are_those_of_unfold():
    x = make_input((2, 3, 8, 9), torch.float64)
    expected = F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))
    got = reference.patches(x.unsqueeze(1), (3, 2), (2, 1), (1, 0), (1, 2), (4, 7))
    assert torch.equal(got.squeeze(1), expected)


def test_form_is_chosen_by_count():
    """Few positions: their products; many: the sample's gradient. A convolution's patches, or sums over shifts."""
    assert choose_form(16, 16, 512, (1,), 512, 1, True) == "gram_shifts"
    assert choose_form(4096, 4096, 64, (1,), 64, 1, True) == "direct"
    assert choose_form(64, 64, 256, (3, 3), 256, 1, True) == "gram_shifts"  # late in a CNN
    assert choose_form(1024, 1024, 16, (3, 3), 16, 1, True) == "direct"  # early
    assert choose_form(256, 16, 256, (3, 3), 256, 1, True) == "gram_patches"  # stride 4
    many = [choose_form(q, q, 64, (1,), 64, 10, True) for q in (1, 8, 64, 512)]
    assert many == sorted(many, reverse=True)  # once direct, always direct
