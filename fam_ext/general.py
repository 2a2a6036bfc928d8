"""The flatness term of a layer that is no head, or of a criterion without closed form: plan, products, measures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import corrections, eigen, engine, factors, finite_difference, graph
from fam_ext.criteria import SUPPORTED, Bound
from fam_ext.curvature import Curvature, LayerCall
from fam_ext.engine import Estimate
from fam_ext.errors import UnsupportedError
from fam_ext.heads import EIGENVALUE_MEASURES, Layer, weight_factor
from fam_ext.terms import Options
from fam_ext.verified import VERIFIED

log = logging.getLogger("fam_ext")

EXACT_PRODUCTS = 32  # "auto" takes the exact value up to this many products
_SEED = 0x5EED


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

    def __init__(self, options: Options, layer: Layer, module: nn.Module) -> None:
        self.options = options
        self.layer = layer
        self.module = module  # the layer, or the adapter around it
        self.plan: Plan | None = None
        self._levels: dict[Any, str] = {}
        self._apart: set[Any] = set()  # graphs found to keep samples apart
        self._generator: torch.Generator | None = options.generator

    def generator(self, device: torch.device) -> torch.Generator:
        """The user's, or one of our own: torch's global random state is left alone."""
        if self._generator is None or self._generator.device != device:
            if self.options.generator is not None:
                raise ValueError(
                    f"{self.options.caller}: generator must be on the layer's device ({device}), got one on "
                    f"{self.options.generator.device}"
                )
            self._generator = torch.Generator(device).manual_seed(_SEED)
        return self._generator

    def flatness(
        self,
        loss: Tensor,
        weight: Tensor,
        calls: Sequence[LayerCall],
        between: list[Any],
        outputs: Any,
        bound: Bound | None,
        per_sample: bool = False,
    ) -> Estimate:
        """The term of these calls of the layer, `between` them and `loss` the autograd nodes of fam_ext.graph.find."""
        options = self.options
        if options.curvature != "hessian":
            return self._positive(weight, calls, between, outputs, bound, per_sample)
        if len(calls) > 1:
            self._check_weight_is_leaf(weight)
        curvature = self.curvature(loss, weight, calls, between, hold=not options.curvature_grad)
        wanted = torch.is_grad_enabled()
        device_type = weight.device.type
        with torch.autocast(device_type, enabled=False), curvature.products():
            level = self._level(curvature, between)
            plan = self._choose(curvature, level, len(between))
            estimate = self._estimate(curvature, plan, per_sample)
        self.note(plan)
        value = self.finish(estimate.value, weight)
        return Estimate(value if wanted else value.detach(), estimate.standard_error)

    def curvature(
        self, loss: Tensor, weight: Tensor, calls: Sequence[LayerCall], between: list[Any], hold: bool
    ) -> Curvature:
        """Products with the Hessian, after a check of the operations they go through."""
        correct = graph.check(self.options.caller, between)
        names = {graph.bare(node.name()) for node in between if node not in correct}
        return Curvature(loss, self.layer, weight, calls, correct, hold, sorted(names - VERIFIED))

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

    def _level(self, curvature: Curvature, between: list[Any]) -> str:
        if curvature.on_weight or self.options.per_sample_probes is False:
            return "batch"
        call = curvature.calls[0]
        several = self.layer.samples(call.shape) > 1
        key = (several, call.shape[1:], *map(_signature, between))
        if key not in self._levels:
            self._levels[key] = engine.interaction(curvature, self.generator(curvature.device))
        return self._levels[key]

    def _choose(self, curvature: Curvature, level: str, nodes: int) -> Plan:
        options = self.options
        if options.measure in EIGENVALUE_MEASURES:
            return Plan("lanczos", None, 0, "an eigenvalue")
        products = engine.exact_products(self.layer, curvature, level)
        size = sum(_bytes(call) for call in curvature.calls) * max(8, 2 * nodes)
        total = products * size
        if options.method == "exact":
            if total > options.max_bytes:
                raise UnsupportedError(
                    f"{options.caller}: method='exact' takes {products} Hessian products here, about {total / 2**30:.3g} GiB of "
                    f"graph for its gradient, over max_bytes={options.max_bytes}; raise max_bytes or use method='hutchinson'"
                )
            return Plan("exact", level, products, "asked for")
        probes_level = level
        if (
            options.per_sample_probes and not curvature.on_weight
        ):  # for estimates: the exact value stays what it is
            independent = self.layer.positions(curvature.calls[0].shape) == 1
            probes_level = "rows" if independent else "samples"
        if options.method == "hutchinson":
            return Plan("hutchinson", probes_level, options.probes, "asked for")
        if products <= EXACT_PRODUCTS and total <= options.max_bytes:
            return Plan("exact", level, products, f"at most {EXACT_PRODUCTS} products")
        return Plan("hutchinson", probes_level, options.probes, f"the exact value takes {products} products")

    def _estimate(self, curvature: Curvature, plan: Plan, per_sample: bool) -> Estimate:
        options, layer = self.options, self.layer
        if options.measure in EIGENVALUE_MEASURES:
            return self._eigenvalue(curvature)
        weighted, level = options.measure == "neuronwise", str(plan.level)
        if per_sample and level == "batch":
            raise UnsupportedError(
                f"{options.caller}: samples interact after the layer, kappa has no shares by sample; use per_sample=False"
            )

        def share(summand: Tensor) -> Tensor:
            shape = curvature.calls[0].shape if per_sample else ()
            return summand.reshape(layer.samples(shape), -1).sum(1) if per_sample else summand.sum()

        if plan.method == "exact":
            size = max(1, sum(_bytes(call) for call in curvature.calls) * 16)
            chunk = max(1, min(plan.products, options.max_bytes // (16 * size)))
            total: Any = 0
            for summand in engine.exact(curvature, level, weighted, chunk, options.backend):
                total = total + share(summand)
            return Estimate(total, None)
        generator = self.generator(curvature.device)
        values = [
            share(s)
            for s in engine.hutchinson(curvature, level, weighted, options.probes, generator, options.backend)
        ]
        return Estimate.of(torch.stack(values))

    def _eigenvalue(self, curvature: Curvature) -> Estimate:
        """lambda_max(H), or sum_s |w_s|^2 lambda_max(H_ss); "layerwise" is multiplied with the norm in finish."""
        if self.options.measure == "layerwise_eigenvalue":
            return Estimate(eigen.largest(curvature), None)
        squares = self.layer.canonical(curvature.weight).to(curvature.dtype).square().sum(2).flatten()
        largest = torch.stack([eigen.largest(curvature, neuron) for neuron in range(len(squares))])
        return Estimate((squares * largest).sum(), None)

    def _positive(
        self,
        weight: Tensor,
        calls: Sequence[LayerCall],
        between: list[Any],
        outputs: Any,
        bound: Bound | None,
        per_sample: bool,
    ) -> Estimate:
        """curvature="ggn" (all factors of the criterion's Hessian) or "fisher" (`probes` draws of labels)."""
        options, layer = self.options, self.layer
        caller = options.caller
        if bound is None or not isinstance(outputs, Tensor):
            raise UnsupportedError(
                f"{caller}: curvature={options.curvature!r} needs a criterion whose own Hessian is known; use {SUPPORTED}"
            )
        bound.check(caller, outputs)
        options.check_bound(bound)
        if len(calls) > 1:
            raise UnsupportedError(
                f"{caller}: curvature={options.curvature!r} is for a layer called once; use curvature='hessian'"
            )
        call, hold = calls[0], not options.curvature_grad
        key = (call.shape, outputs.shape, *map(_signature, between))
        if key not in self._apart:
            factors.check_samples_apart(caller, layer, call, outputs)
            self._apart.add(key)
        weighted = options.measure == "neuronwise"
        # second derivatives: what torch has none of is corrected
        correct = [node for node in between if corrections.needs_correction(node)]
        with torch.autocast(weight.device.type, enabled=False), corrections.corrected(correct):
            if options.curvature == "ggn":
                drawn = factors.output_factors(bound, outputs, layer.samples(call.shape))
            else:
                drawn = factors.sampled_factors(bound, outputs, options.probes, self.generator(weight.device))
            each = factors.squares(layer, weight, call, outputs, drawn, weighted, hold, options.backend)
        stacked = each if per_sample else each.sum(1)
        self.note(Plan(options.curvature, "samples", len(each), "asked for"))
        estimate = Estimate(stacked.sum(0), None) if options.curvature == "ggn" else Estimate.of(stacked)
        return Estimate(self.finish(estimate.value, weight), estimate.standard_error)

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


def _bytes(call: LayerCall) -> int:
    numbers = 1
    for size in call.shape:
        numbers *= size
    return numbers * 4
