"""linear_cross_entropy: cross-entropy plus strength * relative flatness of a linear head from its features, no logits kept."""

from __future__ import annotations

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.ops import backends
from fam_ext.ops._linear_cross_entropy_op import check_shapes
from fam_ext.ops._linear_cross_entropy_op import linear_cross_entropy as operation
from fam_ext.ops.reference import linear_cross_entropy as reference

_NAME = "linear_cross_entropy"
REDUCTIONS = ("none", "mean", "sum")
ACCUMULATE = ("float32", "input")
# default bound of the buffers of a chunk of rows; with few rows a GPU spends its time in passes over the weight's gradient
MAX_BYTES, MAX_BYTES_GPU = 2**27, 2**31


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
    parts: int = 2,
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
    is skipped. On a GPU one call waits for the device once: how many rows are ignored decides what is launched. No
    CUDA graph can capture it therefore; head_cross_entropy, softmax_trace and patch_sqnorm can be captured.
    A backward pass whose upstream gradient is not 1 scales the gradients, which needs one copy of them for its time.
    The "reference" backend, plain PyTorch, holds the logits.

    Args:
        input: phi, (*rows, I), any strides.
        weight: W, (V, I); the `linear_weight` of torch's function.
        target: class indices, (*rows), int64 (or uint8). Class probabilities, as large as the logits, are refused.
        bias: b, (V,); kappa depends on it through p alone.
        class_weight, ignore_index, label_smoothing, reduction: as in torch.nn.functional.cross_entropy.
        strength: factor of kappa; any finite number.
        curvature_grad: False holds the Hessian constant: kappa's gradient flows only through <w_s, w_s'>.
        accumulate: what the weight's gradient is summed over chunks in: "float32" (float64 if an input is), or "input", bfloat16
            for a bfloat16 weight, which halves the memory and rounds each chunk's share and its sum. A float16 weight's is summed
            in float32 always: gradients made before the loss scale is known would underflow. Everything else is formed in float32
            (float64).
        parts: bfloat16 numbers that stand for one float32 number in products that only kappa needs. Where the Triton kernels have
            a bfloat16 input and weight, 2 keeps 16 bits of kappa and of its gradient, 1 keeps 8 and saves two products of eight.
            On a CPU that multiplies bfloat16 numbers (AVX512-BF16, AMX), the native kernels take with 1 the two products that
            only kappa's gradient needs from 8 bits, and keep a bfloat16 copy of the weight; kappa itself, and what is float64,
            stay as they are. Cross-entropy is the same with both; elsewhere products are in float32 (float64) whatever this is.
        max_bytes: bound on the buffers of a chunk of rows (default: 128 MiB on a CPU, 2 GiB on a GPU); not less than 16 rows
            at a time. The more rows, the fewer passes over the weight's gradient. Not counted: the gradients, in float32 until
            the backward pass has multiplied them by the upstream gradient; blocks of the weight in float32 (up to a quarter of
            max_bytes).
        backend: "auto", "native", "triton" (no float64) or "reference".

    Returns:
        (loss, flatness): the total, differentiable once, and kappa, detached. 0-d, or (*rows) with reduction="none". float64 if
        an input is, else float32. As in torch, the mean over no valid row is nan (kappa is 0 there), and class weights that sum
        to 0 over the rows make loss, kappa and gradients not finite.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or options do not fit.
        IndexError: a class index is outside 0..V-1 and is not ignore_index.
        UnsupportedError: target holds class probabilities.
        RuntimeError: a backend asked for by name is not available.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2).requires_grad_()
        >>> loss, kappa = linear_cross_entropy(features, weight, torch.tensor([1]), strength=0.1)
        >>> loss.backward()
        >>> kappa, weight.grad[0]  # |phi|^2 v = 5 * 0.3932
        (tensor(1.9661), tensor([0.5564, 0.5230]))
    """
    _check(input, weight, target, bias, class_weight)
    _checks.check_choice(_NAME, "reduction", reduction, REDUCTIONS)
    _checks.check_choice(_NAME, "accumulate", accumulate, ACCUMULATE)
    _checks.check_cross_entropy_options(_NAME, ignore_index, label_smoothing, strength, curvature_grad)
    if target.dtype == torch.uint8:
        target = target.long()
    if isinstance(parts, bool) or not isinstance(parts, int):
        _checks.bad_type(_NAME, "parts", "an integer", parts)
    if parts not in (1, 2):
        _checks.bad_value(_NAME, "parts", "1 or 2", parts)
    if max_bytes is None:
        max_bytes = MAX_BYTES if input.device.type == "cpu" else MAX_BYTES_GPU
    _checks.check_positive(_NAME, "max_bytes", max_bytes)
    chosen = backends.choose(_NAME, backend, *(t for t in (input, weight, bias) if t is not None))
    if chosen == "reference":
        if target.is_cpu:  # torch's own error names no function
            _checks.check_class_indices(_NAME, target, classes=len(weight), ignore_index=ignore_index)
        return reference.linear_cross_entropy(
            input, weight, target, bias, class_weight, ignore_index, label_smoothing, reduction, strength, curvature_grad
        )  # fmt: skip
    return operation(
        input, weight, bias, target, class_weight, ignore_index, label_smoothing, REDUCTIONS.index(reduction), strength,
        curvature_grad, max_bytes, accumulate == "input", chosen == "triton", parts,
    )  # fmt: skip


def _check(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None
) -> None:
    if isinstance(target, Tensor) and target.is_floating_point():
        raise UnsupportedError(
            f"{_NAME}: target must hold class indices, got {_checks.describe(target)}: class probabilities are as large as the "
            "logits that this operation avoids; form the logits and use head_cross_entropy"
        )
    _checks.check_class_target(_NAME, "target", target)
    check_shapes(input, weight, bias, target.long(), class_weight)
    if class_weight is not None and class_weight.requires_grad:
        _checks.bad_value(_NAME, "class_weight", "free of requires_grad", class_weight)
    _checks.check_same_device(
        _NAME, input=input, weight=weight, target=target, bias=bias, class_weight=class_weight
    )
