"""Arguments of every registered operation: shapes, layouts, dtypes and which gradients are asked for."""

from __future__ import annotations

from typing import Any

import torch
from inputs import make_input
from torch import Tensor

D, F32 = torch.float64, torch.float32


def trace(shape: tuple[int, ...], fan_in: int, layout: str, pairwise: bool, dtype: torch.dtype = D) -> Any:
    weight = make_input((shape[1], fan_in), dtype, layout if layout != "expanded" else "contiguous", seed=1)
    return make_input(shape, dtype, layout).requires_grad_(), weight.requires_grad_(), pairwise


def trace_backward(
    shape: tuple[int, ...],
    fan_in: int,
    layout: str,
    pairwise: bool,
    needs: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = D,
) -> Any:
    logits, weight = (t.detach() for t in trace(shape, fan_in, layout, pairwise, dtype)[:2])
    values, saved = torch.ops.fam_ext.softmax_trace(logits, weight, pairwise)
    return torch.rand_like(values), logits, weight, saved, pairwise, *needs


def head(
    shape: tuple[int, ...],
    fan_in: int,
    layout: str,
    pairwise: bool,
    target: Tensor | None = None,
    class_weight: Tensor | None = None,
    mean: bool = True,
    curvature_grad: bool = True,
    requires_grad: tuple[bool, bool, bool] = (True, True, True),
    dtype: torch.dtype = D,
) -> Any:
    logits, weight, _ = trace(shape, fan_in, layout, pairwise, dtype)
    features = make_input((shape[0], *shape[2:], fan_in), dtype, layout, seed=2)
    if target is None:
        target = torch.arange(features[..., 0].numel()).reshape(features.shape[:-1]) % shape[1]
    inputs = [
        t.detach().requires_grad_(r) for t, r in zip((logits, features, weight), requires_grad, strict=True)
    ]
    return *inputs, target, class_weight, 1, 0.1, mean, 0.5, curvature_grad, pairwise


def head_forward(*args: Any, needs: tuple[bool, bool, bool] = (True, True, True), **kwargs: Any) -> Any:
    values = head(*args, requires_grad=(False, False, False), **kwargs)
    return *values, *needs


def linear(
    rows: tuple[int, ...],
    classes: int,
    layout: str,
    bias: bool = True,
    class_weight: Tensor | None = None,
    reduction: int = 1,
    needs: tuple[bool, bool, bool] = (True, True, True),
    dtypes: tuple[torch.dtype, ...] = (D, D, D),
    accumulate_in_weight_dtype: bool = False,
) -> Any:
    """Gradients are asked for where a tensor requires grad; for reduction="none" they are made in the backward pass."""
    target = (torch.arange(torch.Size(rows).numel()) % classes).reshape(rows)
    shapes = (*rows, 3), (classes, 3), (classes,)
    x, w, b = (
        make_input(s, d, layout if len(s) > 1 else "contiguous", seed=k).requires_grad_(r)
        for k, (s, d, r) in enumerate(zip(shapes, dtypes, needs, strict=True))
    )
    options = 1, 0.1, reduction, 0.5, True, 1, accumulate_in_weight_dtype, False, 2
    made = [need and reduction != 0 for need in (*needs[:2], needs[2] and bias)]
    scale = torch.rand(target.shape) if reduction == 2 else None
    return x, w, b if bias else None, target, class_weight, scale, *options, *made


def row_vectors(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows) % classes, torch.zeros(rows, dtype=torch.int64)


def softmax_rows(rows: int, classes: int, bias: bool, smooth: bool, dtype: torch.dtype = D) -> Any:
    target, best = row_vectors(rows, classes)
    omega = torch.rand(classes, dtype=dtype) if smooth else None
    z, squares = make_input((rows, classes + 3), dtype)[:, :classes], torch.rand(classes, dtype=dtype)
    return z, squares.clone() if bias else None, squares, omega, target, smooth, best, z.new_empty(4, rows)


def mean_rows(rows: int, fan_in: int, classes: int, grads: bool, dtype: torch.dtype = D) -> Any:
    shift, features, mean, scaled = (make_input((rows, fan_in), dtype, seed=k) for k in range(4))
    weight, squares = make_input((classes, fan_in), dtype, "transposed"), torch.rand(classes, dtype=dtype)
    stats, curvature_factor = torch.rand(4, rows, dtype=dtype), torch.rand(rows, dtype=dtype)
    made = (mean, scaled) if grads else (None, None)
    return (
        shift,
        weight,
        weight.mean(0),
        features,
        squares,
        row_vectors(rows, classes)[1],
        stats,
        curvature_factor,
        *made,
        stats.clone(),
    )


def grad_logits(
    rows: int, classes: int, first: int, count: int, products: bool, dtype: torch.dtype = D
) -> Any:
    e, dots, dz, squares = (
        torch.rand(*s, dtype=dtype) for s in ((rows, classes), (rows, count), (rows, classes), (classes,))
    )
    target, best = row_vectors(rows, classes)
    sums = (
        (torch.zeros(classes, dtype=dtype), torch.zeros(classes, dtype=dtype)) if products else (None, None)
    )
    factors = torch.rand(9, rows, dtype=dtype)
    return (
        e,
        dots if products else None,
        dz,
        first,
        count,
        squares,
        squares,
        True,
        target,
        best,
        factors,
        *sums,
    )


def add_rows(rows: int, fan_in: int, first: int, count: int, dtype: torch.dtype = D) -> Any:
    source = torch.rand(rows, fan_in, dtype=dtype)
    return source, torch.arange(rows) % 3, torch.rand(count, fan_in, dtype=dtype), first


def patches(shape: tuple[int, ...], layout: str, *arguments: Any) -> Any:
    return make_input(shape, D, layout).requires_grad_(), *arguments


def patches_backward(shape: tuple[int, ...], layout: str, *arguments: Any) -> Any:
    x = make_input(shape, D, layout)
    return torch.rand_like(torch.ops.fam_ext.patch_sqnorm(x, *arguments)), x, *arguments


def gram(
    shape: tuple[int, ...],
    factors: tuple[int, ...],
    form: str,
    weighted: bool = True,
    window: tuple[list[int], ...] = ([1], [1], [0], [1]),
    requires_grad: tuple[bool, bool, bool] = (True, True, True),
    keep: bool = True,
    layout: str = "contiguous",
    dtype: torch.dtype = D,
    max_bytes: int = 1,
) -> Any:
    matrix = make_input((shape[1], factors[3], factors[3]), D, seed=1)
    inputs = [
        make_input(shape, dtype, layout),
        make_input(factors, dtype, layout, seed=2),
        matrix @ matrix.mT,
    ]
    inputs = [t.requires_grad_(r) for t, r in zip(inputs, requires_grad, strict=True)]
    return inputs[0], inputs[1], inputs[2] if weighted else None, *window, form, max_bytes, keep


def gram_backward(*args: Any, needs: tuple[bool, bool, bool] = (True, True, True), **kwargs: Any) -> Any:
    sample = gram(*args, requires_grad=(False, False, False), **kwargs)
    values, saved = torch.ops.fam_ext.gram_trace(*sample)
    return torch.rand_like(values), *sample[:3], saved, *sample[3:-1], *needs


SOFT = torch.rand(4, 3, 5, dtype=D)
PAIRS = ((3, 1, 4, 6), (2, 3, 1, 5, 6))
WINDOWS = ((2, 2, 3, 7, 6), (2, 2, 2, 4, 4, 2))
WINDOW = ([3, 2], [2, 3], [2, 0], [1, 2])
PATCHES = [
    ((2, 6, 23), "contiguous", [3], [2], [4], [3], 2),
    ((2, 6, 9, 11), "channels_last", [3, 2], [2, 3], [2, 0], [2, 3], 3),
    ((3, 36, 5, 4), "contiguous", [1, 1], [1, 1], [0, 0], [1, 1], 4),
    ((2, 4, 4, 5, 6), "channels_last", [3, 2, 3], [1, 1, 1], [1, 0, 1], [1, 1, 1], 1),
    ((5, 12), "contiguous", [], [], [], [], 3),
    ((0, 4, 6, 6), "channels_last", [3, 3], [1, 1], [1, 1], [1, 1], 2),
]
SAMPLES: dict[str, list[Any]] = {
    "softmax_trace": [
        lambda: trace((7, 5), 3, "contiguous", True),
        lambda: trace((7, 40), 3, "transposed", True),
        lambda: trace((2, 4, 3, 5), 6, "channels_last", False),
        lambda: trace((4, 3, 2), 5, "expanded", True),
        lambda: trace((0, 3), 2, "contiguous", False),
        lambda: trace((6, 3), 2, "strided", False, F32),
    ],
    "softmax_trace_backward": [
        lambda: trace_backward((7, 5), 3, "contiguous", True),
        lambda: trace_backward((7, 40), 3, "transposed", True),
        lambda: trace_backward((2, 4, 3, 5), 6, "channels_last", False),
        lambda: trace_backward((4, 3, 2), 5, "expanded", False, (True, False)),
        lambda: trace_backward((4, 3, 2), 5, "sliced", True, (False, True)),
        lambda: trace_backward((6, 3), 2, "strided", False, dtype=F32),
    ],
    "head_cross_entropy": [
        lambda: head((7, 5), 3, "contiguous", True),
        lambda: head((7, 40), 3, "transposed", False, class_weight=torch.rand(40, dtype=D)),
        lambda: head((2, 4, 3, 5), 6, "channels_last", False, mean=False),
        lambda: head((4, 3, 5), 6, "strided", True, target=SOFT, requires_grad=(False, False, True)),
        lambda: head((4, 3, 5), 6, "sliced", True, curvature_grad=False, requires_grad=(True, True, False)),
        lambda: head((6, 3), 2, "contiguous", True, dtype=F32),
        lambda: head((6, 3), 2, "transposed", True, dtype=torch.float16),
        lambda: head((0, 3), 2, "contiguous", True, mean=False),  # the mean is nan
    ],
    "head_cross_entropy_forward": [
        lambda: head_forward((7, 5), 3, "contiguous", True),
        lambda: head_forward((7, 40), 3, "transposed", False, class_weight=torch.rand(40, dtype=D)),
        lambda: head_forward((2, 4, 3, 5), 6, "channels_last", False, needs=(True, False, False)),
        lambda: head_forward((4, 3, 5), 6, "strided", True, target=SOFT, needs=(False, True, True)),
        lambda: head_forward((4, 3, 5), 6, "expanded", True, curvature_grad=False),
        lambda: head_forward((0, 3), 2, "contiguous", False, mean=False),
        lambda: head_forward((2, 4, 3, 5), 6, "transposed", False, dtype=torch.float16),
    ],
    "gram_trace": [
        lambda: gram(*PAIRS, "direct"),
        lambda: gram(*PAIRS, "gram_shifts", layout="transposed", keep=False, requires_grad=(False,) * 3),
        lambda: gram(*WINDOWS, "direct", False, WINDOW, (True, True, False), dtype=F32),
        lambda: gram(*WINDOWS, "gram_shifts", True, WINDOW, (False, True, True), max_bytes=2**20),
        lambda: gram(*WINDOWS, "gram_patches", True, WINDOW, layout="strided", dtype=torch.bfloat16),
        lambda: gram((0, 1, 4, 6), (2, 0, 1, 5, 6), "direct"),
    ],
    "gram_trace_backward": [
        lambda: gram_backward(*PAIRS, "direct", layout="transposed"),
        lambda: gram_backward(*WINDOWS, "direct", True, WINDOW, needs=(True, False, True), dtype=F32),
        lambda: gram_backward(*WINDOWS, "gram_shifts", False, WINDOW, needs=(True, True, False)),
        lambda: gram_backward(
            *WINDOWS, "gram_patches", True, WINDOW, layout="expanded", dtype=torch.bfloat16
        ),
        lambda: gram_backward(*WINDOWS, "gram_patches", True, WINDOW, needs=(False, False, True)),
        lambda: gram_backward((0, 1, 4, 6), (2, 0, 1, 5, 6), "gram_shifts"),
    ],
    "linear_cross_entropy": [
        lambda: linear((7,), 5, "contiguous"),
        lambda: linear((2, 3, 5), 40, "transposed", class_weight=torch.rand(40, dtype=D), reduction=2),
        lambda: linear((4, 5), 3, "strided", reduction=0),
        lambda: linear((33,), 6, "expanded", bias=False, needs=(False, True, False)),
        lambda: linear((6, 2), 3, "sliced", needs=(True, False, False), dtypes=(F32, F32, F32)),
        lambda: linear((0,), 3, "contiguous", reduction=2),  # the mean is nan
        lambda: linear(
            (19,), 6, "sliced", dtypes=(torch.float16, F32, torch.float16), needs=(True, True, False)
        ),
        lambda: linear((19,), 6, "strided", dtypes=(torch.bfloat16,) * 3, accumulate_in_weight_dtype=True),
    ],
    "linear_cross_entropy_softmax_rows": [
        lambda: softmax_rows(5, 40, True, True),
        lambda: softmax_rows(3, 7, False, False, F32),
        lambda: softmax_rows(0, 7, False, False),
    ],
    "linear_cross_entropy_mean_rows": [
        lambda: mean_rows(5, 21, 4, True),
        lambda: mean_rows(3, 2, 4, False, F32),
        lambda: mean_rows(0, 2, 4, True),
    ],
    "linear_cross_entropy_grad_logits": [
        lambda: grad_logits(5, 40, 0, 40, True),
        lambda: grad_logits(5, 40, 13, 21, True, F32),
        lambda: grad_logits(3, 7, 0, 7, False),
    ],
    "linear_cross_entropy_add_rows": [
        lambda: add_rows(5, 6, 0, 3),
        lambda: add_rows(5, 6, 1, 1, F32),
        lambda: add_rows(0, 6, 1, 1),
    ],
    "patch_sqnorm": [lambda case=case: patches(*case) for case in PATCHES],
    "patch_sqnorm_backward": [lambda case=case: patches_backward(*case) for case in PATCHES],
}
