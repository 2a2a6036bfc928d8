"""Noise in the projections of nn.MultiheadAttention, whose out_proj has its input inside of torch's function.

- in_proj: query, key and value are perturbed as any linear layer's input is, phi + sqrt(2 strength) a (b^T phi). Where they are
  the same tensor they have one draw, that of the packed layer.
- out_proj: z + sqrt(2 strength) (W a) (b^T phi), on the output. phi is not seen from outside, but the function takes an out_proj
  of any height: one with b below the rows of W returns b^T phi beside z. That takes D more rows, for D different b in a batch;
  each sample has an a of its own, so that draws of different samples are uncorrelated all the same.

Sequences come first in out_proj's tensors, (N, S, E), as in torch's function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fam_ext.hessian import noise
from fam_ext.hessian.noise_draws import DIFFERENT, Draw
from fam_ext.layers.linear_map import LinearMap


def perturb_inputs(
    layers: Sequence[LinearMap], drawn: Draw, inputs: Sequence[Tensor], strengths: Sequence[float | Tensor]
) -> list[Tensor]:
    """phi + eps phi for the inputs (S, N, I) of several layers; the same tensor again is perturbed once.

    The draw is that of one layer with all their columns. Inputs that lie in the same place share their columns: a reentrant
    checkpoint's backward pass makes three tensors of one.
    """
    assert drawn.channels is not None
    widths = [layer.inputs for layer in layers]
    lefts, rights = torch.split(drawn.left, widths, -1), torch.split(drawn.channels, widths, -1)

    def perturb(k: int) -> Tensor:
        first = next(j for j in range(k + 1) if _same_place(inputs[j], inputs[k]))
        part = drawn._replace(left=lefts[first], channels=rights[first])
        return noise.perturb_input(layers[k], part, inputs[k], strengths[k])

    return each(inputs, perturb)


def _same_place(a: Tensor, b: Tensor) -> bool:
    if a is b or a.shape != b.shape or torch.compiler.is_compiling():
        return a is b
    return a.is_set_to(b)


def each(tensors: Sequence[Tensor], function: Callable[[int], Tensor]) -> list[Tensor]:
    """function(k) for every tensor; where the k-th is one that came before, that one's result.

    >>> x = torch.ones(1)
    >>> [float(t) for t in each([x, x, 1 * x], lambda k: k * x)]
    [0.0, 0.0, 2.0]
    """
    made: list[Tensor] = []
    for k, tensor in enumerate(tensors):
        before = [made[j] for j in range(k) if tensors[j] is tensor]
        made.append(before[0] if before else function(k))
    return made


def directions(drawn: Draw) -> Tensor:
    """The b of a draw that out_proj gets as further rows, (D, E): sample i takes row i % D."""
    assert drawn.channels is not None
    return drawn.channels[:DIFFERENT, 0]


def perturb_product(
    drawn: Draw, weight: Tensor, z: Tensor, products: Tensor, strength: float | Tensor
) -> Tensor:
    """z + W eps phi, (N, S, E), for z of that shape and the products (N, S, D) of phi with :func:`directions`."""
    if z.numel() == 0:
        return z
    left = F.linear((drawn.left[:, 0] * noise.amplitude(strength)).to(z.dtype), weight.to(z.dtype))  # W a
    samples = z.shape[1]
    row = torch.arange(samples, device=z.device) % products.shape[2]
    inner = products.gather(2, row.reshape(1, -1, 1).expand(len(z), -1, 1)).squeeze(2).t()  # (S, N)
    if drawn.positions is not None and drawn.positions.shape == inner.shape:
        inner = inner * drawn.positions.to(inner.dtype)
    rows = z.permute(1, 2, 0).unsqueeze(1)  # (S, 1, E, N)
    perturbed = noise.add_outer(rows, left.to(z.dtype).unsqueeze(1), inner.unsqueeze(1))
    return perturbed.squeeze(1).permute(2, 0, 1)
