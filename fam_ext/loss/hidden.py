"""The flatness term of a layer that is no head, or of a criterion without closed form: plan, products, measures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext.errors import UnsupportedError
from fam_ext.head.closed_form import weight_factor
from fam_ext.hessian import coupling, eigenvalue, exact, finite_difference, gauss_newton, memory
from fam_ext.hessian.estimate import Estimate
from fam_ext.hessian.products import Curvature, LayerCall
from fam_ext.layers.linear_map import LinearMap
from fam_ext.options import EIGENVALUE_MEASURES, Options

log = logging.getLogger("fam_ext")

EXACT_PRODUCTS = 32  # "auto" takes the exact value up to this many products
_SEED = 0x5EED
# Exact products taken together. Where vmap has no rule for an operation it loops, and the loop's backward fills a tensor of all
# products for each of them: 256 at once took 2 to 20 times as long as 16.
_AT_ONCE = 16


@dataclass(frozen=True)
class Plan:
    """How kappa is computed and why; readable as `criterion.plan`."""

    method: str
    level: str | None = None
    products: int = 0
    reason: str = ""

    def __str__(self) -> str:
        what = self.method if self.level is None else f"{self.method} ({self.level} independent)"
        return f"{what}, {self.products} products: {self.reason}"


CLOSED_FORM = Plan("closed_form", None, 0, "the layer is a head of the criterion")


class General:
    """Computes one layer's term through its output; remembers what it found out about the network."""

    def __init__(self, options: Options, layer: LinearMap, module: nn.Module) -> None:
        self.options = options
        self.layer = layer
        self.module = module  # the layer, or the adapter around it
        self.plan: Plan | None = None
        self._levels: dict[Any, str] = {}  # the widest level found, by graph
        self._apart: set[Any] = set()  # graphs found to keep samples apart
        self._uses: dict[Any, int] = {}  # of such a finding, by graph
        self._bytes: dict[Any, memory.ProductBytes] = {}  # of one product, by graph
        self._at_once: dict[Any, int] = {}  # products within max_bytes, by graph
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        """The user's, or one of our own: torch's global random state is left alone."""
        given = self.options.generator
        if given is not None:
            # a generator's device may lack the index
            if given.device.type != device.type or given.device.index not in (None, device.index):
                raise ValueError(
                    f"{self.options.caller}: generator must be on the layer's device ({device}), got one on {given.device}"
                )
            return given
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(_SEED)
        return self._generators[device]

    def curvature(self, weight: Tensor, calls: Sequence[LayerCall]) -> Curvature:
        """Products with the Hessian through these calls of the layer, inside fam_ext.curvature.products."""
        if len(calls) > 1:
            self._check_weight_is_leaf(weight)
        elif not torch.is_grad_enabled():
            weight = weight.detach()
        return Curvature(self.layer, weight, calls, hold=not self.options.curvature_grad)

    def by_differences(self, closure: Any, per_sample: bool) -> Estimate:
        """method="finite_difference": the loss is evaluated by `closure`, under weights to both sides."""
        options = self.options
        if per_sample:
            raise UnsupportedError(
                f"{options.caller}: method='finite_difference' has no shares by sample; use per_sample=False"
            )
        if self.layer.module is not self.module:
            raise UnsupportedError(
                f"{options.caller}: method='finite_difference' does not serve adapters; merge them first"
            )
        if not callable(closure):
            raise UnsupportedError(
                f"{options.caller}: method='finite_difference' evaluates the loss again under other weights: call "
                "criterion(outputs, targets, closure=lambda: loss_function(model(inputs), targets))"
            )
        weight: Any = self.layer.module.weight
        generator = self.generator(weight.device)
        weighted = options.measure == "neuronwise"
        estimate, rounding = finite_difference.hutchinson(
            options.caller, closure, self.layer, weighted, options.probes, generator
        )
        reason = f"asked for; rounding error about {rounding:.0e} of the value"
        if self.plan is None or self.plan.method != "finite_difference":
            self.note(Plan("finite_difference", "batch", 2 * options.probes + 1, reason))
        return Estimate(self.finish(estimate.value, weight), estimate.standard_error)

    def level(self, curvature: Curvature, between: list[Any], per_sample: bool = False) -> str:
        """How far rows interact (fam_ext.engine), "batch" where that cannot be told yet (for shares by sample: "samples")."""
        if curvature.on_weight or self.options.per_sample_probes is False:
            return "batch"
        call = curvature.calls[0]
        several = self.layer.samples(call.shape) > 1
        key = (several, call.shape[1:], *map(_signature, between))
        known = self._levels.get(key)
        if known != "batch" and (known is None or self._due(key)):
            found = coupling.interaction(curvature, self.generator(curvature.device))
            if found is not None:
                known = self._levels[key] = max(known or found, found, key=coupling.LEVELS.index)
        return known or ("samples" if per_sample else "batch")

    def _due(self, key: Any) -> bool:
        """Whether a finding about this graph is to be checked again: at the 1st, 2nd, 4th, 8th, ... use of it.

        What a weight of zero hides (a gate, the gamma of a residual branch's batch_norm) shows when it has moved.
        """
        uses = self._uses[key] = self._uses.get(key, 0) + 1
        return uses & (uses - 1) == 0

    def choose(self, curvature: Curvature, level: str, between: list[Any], products: int) -> Plan:
        """How to form the term; `products` is what exact values take, those of the other layers in the sum included."""
        options = self.options
        if options.measure in EIGENVALUE_MEASURES:
            return Plan("lanczos", None, 0, "an eigenvalue")
        own = exact.exact_products(self.layer, curvature, level)
        if options.method == "exact":
            total = self._graph_bytes(curvature, level, between, own)
            if total > options.max_bytes:
                raise UnsupportedError(
                    f"{options.caller}: method='exact' takes {own} Hessian products here, about {total / 2**30:.3g} GiB of "
                    f"graph for its gradient, over max_bytes={options.max_bytes}; raise max_bytes or use method='hutchinson'"
                )
            return Plan("exact", level, own, "asked for")
        probes_level = level
        if (
            options.per_sample_probes and not curvature.on_weight
        ):  # for estimates: the exact value stays what it is
            independent = self.layer.positions(curvature.calls[0].shape) == 1
            probes_level = "rows" if independent else "samples"
        if options.method == "hutchinson":
            return Plan("hutchinson", probes_level, options.probes, "asked for")
        if products <= EXACT_PRODUCTS:
            if self._graph_bytes(curvature, level, between, own) <= options.max_bytes:
                return Plan("exact", level, own, f"at most {EXACT_PRODUCTS} products")
            reason = f"the exact value's graph takes more than max_bytes={options.max_bytes}"
            return Plan("hutchinson", probes_level, options.probes, reason)
        reason = f"the exact value takes {products} products"
        return Plan("hutchinson", probes_level, options.probes, reason + " for all layers" * (products > own))

    def _graph_bytes(self, curvature: Curvature, level: str, between: list[Any], products: int) -> float:
        """What the exact value takes for its gradient; 0 where it has none: products leave nothing then."""
        if curvature.hold:
            return 0.0
        together = min(2, products)
        key = self._key(curvature, between, level, together)
        if key not in self._bytes:
            self._bytes[key] = memory.count(self._summand(curvature, level), together)
        return self._bytes[key].total(products, _AT_ONCE)

    def _summand(self, curvature: Curvature, level: str) -> Callable[[int], Tensor]:
        """A function of k: the first k products of the exact value, summed."""
        weighted = self.options.measure == "neuronwise"
        return lambda k: next(exact.exact(curvature, level, weighted, k, self.options.backend))

    @staticmethod
    def _key(curvature: Curvature, between: list[Any], *more: Any) -> Any:
        return (*more, tuple(call.shape for call in curvature.calls), *map(_signature, between))

    def share(self, curvature: Curvature, summand: Tensor, per_sample: bool) -> Tensor:
        """The sum, or the sums by sample, of a summand."""
        if not per_sample:
            return summand.sum()
        return summand.reshape(self.layer.samples(curvature.calls[0].shape), -1).sum(1)

    def exact(self, curvature: Curvature, plan: Plan, between: list[Any], per_sample: bool) -> Tensor:
        """The exact value of a measure that is linear in the Hessian, or of one with eigenvalues."""
        options = self.options
        if options.measure in EIGENVALUE_MEASURES:
            return self.finish(self._eigenvalue(curvature), curvature.weight)
        level = str(plan.level)
        chunk = max(1, min(plan.products, _AT_ONCE))
        if curvature.hold:
            chunk = self.at_once(curvature, level, between, self._summand(curvature, level), chunk)
        weighted = options.measure == "neuronwise"
        total: Any = 0
        for summand in exact.exact(curvature, level, weighted, chunk, options.backend):
            total = total + self.share(curvature, summand, per_sample)
        return self.finish(total, curvature.weight)

    def at_once(
        self, curvature: Curvature, what: str, between: list[Any], take: Callable[[int], object], most: int
    ) -> int:
        """How many of `most` products are formed together where none leaves a graph: counted once for a graph."""
        key = self._key(curvature, between, what, most)
        if key not in self._at_once:
            self._at_once[key] = memory.at_once(self.options.caller, take, most, self.options.max_bytes)
        return self._at_once[key]

    def _eigenvalue(self, curvature: Curvature) -> Tensor:
        """lambda_max(H), or sum_s |w_s|^2 lambda_max(H_ss); "layerwise" is multiplied with the norm in finish."""
        if self.options.measure == "layerwise_eigenvalue":
            return eigenvalue.largest(curvature)
        squares = self.layer.canonical(curvature.weight).to(curvature.dtype).square().sum(2).flatten()
        largest = torch.stack([eigenvalue.largest(curvature, neuron) for neuron in range(len(squares))])
        return (squares * largest).sum()

    def positive(
        self, weight: Tensor, calls: Sequence[LayerCall], between: list[Any], outputs: Tensor
    ) -> gauss_newton.Place:
        """What the Gauss-Newton or Fisher matrix is made from, checked; inside fam_ext.corrections.corrected."""
        caller = self.options.caller
        if len(calls) > 1:
            raise UnsupportedError(
                f"{caller}: curvature={self.options.curvature!r} is for a layer called once; use curvature='hessian'"
            )
        key = (calls[0].shape, outputs.shape, *map(_signature, between))
        if (key not in self._apart or self._due(key)) and gauss_newton.check_samples_apart(
            caller, self.layer, calls[0], outputs
        ):
            self._apart.add(key)
        return gauss_newton.Place(self.layer, weight, calls[0])

    def _check_weight_is_leaf(self, weight: Tensor) -> None:
        if not weight.requires_grad or not weight.is_leaf:
            raise UnsupportedError(
                f"{self.options.caller}: the layer is called several times in one loss, where products are taken on its weight "
                "itself: the weight must be a parameter that requires grad (not a parametrization's result)"
            )

    def finish(self, value: Tensor, weight: Tensor) -> Tensor:
        """The measure from the curvature: times the norm of the weight (any layout), over the fan-in."""
        options = self.options
        factor = weight_factor(weight, options.measure, options.norm_power)
        if factor is not None:
            value = value * factor.to(value.dtype)
        if options.normalize is not None:
            value = value / self.layer.fan_in
        return value

    def note(self, plan: Plan) -> None:
        if plan is not self.plan and plan != self.plan:
            self.plan = plan
            log.info("%s on %s: %s", self.options.caller, type(self.layer.module).__name__, plan)


def _signature(node: Any) -> Any:
    return node.name(), getattr(node, "_saved_training", None) if "Norm" in node.name() else None
