"""Each loss's second derivative against torch's, and what its arguments may be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import ON_OTHER, network
from torch import Tensor, nn

import fam_ext
from fam_ext import FAMLoss, RelativeFlatness, criteria
from fam_ext.loss_hessians import CrossEntropy

pytestmark = pytest.mark.on_devices

D = torch.float64
OMEGA = torch.tensor([0.5, 2.0, 1.5, 0.7], dtype=D)
Y = torch.tensor([[0, 3], [-100, 1], [1, 2]])  # (3, 2): outputs are (3, 4, 2)
REAL = torch.rand(3, 4, 2, dtype=D, generator=torch.Generator().manual_seed(0))
VAR = REAL.flip(0) + 0.1
REDUCTIONS = ["mean", "sum"]

ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = {
    "mse": (F.mse_loss, (REAL,), {}),
    "mse weights": (F.mse_loss, (REAL,), {"weight": 2 * VAR}),
    "bce": (F.binary_cross_entropy_with_logits, (REAL,), {}),
    "bce weights": (
        F.binary_cross_entropy_with_logits, (REAL,), {"weight": VAR, "pos_weight": OMEGA[:, None]},
    ),
    "poisson": (F.poisson_nll_loss, (REAL,), {}),
    "gaussian": (F.gaussian_nll_loss, (REAL, VAR), {}),
    "gaussian number": (F.gaussian_nll_loss, (REAL, 0.3), {}),
    "gaussian rows": (F.gaussian_nll_loss, (REAL, VAR[..., 0]), {}),
    "gaussian broadcast": (F.gaussian_nll_loss, (REAL, VAR[..., :1]), {}),
    "gaussian clamped": (F.gaussian_nll_loss, (REAL, (VAR - 0.4).clamp(min=0)), {"eps": 0.2}),
    "gaussian tiny": (F.gaussian_nll_loss, (REAL, 0 * VAR), {}),
}  # fmt: skip


def outputs(dtype: torch.dtype = D) -> Tensor:
    return torch.randn(3, 4, 2, dtype=dtype)


def torch_hessian(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    hessian: Tensor = torch.func.hessian(loss)(z)
    return hessian.reshape(z.numel(), z.numel())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ELEMENTWISE)
def test_diagonal(case: str, reduction: str) -> None:
    function, arguments, options = ELEMENTWISE[case]
    options = {**options, "reduction": reduction}
    z = outputs()
    bound = criteria.read("test", functools.partial(function, **options))(*arguments)
    bound.check("test", z)
    bound.check_values("test", z)
    expected = torch_hessian(lambda x: function(x, *arguments, **options), z)
    torch.testing.assert_close(torch.diag(bound.diagonal(z).flatten()), expected, rtol=1e-12, atol=1e-14)
    none = criteria.read("test", functools.partial(function, **{**options, "reduction": "none"}))(*arguments)
    total = bound.denominator(z) if reduction == "mean" else 1.0
    torch.testing.assert_close(none.diagonal(z).sum() / total, expected.sum())


CROSS_ENTROPY: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "indices": (Y.clamp(min=0), {}),
    "bytes": (Y.clamp(min=0).byte(), {}),
    "ignored": (Y, {}),
    "ignored class": (Y.clamp(min=0), {"ignore_index": 1}),
    "weights": (Y, {"weight": OMEGA}),
    "smoothing": (Y, {"weight": OMEGA, "label_smoothing": 0.2}),
    "soft": (REAL.softmax(1), {}),
    "soft smoothing": (REAL, {"weight": OMEGA, "label_smoothing": 0.2}),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CROSS_ENTROPY)
def test_coefficients(case: str, reduction: str) -> None:
    target, options = CROSS_ENTROPY[case]
    options = {**options, "reduction": reduction}
    z = outputs()
    bound = criteria.read("test", functools.partial(F.cross_entropy, **options))(target)
    bound.check("test", z)
    bound.check_values("test", z)
    torchs = target.long() if case == "bytes" else target  # torch takes bytes without positions only
    p = z.softmax(1).movedim(1, -1).reshape(6, 4)
    blocks = bound.coefficients(z).reshape(6, 1, 1) * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    rows = torch.eye(6, dtype=D)
    expected = torch_hessian(lambda x: F.cross_entropy(x, torchs, **options), z).reshape(3, 4, 2, 3, 4, 2)
    expected = expected.permute(0, 2, 1, 3, 5, 4).reshape(6, 4, 6, 4)
    torch.testing.assert_close(torch.einsum("ij,iab->iajb", rows, blocks), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [*ELEMENTWISE, *CROSS_ENTROPY])
def test_the_denominator_joins_batches(case: str) -> None:
    """A mean over a data set is the mean of its batches' means, weighted with their denominators."""
    if case in ELEMENTWISE:
        function, arguments, options = ELEMENTWISE[case]
        part = lambda value, rows: (  # noqa: E731
            value[rows] if isinstance(value, Tensor) and value.dim() > 1 and len(value) == 3 else value
        )
    else:
        function, (target, options) = F.cross_entropy, CROSS_ENTROPY[case]
        target = target.long() if case == "bytes" else target
        arguments, part = (target,), lambda value, rows: value[rows] if value is target else value
    z, total, counted = outputs(), torch.zeros((), dtype=D), 0.0
    for rows in (slice(0, 1), slice(1, 3)):
        given = [part(a, rows) for a in arguments]
        own = {k: part(v, rows) for k, v in options.items()}
        count = float(criteria.read("test", functools.partial(function, **own))(*given).denominator(z[rows]))
        total, counted = total + count * function(z[rows], *given, **own), counted + count
    torch.testing.assert_close(total / counted, function(z, *arguments, **options))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits", "mse", "gaussian_nll"])
def test_no_digit_of_float32_in_a_float64_result(loss: str) -> None:
    """float64 features beside float32 criterion arguments: as if these were float64 numbers from the start."""
    phi, weight = torch.randn(3, 5, dtype=D), torch.randn(4, 5, dtype=D)
    real, omega = torch.rand(3, 4), torch.rand(4) + 0.1
    options: dict[str, Any] = {
        "cross_entropy": {"target": real, "class_weight": omega, "label_smoothing": 0.1},
        "bce_with_logits": {"target": real, "pos_weight": omega, "element_weight": real},
        "mse": {"target": real, "element_weight": real},
        "gaussian_nll": {"variance": real, "target": real},
    }[loss]
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    results = [
        fam_ext.relative_flatness(phi, weight, phi @ weight.T, loss=loss, **given)
        for given in (options, exact)
    ]
    torch.testing.assert_close(*results, rtol=1e-14, atol=0)


CLASSES = 4
BAD_TARGETS: dict[str, tuple[Any, type[Exception], str]] = {
    "past the end": (torch.tensor([0, CLASSES, 1]), IndexError, "from 0 to 3 or ignore_index .-100., got 4"),
    "negative": (torch.tensor([0, -1, 1]), IndexError, "from 0 to 3 or ignore_index .-100., got -1"),
    "int32": (
        torch.tensor([0, 1, 1]).int(),
        TypeError,
        r"class indices of int64 .*call .long\(\).*got a int32",
    ),
    "bool": (torch.tensor([0, 1, 1]).bool(), TypeError, "class indices of int64.*got a bool"),
    "list": ([0, 1, 1], TypeError, r"target must be a tensor, got \[0, 1, 1\]"),
    "shape": (torch.zeros(2).long(), ValueError, r"target must be of shape \(3,\)"),
    "soft shape": (torch.rand(3), ValueError, r"target must be of shape \(3, 4\)"),
}


def ask(
    entry: Any, criterion: Any, *targets: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> Tensor:
    """One call of FAMLoss or RelativeFlatness on a linear head of four classes and three rows."""
    net = network().to(dtype)
    strength = (0.1,) if entry is FAMLoss else ()
    result: Tensor = entry(criterion, net[2], *strength)(
        net(torch.randn(3, 5, dtype=dtype)), *targets, **options
    )
    return result


@pytest.mark.parametrize("case", BAD_TARGETS)
@pytest.mark.parametrize("entry", ["FAMLoss", "RelativeFlatness", "relative_flatness"])
def test_one_rule_for_class_targets(entry: str, case: str) -> None:
    target, error, message = BAD_TARGETS[case]
    if error is IndexError and entry == "FAMLoss" and torch.get_default_device().type != "cpu":
        pytest.skip("on a device the kernels check: a GPU's stop the process")
    criteria = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.ones(CLASSES))]
    for criterion in criteria:
        with pytest.raises(error, match=message):
            if entry == "relative_flatness":
                z, weight = torch.zeros(3, CLASSES), torch.zeros(CLASSES, 5)
                fam_ext.relative_flatness(
                    torch.zeros(3, 5), weight, z, target=target, class_weight=criterion.weight
                )
            else:
                ask(getattr(fam_ext, entry), criterion, target)


BAD_CRITERIA: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "weight length": (
        nn.CrossEntropyLoss(torch.ones(3)), (torch.tensor([0, 1, 1]),), ValueError, r"class_weight must be of shape \(4,\)",
    ),
    "weight dtype": (
        nn.CrossEntropyLoss(torch.ones(4, dtype=D)), (torch.tensor([0, 1, 1]),), TypeError,
        "class_weight must be of the dtype of the outputs, torch.float32",
    ),
    "ignore_index": (
        nn.CrossEntropyLoss(ignore_index="a"), (torch.tensor([0, 1, 1]),), TypeError, "ignore_index must be an integer",  # type: ignore[arg-type]
    ),
    "label_smoothing type": (
        nn.CrossEntropyLoss(label_smoothing="a"), (torch.tensor([0, 1, 1]),), TypeError, "label_smoothing must be a number",  # type: ignore[arg-type]
    ),
    "label_smoothing": (
        nn.CrossEntropyLoss(label_smoothing=2.0), (torch.tensor([0, 1, 1]),), ValueError, "between 0 and 1, got 2.0",
    ),
    "ignore_index of probabilities": (
        nn.CrossEntropyLoss(ignore_index=1), (torch.rand(3, 4),), ValueError, "ignore_index must be left out",
    ),
    "negative variance": (
        nn.GaussianNLLLoss(), (torch.rand(3, 4), -torch.ones(3, 4)), ValueError, "at least 0|negative entry",
    ),
    "complex variance": (
        nn.GaussianNLLLoss(), (torch.rand(3, 4), torch.ones(3, 4) * 1j), TypeError, "variance must be a float32",
    ),
    "variance shape": (
        nn.GaussianNLLLoss(), (torch.rand(3, 4), torch.ones(2, 4)), ValueError, r"broadcasts to \(3, 4\)",
    ),
    "complex pos_weight": (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(4) * 1j), (torch.rand(3, 4),), TypeError, "pos_weight must be a float32",
    ),
    "pos_weight shape": (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), (torch.rand(3, 4),), ValueError, r"pos_weight must be .*broadcasts",
    ),
    "integer BCE target": (
        nn.BCEWithLogitsLoss(), (torch.ones(3, 4).long(),), TypeError, "target must be a float32",
    ),
    "mse weight shape": (
        functools.partial(F.mse_loss, weight=torch.ones(4)), (torch.rand(3, 4),), ValueError,
        "element_weight must be of the shape",
    ),
    "unknown argument": (nn.MSELoss(), (torch.rand(3, 4), 1, 2), TypeError, r"MSELoss.forward\(\) takes"),
    "unknown argument of a function": (F.mse_loss, (torch.rand(3, 4), *range(9)), TypeError, r"mse_loss\(\) takes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CRITERIA)
@pytest.mark.parametrize("entry", [FAMLoss, RelativeFlatness])
def test_one_rule_for_criteria(entry: Any, case: str) -> None:
    criterion, targets, error, message = BAD_CRITERIA[case]
    with pytest.raises(error, match=message):
        ask(entry, criterion, *targets)


@pytest.mark.skipif(ON_OTHER, reason="that device has no autocast")
def test_class_weights_under_autocast() -> None:
    """Where the criterion takes them in evaluation mode, training does too."""
    criterion = nn.CrossEntropyLoss(torch.ones(4))
    device = torch.get_default_device().type
    with torch.autocast(device, dtype=torch.bfloat16):
        fam = FAMLoss(criterion, nn.Linear(5, 4), 0.1)
        for _ in ("training", "evaluation"):
            z = fam.layer(torch.randn(3, 5))
            assert z.dtype == torch.bfloat16 and torch.isfinite(fam(z, torch.tensor([0, 1, 1])))
            fam.eval()


def test_integer_targets_where_torch_takes_them() -> None:
    counts = torch.tensor([[0, 1, 2, 3]] * 3)
    for criterion in (nn.PoissonNLLLoss(), nn.MSELoss()):
        torch.manual_seed(0)
        got = ask(RelativeFlatness, criterion, counts)
        torch.manual_seed(0)
        assert torch.equal(got, ask(RelativeFlatness, criterion, counts.float()))


def test_values_that_cannot_be_read_make_nan() -> None:
    """In a compiled graph and under vmap there is no refusing a value: no number comes of it either."""
    phi, weight, good = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 1, -100])
    run = lambda y: fam_ext.relative_flatness(phi, weight, phi @ weight.T, target=y, reduction="none")  # noqa: E731
    expected = run(good)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    bad = torch.tensor([0, 4, -100])
    for function in (compiled, lambda y: torch.func.vmap(run)(y[None])[0]):
        torch.testing.assert_close(function(good), expected)
        assert function(bad)[1].isnan() and not function(bad).isfinite()[1]


def test_a_clone_of_the_criterion_reads_the_same() -> None:
    bound = CrossEntropy(torch.tensor([1, -100]), weight=torch.ones(3))
    assert bound.ignored().tolist() == [False, True] and not bound.fisher()
    assert CrossEntropy(torch.rand(2, 3)).ignored() is None and CrossEntropy(None).fisher()


@pytest.mark.parametrize("classes", [200, 300])
def test_small_integers_are_no_smaller_classes(classes: int) -> None:
    """In uint8 -100 is 156, and 300 classes are 44."""
    layer = torch.nn.Linear(4, classes).double()
    x, y = torch.randn(6, 4).double(), torch.tensor([156, 50, 156, 199, 44, 3])
    values = []
    for labels in (y, y.to(torch.uint8)):
        kappa = fam_ext.RelativeFlatness(torch.nn.CrossEntropyLoss(), layer)
        values.append(kappa(layer(x), labels))
        kappa.detach()
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0)
