"""How far rows of a layer's output interact after it, found out with one Hessian product."""

from __future__ import annotations

import torch

from fam_ext.hessian.products import Curvature

LEVELS = ("rows", "samples", "batch")


def interaction(curvature: Curvature, generator: torch.Generator) -> str | None:
    """How far rows of z interact after the layer: "rows", "samples" or "batch".

    A random direction on half of the rows (then: of the samples) must leave the products at the others at exactly zero. None
    where all products are zero, or there are no rows: such numbers tell nothing.
    """
    if curvature.on_weight:
        return "batch"
    call, layer = curvature.calls[0], curvature.layer
    samples, positions = layer.samples(call.shape), layer.positions(call.shape)
    row_shape = list(call.shape)
    row_shape[layer.class_dim] = 1
    if samples * positions == 0:
        return None
    direction = torch.randn(call.shape, generator=generator, device=curvature.device, dtype=curvature.dtype)
    for level, count in (("rows", samples * positions), ("samples", samples)):
        if count == 1:
            return level
        chosen = torch.zeros(count, dtype=torch.bool, device=curvature.device)
        order = torch.randperm(count, generator=generator, device=curvature.device)
        chosen[order[: (count + 1) // 2]] = True
        mask = chosen.repeat_interleave(samples * positions // count).reshape(row_shape)
        products = curvature.apply((direction * mask).unsqueeze(0))[0].detach()
        if not bool((products * ~mask != 0).any()):  # NaN counts as reached
            return level if bool((products != 0).any()) else None
    return "batch"
