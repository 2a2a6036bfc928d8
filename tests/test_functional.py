"""fam_ext.functional and relative_flatness of a head from its tensors, against the full float64 Hessian."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from full_hessian import layer_hessian
from full_hessian import relative_flatness as full_hessian
from inputs import DTYPES, LAYOUTS, confident_logits, make_input, needs_native
from tolerance import assert_accurate, relative_error
from torch import Tensor

import fam_ext

pytestmark = pytest.mark.on_devices

D = torch.float64
OMEGA = torch.tensor([0.5, 2.0, 1.5, 0.7], dtype=D)
Y = torch.tensor([[0, 3, -100], [1, 1, 2]])
REAL = torch.rand(2, 3, 4, dtype=D)


def ce(z: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Cross-entropy with the classes last."""
    target = target.reshape(-1, 4) if target.is_floating_point() else target.flatten()
    return F.cross_entropy(z.reshape(-1, 4), target, **options)


# what torch returns, and how relative_flatness is asked for the same
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "no target": (lambda z: ce(z, Y.clamp(min=0)), {}),
    "sum": (lambda z: ce(z, Y, reduction="sum"), {"target": Y, "reduction": "sum"}),
    "ignored": (lambda z: ce(z, Y), {"target": Y}),
    "ignored class": (lambda z: ce(z, Y.clamp(min=0), ignore_index=1), {"target": Y.clamp(min=0), "ignore_index": 1}),
    "weights": (lambda z: ce(z, Y, weight=OMEGA), {"target": Y, "class_weight": OMEGA}),
    "smoothing": (
        lambda z: ce(z, Y, weight=OMEGA, label_smoothing=0.2),
        {"target": Y, "class_weight": OMEGA, "label_smoothing": 0.2},
    ),
    "soft": (lambda z: ce(z, REAL.softmax(-1)), {"target": REAL.softmax(-1)}),
    "soft weights": (lambda z: ce(z, REAL, weight=OMEGA), {"target": REAL, "class_weight": OMEGA}),
    "mse": (lambda z: F.mse_loss(z, REAL), {"loss": "mse"}),
    "mse weights": (
        lambda z: F.mse_loss(z, REAL, weight=2 * REAL.flip(0)),
        {"loss": "mse", "target": REAL, "element_weight": 2 * REAL.flip(0)},
    ),
    "bce": (lambda z: F.binary_cross_entropy_with_logits(z, REAL), {"loss": "bce_with_logits"}),
    "bce weights": (
        lambda z: F.binary_cross_entropy_with_logits(z, REAL, REAL.flip(1), pos_weight=OMEGA, reduction="sum"),
        {"loss": "bce_with_logits", "target": REAL, "element_weight": REAL.flip(1), "pos_weight": OMEGA,
         "reduction": "sum"},
    ),
    "poisson": (lambda z: F.poisson_nll_loss(z, REAL), {"loss": "poisson_nll"}),
    "gaussian": (
        lambda z: F.gaussian_nll_loss(z, REAL, REAL.flip(2) + 0.1),
        {"loss": "gaussian_nll", "variance": REAL.flip(2) + 0.1},
    ),
}  # fmt: skip


def make_head(dtype: torch.dtype = D) -> tuple[Tensor, Tensor]:
    """features (2, 3, 3) and weight (4, 3), which require grad."""
    return make_input((2, 3, 3), dtype).requires_grad_(), make_input((4, 3), dtype, seed=1).requires_grad_()


@pytest.mark.parametrize("measure", ["neuronwise", "layerwise", "layerwise 1", "trace"])
@pytest.mark.parametrize("case", CASES)
def test_full_hessian(case: str, measure: str, backend: str) -> None:
    criterion, options = CASES[case]
    measure, _, power = measure.partition(" ")
    phi, weight = make_head()
    loss = lambda w: criterion(phi @ w.T)  # noqa: E731
    kappa = fam_ext.relative_flatness(
        phi, weight, phi @ weight.T, measure=measure, norm_power=int(power or 2), backend=backend, **options
    )
    expected = full_hessian(loss, weight, measure, norm_power=int(power or 2))
    torch.testing.assert_close(kappa, expected, rtol=1e-11, atol=0)
    differentiable = oracle.kappa(loss, weight, measure, norm_power=int(power or 2))
    results = [
        torch.autograd.grad(k, (phi, weight), materialize_grads=True) if k.requires_grad else None
        for k in (kappa, differentiable)
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_curvature_held(case: str, backend: str) -> None:
    """curvature_grad=False: the same number, whose gradient is that of sum <w_s, w_s'> with the Hessian's traces held."""
    criterion, options = CASES[case]
    phi, weight = make_head()
    logits = (phi @ weight.T).detach().requires_grad_()
    inputs = phi, weight, logits
    kappa = fam_ext.relative_flatness(*inputs, curvature_grad=False, backend=backend, **options)
    torch.testing.assert_close(kappa, fam_ext.relative_flatness(*inputs, backend=backend, **options))
    traces = torch.einsum("aibi->ab", layer_hessian(lambda w: criterion(phi @ w.T), weight))
    dphi, dw, dz = torch.autograd.grad(kappa, inputs, allow_unused=True)
    assert dphi is None and dz is None
    torch.testing.assert_close(dw, ((traces + traces.T) @ weight).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_rows_and_normalization(case: str, backend: str) -> None:
    _, options = CASES[case]
    phi, weight = make_head()
    z = phi @ weight.T
    run = lambda **more: fam_ext.relative_flatness(phi, weight, z, backend=backend, **{**options, **more})  # noqa: E731
    none, total = run(reduction="none"), run(reduction="sum")
    softmax = options.get("loss", "cross_entropy") == "cross_entropy"
    assert none.shape == ((2, 3) if softmax else (2, 3, 4))
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(run(normalize="fan_in") * 3, run())


@needs_native
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_with_logits", "poisson_nll"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout: str, loss: str) -> None:
    for dtypes in (*((d,) * 3 for d in DTYPES), *itertools.permutations(DTYPES, 3)):
        shapes = (5, 4, 23), (6, 23), (5, 4, 6)
        inputs = [
            make_input(shape, dtype, layout, k).requires_grad_()
            for k, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        results = []
        for tensors, backend in (
            (inputs, "native"), (inputs, "reference"), ([t.detach().double().requires_grad_() for t in inputs], "reference"),
        ):  # fmt: skip
            kappa = fam_ext.relative_flatness(*tensors, loss=loss, backend=backend)
            results.append((kappa, *torch.autograd.grad(kappa, tensors, materialize_grads=True)))
        assert results[0][0].dtype == (D if D in dtypes else torch.float32)
        for actual, plain, truth in zip(*results, strict=True):
            assert actual.dtype == plain.dtype
            assert_accurate(actual, plain, truth, 20 * 23 * 6)


@needs_native
@pytest.mark.parametrize("classes", [2, 10, 33, 1000])
def test_confident_predictions(classes: int) -> None:
    for digits in range(2, 9):
        z, y = confident_logits(41, classes, 10.0**-digits)
        inputs = [t.requires_grad_() for t in (make_input((41, 20)), make_input((classes, 20), seed=1), z)]
        kappa = fam_ext.relative_flatness(*inputs, target=y, backend="native")
        phi, weight, logits = (t.detach().double().requires_grad_() for t in inputs)
        truth = (phi.square().sum(1) * oracle.softmax_trace(logits, weight)).mean()
        pairs = zip(
            (kappa, *torch.autograd.grad(kappa, inputs)),
            (truth, *torch.autograd.grad(truth, (phi, weight, logits))),
            strict=True,
        )
        assert max(relative_error(a, b) for a, b in pairs) <= 2e-6


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2), (0,), (2, 0)], ids=str)
def test_any_rows(shape: tuple[int, ...], backend: str) -> None:
    phi, weight = make_input((*shape, 5), D), make_input((3, 5), D, seed=1)
    target = torch.zeros(shape, dtype=torch.int64)
    kappa = fam_ext.relative_flatness(phi, weight, phi @ weight.T, target=target, backend=backend)
    rows = phi.reshape(-1, 5)
    parts = [fam_ext.relative_flatness(r, weight, r @ weight.T, backend=backend) for r in rows]
    torch.testing.assert_close(kappa, torch.stack(parts).mean() if parts else torch.zeros((), dtype=D))


@pytest.mark.parametrize("case", ["ignored", "weights", "smoothing"])
def test_ignored_rows_may_hold_anything(case: str, backend: str) -> None:
    _, options = CASES[case]
    phi, weight = make_head()
    phi, results = phi.detach(), []
    for bad in (None, math.nan):
        z = (phi.nan_to_num() @ weight.T).detach()
        if bad is not None:
            phi[0, 2] = z[0, 2] = bad
        inputs = [t.detach().clone().requires_grad_() for t in (phi, weight, z)]
        kappa = fam_ext.relative_flatness(*inputs, backend=backend, **options)
        results.append((kappa, *torch.autograd.grad(kappa, inputs)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)
    everything = torch.full_like(Y, -100)
    kappa = fam_ext.relative_flatness(*inputs, backend=backend, **{**options, "target": everything})
    assert kappa == 0 and not any(g.any() for g in torch.autograd.grad(kappa, inputs))


def test_gradcheck(backend: str) -> None:
    phi, weight = make_head()
    logits = (phi @ weight.T).detach().requires_grad_()
    for case in ("smoothing", "bce weights", "poisson"):
        run = lambda *t: fam_ext.relative_flatness(*t, backend=backend, **CASES[case][1])  # noqa: E731, B023
        assert torch.autograd.gradcheck(run, (phi, weight, logits))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, (phi, weight, logits))


@pytest.mark.parametrize("case", ["smoothing", "soft", "mse", "bce weights"])
def test_compiles_to_one_graph(case: str, backend: str) -> None:
    torch._dynamo.reset()
    run = lambda p, w: fam_ext.relative_flatness(p, w, p @ w.T, backend=backend, **CASES[case][1])  # noqa: E731
    compiled, inputs = torch.compile(run, fullgraph=True, backend="aot_eager"), make_head()
    expected, got = run(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs))


def test_transforms_autocast_and_untouched_inputs() -> None:
    phi, weight = make_head(torch.float32)
    z = (phi @ weight.T).detach()
    kappa = fam_ext.relative_flatness(phi, weight, z)
    versions = [t._version for t in (phi, weight, z)]
    expected = torch.autograd.grad(kappa, weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fam_ext.relative_flatness(phi, weight, z), kappa)
    torch.testing.assert_close(
        torch.func.grad(fam_ext.relative_flatness, argnums=1)(phi.detach(), weight.detach(), z), expected
    )
    rows = torch.func.vmap(fam_ext.relative_flatness, in_dims=(0, None, 0))(phi.detach(), weight.detach(), z)
    torch.testing.assert_close(rows.mean(), kappa.detach())
    assert versions == [t._version for t in (phi, weight, z)]


def test_public_names() -> None:
    assert fam_ext.relative_flatness is fam_ext.functional.relative_flatness
    for name in fam_ext.functional.__all__:
        function = getattr(fam_ext.functional, name)
        assert function.__doc__ and "backend" in inspect.signature(function).parameters


PHI, W, Z = torch.zeros(6, 5), torch.zeros(4, 5), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"features": PHI.int()}, TypeError, "features must be a float32"),
        ({"loss": "gaussian_nll", "variance": -1.0}, ValueError, "variance must be at least 0, got -1.0"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number"),
        ({"ignore_index": "a"}, TypeError, "ignore_index must be an integer"),
        ({"curvature_grad": "no"}, TypeError, "curvature_grad must be True or False"),
        ({"weight": [1]}, TypeError, "weight must be a float32"),
        ({"weight": W[0]}, ValueError, r"weight must be of shape \(O, I\)"),
        ({"features": PHI[:, :4]}, ValueError, r"features must be of shape \(\*rows, 5\), got .*\(6, 4\)"),
        ({"logits": Z[:5]}, ValueError, r"logits must be of shape \(6, 4\), got .*\(5, 4\)"),
        ({"logits": Z.to("meta")}, ValueError, "logits must be on the device of features"),
        ({"loss": "hinge"}, ValueError, "loss must be one of 'cross_entropy', 'mse'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"measure": "l2"}, ValueError, "measure must be one of"),
        ({"normalize": "fan_out"}, ValueError, "normalize must be None or 'fan_in'"),
        ({"norm_power": 1}, ValueError, "norm_power must be 2 with measure='neuronwise'"),
        ({"target": torch.zeros(5).long()}, ValueError, r"target must be of shape \(6,\)"),
        ({"target": torch.zeros(6, 3)}, ValueError, r"target must be of shape \(6, 4\)"),
        ({"class_weight": torch.ones(4)}, ValueError, "target must be given where class_weight"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0 and 1"),
        ({"loss": "mse", "label_smoothing": 0.1}, ValueError, "label_smoothing must be left out with loss"),
        ({"loss": "mse", "ignore_index": 0}, ValueError, "ignore_index must be left out with loss='mse'"),
        ({"loss": "mse", "eps": -5.0}, ValueError, "eps must be left out with loss='mse'"),
        ({"eps": 1e-3}, ValueError, "eps must be left out with loss='cross_entropy'"),
        ({"pos_weight": torch.ones(4)}, ValueError, "pos_weight must be left out"),
        ({"loss": "gaussian_nll"}, ValueError, "variance must be given"),
        ({"loss": "mse", "target": torch.zeros(6)}, ValueError, "target must be of the shape of the outputs"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
    ids=str,
)
def test_bad_arguments(changed: dict[str, Any], error: Any, match: str) -> None:
    arguments = {"features": PHI, "weight": W, "logits": Z, **changed}
    with pytest.raises(error, match="relative_flatness: " + match):
        fam_ext.relative_flatness(**arguments)


def test_missing_backend_is_named() -> None:
    with pytest.raises(RuntimeError, match="backend 'triton' is not available"):
        fam_ext.relative_flatness(PHI, W, Z, backend="triton")


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_no_features_no_flatness(loss: str, backend: str) -> None:
    phi, weight = torch.zeros(3, 0, requires_grad=True), torch.zeros(4, 0, requires_grad=True)
    kappa = fam_ext.relative_flatness(phi, weight, torch.randn(3, 4), loss=loss, backend=backend)
    assert kappa == 0 and torch.autograd.grad(kappa, phi)[0].shape == (3, 0)


def test_weights_without_a_shape() -> None:
    with pytest.raises(
        TypeError, match="relative_flatness: weight must be a dense tensor, got an uninitialized"
    ):
        fam_ext.relative_flatness(PHI, torch.nn.LazyLinear(4).weight, Z)


@pytest.mark.parametrize(
    ("loss", "argument", "shape"),
    [
        ("cross_entropy", "class_weight", (4,)),
        ("cross_entropy", "target", (2, 3, 4)),
        ("bce_with_logits", "pos_weight", (4,)),
        ("bce_with_logits", "element_weight", (4,)),
        ("mse", "element_weight", (2, 3, 4)),
        ("mse", "target", (2, 3, 4)),
        ("gaussian_nll", "variance", (2, 3)),
    ],
)
def test_a_float64_argument_of_the_loss_makes_all_digits_those_of_float64(
    loss: str, argument: str, shape: tuple[int, ...]
) -> None:
    features, weight = make_head(torch.float32)
    options: dict[str, Any] = {argument: torch.rand(shape, dtype=D) + 0.1}
    if argument in ("class_weight", "pos_weight"):
        options["target"] = Y if loss == "cross_entropy" else REAL
    logits = (features @ weight.T).detach()
    kappa = fam_ext.relative_flatness(features, weight, logits, loss=loss, **options)
    wide = fam_ext.relative_flatness(
        features.double(), weight.double(), logits.double(), loss=loss, **options
    )
    torch.testing.assert_close(kappa, wide, rtol=1e-14, atol=0)


def test_on_the_meta_device() -> None:
    """Shapes alone, as for counting operations."""
    z, x, w = (torch.empty(s, device="meta", requires_grad=True) for s in ((5, 3), (5, 4), (3, 4)))
    y = torch.empty(5, dtype=torch.int64, device="meta")
    image, kernel, factors = (torch.empty(s, device="meta") for s in ((2, 3, 6), (4, 3, 2), (2, 4, 5)))
    assert fam_ext.relative_flatness(x, w, z, target=y).shape == ()
    assert fam_ext.functional.softmax_trace(z, w).shape == (5,)
    assert fam_ext.functional.head_cross_entropy(z, x, w, y)[0].shape == ()
    assert fam_ext.functional.linear_cross_entropy(x, w, y)[0].shape == ()
    assert fam_ext.functional.patch_sqnorm(image, 2, padding="same").shape == (2, 1, 6)
    assert fam_ext.functional.gram_trace(image, factors, kernel).shape == (2,)
    layer = torch.nn.Linear(4, 3, device="meta")
    assert fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), layer, 0.1)(layer(x), y).is_meta


@pytest.mark.parametrize("measure", ["layerwise_eigenvalue", "neuronwise_eigenvalue", "sharpness"])
def test_measures_that_it_does_not_form_are_refused(measure: str) -> None:
    features, weight = torch.randn(4, 3), torch.randn(2, 3)
    with pytest.raises(ValueError, match="measure must be one of 'neuronwise', 'layerwise', 'trace'"):
        fam_ext.relative_flatness(features, weight, features @ weight.t(), measure=measure)
