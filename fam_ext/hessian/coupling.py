"""How far rows of a layer's output are coupled by the network after it, from one or two Hessian products.

- "rows": the Hessian by z is block-diagonal in rows (samples x positions): O exact products, or independent probes for every row;
- "samples": block-diagonal in samples: independent probes for every sample;
- "batch": anything may be coupled (batch_norm in training, contrastive losses, several calls): one probe for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fam_ext.hessian.products import LayerHessian

LEVELS = ("rows", "samples", "batch")
_SEED = 0xC0DE


def coupling_level(hessian: LayerHessian, check: int = 0) -> str | None:
    """How far rows of z are coupled by what follows the layer: "rows", "samples" or "batch".

    A random direction on half of the samples must leave the products at the other samples at exactly zero; then one on half of
    the positions of every sample those at the other positions. None where all products are zero, some are not finite, or there
    are no rows: such numbers tell nothing. Two rows that only each other are coupled with can lie in one half: another `check`
    takes other halves.
    """
    if hessian.on_weight:
        return "batch"
    call, layer = hessian.calls[0], hessian.layer
    samples, positions = layer.samples(call.shape), layer.positions(call.shape)
    if samples * positions == 0:
        return None
    # of its own: a check, which comes at steps that no user counts, must not move the estimate's random numbers
    generator = torch.Generator(hessian.device).manual_seed(_SEED + check)
    if samples > 1:
        coupled = _crosses(hessian, _halves(1, samples, generator).reshape(samples, 1), generator)
        if coupled is not False:
            return "batch" if coupled else None
    if positions > 1:
        coupled = _crosses(hessian, _halves(samples, positions, generator), generator)
        if coupled is not False:
            return "samples" if coupled else None
    return "rows"


def _halves(count: int, size: int, generator: torch.Generator) -> Tensor:
    """A random half of `size` things, `count` times over: (count, size) of booleans."""
    numbers = torch.rand(count, size, generator=generator, device=generator.device)
    return numbers.argsort(1).argsort(1) < (size + 1) // 2


def _crosses(hessian: LayerHessian, half: Tensor, generator: torch.Generator) -> bool | None:
    """Whether a direction on `half` (samples, positions or 1) reaches the other rows; None where it reaches nothing."""
    call, layer = hessian.calls[0], hessian.layer
    row_shape = list(call.shape)
    row_shape[layer.class_dim] = 1
    mask = half.expand(layer.samples(call.shape), layer.positions(call.shape)).reshape(row_shape)
    direction = torch.randn(call.shape, generator=generator, device=hessian.device, dtype=hessian.dtype)
    products = hessian.matvec((direction * mask).unsqueeze(0))[0].detach()
    finite = products.isfinite()
    if bool((products[~mask.expand_as(products) & finite] != 0).any()):
        return True
    # a batch of NaN or inf, or a step that diverged, tells nothing either
    return False if bool(finite.all()) and bool((products != 0).any()) else None
