"""head_cross_entropy: cross-entropy plus strength * relative flatness of a linear head, in one pass over its logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops import backends
from fam_ext.ops._registration import gradient_dtype, made_gradient, register_fake
from fam_ext.ops.reference import head_cross_entropy as reference
from fam_ext.ops.softmax_trace import choose_form, softmax_trace

REDUCTIONS = ("none", "mean", "sum")
# the operation for an ordinary call, None otherwise: see csrc/head_cross_entropy_python.cpp
_ordinary: Any = backends.native_function("head_cross_entropy")


def head_cross_entropy(
    logits: Tensor,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    strength: float = 1.0,
    curvature_grad: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy plus strength * kappa of the linear head that made the logits.

    .. math:: \mathrm{loss} = \mathrm{CE}(z, t) + \mathrm{strength} \cdot \kappa, \qquad
              \kappa = \sum_i c_i \|\phi_i\|^2 \, \mathrm{Tr}(W^\top (\mathrm{diag}(p_i) - p_i p_i^\top) W)

    for z = phi W^T (+ bias), p = softmax(z): relative flatness (Petzka et al. 2021, Definition 3; Adilova et al. 2023, Eq. 3) of
    a layer whose output cross-entropy receives. Class weights, label smoothing, ignored rows and the reduction change c_i only.
    Log-sum-exp is shared between both terms, and the gradients of logits, features and weight are made in the forward pass; the
    backward pass hands them out, multiplied by the upstream gradient unless that is 1. What does not require grad is skipped.
    The gradient of CE with respect to features and weight flows through the logits as usual.

    Args:
        logits: z, (N, O) or channel-first (B, O, *positions); any strides.
        features: phi, (N, I) or (B, *positions, I): rows in the order of the logits' rows.
        weight: W, (O, I).
        target: class indices, (N,) or (B, *positions), int64 (or uint8), or class probabilities of the shape of `logits`; not
            differentiated.
        class_weight, ignore_index, label_smoothing, reduction: as in torch.nn.functional.cross_entropy; ignore_index must be
            negative where targets are probabilities.
        strength: factor of kappa; any finite number.
        curvature_grad: False holds the Hessian constant: kappa's gradient flows only through <w_s, w_s'>.
        backend: "auto", "native" or "reference".

    Returns:
        (loss, flatness): the total, differentiable, and kappa, detached. 0-d, or per row with reduction="none". float64 if an
        input is, else float32. As in torch, the mean over no row is nan (kappa is 0 there), and class weights that sum to 0
        over the rows make loss, kappa and gradients not finite. Gradients of float16 and bfloat16 tensors are kept in float32
        until the upstream gradient is known, and rounded once.

    Raises:
        TypeError: an input has the wrong dtype.
        ValueError: shapes, devices or options do not fit.
        IndexError: a class index is outside 0..O-1 and is not ignore_index.
        RuntimeError: a backend asked for by name is not available.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2).requires_grad_()
        >>> loss, kappa = head_cross_entropy(features @ weight.T, features, weight, torch.tensor([1]), strength=0.1)
        >>> loss.backward()
        >>> kappa, weight.grad[0]  # |phi|^2 v = 5 * 0.3932
        (tensor(1.9661), tensor([0.5564, 0.5230]))
    """
    # C++ would take anything for True or False
    plain = type(strength) in (float, int) and type(curvature_grad) is bool and backend in ("auto", "native")
    if plain and not torch.compiler.is_compiling() and not nn.parameter.is_lazy(weight):
        pair = ordinary_call(
            logits, features, weight, target, class_weight, ignore_index, label_smoothing, reduction, strength, curvature_grad
        )  # fmt: skip
        if pair is not None:
            return pair
    name = "head_cross_entropy"
    _check(name, logits, features, weight, target, class_weight)
    _checks.check_choice(name, "reduction", reduction, REDUCTIONS)
    _checks.check_cross_entropy_options(name, ignore_index, label_smoothing, strength, curvature_grad)
    classes, fan_in = weight.shape
    if target.is_floating_point() and ignore_index >= 0:
        _checks.bad_value(name, "ignore_index", "left out with class probabilities", ignore_index)
    if target.dtype == torch.uint8:
        target = target.long()
    form = choose_form(logits.numel() // classes, fan_in, classes)
    chosen = backends.choose(name, backend, logits, features, weight)
    # per-row losses: their upstream gradients are not known in the forward pass, so the parts are composed
    if reduction == "none" or chosen == "reference":
        if target.is_cpu and not target.is_floating_point():  # torch's own error names no function
            _checks.check_class_indices(name, target, classes, ignore_index)
        return reference.head_cross_entropy(
            logits, features, weight, target, class_weight, ignore_index, label_smoothing, reduction, strength,
            curvature_grad, partial(softmax_trace, form=form, backend=chosen),
        )  # fmt: skip
    loss, flatness = torch.ops.fam_ext.head_cross_entropy(
        logits, features, weight, target, class_weight, ignore_index, label_smoothing, reduction == "mean", strength,
        curvature_grad, form == "pairwise",
    )  # fmt: skip
    return loss, flatness


def ordinary_call(
    logits: Any, features: Any, weight: Any, target: Any, class_weight: Any, ignore_index: int, label_smoothing: float,
    reduction: str, strength: float, curvature_grad: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The compiled operation on arguments it recognizes as right; None for all others, which are to be checked first."""
    if _ordinary is None or torch.compiler.is_compiling():
        return None
    if type(ignore_index) is not int or type(label_smoothing) not in (float, int):
        return None  # C++ would take a tensor for a number
    try:
        if ignore_index >= 0 and target.is_floating_point():
            return None
        classes, fan_in = weight.shape
        pairwise = choose_form(logits.numel() // classes, fan_in, classes) == "pairwise"
        mean = {"mean": True, "sum": False}[reduction]
        pair: tuple[Tensor, Tensor] | None = _ordinary(
            logits, features, weight, target, class_weight, ignore_index, label_smoothing, mean, strength, curvature_grad,
            pairwise,
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # reduction="none", or what the checks name
    except RuntimeError:
        if any(t.is_nested for t in (logits, features, weight, target)):  # it has no sizes
            return None
        raise
    return pair


def _check(
    name: str,
    logits: Tensor,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
) -> None:
    for argument, value in (("logits", logits), ("features", features), ("weight", weight)):
        _checks.check_floating(name, argument, value)
    if logits.dim() < 2 or logits.shape[1] == 0:
        _checks.bad_value(
            name, "logits", "of shape (N, O) or (B, O, *positions) with at least one class", logits
        )
    classes, rows = logits.shape[1], (logits.shape[0], *logits.shape[2:])
    if weight.dim() != 2 or weight.shape[0] != classes:
        _checks.bad_value(name, "weight", f"of shape (O, I) with O = {classes} classes", weight)
    if features.shape != (*rows, weight.shape[1]):
        _checks.bad_value(name, "features", f"of shape {(*rows, weight.shape[1])}", features)
    expected = logits.shape if _checks.check_class_target(name, "target", target) else rows
    if target.shape != expected:
        _checks.bad_value(name, "target", f"of shape {tuple(expected)}", target)
    _checks.check_by_class(name, "class_weight", class_weight, classes)
    if class_weight is not None and class_weight.requires_grad:
        _checks.bad_value(name, "class_weight", "free of requires_grad", class_weight)
    if target.requires_grad:
        _checks.bad_value(name, "target", "free of requires_grad", target)
    _checks.check_same_device(
        name, logits=logits, features=features, weight=weight, target=target, class_weight=class_weight
    )


def _register() -> None:
    @register_fake("head_cross_entropy")
    def _(
        logits: Tensor,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        scalar = logits.new_empty((), dtype=accumulation_dtype(logits, features, weight))
        return scalar, torch.empty_like(scalar)

    @register_fake("head_cross_entropy_forward")
    def _(
        logits: Tensor,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        scalar = logits.new_empty((), dtype=accumulation_dtype(logits, features, weight))
        inputs = zip((logits, features), options[-3:-1], strict=True)
        dz, dphi = (
            torch.empty_like(x, dtype=gradient_dtype(x)) if needed else made_gradient(x, False)
            for x, needed in inputs
        )
        dw = made_gradient(weight, options[-1])
        return scalar, torch.empty_like(scalar), dz, dphi, dw


if backends.native_loaded():
    _register()
