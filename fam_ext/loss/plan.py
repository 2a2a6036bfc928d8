"""Which method computes a hidden layer's kappa, and why; and what is known about the coupling of rows after the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fam_ext.derivatives.nodes import bare
from fam_ext.errors import UnsupportedError
from fam_ext.hessian import coupling, memory
from fam_ext.hessian.exact import exact, exact_products
from fam_ext.hessian.memory import ProductBytes
from fam_ext.hessian.products import LayerHessian
from fam_ext.options import EIGENVALUE_MEASURES, Options

RECHECKED = 32  # uses after which a result about the coupling of rows is checked again at the latest
EXACT_PRODUCTS = 32  # "auto" takes the exact value up to this many products
# Exact products taken together. Where vmap has no rule for an operation it loops, and the loop's backward fills a tensor of all
# products for each of them: 256 at once took 2 to 20 times as long as 16.
AT_ONCE = 16


@dataclass(frozen=True)
class Plan:
    """How kappa is computed and why; readable as `criterion.plan`.

    method: "closed_form", "exact", "hutchinson", "lanczos", "finite_difference", "ggn", "fisher", "noise" or "unused".
    level: how far rows of the layer's output are coupled by what follows: "rows" and "samples" are independent, or "batch".
    products: Hessian products, probes or factors of a step.

    Example:
        >>> import torch, fam_ext
        >>> layer = torch.nn.Linear(3, 2)
        >>> criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), layer, strength=0.1)
        >>> _ = criterion(layer(torch.randn(4, 3)), torch.tensor([0, 1, 1, 0]))
        >>> criterion.plan.method
        'closed_form'
    """

    method: str
    level: str | None = None
    products: int = 0
    reason: str = ""

    def __str__(self) -> str:
        what = self.method if self.level is None else f"{self.method} ({self.level} independent)"
        return f"{what}, {self.products} products: {self.reason}"


class Plans(tuple[Plan | None, ...]):
    """The plans of several layers: a tuple, which prints as a line for each layer and for each that was left out.

    names: of the layers, as in the model where FAMLoss.for_model chose them.
    left_out: name of a layer -> why it is not regularized.
    """

    names: Sequence[str]
    left_out: Mapping[str, str]

    @classmethod
    def of(cls, plans: Iterable[Plan | None], names: Sequence[str], left_out: Mapping[str, str]) -> Plans:
        made = cls(plans)
        made.names, made.left_out = names, left_out
        return made

    def __repr__(self) -> str:
        lines = [f"{name}: {plan or 'no step yet'}" for name, plan in zip(self.names, self, strict=True)]
        return "\n".join(lines + [f"{name}: left out, {reason}" for name, reason in self.left_out.items()])

    __str__ = __repr__


CLOSED_FORM = Plan("closed_form", None, 0, "the layer's output is what the criterion receives")
_NOISE = "the loss is that of the perturbed network; where samples are coupled after the layer (batch_norm in training mode) "
NOISE = Plan("noise", "samples", 0, _NOISE + "its mean holds kappa without the terms between samples")
NOISE_SHARED = Plan("noise", "batch", 0, _NOISE + "its mean holds all of kappa")
UNUSED = Plan("unused", None, 0, "the latest loss does not depend on the layer, whose kappa is 0 then")


class CouplingMemory:
    """What one layer's products have shown about the network after it, by the signature of the graph."""

    def __init__(self) -> None:
        # each by the signature of a graph
        self.levels: dict[Any, str] = {}  # the widest level shown
        self.uses: dict[Any, int] = {}  # how often a remembered result was used
        self.bytes: dict[Any, ProductBytes] = {}  # of one product with its graph
        self.apart: dict[Any, tuple[Any, ...]] = {}  # rows_taken of a positive form whose samples are apart
        self.at_once: dict[Any, int] = {}  # products within max_bytes that leave no graph

    def should_recheck(self, key: Any) -> bool:
        """Whether a result about this graph is to be checked again: at the 1st, 2nd, 4th, ..., 32nd use of it, and every 32nd.

        What a factor of zero hides (a gate, the gamma of a residual branch's batch_norm, a loss that is switched on later) shows
        when it has moved.
        """
        uses = self.uses[key] = self.uses.get(key, 0) + 1
        return uses % RECHECKED == 0 if uses > RECHECKED else uses & (uses - 1) == 0

    def level(self, options: Options, hessian: LayerHessian, between: Sequence[Any], per_sample: bool) -> str:
        """How far rows are coupled, "batch" where that cannot be told yet (for shares by sample: "samples")."""
        if hessian.on_weight or options.per_sample_probes is False:
            return "batch"
        call = hessian.calls[0]
        # the same for any number of samples, but for a single one, which cannot interact
        key = (call.shape[0] > 1, call.shape[1:], *map(signature, between))
        known = self.levels.get(key)
        if known != "batch" and (known is None or self.should_recheck(key)):
            shown = coupling.coupling_level(hessian, self.uses.get(key, 0))
            if shown is not None:
                known = self.levels[key] = max(known or shown, shown, key=coupling.LEVELS.index)
        return known or ("samples" if per_sample else "batch")

    def graph_bytes(
        self, options: Options, hessian: LayerHessian, level: str, between: Sequence[Any], products: int
    ) -> float:
        """What the exact value takes for its gradient; 0 where the Hessian is detached: products leave nothing then."""
        if hessian.detached:
            return 0.0
        together = min(2, products)
        key = graph_key(hessian, between, level, together)
        if key not in self.bytes:
            self.bytes[key] = memory.count(first_products(options, hessian, level), together)
        return self.bytes[key].total(products, AT_ONCE)


def first_products(options: Options, hessian: LayerHessian, level: str) -> Callable[[int], Tensor]:
    """A function of k: the first k products of the exact value, summed."""
    weighted = options.measure == "neuronwise"
    return lambda k: next(exact(hessian, level, weighted, k, options.backend))


def graph_key(hessian: LayerHessian, between: Sequence[Any], *more: Any) -> Any:
    """What the memory of products depends on: shapes of the layer's calls, and the graph after it."""
    return (*more, tuple(call.shape for call in hessian.calls), *map(signature, between))


def signature(node: Any) -> Any:
    """What tells graphs of different networks and modes apart: the node's name, and a norm's mode."""
    name = node.name()
    return (name, getattr(node, "_saved_training", None)) if "Norm" in name else name


def rows_taken(between: Sequence[Any]) -> tuple[Any, ...]:
    """Which rows of the first dimension indexing took between the layer and the loss: shapes and names do not tell these."""
    taken = []
    for node in between:
        name = bare(node.name())
        if name == "IndexBackward":
            taken.append(node._saved_indices[0])
        elif name in ("IndexSelectBackward", "GatherBackward") and node._saved_dim == 0:
            taken.append(node._saved_index)
        elif name == "MaskedSelectBackward":
            taken.append(node._saved_mask)
        elif name == "TakeBackward":
            taken.append(node._saved_index)
    return tuple(None if rows is None else (*rows.shape, *rows.flatten().tolist()) for rows in taken)


def plan_products(
    options: Options,
    layers: Sequence[tuple[CouplingMemory, LayerHessian, Sequence[Any]]],
    per_sample: bool,
) -> list[Plan]:
    """How to form the term of each layer of a sum from Hessian products.

    `layers` holds what is known of a layer, its products, and the autograd nodes between the loss and it.

    Raises UnsupportedError where the exact value was asked for and takes more than `max_bytes`, and for shares by sample where
    samples are coupled.
    """
    if options.measure in EIGENVALUE_MEASURES:
        if per_sample:
            raise UnsupportedError(
                f"{options.caller}: measure={options.measure!r} has no shares by sample; use per_sample=False"
            )
        return [Plan("lanczos", None, 0, "an eigenvalue") for _ in layers]
    levels = [known.level(options, hessian, between, per_sample) for known, hessian, between in layers]
    if per_sample and "batch" in levels:
        raise UnsupportedError(
            f"{options.caller}: samples interact after the layer, kappa has no shares by sample; use per_sample=False"
        )
    if options.method == "hutchinson":
        return [
            _estimate(options, hessian, level, "asked for")
            for (_, hessian, _), level in zip(layers, levels, strict=True)
        ]
    counts = [exact_products(hessian, level) for (_, hessian, _), level in zip(layers, levels, strict=True)]
    total = sum(counts)
    plans = []
    for (known, hessian, between), level, own in zip(layers, levels, counts, strict=True):
        exactly = options.method == "exact" or total <= EXACT_PRODUCTS
        size = known.graph_bytes(options, hessian, level, between, own) if exactly else 0.0
        if options.method == "exact":
            if size > options.max_bytes:
                raise UnsupportedError(
                    f"{options.caller}: method='exact' takes {own} Hessian products here, about {size / 2**30:.3g} GiB of "
                    f"graph for its gradient, over max_bytes={options.max_bytes}; raise max_bytes or use method='hutchinson'"
                )
            plans.append(Plan("exact", level, own, "asked for"))
        elif total <= EXACT_PRODUCTS and size <= options.max_bytes:
            plans.append(Plan("exact", level, own, f"at most {EXACT_PRODUCTS} products"))
        elif total <= EXACT_PRODUCTS:
            reason = f"the exact value's graph takes more than max_bytes={options.max_bytes}"
            plans.append(_estimate(options, hessian, level, reason))
        else:
            reason = f"the exact value takes {total} products" + " for all layers" * (total > own)
            plans.append(_estimate(options, hessian, level, reason))
    return plans


def _estimate(options: Options, hessian: LayerHessian, level: str, reason: str) -> Plan:
    if options.per_sample_probes and not hessian.on_weight:  # the exact value stays what it is
        level = "rows" if hessian.layer.positions(hessian.calls[0].shape) == 1 else "samples"
    if hessian.past_calls:
        reason += "; on the weight, since the loss depends on it past the layer's own calls as well"
    return Plan("hutchinson", level, options.probes, reason)
