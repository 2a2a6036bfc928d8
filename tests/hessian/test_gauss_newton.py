"""Traces of pulled-back factors against dense J^T M J, value and gradients; whether samples are apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import dense_factors
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fam_ext import UnsupportedError
from fam_ext.hessian import gauss_newton, loss_factors, noise
from fam_ext.hessian.gauss_newton import FactoredLayer
from fam_ext.hessian.products import LayerCall
from fam_ext.layers.linear_map import LinearMap
from fam_ext.loss_hessians import CrossEntropy

B = 3


class Problem:
    """An earlier layer, a layer, what follows, and cross-entropy: x -> first -> tanh -> layer -> tail."""

    def __init__(
        self, first: nn.Module, layer: nn.Module, tail: nn.Module, x: Tensor, targets: tuple[int, ...]
    ) -> None:
        self.first, self.layer, self.tail = first.double(), layer.double(), tail.double()
        self.x, self.y = x.double().requires_grad_(), torch.randint(0, 3, targets)
        self.features = self.first(self.x).tanh()
        self.z = self.layer(self.features)
        self.outputs = self.tail(self.z)
        call = LayerCall(GradientEdge(self.z.grad_fn, 0), self.features, tuple(self.z.shape), self.z.dtype)
        self.factored = FactoredLayer(LinearMap("test", self.layer), self.layer.weight, call)
        self.parameters = [
            *self.first.parameters(),
            *self.layer.parameters(),
            *self.tail.parameters(),
            self.x,
        ]

    def loss(self, f: Tensor) -> Tensor:
        return F.cross_entropy(f, self.y)

    def traces(self, factors: Any, **options: Any) -> Tensor:
        chosen: dict[str, Any] = {"weighted": True, "detached": False, "backend": "auto", "generator": None}
        (traces,) = gauss_newton.factor_traces([self.factored], self.outputs, factors, **chosen | options)
        return traces

    def exact(self, **options: Any) -> Tensor:
        known = CrossEntropy(self.y)
        factors = loss_factors.output_factors(known, self.outputs, self.factored.layer.samples(self.z.shape))
        return self.traces(factors, **options)

    def expected(self, weighted: bool = True, loss: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        matrix = dense_factors.of_loss(loss or self.loss)
        features = self.first(self.x).tanh()
        return dense_factors.quadratic_form(self.layer, self.tail, features, matrix, weighted)


def mlp() -> Problem:
    tail = nn.Sequential(nn.Tanh(), nn.Linear(4, 3))
    return Problem(nn.Linear(2, 3), nn.Linear(3, 4), tail, torch.randn(B, 2), (B,))


def tokens() -> Problem:
    tail = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    return Problem(nn.Linear(2, 2), nn.Linear(2, 3), tail, torch.randn(B, 2, 2), (B,))


def grouped_conv() -> Problem:
    layer = nn.Conv1d(2, 4, 2, groups=2, stride=2, padding=1)
    tail = nn.Sequential(nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 3))
    return Problem(nn.Conv1d(1, 2, 1), layer, tail, torch.randn(2, 1, 3), (2,))


def transposed() -> Problem:
    layer = nn.ConvTranspose1d(2, 4, 2, stride=2, groups=2)
    tail = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    return Problem(nn.Conv1d(1, 2, 1), layer, tail, torch.randn(2, 1, 2), (2,))


def pointwise() -> Problem:
    """A kernel of one place, whose stride and padding leave as many positions as there were, and others."""
    layer = nn.Conv1d(2, 2, 1, stride=2, padding=1)
    tail = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    return Problem(nn.Conv1d(1, 2, 1), layer, tail, torch.randn(2, 1, 3), (2,))


def unbatched() -> Problem:
    tail = nn.Sequential(nn.Tanh(), nn.Flatten(0), nn.Linear(4, 3))
    return Problem(nn.Conv1d(1, 2, 1), nn.Conv1d(2, 2, 2), tail, torch.randn(1, 3), ())


PROBLEMS = [mlp, tokens, grouped_conv, transposed, pointwise, unbatched]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("make", PROBLEMS)
def test_exact_factors_give_the_gauss_newton_matrix(make: Any, weighted: bool) -> None:
    case = make()
    traces = case.exact(weighted=weighted)
    assert traces.shape[1] == (len(case.z) if make is not unbatched else 1)
    dense_factors.compare(traces.sum(), case.expected(weighted), case.parameters)


def test_the_trace_of_each_sample() -> None:
    case = mlp()
    own = [case.expected(loss=lambda f, i=i: F.cross_entropy(f[i], case.y[i]) / B) for i in range(B)]
    torch.testing.assert_close(case.exact().sum(0), torch.stack(own))


@pytest.mark.parametrize("make", [mlp, tokens, transposed])
def test_with_the_hessian_held_the_gradient_flows_through_the_weight(make: Any) -> None:
    """kappa = Tr(W^T S W) with S = sum Gamma Gamma^T constant: its gradient is 2 S W, and nothing elsewhere."""
    case = make()
    held = case.exact(detached=True)
    layer_map, weight = case.factored.layer, case.layer.weight
    outputs = case.tail(case.z).flatten()
    jacobian = torch.stack([torch.autograd.grad(f, weight, retain_graph=True)[0] for f in outputs])
    second = dense_factors.of_loss(case.loss)(case.outputs.detach())
    rows = torch.stack([layer_map.canonical(j) for j in jacobian])
    held_matrix = torch.einsum("kgsi,kl,lgti->gst", rows, second, rows)
    expected = layer_map.to_module(2 * held_matrix @ layer_map.canonical(weight), weight.shape)
    assert torch.autograd.grad(held.sum(), case.x, allow_unused=True, retain_graph=True) == (None,)
    torch.testing.assert_close(torch.autograd.grad(held.sum(), weight)[0], expected)
    torch.testing.assert_close(held.sum(), case.expected())


def one_label_at_a_time(case: Problem) -> tuple[list[Tensor], Tensor]:
    """The factors of each label, drawn for all rows at once, and sqrt(p): one row a sample, which sees its own label alone."""
    p = case.outputs.softmax(1)
    root = torch.tensor(1 / len(p), dtype=torch.float64).sqrt()
    return [root * (torch.eye(3, dtype=torch.float64)[k] - p) for k in range(3)], p


@pytest.mark.parametrize("own_input", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_one_row_by_the_input_and_by_the_output(weighted: bool, own_input: bool) -> None:
    """The mean over every label: both ways of forming |phi|^2 |W^T s|^2 agree with the dense matrix, and so do the gradients."""
    case = mlp()
    case.factored = case.factored._replace(own_input=own_input)
    factors, p = one_label_at_a_time(case)
    traces = case.traces(factors, weighted=weighted, generator=torch.Generator())
    way = gauss_newton._way(case.factored, weighted, False, torch.Generator())
    assert way is (gauss_newton._by_input if own_input and weighted else gauss_newton._by_output)
    dense_factors.compare((p.T * traces).sum(), case.expected(weighted), case.parameters)


def test_one_row_with_the_hessian_held() -> None:
    """By the output, whatever the input's takers: the gradient by the input would miss the weight."""
    case = mlp()
    case.factored = case.factored._replace(own_input=True)
    factors, p = one_label_at_a_time(case)
    traces = (p.detach().T * case.traces(factors, detached=True, generator=torch.Generator())).sum()
    reference = case.exact(detached=True).sum()
    torch.testing.assert_close(traces, reference)
    gradients = [torch.autograd.grad(v, case.layer.weight)[0] for v in (traces, reference)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("make", [tokens, grouped_conv, transposed, pointwise, unbatched])
def test_a_random_direction_in_the_mean(make: Any, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """|W^T Gamma_i b|^2 over every b: its mean is |W^T Gamma_i|^2, for each factor, value and gradients."""
    case = make()
    layer = case.factored.layer
    samples = 1 if make is unbatched else len(case.z)
    channels = layer.inputs // layer.groups
    vectors = torch.tensor(list(itertools.product((1.0, -1.0), repeat=layer.inputs))).double()
    kernel = () if layer.linear else layer.module.kernel_size
    places = math.prod(kernel)
    u = torch.randn_like(case.outputs)
    # signs of every sample permute the vectors that it meets
    own = ((torch.arange(samples * layer.inputs) * 2 // 3) % 2 * 2.0 - 1).double()
    own = own.reshape(samples, layer.groups, channels)
    total: Any = 0
    for place in range(places):
        one = places**0.5 * (torch.arange(places) == place).double().reshape(1, 1, 1, *kernel)
        monkeypatch.setattr(
            noise, "kernel_places", lambda *_, one=one: one.expand(samples, layer.groups, 1, *kernel)
        )
        for vector in vectors:

            def drawn(shape: Any, like: Tensor, generator: Any, vector: Tensor = vector) -> Tensor:
                assert shape == own.shape
                return own * vector.reshape(1, layer.groups, channels)

            monkeypatch.setattr(noise, "signs", drawn)
            total = total + case.traces([u], weighted=weighted, generator=torch.Generator())
    mean = total / (places * len(vectors))
    expected = case.traces([u], weighted=weighted)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-13)
    dense_factors.compare(mean.sum(), expected.sum(), case.parameters)


@pytest.mark.parametrize("make", [tokens, grouped_conv, transposed])
def test_random_directions_differ_between_samples_and_follow_the_generator(make: Any) -> None:
    case = make()
    u = torch.randn_like(case.outputs)

    def traces(seed: int) -> Tensor:
        return case.traces([u] * 40, generator=torch.Generator().manual_seed(seed)).detach()

    each = traces(0)
    assert torch.equal(each, traces(0)) and not torch.equal(each, traces(1))
    exact = case.traces([u]).detach()[0]
    assert ((each.mean(0) - exact).abs() <= 4 * each.std(0) / 40**0.5 + 1e-12).all()


def test_layers_of_a_sum_share_the_backward_pass() -> None:
    """The traces of each layer are those of the layer alone; a factor that reaches one of them alone gives the other zeros."""
    case = mlp()
    h = case.first(case.x)
    features = h.tanh()
    z = case.layer(features)
    outputs = case.tail(z)
    layers = [
        FactoredLayer(
            LinearMap("test", m), m.weight, LayerCall(GradientEdge(t.grad_fn, 0), f, tuple(t.shape), t.dtype)
        )
        for m, f, t in ((case.first, case.x, h), (case.layer, features, z))
    ]
    factors = [torch.randn_like(outputs) for _ in range(2)]
    options: dict[str, Any] = {"weighted": True, "detached": False, "backend": "auto", "generator": None}
    together = gauss_newton.factor_traces(layers, outputs, factors, **options)
    for layer, traces in zip(layers, together, strict=True):
        assert traces.shape == (2, B)
        torch.testing.assert_close(
            traces, gauss_newton.factor_traces([layer], outputs, factors, **options)[0]
        )
    past = gauss_newton.factor_traces(
        layers, h, [torch.randn_like(h)], **options
    )  # h does not depend on the second
    assert (past[1] == 0).all() and past[1].shape == (1, B) and (past[0] > 0).all()
    assert [t.shape for t in gauss_newton.factor_traces(layers, outputs, [], **options)] == [(1, B)] * 2


def test_several_factors_at_once_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tokens()
    at_once = case.exact()
    monkeypatch.setattr(gauss_newton, "_TOGETHER", 1)
    torch.testing.assert_close(case.exact(), at_once)


def coupled(pairs: list[tuple[int, int]], samples: int) -> Problem:
    """The output of sample i depends on z of sample j for each pair (i, j)."""

    class Mixed(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            rows = list(z.tanh())
            for i, j in pairs:
                rows[i] = rows[i] * z[j].sin()
            return torch.stack(rows)

    return Problem(nn.Linear(2, 2), nn.Linear(2, 3), Mixed(), torch.randn(samples, 2), (samples,))


def check(case: Problem, again: int = 0) -> bool:
    layers = [(case.factored.layer, case.factored.call)]
    (shown,) = gauss_newton.check_samples_apart("test", layers, case.outputs, again)
    return shown


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_samples_that_are_apart(samples: int) -> None:
    assert check(coupled([], samples))


@pytest.mark.parametrize(
    "pairs", [[(3, 0)], [(0, 3)], [(0, 1)], [(1, 0)], [(2, 3)], [(0, 1), (1, 0), (2, 3), (3, 2)]], ids=str
)
def test_samples_that_are_coupled(pairs: list[tuple[int, int]]) -> None:
    """Any pair in either direction, next to each other or not."""
    with pytest.raises(UnsupportedError, match="test: samples interact after the layer"):
        check(coupled(pairs, 4))


def test_checks_made_again_find_any_pair_in_the_end() -> None:
    """Each takes one pair of random halves: the two samples are on different sides of some of them."""
    case, refused = coupled([(2, 5)], 8), 0
    for again in range(1, 9):
        try:
            assert check(case, again)
        except UnsupportedError:
            refused += 1
    assert 0 < refused < 8


def test_layers_share_the_passes_of_a_check() -> None:
    """Each layer has an answer of its own, whatever the others'."""
    first, second = nn.Linear(2, 3), nn.Linear(3, 4)
    x = torch.randn(4, 2)
    z = first(x)
    h = second(z.tanh())
    layers = [(LinearMap("test", m), LayerCall(get_gradient_edge(t), f, tuple(t.shape), t.dtype))
              for m, f, t in ((first, x, z), (second, z, h))]  # fmt: skip
    check_all = gauss_newton.check_samples_apart
    assert check_all("test", layers, h.sin()) == [True, True]
    assert check_all("test", layers, z.sin()) == [True, False]  # z does not depend on the second
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = h.grad_fn.register_hook(count)
    check_all("test", layers, h.sin())
    assert passes == 2 * 2  # two for each bit of four samples' numbers
    check_all("test", layers, h.sin(), again=1)
    assert passes == 2 * 2 + 2
    handle.remove()
    with pytest.raises(UnsupportedError, match="samples interact"):
        check_all("test", layers, h - z.mean(0).sum())  # after the first only


def test_outputs_that_nothing_of_the_layer_reaches() -> None:
    case = coupled([], 4)
    case.outputs = case.outputs * 0
    assert not check(case)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_tell_nothing(bad: float) -> None:
    """As in a step that diverged: no reason to stop, nor to be sure."""
    case = coupled([], 4)
    case.outputs = case.outputs * bad
    assert not check(case)
    case = coupled([(0, 1)], 4)
    scale = torch.ones(4, 1).index_fill(0, torch.tensor(3), bad)
    case.outputs = case.outputs * scale.to(case.outputs)
    with pytest.raises(UnsupportedError, match="samples interact"):  # seen in the samples that are finite
        check(case)


def test_outputs_that_are_no_whole_samples() -> None:
    case = coupled([], 4)
    case.outputs = case.outputs.flatten()[:7]
    with pytest.raises(
        UnsupportedError, match="to hold whole samples along its first dimension; it has 7 rows for 4"
    ):
        check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shapes", [((7, 5), (7, 3)), ((2, 9001), (2, 17)), ((4, 1, 6), (4, 1, 6)), ((6,), (6,))], ids=str
)
def test_row_traces_in_one_pass(shapes: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled form, where there is one, against plain PyTorch in float64: value, either gradient, no second one."""
    phi, t = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    wide = [x.detach().double().requires_grad_() for x in (phi, t)]
    with monkeypatch.context() as patch:
        patch.setattr(gauss_newton, "_native", None)
        exact = gauss_newton._row_trace(*wide)
    got, upstream = gauss_newton._row_trace(phi, t), torch.randn_like(exact)
    compiled = gauss_newton._native is not None
    assert ("_RowTrace" in got.grad_fn.name()) is not compiled  # type: ignore[union-attr]
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got, exact.to(dtype), **near)
    gradients = torch.autograd.grad(got, [phi, t], upstream.to(dtype), create_graph=True)
    torch.testing.assert_close(
        gradients, [g.to(dtype) for g in torch.autograd.grad(exact, wide, upstream)], **near
    )
    with pytest.raises(RuntimeError, match="once"):
        gradients[0].sum().backward()
    (alone,) = torch.autograd.grad(gauss_newton._row_trace(phi.detach(), t).sum(), t)
    torch.testing.assert_close(alone, torch.autograd.grad(gauss_newton._row_trace(phi, t).sum(), t)[0])
    turned = (
        t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t
    )  # rows that do not lie one after another
    torch.testing.assert_close(gauss_newton._row_trace(phi, turned), got)
