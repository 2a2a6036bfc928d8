"""gram_trace: |W^T Gamma|^2 of every sample's weight gradient Gamma, without the gradients or the patches of all samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fam_ext.ops._gram_trace  # noqa: F401  registers the operations
from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype, without_autocast
from fam_ext.ops import backends
from fam_ext.ops._conv_args import PADDING_MODES, Ints, check_extent, check_groups, pad, padding_of, per_axis
from fam_ext.ops.reference import gram_trace as reference

_NAME = "gram_trace"
FORMS = ("auto", "direct", "gram")
MAX_BYTES, MAX_BYTES_GPU = 2**26, 2**29
# multiply-adds of a matrix product in the time that one number takes to be moved or added on its own
_MOVE = 16


def gram_trace(
    input: Tensor,
    factors: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    weighted: bool = True,
    form: str = "auto",
    max_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Squared norm of W^T Gamma_i for the weight gradient Gamma_i = sum_q s_iq phi_iq^T of every sample i.

    .. math:: v_i = \|W^\top \Gamma_i\|_F^2 = \sum_{q,q'} \langle\phi_{iq}, \phi_{iq'}\rangle \, s_{iq}^\top G \, s_{iq'},
              \qquad G = W W^\top

    With factors s of a Gauss-Newton or Fisher matrix sum_i Gamma_i Gamma_i^T, their sum is the layer's relative flatness (Petzka
    et al. 2021, arXiv 2001.00939, with that matrix in place of the Hessian). Two ways to the same numbers: "direct" forms Gamma
    of a few samples at a time, "gram" the products <phi_q, phi_q'> of their positions. The patches of a convolution are never all
    formed.

    Args:
        input: of a linear layer (B, *positions, I), of a convolution (B, C, *spatial) with 1 to 3 spatial axes; any strides.
        factors: s, of the shape of the layer's output, (B, *positions, O) or (B, O, *out); or K of them, stacked in front.
        weight: (O, I), or (O, C / groups, *kernel) of a convolution.
        stride, padding, dilation, groups, padding_mode: of a convolution, as in torch.nn.ConvNd.
        weighted: False puts the identity in place of G: |Gamma_i|_F^2, and the weight gives its shape only.
        form: "auto" (fewer counted operations, see :func:`choose_form`), "direct" or "gram".
        max_bytes: bound on what the native backend holds at a time beyond the results, but for what one sample takes (default:
            64 MiB on a CPU, 512 MiB on a GPU, where products of few samples are slow).
        backend: "auto", "reference", "native" or "triton".

    Returns:
        (B,), or (K, B) for stacked factors; float64 where a tensor is (the weight counts with weighted=True only), else float32.
        Nonnegative up to rounding. Only the reference can be differentiated twice.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or range.
        RuntimeError: a backend asked for by name that is not available.

    Example:
        >>> features, factors = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> gram_trace(features, factors, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # |phi_i|^2 |W^T s_i|^2
        tensor([5., 0.])
        >>> gram_trace(features[None], factors[None], torch.eye(2))  # one sample of two positions: |s^T phi|^2
        tensor([11.])
    """
    for name, tensor in (("input", input), ("factors", factors), ("weight", weight)):
        _checks.check_floating(_NAME, name, tensor)
    _checks.check_same_device(_NAME, input=input, factors=factors, weight=weight)
    _checks.check_choice(_NAME, "form", form, FORMS)
    _checks.check_choice(_NAME, "padding_mode", padding_mode, PADDING_MODES)
    _checks.check_bool(_NAME, "weighted", weighted)
    if max_bytes is None:
        max_bytes = MAX_BYTES if input.device.type == "cpu" else MAX_BYTES_GPU
    _checks.check_positive(_NAME, "max_bytes", max_bytes)
    stacked = factors.dim() == input.dim() + 1
    s = factors if stacked else factors.unsqueeze(0)
    if weight.dim() == 2:
        x, s, w = _linear(input, factors, s, weight, (stride, padding, dilation, groups, padding_mode))
        window: tuple[Ints, Ints, Ints, Ints] = ((1,), (1,), (0,), (1,))
    else:
        x, s, w, window = _convolution(
            input, factors, s, weight, stride, padding, dilation, groups, padding_mode
        )
    chosen = backends.choose(_NAME, backend, input, factors, weight)
    acc = accumulation_dtype(input, factors, weight)
    gram = None
    with without_autocast(input):
        if weighted and w.shape[2] < w.shape[1]:  # W^T s has fewer numbers than s
            s = torch.einsum("goi,kbgo...->kbgi...", w.to(acc), s.to(acc))
        elif weighted:
            wide = w.to(acc)  # once: two casts would round the weight's gradient twice
            gram = wide @ wide.transpose(1, 2)
        form = _resolve(form, x, s, gram is not None, *window)
        if chosen == "reference":
            values = reference.gram_trace(x, s, gram, *window, form)
        else:
            keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, s, gram) if t is not None)
            if (
                chosen == "triton" and form != "direct"
            ):  # the direct form is products only, and the same for both
                form = "gram_tiles"
            values = torch.ops.fam_ext.gram_trace(x, s, gram, *window, form, max_bytes, keep)[0]
    return values if stacked else values[0]


def choose_form(
    inputs: int,
    outputs: int,
    channels: int,
    kernel: Sequence[int],
    neurons: int,
    factors: int,
    weighted: bool,
) -> str:
    """ "direct", "gram_shifts" or "gram_patches", by counted multiply-adds of value and gradients for one sample and group.

    N = inputs and Q = outputs positions, C channels, I = C times the kernel's volume, O neurons, K factors: "direct" takes
    3 K Q I O (+ 2 K O^2 I with a weight), the Gram form 2 K Q^2 O (+ 3 K Q O^2) and the products of patches: 2 Q^2 I, or 2 N^2 C
    where products of positions are summed over the kernel's offsets along each axis. A number that is moved counts as 16.
    """
    volume = 1
    for k in kernel:
        volume *= k
    fan_in, pointwise = channels * volume, volume == 1 and inputs == outputs
    copies = 0 if pointwise else 2 * _MOVE * outputs * fan_in
    direct = 3 * factors * outputs * fan_in * neurons + copies
    pairs = 2 * factors * outputs**2 * neurons
    if weighted:
        direct += 2 * factors * neurons**2 * fan_in
        pairs += 3 * factors * outputs * neurons**2
    shifts = 2 * inputs**2 * channels + (0 if pointwise else 2 * _MOVE * sum(kernel) * inputs**2)
    patches = 2 * outputs**2 * fan_in + copies
    if direct < pairs + min(shifts, patches):
        return "direct"
    return "gram_shifts" if shifts <= patches else "gram_patches"


def _resolve(form: str, x: Tensor, s: Tensor, weighted: bool, kernel: Ints, *window: Ints) -> str:
    if form == "direct":
        return form
    inputs = outputs = 1
    for size in x.shape[3:]:
        inputs *= size
    for size in s.shape[4:]:
        outputs *= size
    factors = s.shape[0] if form == "auto" else 0
    chosen = choose_form(inputs, outputs, x.shape[2], kernel, s.shape[3], factors, weighted)
    if form == "gram" and chosen == "direct":
        return "gram_shifts"
    return chosen


def _linear(
    input: Tensor, factors: Tensor, s: Tensor, weight: Tensor, convolution: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as columns: (B, 1, I, Q), (K, B, 1, O, Q), and the weight (1, O, I)."""
    if convolution != (1, 0, 1, 1, "zeros"):
        expected = "left at their defaults for a linear layer's weight (O, I)"
        _checks.bad_value(_NAME, "stride, padding, dilation, groups and padding_mode", expected, convolution)
    if input.dim() < 2 or input.shape[-1] != weight.shape[1]:
        _checks.bad_value(
            _NAME, "input", f"(B, *positions, {weight.shape[1]}) for this weight, a sample unsqueezed", input
        )
    if s.shape[1:-1] != input.shape[:-1] or s.shape[-1] != weight.shape[0]:
        expected = f"{(*input.shape[:-1], weight.shape[0])}, or K of them stacked in front"
        _checks.bad_value(_NAME, "factors", expected, factors)
    q = 1
    for size in input.shape[1:-1]:
        q *= size
    x = input.reshape(input.shape[0], q, input.shape[-1]).transpose(1, 2).unsqueeze(1)
    return x, s.reshape(*s.shape[:2], q, s.shape[-1]).transpose(2, 3).unsqueeze(2), weight.unsqueeze(0)


def _convolution(
    input: Tensor,
    factors: Tensor,
    s: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
) -> tuple[Tensor, Tensor, Tensor, tuple[Ints, Ints, Ints, Ints]]:
    """(B, g, C, *spatial), (K, B, g, O, *out), the weight (g, O, I), and kernel, stride, padding in front and dilation."""
    rank = weight.dim() - 2
    if not 1 <= rank <= 3:
        _checks.bad_value(_NAME, "weight", "(O, I), or (O, C, *kernel) with 1 to 3 spatial axes", weight)
    kernel: Ints = tuple(weight.shape[2:])
    if 0 in kernel:
        _checks.bad_value(_NAME, "weight", "of a kernel with at least one position along each axis", weight)
    strides = per_axis(_NAME, "stride", stride, rank, 1)
    dilations = per_axis(_NAME, "dilation", dilation, rank, 1)
    check_groups(_NAME, groups, weight.shape[0], "neurons")
    channels = weight.shape[1] * groups
    if input.dim() != rank + 2 or input.shape[1] != channels:
        expected = f"(B, {channels}, *spatial) with {rank} spatial axes, a sample unsqueezed"
        _checks.bad_value(_NAME, "input", expected, input)
    before, after = padding_of(_NAME, padding, kernel, strides, dilations)
    check_extent(_NAME, "weight's kernel", input, kernel, dilations, before, after, padding_mode)
    if padding_mode != "zeros" and any(after):
        input = pad(input, before, after, padding_mode)
        before = after = (0,) * rank
    axes = zip(input.shape[2:], kernel, strides, before, after, dilations, strict=True)
    out = tuple((size + p + q - d * (k - 1) - 1) // t + 1 for size, k, t, p, q, d in axes)
    if s.shape[1:] != (input.shape[0], weight.shape[0], *out):
        expected = f"{(input.shape[0], weight.shape[0], *out)}, or K of them stacked in front"
        _checks.bad_value(_NAME, "factors", expected, factors)
    neurons = weight.shape[0] // groups
    x = input.reshape(input.shape[0], groups, weight.shape[1], *input.shape[2:])
    s = s.reshape(*s.shape[:2], groups, neurons, *out)
    return x, s, weight.reshape(groups, neurons, -1), (kernel, strides, before, dilations)
