"""kappa of hidden layers, or of a criterion without a closed form: planned, then evaluated for all layers of a sum at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fam_ext.criteria import SUPPORTED
from fam_ext.derivatives import corrections, taken_twice, verdicts
from fam_ext.errors import UnsupportedError
from fam_ext.hessian import eigenvalue, finite_difference, gauss_newton, hutchinson, loss_factors, memory
from fam_ext.hessian.estimate import Estimate
from fam_ext.hessian.exact import exact
from fam_ext.hessian.products import LayerCall, LayerHessian, products
from fam_ext.layers import sharding
from fam_ext.loss.layer_term import LayerTerm
from fam_ext.loss.plan import AT_ONCE, Plan, first_products, graph_key, plan_products, rows_taken, signature
from fam_ext.loss_hessians import LossHessian
from fam_ext.options import EIGENVALUE_MEASURES, Options


class HiddenCall(NamedTuple):
    """A hidden layer in one loss: its weight and calls, and the autograd nodes between the loss and them.

    `past_calls`: the loss depends on the weight past these calls as well (fam_ext.capture.graph_walk). `own_input`: nothing but
    the first call takes its input, so that the gradient by the input is the call's own.
    """

    term: LayerTerm
    weight: Tensor
    calls: list[LayerCall]
    between: list[Any]
    past_calls: bool
    own_input: bool = False


def hessian_terms(
    options: Options, loss: Tensor, hidden: Sequence[HiddenCall], per_sample: bool
) -> list[Estimate]:
    """The terms of layers from Hessian products, which share the first gradient; what is estimated is one estimate."""
    wanted = torch.is_grad_enabled()
    correct, doubtful = verdicts.check(options.caller, _all_between(hidden))
    hessians = [_layer_hessian(h, not options.curvature_grad) for h in hidden]
    with torch.autocast(loss.device.type, enabled=False), products(loss, hessians, correct, doubtful):
        layers = [(h.term.memory, hessian, h.between) for h, hessian in zip(hidden, hessians, strict=True)]
        plans = plan_products(options, layers, per_sample)
        terms, estimated = [], []
        for call, hessian, plan in zip(hidden, hessians, plans, strict=True):
            if plan != call.term.plan:
                call.term.record_plan(plan)
            if plan.method == "hutchinson":
                estimated.append((call, hessian, str(plan.level)))
            else:
                terms.append(Estimate(_exact(call, hessian, plan, per_sample), None))
        if estimated:
            terms.append(_hutchinson(options, estimated, per_sample))
    return terms if wanted else [Estimate(term.value.detach(), term.standard_error) for term in terms]


def weight_product(options: Options, loss: Tensor, hidden: HiddenCall, direction: Tensor) -> Tensor:
    """H D of one loss, D and the result in canonical layout (fam_ext.layers.linear_map), without graph."""
    hessian = _layer_hessian(hidden, detached=True)
    correct, doubtful = verdicts.check(options.caller, hidden.between)
    with torch.autocast(loss.device.type, enabled=False), products(loss, [hessian], correct, doubtful):
        return hessian.weight_product(direction).detach()


def _layer_hessian(hidden: HiddenCall, detached: bool) -> LayerHessian:
    hessian = LayerHessian(hidden.term.layer, hidden.weight, hidden.calls, detached, hidden.past_calls)
    if not torch.is_grad_enabled() and not hessian.on_weight:
        hessian.weight = hidden.weight.detach()
    if hessian.on_weight and not (hidden.weight.requires_grad and hidden.weight.is_leaf):
        why = (
            "depends on the weight past the layer's calls"
            if hidden.past_calls
            else "calls the layer several times"
        )
        raise UnsupportedError(
            f"{hidden.term.options.caller}: the loss {why}, where products are taken on its weight itself: the weight must be a "
            "parameter that requires grad (not a parametrization's result)"
        )
    return hessian


def _all_between(hidden: Sequence[HiddenCall]) -> Sequence[Any]:
    if len(hidden) == 1:
        return hidden[0].between
    return list(dict.fromkeys(node for h in hidden for node in h.between))  # a set with an order


def _reduce(hessian: LayerHessian, summands: Tensor, per_sample: bool) -> Tensor:
    """The sums of summands (K, *shape), (K,), or their sums by sample, (K, B)."""
    if not per_sample:
        return summands.flatten(1).sum(1)
    return summands.reshape(len(summands), hessian.layer.samples(hessian.calls[0].shape), -1).sum(2)


def _hutchinson(
    options: Options, estimated: Sequence[tuple[HiddenCall, LayerHessian, str]], per_sample: bool
) -> Estimate:
    first, hessian, _ = estimated[0]
    generator = first.term.generators.get(hessian.device) or first.term.generator(hessian.device)
    weighted = options.measure == "neuronwise"

    def by_probe(probes: int) -> Tensor:
        drawn = [
            hutchinson.draw(hessian, level, weighted, probes, generator, options.backend)
            for _, hessian, level in estimated
        ]
        values: Any = 0
        for (call, hessian, _), stack in zip(estimated, hutchinson.hutchinson(drawn), strict=True):
            reduced = _reduce(hessian, stack, per_sample)
            scaled = (
                reduced * call.term.factor
                if weighted
                else call.term.scale_to_measure(reduced, hessian.weight)
            )
            values = values + scaled
        return values  # type: ignore[no-any-return]

    chunk = options.probes
    if not torch.is_grad_enabled():
        chunk = _at_once(first, hessian, "probes", by_probe, options.probes)
    sizes = [min(chunk, options.probes - done) for done in range(0, options.probes, chunk)]
    values = torch.cat([by_probe(size) for size in sizes]) if len(sizes) > 1 else by_probe(sizes[0])
    return Estimate(values[0], None) if len(values) == 1 else Estimate.of(values)


def _at_once(
    call: HiddenCall, hessian: LayerHessian, what: str, take: Callable[[int], object], most: int
) -> int:
    """How many of `most` products are formed together where none leaves a graph: counted once for a graph."""
    options, known = call.term.options, call.term.memory.at_once
    key = graph_key(hessian, call.between, what, most)
    if key not in known:
        known[key] = memory.at_once(options.caller, take, most, options.max_bytes)
    return known[key]


def _exact(call: HiddenCall, hessian: LayerHessian, plan: Plan, per_sample: bool) -> Tensor:
    """The exact value of a measure that is linear in the Hessian, or of one with eigenvalues."""
    term, options = call.term, call.term.options
    if options.measure in EIGENVALUE_MEASURES:
        return term.scale_to_measure(_eigenvalue(options, hessian), hessian.weight)
    level, chunk = str(plan.level), max(1, min(plan.products, AT_ONCE))
    if hessian.detached:
        chunk = _at_once(call, hessian, level, first_products(options, hessian, level), chunk)
    weighted = options.measure == "neuronwise"
    total: Any = 0
    for summand in exact(hessian, level, weighted, chunk, options.backend):
        total = total + _reduce(hessian, summand.unsqueeze(0), per_sample)[0]
    return term.scale_to_measure(total, hessian.weight)


def _eigenvalue(options: Options, hessian: LayerHessian) -> Tensor:
    """lambda_max(H), or sum_s |w_s|^2 lambda_max(H_ss); "layerwise" is multiplied with the norm by scale_to_measure."""
    if options.measure == "layerwise_eigenvalue":
        return eigenvalue.largest(hessian)
    squares = hessian.layer.canonical(hessian.weight).to(hessian.dtype).square().sum(2).flatten()
    largest = torch.stack([eigenvalue.largest(hessian, neuron) for neuron in range(len(squares))])
    return eigenvalue.neuronwise(squares, largest)


def positive_terms(
    options: Options,
    outputs: Any,
    hidden: Sequence[HiddenCall],
    loss_hessian: LossHessian | None,
    per_sample: bool,
) -> list[Estimate]:
    """The terms of layers for a positive form. "ggn": every factor of the criterion's Hessian, or `probes` random ones; "fisher":
    `probes` draws of labels; "empirical_fisher": the batch's own labels. One backward pass pulls a factor back to all layers.
    """
    caller = options.caller
    if loss_hessian is None or not isinstance(outputs, Tensor):
        raise UnsupportedError(
            f"{caller}: curvature={options.curvature!r} needs a criterion whose own Hessian is known; use {SUPPORTED}"
        )
    loss_hessian.check(caller, outputs)
    options.check_fisher(loss_hessian)
    # second derivatives: what torch has none of is corrected
    between = _all_between(hidden)
    verdicts.check_reentrant(caller, between)
    correct = [
        node
        for node in between
        if not verdicts.check_sink(caller, node) and corrections.needs_correction(node)
    ]
    hold = options.hold_statistics is not False
    held = hold and any("BatchNorm" in node.name() for node in correct)
    correct = [node for node in correct if not taken_twice.needs_no_correction(node, hold)]
    with (
        torch.autocast(outputs.device.type, enabled=False),
        corrections.corrected(correct),
        taken_twice.replaced(between, hold),
    ):
        groups: dict[int, list[HiddenCall]] = {}  # by number of samples, which factors depend on
        for call in hidden:
            _check_calls(caller, call)
            groups.setdefault(call.term.layer.samples(call.calls[0].shape), []).append(call)
        for group in groups.values():
            _check_samples(caller, group, outputs)
        return [
            _positive(group, samples, outputs, loss_hessian, held, per_sample)
            for samples, group in groups.items()
        ]


def _check_calls(caller: str, hidden: HiddenCall) -> None:
    """Refuse where the Gauss-Newton and Fisher matrices are no sum over the rows of one call."""
    if len(hidden.calls) > 1 or hidden.past_calls:
        raise UnsupportedError(
            f"{caller}: curvature={hidden.term.options.curvature!r} is for a layer called once, on which the loss depends "
            "through that call alone; use curvature='hessian'"
        )


def _check_samples(caller: str, group: Sequence[HiddenCall], outputs: Tensor) -> None:
    """Refuse where samples interact after one of the layers: found out once for a graph and rows that indexing takes, and now
    and then again.
    """
    new, known = [], []
    rows = rows_taken(_all_between(group))
    for hidden in group:
        call, memory = hidden.calls[0], hidden.term.memory
        key = ("factors", call.shape, outputs.shape, *map(signature, hidden.between))
        if memory.apart.get(key) != rows:
            new.append((hidden, key))
        elif memory.should_recheck(key):
            known.append((hidden, key))
    for due in (new, known):
        if due:
            again = max(hidden.term.memory.uses.get(key, 0) for hidden, key in due)
            layers = [(hidden.term.layer, hidden.calls[0]) for hidden, _ in due]
            apart = gauss_newton.check_samples_apart(caller, layers, outputs, again)
            for (hidden, key), shown in zip(due, apart, strict=True):
                if shown:
                    hidden.term.memory.apart[key] = rows


def _positive(
    group: Sequence[HiddenCall],
    samples: int,
    outputs: Tensor,
    loss_hessian: LossHessian,
    held: bool,
    per_sample: bool,
) -> Estimate:
    """The summed terms of layers whose calls have as many samples: factors are formed once, and pulled back once."""
    options = group[0].term.options
    generator = group[0].term.generator(outputs.device)
    if options.sampled:
        factors = loss_factors.sampled_factors(loss_hessian, outputs, options.probes, generator)
    elif options.curvature == "ggn":
        factors = loss_factors.output_factors(loss_hessian, outputs, samples)
    else:
        factors = loss_factors.empirical_factors(loss_hessian, outputs, samples, options.probes, generator)
    layers = [gauss_newton.FactoredLayer(h.term.layer, h.weight, h.calls[0], h.own_input) for h in group]
    exact = options.curvature == "ggn" and not options.sampled
    by_layer = gauss_newton.factor_traces(
        layers,
        outputs,
        factors,
        weighted=options.measure == "neuronwise",
        detached=not options.curvature_grad or not torch.is_grad_enabled(),
        backend=options.backend,
        generator=None if exact else generator,
    )
    total: Any = 0
    for call, layer, each in zip(group, layers, by_layer, strict=True):
        reason = "asked for" + "; batch statistics held constant" * held
        reason += "; random factors of the criterion's Hessian" * (
            options.sampled and options.curvature == "ggn"
        )
        if not exact and not layer.one_row:
            reason += "; along a random direction of the input for each draw"
        call.term.record_plan(Plan(options.curvature, "samples", len(each), reason))
        total = total + call.term.scale_to_measure(each if per_sample else each.sum(1), call.weight)
    return Estimate(total.sum(0), None) if exact else Estimate.of(total)


def difference_term(term: LayerTerm, closure: Any, per_sample: bool) -> Estimate:
    """method="finite_difference": the loss is evaluated by `closure`, under weights to both sides."""
    options = term.options
    if per_sample:
        raise UnsupportedError(
            f"{options.caller}: method='finite_difference' has no shares by sample; use per_sample=False"
        )
    if term.layer.module is not term.module:
        raise UnsupportedError(
            f"{options.caller}: method='finite_difference' is not for adapters; merge them first"
        )
    if not isinstance(term.layer.module._parameters.get("weight"), torch.nn.Parameter):
        raise UnsupportedError(
            f"{options.caller}: method='finite_difference' moves the layer's parameter `weight`, and this layer computes its "
            "weight at every call (pruning, weight_norm, a parametrization); make it permanent, or use another method"
        )
    sharding.check_local(options.caller, term.layer.module.weight)
    if term.captures.owners:
        raise UnsupportedError(
            f"{options.caller}: method='finite_difference' is not for weights that FSDP2 shards; use another method, or "
            "DistributedDataParallel"
        )
    if not callable(closure):
        raise UnsupportedError(
            f"{options.caller}: method='finite_difference' evaluates the loss again under other weights: call "
            "criterion(outputs, targets, closure=lambda: loss_function(model(inputs), targets))"
        )
    weight: Any = term.layer.module.weight
    estimate, rounding = finite_difference.hutchinson(
        options.caller,
        closure,
        term.layer,
        options.measure == "neuronwise",
        options.probes,
        term.generator(weight.device),
    )
    reason = f"asked for; rounding error about {rounding:.0e} of the value"
    if term.plan is None or term.plan.method != "finite_difference":
        term.record_plan(Plan("finite_difference", "batch", 2 * options.probes + 1, reason))
    return Estimate(term.scale_to_measure(estimate.value, weight), estimate.standard_error)
