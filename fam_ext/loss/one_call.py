"""One call of a loss: each layer's captured call as a head or a hidden layer, and the sum of their terms."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fam_ext import _checks
from fam_ext._dtypes import accumulation_dtype
from fam_ext.capture import graph_walk
from fam_ext.capture.calls import CapturedCall, check_tensor, layer_weight
from fam_ext.errors import LayerNotCalled, NoClosedForm, UnsupportedError
from fam_ext.head import parallel
from fam_ext.head.closed_form import check_class_dim, flatness
from fam_ext.head.one_pass import has_hooks
from fam_ext.hessian.estimate import Estimate
from fam_ext.hessian.products import LayerCall
from fam_ext.layers import sharding
from fam_ext.loss.hidden import HiddenCall, difference_term, hessian_terms, positive_terms
from fam_ext.loss.layer_term import LayerTerm
from fam_ext.loss.plan import CLOSED_FORM, UNUSED
from fam_ext.loss_hessians import LossHessian
from fam_ext.options import Options


def distributed() -> bool:
    """Whether anything can be sharded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class HeadCall(NamedTuple):
    """A layer whose output the criterion receives, and how the criterion's input is laid out (fam_ext.capture.row_map)."""

    call: CapturedCall
    features: Tensor
    weight: Tensor
    class_dim: int | None
    rows: Tensor | None
    loss_hessian: LossHessian


class LossCall(NamedTuple):
    """The criterion and what it was called with; `loss_hessian` is the two together, None where there is no closed form."""

    criterion: Any
    outputs: Any
    targets: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_hessian: LossHessian | None
    closure: Any = None
    per_sample: bool = False


def check_attached(caller: str, terms: Sequence[LayerTerm]) -> None:
    """Refuse a training step without the hooks."""
    for term in terms:
        if term.handle is None:
            raise UnsupportedError(
                f"{caller}: detached from its layer; call attach() first, or eval() for the plain loss"
            )


def head_calls(
    options: Options, terms: Sequence[LayerTerm], call: LossCall, no_closed_form: str
) -> list[HeadCall | None]:
    """For each layer what the closed form works on; None where another method is to be taken. Raises where none can be.

    `no_closed_form` explains why the criterion has none, where it has none.
    """
    check_attached(options.caller, terms)
    if not options.closed_form:
        return [None] * len(terms)
    return [_head_or_hidden(options, term, call.outputs, call.loss_hessian, no_closed_form) for term in terms]


def _head_or_hidden(
    options: Options, term: LayerTerm, outputs: Any, loss_hessian: LossHessian | None, no_closed_form: str
) -> HeadCall | None:
    try:
        return _head_call(options, term, outputs, loss_hessian, no_closed_form)
    except LayerNotCalled:
        if not term.captures.seen or term.plan is CLOSED_FORM:  # the head of a criterion is not skipped
            raise
        return None
    except NoClosedForm as error:
        if options.method == "closed_form":
            raise
        term.why_not_closed = error.with_traceback(None)  # its frames would keep the batch alive
        return None


def _head_call(
    options: Options, term: LayerTerm, outputs: Any, loss_hessian: LossHessian | None, no_closed_form: str
) -> HeadCall:
    caller, layer = options.caller, term.layer
    if loss_hessian is None:
        raise NoClosedForm(no_closed_form)
    check_tensor(caller, outputs)
    options.check_fisher(loss_hessian)
    _check_constant(caller, term, loss_hessian)
    call, features, row_map = term.captures.take(caller, outputs, layer.class_dim)
    weight: Tensor = call.weight  # type: ignore[assignment]
    class_dim: int | None = outputs.dim() + layer.class_dim
    rows = None
    if row_map is not None:
        class_dim, rows = row_map
    sharding.check_whole(caller, weight)
    layer.check_call(caller, features, weight, call.shape)
    check_class_dim(caller, loss_hessian, class_dim, outputs)
    if loss_hessian.target is None:  # kappa may not need it, but the criterion does
        _checks.bad_type(caller, "target", "a tensor", None)
    loss_hessian.check(caller, outputs)
    if features.device != outputs.device:
        _checks.bad_value(caller, "outputs", f"on the layer's device ({features.device})", outputs)
    if call.first is not None:
        if sharding.is_dtensor(weight):
            parallel.check_unusual(caller, layer, features, weight, call.first, call.dtype)
        else:
            layer.check_unusual(caller, features, weight, call.first, call.dtype)
    term.record_plan(CLOSED_FORM)
    if term.scale is not None:
        features, weight = term.rescaled(features, weight)
    return HeadCall(call, features, weight, class_dim, rows, loss_hessian)


def _check_constant(caller: str, term: LayerTerm, loss_hessian: LossHessian) -> None:
    """The closed forms hold the criterion's target, variance and weights constant: the layer's output may not be in them."""
    for name, value in vars(loss_hessian).items():
        if not isinstance(value, Tensor) or value.grad_fn is None:
            continue
        if graph_walk.find(value, [term.captures])[0].calls:
            raise NoClosedForm(
                f"{caller}: the criterion's {name} depends on the layer's output as well, which the closed form takes for "
                "constant; detach it, or use method='auto'"
            )


def loss_and_terms(
    options: Options,
    terms: Sequence[LayerTerm],
    heads: Sequence[HeadCall | None],
    call: LossCall,
    need_loss: bool = True,
) -> tuple[Tensor | None, Estimate]:
    """The criterion's loss, None where it is not needed, and the sum of the layers' terms."""
    criterion, outputs, targets, kwargs, loss_hessian, closure, per_sample = call
    loss: Tensor | None = None
    if need_loss:
        if loss_hessian is not None and outputs.is_cpu and any(head is not None for head in heads):
            loss_hessian.check_values(options.caller, outputs)  # the criterion's own error names no argument
        loss = criterion(outputs, *targets, **kwargs)
    elif None in heads and options.method != "finite_difference":
        with torch.enable_grad():  # a value without a graph of its own still needs the loss's
            loss = criterion(outputs, *targets, **kwargs)
    elif loss_hessian is not None:  # the criterion has not looked at its arguments
        loss_hessian.check_values(options.caller, outputs)
    if need_loss and any(head is not None for head in heads):
        _check_hooks(options.caller, call, loss)
    estimates = []
    others = []
    for term, head in zip(terms, heads, strict=True):
        if head is None:
            others.append(term)
            continue
        samples = term.layer.samples(head.call.shape)
        form = parallel.flatness if sharding.is_dtensor(head.weight) else flatness
        kappa = form(
            options, term.layer, head.loss_hessian, outputs, head.class_dim, head.rows, head.features, head.weight, samples,
            per_sample,
        )  # fmt: skip
        estimates.append(Estimate(kappa if term.share == 1.0 else kappa * term.share, None))
    if others and options.method == "finite_difference":
        for term in others:
            if need_loss and term.captures.idle() and not term.captures.seen:  # kappa would be 0 for good
                raise term.captures.not_called(options.caller)
            term.captures.done()
            estimates.append(difference_term(term, closure, per_sample))
    elif others:
        assert loss is not None
        estimates += hidden_terms(options, others, call, loss, loss, not estimates)
    return loss, estimates[0] if len(estimates) == 1 else Estimate.total(estimates)


def one_pass_head(
    terms: Sequence[LayerTerm], heads: Sequence[HeadCall | None]
) -> tuple[HeadCall, LayerTerm] | None:
    """The only head among the layers, where it is a linear layer as head_cross_entropy takes it."""
    found = [(head, term) for head, term in zip(heads, terms, strict=True) if head is not None]
    if len(found) != 1:
        return None
    head, term = found[0]
    fits = term.layer.linear and not term.layer.input_first and not sharding.is_dtensor(head.weight)
    return (head, term) if fits else None


def hidden_terms(
    options: Options,
    terms: Sequence[LayerTerm],
    call: LossCall,
    loss: Tensor,
    graph_of: Tensor,
    alone: bool = False,
) -> list[Estimate]:
    """The terms of hidden layers, whose calls are looked for in the graph of `graph_of`: the loss, or what the criterion received
    where the loss depends on the layers through that only. Where this step skipped all of them: nothing, or if `alone` a zero.
    """
    sharded = distributed()
    hidden = hidden_calls(options, terms, loss, graph_of, sharded)
    if hidden:
        with sharding.held() if sharded else nullcontext():
            if options.curvature == "hessian":
                return hessian_terms(options, loss, hidden, call.per_sample)
            return positive_terms(options, call.outputs, hidden, call.loss_hessian, call.per_sample)
    if not alone:
        return []
    return [Estimate(torch.zeros((), dtype=accumulation_dtype(loss), device=loss.device), None)]


def _check_hooks(caller: str, call: LossCall, loss: Any) -> None:
    """Refuse a hook on the criterion that changes its loss: the closed form is that of the criterion alone."""
    criterion = call.criterion
    if not has_hooks(criterion):
        return
    with torch.no_grad():
        alone = criterion.forward(call.outputs, *call.targets, **call.kwargs)
    if alone.shape != loss.shape or not torch.allclose(loss, alone, rtol=0, atol=0, equal_nan=True):
        raise UnsupportedError(
            f"{caller}: a forward hook on the criterion changes its loss, which has no closed form then; remove it, or use "
            "method='exact' or 'hutchinson'"
        )


def hidden_calls(
    options: Options, terms: Sequence[LayerTerm], loss: Tensor, graph_of: Tensor, sharded: bool
) -> list[HiddenCall]:
    """The calls of layers that `loss` depends on, by one walk of the graph of `graph_of`; a layer that this step skipped is left
    out.

    Raises UnsupportedError where a layer has no call that the loss depends on.
    """
    caller = options.caller
    if loss.dim() != 0:
        raise UnsupportedError(
            f"{caller}: the criterion must return one number where there is no closed form, got shape {tuple(loss.shape)}; use "
            "reduction='mean' or 'sum'"
        )
    if not loss.requires_grad:
        raise UnsupportedError(
            f"{caller}: without a closed form the layer's curvature needs gradients: {_no_graph(terms[0])}"
        )
    parameters = [list(term.module.parameters()) for term in terms]
    for term, of_layer in zip(terms, parameters, strict=True):
        if term.captures.owners:  # FSDP2 exchanges the parameters with their shards
            term.captures.gather()
            of_layer += term.module.parameters()
    walks = graph_walk.find(graph_of, [term.captures for term in terms], parameters)
    if sharded:
        sharding.check_flat(caller, (getattr(node, "variable", None) for node in walks[0].nodes))
    hidden = []
    for term, walk in zip(terms, walks, strict=True):
        if walk.calls or walk.past_calls:
            if walk.past_calls and term.captures.owners:
                sharding.check_shards(caller, walk.nodes)
            if sharded:
                sharding.check_between(caller, walk.between)
            hidden.append(_hidden_call(caller, term, walk, sharded))
        elif term.captures.idle():
            if not term.captures.seen or term.plan is CLOSED_FORM:
                raise term.captures.not_called(caller)
            term.record_plan(UNUSED)
        else:
            raise term.why_not_closed or UnsupportedError(f"{caller}: {_no_graph(term)}")
    if options.curvature == "hessian":
        return hidden
    firsts = [(h.calls[0].edge.node, h.calls[0].features) for h in hidden if h.calls]
    own = iter(graph_walk.inputs_of_their_own(walks[0].nodes, firsts))
    return [h._replace(own_input=next(own)) if h.calls else h for h in hidden]


def _hidden_call(caller: str, term: LayerTerm, walk: graph_walk.Walk, sharded: bool) -> HiddenCall:
    calls: list[LayerCall] = []
    weight: Any = None
    taken = [call.stored.take(caller) for call in walk.calls]
    if term.captures.owners:
        term.captures.gather(*[call.stored for call in walk.calls])
    term.captures.done()
    for (node, number, stored), features in zip(walk.calls, taken, strict=True):
        stored.used[0] = True
        weight = stored.weight
        if sharded:
            sharding.check_whole(caller, weight)
            sharding.check_local(caller, weight, features)
        term.layer.check_call(caller, features, weight, stored.shape)
        if stored.first is not None:
            term.layer.check_unusual(caller, features, weight, stored.first, stored.dtype)
        if term.scale is not None:
            features, weight = term.rescaled(features, weight)
        calls.append(LayerCall(GradientEdge(node, number), features, stored.shape, stored.dtype))
    if weight is None:  # the loss holds a derivative of the layer alone
        weight = layer_weight(term.module)
    return HiddenCall(term, weight, calls, walk.between, walk.past_calls)


def _no_graph(term: LayerTerm) -> str:
    if term.captures.called_without_grad:
        return (
            "the layer was called under torch.no_grad or inference_mode (or by reentrant checkpointing: set "
            "use_reentrant=False); call the model with gradients enabled"
        )
    return (
        f"the loss does not depend on a call of {term.module} in training mode; check that `layer` is the very module the "
        "model uses, and that it or something before it requires grad"
    )
