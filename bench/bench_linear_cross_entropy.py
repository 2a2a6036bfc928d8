"""linear_cross_entropy at vocabulary size: CE + FAM of a language model's head, from features to gradients.

Ratios are to torch's own chunked F.linear_cross_entropy with chunks of 256 rows, its options' default beside it. It computes CE
alone: three products of size N x I x V, where CE + FAM takes six; "% of ceiling" counts six for all. Then comes what holds the
logits: linear + CE, and the closed form in plain PyTorch, textbook (which loses its digits on confident predictions) and stable.
Shapes of whole language models are in bench_vocabulary.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from baselines import by_trace, textbook_trace
from case import Build, Case, Variant
from torch import Tensor, nn

from fam_ext.functional import linear_cross_entropy

OP = "linear_cross_entropy"
STRENGTH = 0.01
SHAPES = ((512, 256, 4096), (256, 512, 8192), (128, 512, 32000))  # rows N, fan-in I, vocabulary V
COMPILED = SHAPES[1]  # a compilation takes as long as the rounds
OURS, EAGER = "linear_cross_entropy", "linear + CE, eager"
DEFAULT, CHUNKED = "F.linear_cross_entropy, chunked", "F.linear_cross_entropy, 256 rows"  # CE alone
BASELINE = CHUNKED if hasattr(nn, "LinearCrossEntropyOptions") else EAGER
Shape = tuple[int, int, int]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), t)


def chunked(rows: int | None, x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    given = {} if rows is None else {"batch_chunk_size": rows, "chunking_method": None}
    return F.linear_cross_entropy(x, w, t, options=nn.LinearCrossEntropyOptions(**given))


def ours(x: Tensor, w: Tensor, t: Tensor, parts: int = 2) -> Tensor:
    return linear_cross_entropy(x, w, t, strength=STRENGTH, parts=parts)[0]


def stable(x: Tensor, w: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    return linear_cross_entropy(x, w, t, strength=STRENGTH, reduction=reduction, backend="reference")[0]


def textbook(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return by_trace(textbook_trace, STRENGTH, x, w, None, t)


def step(loss: Loss, x: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    value = loss(x, w, t)
    return value, *torch.autograd.grad(value, (x, w))


def in_float64(loss: Loss, x: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """The step of a sum over rows, divided by their number: in slices of rows, so that any shape fits."""
    w = w.detach().double().requires_grad_()
    value, dx, dw = torch.zeros((), dtype=w.dtype), [], torch.zeros_like(w)
    for rows, target in zip(x.detach().double().split(128), t.split(128), strict=True):
        share, share_dx, share_dw = step(loss, rows.requires_grad_(), w, target)
        value = value + share.detach()
        dx.append(share_dx)
        dw += share_dw
    return value / len(t), torch.cat(dx) / len(t), dw.div_(len(t))


def case(shape: Shape, compiled: bool) -> Case:
    rows, fan_in, classes = shape
    torch.manual_seed(0)
    x = torch.randn(rows, fan_in, requires_grad=True)
    w, t = (torch.randn(classes, fan_in) / fan_in**0.5).requires_grad_(), torch.randint(classes, (rows,))
    without = in_float64(lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="sum"), x, w, t)
    total = in_float64(partial(stable, reduction="sum"), x, w, t)

    def variant(name: str, loss: Loss, tolerance: float, exact: Sequence[Tensor]) -> Variant:
        return Variant(name, partial(step, loss, x, w, t), BASELINE, tolerance, exact)

    variants = [
        variant(EAGER, plain, 5e-6, without),
        variant(OURS, ours, 5e-6, total),
        variant(f"{OURS}, one part", partial(ours, parts=1), 1e-3, total),
        variant("textbook, eager", textbook, 1e-4, total),
        variant("stable, eager", stable, 1e-5, total),
    ]
    if BASELINE == CHUNKED:
        own = [
            variant(CHUNKED, partial(chunked, 256), 5e-6, without),
            variant(DEFAULT, partial(chunked, None), 5e-6, without),
        ]
        variants = own + variants
    if compiled:
        variants += [
            variant("linear + CE, compiled", torch.compile(plain, dynamic=False), 5e-6, without),
            variant("textbook, compiled", torch.compile(textbook, dynamic=False), 1e-4, total),
        ]
    label = f"N={rows} I={fan_in} V={classes}, forward + backward"
    return Case(label, variants, flops=12 * rows * fan_in * classes, least=3 if classes > 10_000 else None)


def cases(quick: bool = False) -> list[Build]:
    def build(shape: Shape, compiled: bool) -> Case:
        return case(shape, compiled and shape == COMPILED)

    return [partial(build, shape) for shape in (SHAPES[:1] if quick else SHAPES)]
