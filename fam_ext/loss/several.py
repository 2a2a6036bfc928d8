"""The terms of one or several layers that are no heads, from gradients, products and factors that serve all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fam_ext.derivatives import corrections
from fam_ext.errors import UnsupportedError
from fam_ext.hessian import exact, gauss_newton, hutchinson
from fam_ext.hessian.estimate import Estimate
from fam_ext.hessian.products import Curvature, LayerCall
from fam_ext.loss.hidden import General, Plan
from fam_ext.loss_hessians import SUPPORTED, Bound


def hessian_terms(found: Sequence[tuple[General, Curvature, list[Any]]], per_sample: bool) -> list[Estimate]:
    """The terms of several layers, inside fam_ext.curvature.products; the sum of those that are estimated is one estimate.

    `found` holds each layer's products, and the autograd nodes between the loss and it.
    """
    levels = [general.level(curvature, nodes, per_sample) for general, curvature, nodes in found]
    products = sum(
        exact.exact_products(general.layer, curvature, level)
        for (general, curvature, _), level in zip(found, levels, strict=True)
    )
    terms, estimated = [], []
    for (general, curvature, nodes), level in zip(found, levels, strict=True):
        plan = general.choose(curvature, level, nodes, products)
        general.note(plan)
        if per_sample and plan.level == "batch":
            raise UnsupportedError(
                f"{general.options.caller}: samples interact after the layer, kappa has no shares by sample; use per_sample=False"
            )
        if plan.method == "hutchinson":
            estimated.append((general, curvature, str(plan.level), nodes))
        else:
            terms.append(Estimate(general.exact(curvature, plan, nodes, per_sample), None))
    if estimated:
        terms.append(_estimate(estimated, per_sample))
    return terms


def _estimate(found: Sequence[tuple[General, Curvature, str, list[Any]]], per_sample: bool) -> Estimate:
    first, curvature, _, nodes = found[0]
    options, generator = first.options, first.generator(curvature.device)
    weighted = options.measure == "neuronwise"

    def values(probes: int) -> Tensor:
        drawn = [
            hutchinson.draw(curvature, level, weighted, probes, generator, options.backend)
            for _, curvature, level, _ in found
        ]
        total: Any = sum(
            general.finish(
                torch.stack([general.share(curvature, s, per_sample) for s in stack]), curvature.weight
            )
            for (general, curvature, *_), stack in zip(found, hutchinson.hutchinson(drawn), strict=True)
        )
        return total  # type: ignore[no-any-return]

    chunk = options.probes
    if curvature.hold and not torch.is_grad_enabled():
        chunk = first.at_once(curvature, "probes", nodes, values, options.probes)
    sizes = [min(chunk, options.probes - done) for done in range(0, options.probes, chunk)]
    return Estimate.of(torch.cat([values(size) for size in sizes]))


def positive_terms(
    found: Sequence[tuple[General, Tensor, Sequence[LayerCall], list[Any]]],
    outputs: Any,
    bound: Bound | None,
    per_sample: bool,
) -> list[Estimate]:
    """The terms of several layers for curvature="ggn" (every factor of the criterion's Hessian) or "fisher" (`probes` draws).

    `found` holds each layer's weight and calls, and the autograd nodes between the loss and them.
    """
    options = found[0][0].options
    if bound is None or not isinstance(outputs, Tensor):
        raise UnsupportedError(
            f"{options.caller}: curvature={options.curvature!r} needs a criterion whose own Hessian is known; use {SUPPORTED}"
        )
    bound.check(options.caller, outputs)
    options.check_bound(bound)
    nodes = dict.fromkeys(node for *_, between in found for node in between)
    # second derivatives: what torch has none of is corrected
    correct = [node for node in nodes if corrections.needs_correction(node)]
    with (
        torch.autocast(outputs.device.type, enabled=False),
        corrections.corrected(correct, options.hold_statistics),
    ):
        groups: dict[
            int, list[tuple[General, gauss_newton.Place]]
        ] = {}  # by number of samples, which factors depend on
        for general, weight, calls, between in found:
            place = general.positive(weight, calls, between, outputs)
            groups.setdefault(general.layer.samples(place.call.shape), []).append((general, place))
        return [_positive(group, samples, outputs, bound, per_sample) for samples, group in groups.items()]


def _positive(
    group: Sequence[tuple[General, gauss_newton.Place]],
    samples: int,
    outputs: Tensor,
    bound: Bound,
    per_sample: bool,
) -> Estimate:
    first = group[0][0]
    options, hold = first.options, not first.options.curvature_grad or not torch.is_grad_enabled()
    if options.curvature == "ggn":
        drawn = gauss_newton.output_factors(bound, outputs, samples)
    else:
        drawn = gauss_newton.sampled_factors(bound, outputs, options.probes, first.generator(outputs.device))
    weighted, places = options.measure == "neuronwise", [place for _, place in group]
    total: Any = 0
    for (general, place), each in zip(
        group, gauss_newton.squares(places, outputs, drawn, weighted, hold, options.backend), strict=True
    ):
        general.note(Plan(options.curvature, "samples", len(each), "asked for"))
        total = total + general.finish(each if per_sample else each.sum(1), place.weight)
    return Estimate(total.sum(0), None) if options.curvature == "ggn" else Estimate.of(total)
