"""Hidden layers: value and gradients against second derivatives of the whole loss by autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import FAMLoss, RelativeFlatness, UnsupportedError
from fam_ext.layers.linear_map import LinearMap

pytestmark = pytest.mark.on_devices

B = 4


class Case:
    """A layer, the rest of the network, an input, and how many classes' worth of targets the loss needs."""

    def __init__(self, layer: nn.Module, tail: nn.Module, x: Tensor, targets: tuple[int, ...]) -> None:
        with torch.no_grad():
            tail(layer(x))  # lazy modules get their shapes
        self.layer, self.tail, self.x = layer.double(), tail.double(), x.double().requires_grad_()
        self.y = torch.randint(0, 3, targets)

    def loss(self, weight: Tensor) -> Tensor:
        z = torch.func.functional_call(self.layer, {"weight": weight}, (self.x,))
        return F.cross_entropy(self.tail(z), self.y)

    def parameters(self) -> list[Tensor]:
        return [*self.layer.parameters(), *self.tail.parameters(), self.x]

    def expected(self, measure: str = "neuronwise") -> Tensor:
        """From second derivatives of the loss, one weight at a time, in canonical order of the weight."""
        layer_map = LinearMap("test", self.layer)
        weight = self.layer.weight
        canonical = layer_map.canonical(weight)
        rows = canonical.flatten(0, 1)

        def loss(w: Tensor) -> Tensor:
            return self.loss(layer_map.to_module(w.reshape(canonical.shape), weight.shape))

        return oracle.kappa(loss, rows, measure, groups=layer_map.groups)


def mlp() -> Case:
    return Case(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 3)), torch.randn(B, 3), (B,))


def mlp_layer_norm() -> Case:
    tail = nn.Sequential(nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 3))
    return Case(nn.Linear(3, 4), tail, torch.randn(B, 3), (B,))


def mlp_batch_norm() -> Case:
    tail = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return Case(nn.Linear(3, 4), tail, torch.randn(B, 3), (B,))


def mlp_batch_norm_eval() -> Case:
    tail = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).eval()
    return Case(nn.Linear(3, 4), tail, torch.randn(B, 3), (B,))


def tokens() -> Case:
    tail = nn.Sequential(nn.Tanh(), nn.Linear(4, 3), nn.Flatten(0, 1))
    return Case(nn.Linear(3, 4), tail, torch.randn(B, 2, 3), (2 * B,))


def transformer() -> Case:
    block = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    return Case(
        nn.Linear(3, 4), nn.Sequential(block, nn.Flatten(), nn.LazyLinear(3)), torch.randn(B, 2, 3), (B,)
    )


def conv() -> Case:
    layer = nn.Conv2d(2, 4, 2, groups=2, padding=1, stride=2, padding_mode="reflect")
    return Case(
        layer, nn.Sequential(nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)), torch.randn(B, 2, 3, 3), (B,)
    )


def conv_batch_norm() -> Case:
    tail = nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.AvgPool1d(2), nn.Flatten(), nn.LazyLinear(3))
    return Case(nn.Conv1d(2, 4, 2, padding="same", dilation=2), tail, torch.randn(B, 2, 4), (B,))


def conv_rows() -> Case:
    tail = nn.Sequential(nn.Softplus(), nn.Conv2d(4, 3, 1))
    return Case(nn.Conv2d(2, 4, 2, groups=2), tail, torch.randn(B, 2, 3, 3), (B, 2, 2))


def conv_unbatched() -> Case:
    return Case(
        nn.Conv1d(2, 4, 2),
        nn.Sequential(nn.Sigmoid(), nn.Flatten(0), nn.LazyLinear(3)),
        torch.randn(2, 4),
        (),
    )


def conv_transpose() -> Case:
    layer = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, output_padding=1)
    return Case(
        layer, nn.Sequential(nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)), torch.randn(B, 4, 2, 2), (B,)
    )


def conv_transpose_rows() -> Case:
    layer = nn.ConvTranspose1d(4, 6, 2, stride=2, groups=2, padding=1)
    return Case(layer, nn.Sequential(nn.Tanh(), nn.Conv1d(6, 3, 1)), torch.randn(B, 4, 3), (B, 4))


LEVELS = {
    mlp: "rows", mlp_layer_norm: "rows", mlp_batch_norm: "batch", mlp_batch_norm_eval: "rows", tokens: "rows",
    transformer: "samples", conv: "samples", conv_batch_norm: "batch", conv_rows: "rows", conv_unbatched: "samples",
    conv_transpose: "samples", conv_transpose_rows: "rows",
}  # fmt: skip
CASES: dict[str, Callable[[], Case]] = {make.__name__: make for make in LEVELS}


def run(case: Case, criterion: Any, *extra: Any, **options: Any) -> Tensor:
    value: Tensor = criterion(case.tail(case.layer(case.x)), case.y, *extra, **options)
    return value


def compare(case: Case, value: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Value, and gradients to everything: the layer, what comes after it, and its input."""
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-12)
    want = torch.autograd.grad(expected, case.parameters(), allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad(value, case.parameters(), allow_unused=True, materialize_grads=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-10)


def right_third_derivatives(case: Case) -> bool:
    """Whether the oracle's own gradient is right: torch's is wrong behind these norms."""
    wrong = (nn.LayerNorm, nn.TransformerEncoderLayer)
    return not any(
        isinstance(m, wrong) or (isinstance(m, nn.BatchNorm1d) and m.training) for m in case.tail.modules()
    )


@pytest.mark.parametrize("measure", ["neuronwise", "layerwise", "trace"])
@pytest.mark.parametrize("name", CASES)
def test_exact_equals_the_full_hessian(name: str, measure: str) -> None:
    case = CASES[name]()
    criterion = RelativeFlatness(nn.CrossEntropyLoss(), case.layer, method="exact", measure=measure)
    value = run(case, criterion)
    assert criterion.plan is not None and criterion.plan.level == LEVELS[CASES[name]]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = case.expected(measure)
        if right_third_derivatives(case):
            compare(case, value, expected)
            return
        torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12, check_dtype=True)
    finite_differences(case, value, lambda: case.expected(measure).detach())


def finite_differences(case: Case, value: Tensor, kappa: Callable[[], Tensor]) -> None:
    step = 1e-5
    gradients = torch.autograd.grad(value, case.parameters(), allow_unused=True, materialize_grads=True)
    directions = [torch.randn_like(p) for p in case.parameters()]
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(case.parameters(), directions, strict=True):
                p.add_(d, alpha=sign * step)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            values.append(kappa())
    slope = (values[0] - values[1]) / (2 * step)
    along = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(along, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("per_sample_probes", [None, False])
@pytest.mark.parametrize("measure", ["neuronwise", "trace"])
@pytest.mark.parametrize("name", CASES)
def test_hutchinson_converges(name: str, measure: str, per_sample_probes: bool | None) -> None:
    """Within four standard errors of the exact value, in value and in the gradient of the weight along itself."""
    case = CASES[name]()
    options: dict[str, Any] = {"measure": measure, "per_sample_probes": per_sample_probes}
    exact = run(case, RelativeFlatness(nn.CrossEntropyLoss(), case.layer, method="exact", measure=measure))
    criterion = RelativeFlatness(nn.CrossEntropyLoss(), case.layer, method="hutchinson", probes=5, **options)
    values = [run(case, criterion) for _ in range(25)]
    assert criterion.standard_error is not None and criterion.plan.products == 5
    weight = case.layer.weight
    along = [(torch.autograd.grad(v, weight)[0] * weight).sum() for v in (*values, exact)]
    for estimates, truth in ((torch.stack(values).detach(), exact), (torch.stack(along[:-1]), along[-1])):
        assert abs(estimates.mean() - truth) < 4 * estimates.std() / 5
    again = RelativeFlatness(nn.CrossEntropyLoss(), case.layer, method="hutchinson", probes=5, **options)
    assert run(case, again) == values[0]  # the same seed


@pytest.mark.parametrize("method", ["exact", "auto"])
def test_forced_probes_leave_the_exact_value_alone(method: str) -> None:
    """Samples interact here: what holds for independent ones would be another number, and is for estimates only."""
    case = mlp_batch_norm()
    criterion = RelativeFlatness(nn.CrossEntropyLoss(), case.layer, method=method, per_sample_probes=True)
    value = run(case, criterion)
    torch.testing.assert_close(value, case.expected().detach(), rtol=1e-9, atol=1e-12)
    assert criterion.plan.method == "exact" and criterion.plan.level == "batch"
    forced = RelativeFlatness(nn.CrossEntropyLoss(), case.layer, method="hutchinson", per_sample_probes=True)
    run(case, forced)
    assert forced.plan.level == "rows"


def test_per_sample_probes_spread_less() -> None:
    """With features that point the same way, a shared probe sees all samples at once: sqrt(B) times the spread."""
    x = 1 + 0.1 * torch.randn(64, 20)
    case = Case(nn.Linear(20, 16), nn.Sequential(nn.Tanh(), nn.Linear(16, 3)), x, (64,))
    errors = []
    for per_sample in (True, False):
        criterion = RelativeFlatness(
            nn.CrossEntropyLoss(), case.layer, method="hutchinson", probes=60, per_sample_probes=per_sample
        )
        run(case, criterion)
        errors.append(criterion.standard_error)
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("name", [n for n, make in CASES.items() if LEVELS[make] != "batch"])
def test_positive_forms(name: str, curvature: str) -> None:
    case = CASES[name]()
    check_positive_form(case, case.tail, curvature)


def check_positive_form(case: Case, jacobian_tail: nn.Module, curvature: str, **options: Any) -> None:
    """Against J^T (d2 l / df2) J, value and gradients; `jacobian_tail` stands for the network after the layer in J."""
    layer_map = LinearMap("test", case.layer)
    weight = case.layer.weight

    def outputs(w: Tensor) -> Tensor:
        result: Tensor = jacobian_tail(torch.func.functional_call(case.layer, {"weight": w}, (case.x,)))
        return result

    def expected() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            f = outputs(weight)
            numbers = range(f.numel())
            jacobian = torch.stack(
                [torch.autograd.grad(f.flatten()[k], weight, create_graph=True)[0] for k in numbers]
            )
        hessian = torch.autograd.functional.hessian(
            lambda o: F.cross_entropy(o, case.y), f, create_graph=True
        ).reshape(f.numel(), f.numel())
        rows = torch.stack([layer_map.canonical(j) for j in jacobian])  # (K, groups, n, I)
        gram = layer_map.canonical(weight) @ layer_map.canonical(weight).transpose(1, 2)
        return torch.einsum("kgsi,kl,lgti,gst->", rows, hessian, rows, gram)

    criterion = RelativeFlatness(
        nn.CrossEntropyLoss(), case.layer, curvature=curvature, probes=200, **options
    )
    value = run(case, criterion)
    assert value >= 0
    if curvature == "ggn":
        torch.testing.assert_close(value, expected().detach(), rtol=1e-9, atol=1e-12)
        finite_differences(case, value, lambda: expected().detach())
    else:
        assert abs(value - expected()) < 4 * criterion.standard_error


class HeldBatchNorm(nn.Module):
    """batch_norm of the batch whose statistics answer to parameters but count as constants in the Jacobian by z."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.dim()) if d != 1]
        mean, var = x.detach().mean(dims), x.detach().var(dims, unbiased=False)
        result: Tensor = F.batch_norm(x, mean, var, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        return result


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("make", [mlp_batch_norm, conv_batch_norm])
def test_positive_forms_with_statistics_held(make: Callable[[], Case], curvature: str) -> None:
    case = make()
    held = nn.Sequential(
        *(HeldBatchNorm(m) if isinstance(m, nn.modules.batchnorm._BatchNorm) else m for m in case.tail)
    )
    check_positive_form(case, held, curvature, hold_statistics=True)


def test_positive_forms_refuse_interacting_samples() -> None:
    case = mlp_batch_norm()
    with pytest.raises(UnsupportedError, match=r"samples interact.*eval\(\)"):
        run(case, RelativeFlatness(nn.CrossEntropyLoss(), case.layer, curvature="ggn", hold_statistics=False))
    with pytest.raises(UnsupportedError, match="no closed form is known"):
        RelativeFlatness(nn.HuberLoss(), case.layer, curvature="ggn")


@pytest.mark.parametrize("name", ["mlp", "conv", "conv_batch_norm", "conv_transpose"])
@pytest.mark.parametrize("measure", ["layerwise_eigenvalue", "neuronwise_eigenvalue"])
def test_eigenvalues(name: str, measure: str) -> None:
    case = CASES[name]()
    layer_map = LinearMap("test", case.layer)

    def expected() -> Tensor:
        weight = case.layer.weight
        shape = layer_map.canonical(weight).shape
        hessian = torch.autograd.functional.hessian(
            lambda w: case.loss(layer_map.to_module(w.reshape(shape), weight.shape)),
            layer_map.canonical(weight).detach(),
        )
        rows = shape[0] * shape[1]
        matrix = hessian.reshape(rows, shape[2], rows, shape[2])
        w = layer_map.canonical(weight).detach().flatten(0, 1)
        if measure == "layerwise_eigenvalue":
            return torch.linalg.eigvalsh(matrix.reshape(w.numel(), -1))[-1] * w.square().sum()
        blocks = torch.stack([matrix[s, :, s] for s in range(rows)])
        return (torch.linalg.eigvalsh(blocks)[:, -1] * w.square().sum(1)).sum()

    value = run(case, RelativeFlatness(nn.CrossEntropyLoss(), case.layer, measure=measure))
    torch.testing.assert_close(value.detach(), expected(), rtol=1e-6, atol=1e-10)
    finite_differences(case, value, expected)


def test_eigenvalue_of_a_zero_hessian_and_of_none() -> None:
    """A layer whose units are all dead; more unknowns than are solved densely."""
    layer, tail = nn.Linear(8, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 3))
    nn.init.constant_(layer.bias, -100.0)
    case = Case(layer, tail, torch.randn(B, 8), (B,))
    criterion = RelativeFlatness(nn.CrossEntropyLoss(), layer, measure="layerwise_eigenvalue")
    assert run(case, criterion) == 0
    with torch.no_grad():
        layer.bias.fill_(torch.nan)
    assert run(case, criterion).isnan()


def test_auto_chooses_by_count_and_says_why() -> None:
    case = mlp()
    criterion = FAMLoss(nn.CrossEntropyLoss(), case.layer, 0.1)
    run(case, criterion)
    assert (criterion.plan.method, criterion.plan.products) == ("exact", 4)
    wide = Case(nn.Linear(3, 40), nn.Sequential(nn.Tanh(), nn.Linear(40, 3)), torch.randn(B, 3), (B,))
    criterion = FAMLoss(nn.CrossEntropyLoss(), wide.layer, 0.1, probes=2)
    run(wide, criterion)
    assert criterion.plan.method == "hutchinson" and "40 products" in str(criterion.plan)
    head = FAMLoss(nn.CrossEntropyLoss(), case.tail[1], 0.1)
    run(case, head)
    assert head.plan.method == "closed_form"
    tight = RelativeFlatness(nn.CrossEntropyLoss(), case.layer, method="exact", max_bytes=100)
    with pytest.raises(UnsupportedError, match=r"4 Hessian products.*GiB.*max_bytes"):
        run(case, tight)
