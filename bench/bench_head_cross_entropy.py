"""The price of FAM on a linear head: (linear + CE + FAM) / (linear + CE), forward and backward.

A step makes the loss and the gradients of the layer's input, weight and bias. Ours is measured as the functional
(`head_cross_entropy`) and as users call it (`FAMLoss`, with its hook and its Python), each against the same step without FAM.
Beside them stands what one would write in plain PyTorch, eager and compiled (compile time is not counted): the textbook variance
sum_s p_s |w_s|^2 - |sum_s p_s w_s|^2, which loses its digits on confident predictions, and the stable form of fam_ext.reference.
Then what does not know the closed form: the full Hessian, where it fits, and Hutchinson's estimator, whose time is that of a step
with few probes, multiplied to the number that brings its standard error to 1 % (bench/baselines.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from baselines import by_trace, full_hessian, hutchinson, hutchinson_values, probes_for, textbook_trace
from case import Build, Case, Variant
from counts import head_step, linear_step
from torch import Tensor, nn

import fam_ext
from fam_ext.functional import head_cross_entropy
from fam_ext.ops.reference.softmax_trace import softmax_trace as stable_trace
from fam_ext.ops.softmax_trace import choose_form

OP = "head_cross_entropy"
STRENGTH = 0.1
SHAPES = ((64, 64, 10), (128, 512, 10), (128, 512, 100), (256, 2048, 1000))  # rows N, fan-in I, classes O
HESSIAN_LIMIT = 1000  # O I, whose square is the number of floats in the Hessian; 5120 takes 2 s a step
PROBES = 4
FUNCTIONS, MODULES = "linear + CE (functions)", "linear + CE (modules)"
Shape = tuple[int, int, int]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w, b), t)


def functional(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return head_cross_entropy(F.linear(x, w, b), x, w, t, strength=STRENGTH)[0]


textbook = partial(by_trace, textbook_trace, STRENGTH)


def stable(form: str) -> Loss:
    return partial(by_trace, partial(stable_trace, form=form), STRENGTH)


def step(loss: Loss, x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    value = loss(x, w, b, t)
    return value, *torch.autograd.grad(value, (x, w, b))


def called(criterion: nn.Module, layer: nn.Linear, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    value = criterion(layer(x), t)
    return value, *torch.autograd.grad(value, (x, layer.weight, layer.bias))


def estimated(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    value = hutchinson(x, w, b, t, STRENGTH, PROBES)
    torch.autograd.grad(value, (x, w, b))
    return (value,)


def inputs(shape: Shape) -> tuple[nn.Linear, Tensor, Tensor]:
    """(layer, features, target), the same at every call."""
    rows, fan_in, classes = shape
    torch.manual_seed(0)
    layer = nn.Linear(fan_in, classes)
    return layer, torch.randn(rows, fan_in, requires_grad=True), torch.randint(classes, (rows,))


def case(shape: Shape, compiled: bool, others: bool = True) -> Case:
    """`others`: with the ways that do not know the closed form."""
    rows, fan_in, classes = shape
    layer, x, t = inputs(shape)
    hooked = nn.Linear(fan_in, classes)
    w, b = hooked.weight, hooked.bias = layer.weight, layer.bias
    fam = fam_ext.FAMLoss(nn.CrossEntropyLoss(), layer=hooked, strength=STRENGTH)
    reference = stable(choose_form(*shape))
    double = [a.detach().double().requires_grad_() for a in (x, w, b)]
    form = (
        "pairwise" if classes <= 1000 else "shifted"
    )  # float64 has the digits in both; O^2 numbers are held
    without, total = step(plain, *double, t), step(stable(form), *double, t)

    def of(loss: Loss) -> Callable[[], tuple[Tensor, ...]]:
        return partial(step, loss, x, w, b, t)

    own, added = linear_step(*shape), head_step(*shape)
    # distances of random weight rows concentrate, and the gradient of the logits is a difference of them
    tolerance = 2e-6 * max(1.0, (fan_in / 512) ** 0.5)
    # both PyTorch forms are right to a few digits here, where no prediction is confident
    variants = [
        Variant(FUNCTIONS, of(plain), FUNCTIONS, 2e-6, without, own),
        Variant(MODULES, partial(called, nn.CrossEntropyLoss(), layer, x, t), MODULES, 2e-6, without, own),
        Variant("head_cross_entropy", of(functional), FUNCTIONS, tolerance, total),
        Variant("FAMLoss", partial(called, fam, hooked, x, t), MODULES, tolerance, total),
        Variant("textbook, eager", of(textbook), FUNCTIONS, 1e-4, total),
        Variant("stable, eager", of(reference), FUNCTIONS, 1e-5, total),
    ]
    if compiled:
        variants += [
            Variant("textbook, compiled", of(torch.compile(textbook, dynamic=False)), FUNCTIONS, 1e-4, total),
            Variant("stable, compiled", of(torch.compile(reference, dynamic=False)), FUNCTIONS, 1e-5, total),
        ]
    if others and classes * fan_in <= HESSIAN_LIMIT:
        full = of(partial(full_hessian, strength=STRENGTH))
        variants.append(Variant("full Hessian (torch.func)", full, FUNCTIONS, 1e-4, total, thin=True))
    if others:
        kappa = float((total[0] - without[0]).detach()) / STRENGTH
        draws = hutchinson_values(x, w, b, t, 64 if classes * fan_in <= HESSIAN_LIMIT else 16, graph=False)[1]
        probes, deviation = probes_for(draws, kappa)
        spread = 5 * deviation / PROBES**0.5 * STRENGTH * kappa / float(total[0].detach())
        name = f"Hutchinson to 1 % ({probes} probes)"
        run = partial(estimated, x, w, b, t)
        variants.append(Variant(name, run, FUNCTIONS, spread, total[:1], scale=probes / PROBES, thin=True))
    return Case(f"N={rows} I={fan_in} O={classes}, forward + backward", variants, flops=added)


def cases(quick: bool = False) -> list[Build]:
    return [partial(case, shape) for shape in (SHAPES[:2] if quick else SHAPES)]
