"""softmax_trace: trace of the weights' covariance under the softmax distribution of each row of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.ops import backends
from fam_ext.ops._registration import refuse_double_backward, register_fake
from fam_ext.ops.reference import softmax_trace as reference

FORMS = ("auto", "shifted", "pairwise")


def choose_form(rows: int, fan_in: int, classes: int) -> str:
    """The cheaper form by multiply-adds of forward and backward together.

    shifted: the products p W, u W^T and p^T u, 3 N O I. pairwise: class distances and their gradient, 2 O^2 I (the first
    over half the pairs, two operations each), and the products D p and p p^T, 2 N O^2.

    >>> choose_form(rows=128, fan_in=512, classes=10), choose_form(rows=128, fan_in=64, classes=1000)
    ('pairwise', 'shifted')
    """
    shifted = 3 * rows * classes * fan_in
    pairwise = 2 * classes * classes * fan_in + 2 * rows * classes * classes
    return "pairwise" if pairwise <= shifted else "shifted"


def softmax_trace(logits: Tensor, weight: Tensor, *, form: str = "auto", backend: str = "auto") -> Tensor:
    r"""Trace of the covariance of the weight rows under each row's softmax distribution.

    .. math:: v_i = \mathrm{Tr}\,(W^\top (\mathrm{diag}(p_i) - p_i p_i^\top) W)
                  = \sum_s p_{is} \|w_s - u_i\|^2, \quad u_i = \sum_s p_{is} w_s, \quad p_i = \mathrm{softmax}(z_i)

    With row coefficients c_i and features phi_i, relative flatness of a cross-entropy head is sum_i c_i |phi_i|^2 v_i
    (Petzka et al. 2021, Definition 3, for a layer whose output the loss receives). Both forms keep their relative accuracy for
    confident predictions, where sum_s p_s |w_s|^2 - |u|^2 loses every digit:

    - "shifted" works relative to the most likely class, one (N,O)x(O,I) product forward and two backward;
    - "pairwise" is 1/2 p^T D p with D_st = |w_s - w_t|^2, O^2 I + N O^2 operations, for few classes.

    Args:
        logits: z, (B, O) or channel-first (B, O, *positions); any strides, no copy is made. -inf masks a class.
        weight: W, (O, I).
        form: "auto" (the cheaper by counted operations), "shifted" or "pairwise".
        backend: "auto", "native" or "reference".

    Returns:
        v, (B,) or (B, *positions), non-negative, in the unit of |w|^2: float64 if an input is, else float32. Gradients reach
        logits and weight; the native backward cannot be differentiated again.

    Raises:
        TypeError: an input is not a floating tensor.
        ValueError: shapes, devices, form or backend do not fit.
        RuntimeError: a backend asked for by name is not available.

    Example:
        Two classes at squared distance 2, the first row in favour of one of them: v = 2 p (1 - p).

        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> softmax_trace(logits, torch.eye(2))
        tensor([0.2100, 0.5000])
    """
    name = "softmax_trace"
    _checks.check_floating(name, "logits", logits)
    _checks.check_floating(name, "weight", weight)
    if logits.dim() < 2:
        _checks.bad_value(name, "logits", "of shape (B, O) or (B, O, *positions)", logits)
    if weight.dim() != 2 or weight.shape[0] != logits.shape[1]:
        _checks.bad_value(name, "weight", f"of shape (O, I) with O = {logits.shape[1]} classes", weight)
    if logits.shape[1] == 0:
        _checks.bad_value(name, "logits", "of at least one class", logits)
    _checks.check_choice(name, "form", form, FORMS)
    _checks.check_same_device(name, logits=logits, weight=weight)
    if form == "auto":
        form = choose_form(logits.numel() // logits.shape[1], weight.shape[1], logits.shape[1])
    if backends.choose(name, backend, logits, weight) == "native":
        value: Tensor = torch.ops.fam_ext.softmax_trace(logits, weight, form == "pairwise")[0]
        return value
    return reference.softmax_trace(logits, weight, form)


def _register() -> None:
    @register_fake("softmax_trace")
    def _(logits: Tensor, weight: Tensor, pairwise: bool) -> tuple[Tensor, Tensor]:
        acc = accumulation_dtype(logits, weight)
        shape = [logits.shape[0], *logits.shape[2:]]
        rows = logits.numel() // logits.shape[1]
        saved = (weight.shape[0], weight.shape[0]) if pairwise else (rows, weight.shape[1])
        return logits.new_empty(shape, dtype=acc), weight.new_empty(saved, dtype=acc)

    @register_fake("softmax_trace_backward")
    def _(
        grad: Tensor,
        logits: Tensor,
        weight: Tensor,
        saved: Tensor,
        pairwise: bool,
        grad_logits: bool,
        grad_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        dz = torch.empty_like(logits) if grad_logits else logits.new_empty(0)
        dw = weight.new_empty(weight.shape) if grad_weight else weight.new_empty(0)  # contiguous
        return dz, dw

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        logits, weight, ctx.pairwise = inputs
        ctx.save_for_backward(logits, weight, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, Tensor | None, None]:
        logits, weight, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if grad is None:
            return None, None, None
        dz, dw = torch.ops.fam_ext.softmax_trace_backward(
            grad, logits, weight, saved, ctx.pairwise, needs[0], needs[1]
        )
        return dz if needs[0] else None, dw if needs[1] else None, None

    torch.library.register_autograd("fam_ext::softmax_trace", backward, setup_context=setup_context)
    refuse_double_backward("softmax_trace_backward")


if backends.native_loaded():
    _register()
