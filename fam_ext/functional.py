"""The operations as functions, and relative flatness of a linear head from its tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fam_ext import _checks, loss_hessians
from fam_ext._dtypes import accumulation_dtype, without_autocast
from fam_ext.head.closed_form import row_norms, summands
from fam_ext.loss_hessians import CrossEntropy, LossHessian
from fam_ext.ops.gram_trace import gram_trace
from fam_ext.ops.head_cross_entropy import head_cross_entropy
from fam_ext.ops.linear_cross_entropy import linear_cross_entropy
from fam_ext.ops.patch_sqnorm import patch_sqnorm
from fam_ext.ops.softmax_trace import softmax_trace
from fam_ext.options import MEASURES, Options

__all__ = [
    "gram_trace",
    "head_cross_entropy",
    "linear_cross_entropy",
    "patch_sqnorm",
    "relative_flatness",
    "softmax_trace",
]

_NAME = "relative_flatness"
_LOSSES = ("cross_entropy", "mse", "bce_with_logits", "poisson_nll", "gaussian_nll")


def relative_flatness(
    features: Tensor,
    weight: Tensor,
    logits: Tensor,
    *,
    loss: str = "cross_entropy",
    target: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalize: str | None = None,
    measure: str = "neuronwise",
    norm_power: int = 2,
    curvature_grad: bool = True,
    pos_weight: Tensor | None = None,
    element_weight: Tensor | None = None,
    variance: Tensor | float | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    r"""Relative flatness of a linear head from its tensors.

    .. math:: \kappa = \sum_{s,s'} \langle w_s, w_{s'} \rangle \, \mathrm{Tr}(H_{s,s'})
                    = \sum_i \|\phi_i\|^2 \, \mathrm{Tr}(W^\top \Lambda_i W)

    for z = phi W^T (+ bias), with H the Hessian of the loss with respect to W and Lambda_i that of row i with respect to z_i
    (Petzka et al. 2021, Definition 3).

    Args:
        features: phi, (*rows, I). weight: W, (O, I). logits: z, (*rows, O), the classes last.
        loss: "cross_entropy", "mse", "bce_with_logits", "poisson_nll" (log input) or "gaussian_nll" (needs `variance`).
        target: class indices (*rows), int64 or uint8, or probabilities (*rows, O); for the other losses (*rows, O). None where
            the Hessian does not depend on it: needed with class_weight or pos_weight, and for ignored rows.
        class_weight, ignore_index, label_smoothing: of cross-entropy, as in torch.
        pos_weight, element_weight: as pos_weight and weight of BCE with logits; element_weight is the weight of MSE too.
        variance, eps: as var and eps of torch.nn.functional.gaussian_nll_loss.
        reduction: "mean", "sum", or "none" for the share of each row (of each element for the other losses).
        normalize: None, or "fan_in" to divide by I.
        measure: "neuronwise", "layerwise" or "trace".
        norm_power, curvature_grad, backend: as in FAMLoss.

    Returns:
        kappa, 0-d, differentiable in features, weight and logits; float64 if an input is, else float32.

    Raises:
        TypeError, ValueError: an argument does not fit.
        IndexError: a class index is outside 0..O-1 and is not ignore_index. In a compiled graph and under torch.func transforms,
            where no value can be read, kappa is NaN then.

    >>> import torch
    >>> from fam_ext import relative_flatness
    >>> features = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> relative_flatness(features, weight, features @ weight.T)
    tensor(1.5499)
    >>> relative_flatness(features, weight, features @ weight.T, reduction="none")
    tensor([2.0999, 1.0000])
    """
    _checks.check_choice(_NAME, "measure", measure, MEASURES)
    options = Options(
        _NAME, measure, "hessian", "auto", 1, normalize, norm_power, curvature_grad, None, backend
    )
    for argument, value in (("features", features), ("weight", weight), ("logits", logits)):
        _checks.check_floating(_NAME, argument, value)
    if weight.dim() != 2:
        _checks.bad_value(_NAME, "weight", "of shape (O, I)", weight)
    outputs, fan_in = weight.shape
    if features.dim() < 1 or features.shape[-1] != fan_in:
        _checks.bad_value(_NAME, "features", f"of shape (*rows, {fan_in})", features)
    rows = features.shape[:-1]
    if logits.shape != (*rows, outputs):
        _checks.bad_value(_NAME, "logits", f"of shape {(*rows, outputs)}", logits)
    _checks.check_choice(_NAME, "loss", loss, _LOSSES)
    _check_options(
        loss, target, class_weight, ignore_index, label_smoothing, pos_weight, element_weight, variance, eps
    )
    loss_hessian: LossHessian
    if loss == "cross_entropy":
        loss_hessian = CrossEntropy(target, reduction, class_weight, ignore_index, label_smoothing)
        loss_hessian.check_rows(_NAME, logits, rows, outputs)
    else:
        loss_hessian = _elementwise(loss, target, reduction, pos_weight, element_weight, variance, eps)
        loss_hessian.check(_NAME, logits)
    _checks.check_same_device(
        _NAME, features=features, weight=weight, logits=logits, target=target, class_weight=class_weight,
        pos_weight=pos_weight, element_weight=element_weight, variance=variance if isinstance(variance, Tensor) else None,
    )  # fmt: skip
    z, class_dim = logits, len(rows)
    if isinstance(loss_hessian, CrossEntropy):  # rows first, then classes
        z, class_dim = logits.reshape(rows.numel(), outputs), 1
        if target is not None:
            loss_hessian.target = target.reshape(z.shape if target.is_floating_point() else -1)
    loss_hessian.check_values(_NAME, z)
    with without_autocast(logits):
        acc = accumulation_dtype(features, weight, logits, *loss_hessian.tensors())
        phi = features.reshape(rows.numel(), fan_in).to(acc)
        row_shape = rows if class_dim == len(rows) else z.shape[:1]
        norms = row_norms(phi, loss_hessian, backend).reshape(*row_shape, 1)
        terms = summands(options, loss_hessian, z, class_dim, norms, weight, fan_in)
    if reduction != "none":
        return terms.sum()
    return terms.reshape(rows) if isinstance(loss_hessian, CrossEntropy) else terms


def _elementwise(
    loss: str, target: Any, reduction: str, pos_weight: Any, element_weight: Any, variance: Any, eps: float
) -> LossHessian:
    if loss == "mse":
        return loss_hessians.MeanSquaredError(target, reduction, element_weight)
    if loss == "bce_with_logits":
        return loss_hessians.BinaryCrossEntropy(target, reduction, element_weight, pos_weight)
    if loss == "poisson_nll":
        return loss_hessians.PoissonNLL(target, reduction)
    return loss_hessians.GaussianNLL(target, reduction, variance, eps)


def _check_options(
    loss: str,
    target: Any,
    class_weight: Any,
    ignore_index: Any,
    label_smoothing: float,
    pos_weight: Any,
    element_weight: Any,
    variance: Any,
    eps: Any,
) -> None:
    """Refuse an option that the loss would ignore, and a missing target that it needs."""
    _checks.check_between(_NAME, "label_smoothing", label_smoothing, 0.0, 1.0)
    allowed = {
        "class_weight": loss == "cross_entropy",
        "ignore_index": loss == "cross_entropy",
        "label_smoothing": loss == "cross_entropy",
        "pos_weight": loss == "bce_with_logits",
        "element_weight": loss in ("bce_with_logits", "mse"),
        "variance": loss == "gaussian_nll",
        "eps": loss == "gaussian_nll",
    }
    given = {
        "class_weight": class_weight is not None,
        "ignore_index": not isinstance(ignore_index, int) or ignore_index != -100,
        "label_smoothing": label_smoothing != 0,
        "pos_weight": pos_weight is not None,
        "element_weight": element_weight is not None,
        "variance": variance is not None,
        "eps": not isinstance(eps, float) or eps != 1e-6,
    }
    for argument, present in given.items():
        if present and not allowed[argument]:
            _checks.bad_value(_NAME, argument, f"left out with loss={loss!r}", "a value")
    if target is None and (class_weight is not None or pos_weight is not None):
        _checks.bad_value(_NAME, "target", "given where class_weight or pos_weight is", None)
    if loss == "gaussian_nll" and variance is None:
        _checks.bad_value(_NAME, "variance", "given with loss='gaussian_nll'", None)
