"""Closed-form relative flatness of heads: every layer and criterion against the full float64 Hessian, value and gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from full_hessian import layer_hessian
from torch import Tensor, nn

import fam_ext
from fam_ext.head.closed_form import row_traces
from fam_ext.layers.linear_map import LinearMap

pytestmark = pytest.mark.on_devices

CE_WEIGHT = torch.tensor([0.5, 2.0, 1.5, 0.7], dtype=torch.float64)


def index_target(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, shape[1], (shape[0], *shape[2:]))


def ignored_target(shape: tuple[int, ...]) -> Tensor:
    target = index_target(shape)
    target.view(-1)[::3] = -100
    return target


def soft_target(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, dtype=torch.float64).softmax(1)


def real_target(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


CROSS_ENTROPY: dict[str, tuple[Any, Callable[[tuple[int, ...]], Tensor]]] = {
    "ce": (nn.CrossEntropyLoss(), index_target),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), index_target),
    "weights": (nn.CrossEntropyLoss(weight=CE_WEIGHT), ignored_target),
    "ignore": (nn.CrossEntropyLoss(), ignored_target),
    "smoothing": (nn.CrossEntropyLoss(weight=CE_WEIGHT, label_smoothing=0.2), ignored_target),
    "soft": (nn.CrossEntropyLoss(), soft_target),
    "soft weights": (F.cross_entropy, soft_target),
    "function": (functools.partial(F.cross_entropy, label_smoothing=0.1, weight=CE_WEIGHT), index_target),
}
ELEMENTWISE: dict[str, tuple[Any, Callable[[tuple[int, ...]], Tensor]]] = {
    "mse": (nn.MSELoss(), real_target),
    "mse sum": (F.mse_loss, real_target),
    "bce": (nn.BCEWithLogitsLoss(), real_target),
    "poisson": (nn.PoissonNLLLoss(), real_target),
    "poisson full": (functools.partial(F.poisson_nll_loss, full=True, reduction="sum"), real_target),
}
ALL = {**CROSS_ENTROPY, **ELEMENTWISE}


def linear() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Linear(3, 4), torch.randn(6, 3), lambda z: z


def linear_tokens() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Linear(3, 4), torch.randn(2, 3, 3), lambda z: z.transpose(1, 2)


def linear_flattened() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Linear(3, 4), torch.randn(2, 3, 3), lambda z: z.view(-1, 4)


def linear_shifted() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Linear(3, 4), torch.randn(2, 4, 3), lambda z: z[..., :-1, :].contiguous().view(-1, 4)


def linear_time_first() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Linear(3, 4), torch.randn(3, 2, 3), lambda z: z.transpose(0, 1).reshape(-1, 4)


def linear_masked() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    return nn.Linear(3, 4), torch.randn(2, 3, 3), lambda z: z[mask]


def conv1d() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Conv1d(2, 4, 2, stride=2, padding=1, bias=False), torch.randn(2, 2, 5), lambda z: z


def conv2d() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return (
        nn.Conv2d(2, 4, (2, 1), dilation=2, padding="same"),
        torch.randn(1, 2, 3, 2),
        lambda z: z.flatten(2),
    )


def conv2d_reflect() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 1, 2, 2), lambda z: z


def conv3d() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Conv3d(1, 4, (2, 1, 1)), torch.randn(2, 1, 2, 2, 1), lambda z: z


def grouped() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Conv2d(4, 4, (1, 2), groups=2), torch.randn(2, 4, 2, 3), lambda z: z


def depthwise() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return nn.Conv1d(4, 4, 2, groups=4), torch.randn(2, 4, 3), lambda z: z


def conv_transpose() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    layer = nn.ConvTranspose2d(2, 4, 2, stride=2, padding=1, groups=2, output_padding=1)
    return layer, torch.randn(2, 2, 2, 1), lambda z: z


HEADS = {
    f.__name__: f
    for f in (
        linear, linear_tokens, linear_flattened, linear_shifted, linear_time_first, linear_masked,
        conv1d, conv2d, conv2d_reflect, conv3d, grouped, depthwise, conv_transpose,
    )
}  # fmt: skip


def call(layer: nn.Module, features: Tensor, weight: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"weight": weight}, (features,))


def check(
    layer: nn.Module, x: Tensor, view: Callable[[Tensor], Tensor], criterion: Any, args: Any, **options: Any
) -> None:
    """kappa, its gradients to weight and features, and FAMLoss's total, against the oracle; layer and x in float64."""
    groups = getattr(layer, "groups", 1)
    weight = layer.weight
    x.requires_grad_()
    layer_map = LinearMap("test", layer)
    canonical = layer_map.canonical(weight)

    def loss(w: Tensor) -> Tensor:
        return criterion(view(call(layer, x, w)), *args)

    def by_rows(w: Tensor) -> Tensor:
        return loss(layer_map.to_module(w.reshape(canonical.shape), weight.shape))

    with torch.no_grad():
        held = {n: p for n, p in layer.named_parameters() if n != "weight"}
    expected = oracle.kappa(by_rows, canonical.flatten(0, 1), groups=groups, **options)
    measure = fam_ext.RelativeFlatness(criterion, layer, **options)
    kappa = measure(view(layer(x)), *args)
    torch.testing.assert_close(kappa, expected, rtol=1e-9, atol=1e-12)
    inputs = [weight, x, *held.values()]
    want = torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad(kappa, inputs, allow_unused=True, materialize_grads=True)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-11)

    famloss = fam_ext.FAMLoss(criterion, layer, -0.7, **options)
    total = famloss(view(layer(x)), *args)
    torch.testing.assert_close(total, loss(weight) - 0.7 * expected, rtol=1e-9, atol=1e-12)
    want = torch.autograd.grad(
        loss(weight) - 0.7 * oracle.kappa(by_rows, canonical.flatten(0, 1), groups=groups, **options),
        inputs,
        materialize_grads=True,
        allow_unused=True,
    )
    got = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("head", HEADS)
def test_against_the_full_hessian(head: str, name: str) -> None:
    layer, x, view = HEADS[head]()
    criterion, make = ALL[name]
    layer, x = layer.double(), x.double()
    check(layer, x, view, criterion, (make(tuple(view(layer(x)).shape)),))


@pytest.mark.parametrize(
    "options", [{"measure": "trace"}, {"measure": "layerwise"}, {"measure": "layerwise", "norm_power": 1}]
)
@pytest.mark.parametrize("name", ["weights", "bce"])
@pytest.mark.parametrize("head", ["linear_tokens", "conv1d", "grouped"])
def test_other_measures(head: str, name: str, options: dict[str, Any]) -> None:
    layer, x, view = HEADS[head]()
    criterion, make = ALL[name]
    layer, x = layer.double(), x.double()
    check(layer, x, view, criterion, (make(tuple(view(layer(x)).shape)),), **options)


@pytest.mark.parametrize("shape", [(6, 4), (6,), (6, 1)])
def test_gaussian_nll(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(3, 4).double(), torch.randn(6, 3).double()
    var = torch.rand(shape, dtype=torch.float64) + 0.1
    check(layer, x, lambda z: z, nn.GaussianNLLLoss(), (real_target((6, 4)), var))


def test_weighted_bce_and_mse() -> None:
    layer, x = nn.Linear(3, 4).double(), torch.randn(6, 3).double()
    weight, pos_weight = torch.rand(6, 1).double(), torch.rand(4).double() * 3
    check(
        layer,
        x,
        lambda z: z,
        nn.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight),
        (real_target((6, 4)),),
    )
    criterion = functools.partial(F.mse_loss, weight=torch.rand(6, 4).double())
    check(layer, x, lambda z: z, criterion, (real_target((6, 4)),))


def test_single_output_squeezed() -> None:
    layer, x = nn.Linear(3, 1).double(), torch.randn(6, 3).double()
    check(layer, x, lambda z: z.squeeze(-1), nn.BCEWithLogitsLoss(), (real_target((6,)),))
    check(layer, x, lambda z: z[:, 0], nn.MSELoss(), (real_target((6,)),))


def test_unbatched() -> None:
    layer, x = nn.Linear(3, 4).double(), torch.randn(3).double()
    check(layer, x, lambda z: z, nn.CrossEntropyLoss(), (torch.tensor(2),))
    check(layer, x, lambda z: z, nn.MSELoss(), (real_target((4,)),))
    check(layer, x, lambda z: z.unsqueeze(0), nn.CrossEntropyLoss(), (torch.tensor([2]),))


@pytest.mark.parametrize("head", ["linear", "linear_shifted", "linear_masked", "conv2d", "grouped"])
@pytest.mark.parametrize("name", ["ignore", "mse"])
def test_per_sample_adds_up(head: str, name: str) -> None:
    layer, x, view = HEADS[head]()
    layer, x = layer.double(), x.double()
    criterion, make = ALL[name]
    target = make(tuple(view(layer(x)).shape))
    measure = fam_ext.RelativeFlatness(criterion, layer)
    kappa = measure(view(layer(x)), target)
    parts = measure(view(layer(x)), target, per_sample=True)
    assert parts.shape == (x.shape[0],)
    torch.testing.assert_close(parts.sum(), kappa)
    x2 = x.clone()
    x2[0] = 0  # no features, no share
    first = measure(view(layer(x2)), target, per_sample=True)
    assert first[0] == 0
    torch.testing.assert_close(first[1:], parts[1:])


@pytest.mark.parametrize("head", ["linear", "linear_tokens", "grouped"])
@pytest.mark.parametrize("base", [nn.CrossEntropyLoss, nn.MSELoss])
def test_reduction_none(head: str, base: Any) -> None:
    layer, x, view = HEADS[head]()
    layer, x = layer.double(), x.double()
    z = view(layer(x))
    target = index_target(tuple(z.shape)) if base is nn.CrossEntropyLoss else torch.rand_like(z)
    each = base(reduction="none")
    total = fam_ext.FAMLoss(each, layer, 0.3)(view(layer(x)), target)
    assert total.shape == each(z, target).shape
    summed = fam_ext.FAMLoss(base(reduction="sum"), layer, 0.3)(view(layer(x)), target)
    torch.testing.assert_close(total.sum(), summed)


@pytest.mark.parametrize("exponent", [2, 5, 8])
@pytest.mark.parametrize("measure", ["neuronwise", "trace"])
@pytest.mark.parametrize("groups", [1, 2])
def test_confident_predictions(exponent: int, measure: str, groups: int) -> None:
    """float32 keeps its digits where p is 1 - 10^-exponent."""
    layer = nn.Conv1d(4, 6, 1, groups=groups)
    x = torch.randn(5, 4, 3)
    with torch.no_grad():
        layer.bias[0] = exponent * 2.3 + 2
    y = index_target((5, 6, 3))
    got = fam_ext.RelativeFlatness(nn.CrossEntropyLoss(), layer, measure=measure)
    kappa = got(layer(x), y)
    z = layer(x).detach()
    # the float64 value for the very float32 logits
    double = row_traces(
        z.double(),
        layer.weight.double(),
        x.double().unflatten(1, (groups, -1)).square().sum(2).movedim(1, -1),
        measure,
        "reference",
    ).mean()
    torch.testing.assert_close(kappa.double(), double, rtol=3e-6, atol=0)


def test_rescaling_a_relu_network_leaves_kappa_alone() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
    measure = fam_ext.RelativeFlatness(nn.CrossEntropyLoss(), net[2])
    trace = fam_ext.RelativeFlatness(nn.CrossEntropyLoss(), net[2], measure="trace")
    before, other = measure(net(x), y), trace(net(x), y)
    with torch.no_grad():
        net[0].weight.mul_(1 / 7)
        net[0].bias.mul_(1 / 7)
        net[2].weight.mul_(7)
    torch.testing.assert_close(measure(net(x), y), before, rtol=1e-12, atol=0)
    torch.testing.assert_close(trace(net(x), y), other / 49)


@pytest.mark.parametrize("measure", ["neuronwise", "layerwise"])
@pytest.mark.parametrize("name", ["weights", "bce"])
def test_curvature_held_constant(name: str, measure: str) -> None:
    layer, x = nn.Linear(3, 4).double(), torch.randn(6, 3).double().requires_grad_()
    criterion, make = ALL[name]
    y = make((6, 4))
    kappa = fam_ext.RelativeFlatness(criterion, layer, measure=measure, curvature_grad=False)(layer(x), y)
    grad_w, grad_x = torch.autograd.grad(kappa, [layer.weight, x], allow_unused=True)
    assert grad_x is None
    hessian = layer_hessian(lambda w: criterion(x.detach() @ w.T + layer.bias.detach(), y), layer.weight)
    traces = torch.einsum("aibi->ab", hessian)
    w = layer.weight.detach()
    want = 2 * traces @ w if measure == "neuronwise" else 2 * w * traces.trace()
    torch.testing.assert_close(grad_w, want)
    total = fam_ext.FAMLoss(criterion, layer, 0.5, measure=measure, curvature_grad=False)(layer(x), y)
    plain = torch.autograd.grad(criterion(layer(x), y), layer.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(total, layer.weight)[0], plain + 0.5 * want)


def test_normalize_divides_by_the_fan_in() -> None:
    layer, x, y = nn.Linear(3, 4), torch.randn(6, 3), index_target((6, 4))
    plain = fam_ext.FAMLoss(nn.CrossEntropyLoss(), layer, 0.3)
    divided = fam_ext.FAMLoss(nn.CrossEntropyLoss(), layer, 0.9, normalize="fan_in")
    torch.testing.assert_close(plain(layer(x), y), divided(layer(x), y))
    torch.testing.assert_close(plain.last.flatness / 3, divided.last.flatness)
    torch.testing.assert_close(plain.last.loss, divided.last.loss)


def test_no_valid_rows_is_zero() -> None:
    layer = nn.Linear(3, 4)
    for x, y in (
        (torch.randn(5, 3), torch.full((5,), -100)),
        (torch.randn(0, 3), torch.zeros(0, dtype=torch.int64)),
    ):
        kappa = fam_ext.RelativeFlatness(nn.CrossEntropyLoss(), layer)(layer(x), y)
        assert kappa == 0
        assert torch.autograd.grad(kappa, layer.weight)[0].abs().sum() == 0


@pytest.mark.parametrize("name", ["weights", "smoothing", "soft", "mse", "bce", "poisson"])
def test_function_of_tensors_agrees(name: str) -> None:
    criterion, make = ALL[name]
    layer, x = nn.Linear(3, 4).double(), torch.randn(6, 3).double()
    y = make((6, 4))
    kappa = fam_ext.RelativeFlatness(criterion, layer)(layer(x), y)
    loss = {"mse": "mse", "bce": "bce_with_logits", "poisson": "poisson_nll"}.get(name, "cross_entropy")
    extra: dict[str, Any] = {}
    if isinstance(criterion, nn.CrossEntropyLoss):
        extra = {"class_weight": criterion.weight, "label_smoothing": criterion.label_smoothing}
    got = fam_ext.relative_flatness(
        x.view(2, 3, 3),
        layer.weight,
        layer(x).view(2, 3, 4),
        loss=loss,
        target=y.view(2, 3, *y.shape[1:]),
        **extra,
    )
    torch.testing.assert_close(got, kappa)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of"),
        ({"class_weight": torch.ones(4)}, "target must be given"),
        ({"loss": "mse", "class_weight": torch.ones(4)}, "class_weight must be left out"),
        ({"loss": "gaussian_nll"}, "variance must be given"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, "target must be of shape"),
        ({"norm_power": 1}, "norm_power"),
        ({"loss": "mse", "target": torch.zeros(6)}, "target must be of the shape"),
    ],
)
def test_function_of_tensors_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fam_ext.relative_flatness(torch.randn(6, 3), torch.randn(4, 3), torch.randn(6, 4), **options)


def test_a_float64_argument_of_the_loss_makes_all_digits_those_of_float64() -> None:
    layer, x = nn.Linear(3, 4), torch.randint(-8, 8, (6, 3)) / 8
    for parameter in layer.parameters():  # few bits: logits are the same in both dtypes
        parameter.data = torch.randint(-8, 8, parameter.shape) / 16
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.rand(4, dtype=torch.float64) + 0.5)
    target = torch.rand(6, 4)
    values = []
    for head in (layer, copy.deepcopy(layer).double()):
        flatness = fam_ext.RelativeFlatness(criterion, head)
        values.append(flatness(head(x.to(head.weight.dtype)), target))
    torch.testing.assert_close(*values, rtol=1e-14, atol=0)
