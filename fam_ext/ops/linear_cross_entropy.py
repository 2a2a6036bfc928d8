"""linear_cross_entropy: cross-entropy plus strength * relative flatness of a linear head from its features, no logits kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fam_ext.ops._linear_cross_entropy_triton as triton
from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.errors import UnsupportedError
from fam_ext.ops import backends
from fam_ext.ops._registration import register_fake
from fam_ext.ops.reference import linear_cross_entropy as reference

_NAME = "linear_cross_entropy"
REDUCTIONS = ("none", "mean", "sum")
ACCUMULATE = ("float32", "input")
# default bound of the buffers of a chunk of rows; products of few rows keep a CPU busy, a GPU idle
MAX_BYTES, MAX_BYTES_GPU = 2**27, 2**29


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    strength: float = 1.0,
    curvature_grad: bool = True,
    accumulate: str = "float32",
    max_bytes: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy plus strength * kappa of a linear head, from its features; for vocabularies too large to keep the logits.

    .. math:: z = \phi W^\top + b, \qquad \mathrm{loss} = \mathrm{CE}(z, t) + \mathrm{strength} \cdot \kappa, \qquad
              \kappa = \sum_i c_i \|\phi_i\|^2 \, \mathrm{Tr}(W^\top (\mathrm{diag}(p_i) - p_i p_i^\top) W)

    the relative flatness (Petzka et al. 2021, Definition 3; Adilova et al. 2023, Eq. 3) of the layer (W, b) whose output
    cross-entropy receives, as torch.nn.functional.linear_cross_entropy computes CE alone. All backends but the reference take the
    rows in chunks and never hold an (N, V) matrix; the gradients of input, weight and bias are made in the forward pass (with
    reduction="none" in the backward pass, chunk by chunk again). Rows that are ignored cost nothing. What does not require grad
    is skipped. A backward pass whose upstream gradient is not 1 scales the gradients, which needs one copy of them for its time.
    The "reference" backend, plain PyTorch, holds the logits.

    Args:
        input: phi, (*rows, I), any strides.
        weight: W, (V, I); the `linear_weight` of torch's function.
        target: class indices, (*rows), int64 (or uint8). Class probabilities, as large as the logits, are refused.
        bias: b, (V,); it takes no part in kappa itself.
        class_weight, ignore_index, label_smoothing, reduction: as in torch.nn.functional.cross_entropy.
        strength: factor of kappa; any finite number.
        curvature_grad: False holds the Hessian constant: kappa's gradient flows only through <w_s, w_s'>.
        accumulate: what the weight's gradient is summed over chunks in: "float32" (float64 if an input is), or "input", the
            weight's own dtype, which halves the memory of a bfloat16 head and rounds once per chunk. Everything else is formed in
            float32 (float64) always.
        max_bytes: bound on the buffers of a chunk of rows (default: 128 MiB on a CPU, 512 MiB on a GPU); not less than 16 rows
            at a time. The more rows, the fewer passes over the weight's gradient. Not counted: the gradients; for a weight of
            less than float32, blocks of it in float32 (up to a quarter of max_bytes), and under accumulate="float32" its
            gradient in float32.
        backend: "auto", "native", "triton" (no float64) or "reference".

    Returns:
        (loss, flatness): the total, differentiable once, and kappa, detached. 0-d, or (*rows) with reduction="none". float64 if
        an input is, else float32. As in torch, the mean over no valid row is nan; kappa is 0 there.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or options do not fit.
        IndexError: a class index is outside 0..V-1 and is not ignore_index.
        UnsupportedError: target holds class probabilities.
        RuntimeError: a backend asked for by name is not available.
    """
    _check(input, weight, target, bias, class_weight)
    _checks.check_choice(_NAME, "reduction", reduction, REDUCTIONS)
    _checks.check_choice(_NAME, "accumulate", accumulate, ACCUMULATE)
    _checks.check_cross_entropy_options(_NAME, ignore_index, label_smoothing, strength, curvature_grad)
    if target.dtype == torch.uint8:
        target = target.long()
    if max_bytes is None:
        max_bytes = MAX_BYTES if input.device.type == "cpu" else MAX_BYTES_GPU
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        _checks.bad_type(_NAME, "max_bytes", "an integer", max_bytes)
    if max_bytes < 1:
        _checks.bad_value(_NAME, "max_bytes", "at least 1", max_bytes)
    chosen = backends.choose(_NAME, backend, *(t for t in (input, weight, bias) if t is not None))
    if chosen == "reference":
        return reference.linear_cross_entropy(
            input, weight, target, bias, class_weight, ignore_index, label_smoothing, reduction, strength, curvature_grad
        )  # fmt: skip
    operator = torch.ops.fam_ext.linear_cross_entropy if chosen == "native" else triton.linear_cross_entropy
    loss, flatness = operator(
        input, weight, bias, target, class_weight, ignore_index, label_smoothing, REDUCTIONS.index(reduction), strength,
        curvature_grad, max_bytes, accumulate == "input",
    )  # fmt: skip
    return loss, flatness


def _check(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None
) -> None:
    _checks.check_floating(_NAME, "input", input)
    _checks.check_floating(_NAME, "weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        _checks.bad_value(_NAME, "weight", "of shape (V, I) with at least one class", weight)
    classes, fan_in = weight.shape
    if input.dim() < 1 or input.shape[-1] != fan_in:
        _checks.bad_value(_NAME, "input", f"of shape (*rows, {fan_in})", input)
    if isinstance(target, Tensor) and target.is_floating_point():
        raise UnsupportedError(
            f"{_NAME}: target must hold class indices, got {_checks.describe(target)}: class probabilities are as large as the "
            "logits that this operation avoids; form the logits and use head_cross_entropy"
        )
    _checks.check_class_target(_NAME, "target", target)
    if target.shape != input.shape[:-1]:
        _checks.bad_value(_NAME, "target", f"of shape {tuple(input.shape[:-1])}", target)
    _checks.check_by_class(_NAME, "bias", bias, classes)
    _checks.check_by_class(_NAME, "class_weight", class_weight, classes)
    if class_weight is not None and class_weight.requires_grad:
        _checks.bad_value(_NAME, "class_weight", "free of requires_grad", class_weight)
    _checks.check_same_device(
        _NAME, input=input, weight=weight, target=target, bias=bias, class_weight=class_weight
    )


def _register() -> None:
    @register_fake("linear_cross_entropy")
    def _(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        return triton.fake_values(input, accumulation_dtype(input, weight, bias), target, reduction)

    register_fake("linear_cross_entropy_forward")(triton.fake_forward)


if backends.native_loaded():
    _register()
