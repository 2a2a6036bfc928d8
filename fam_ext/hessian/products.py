"""Hessian products of a loss with respect to one layer's weight, taken through the layer's output z.

For a layer called once, z = layer(phi; W) is linear in W, so for weight directions A and B: A^T H B = <da, Lambda db> with
da = layer(phi; A), db = layer(phi; B) and Lambda = d^2 L / dz^2, of which only products are formed: Lambda db = grad(g, z, db)
with g = grad(L, z, create_graph=True). Only the part of the network after the layer is differentiated twice. Where the layer is
called several times, a later input depends on an earlier output; and a loss that holds a derivative of the network, or a penalty
on the weight, depends on the weight past the layer's calls. Products are taken on the weight itself then.

Several layers share the first gradient: one backward pass gives it for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fam_ext.derivatives import corrections
from fam_ext.errors import UnsupportedError
from fam_ext.layers.linear_map import LinearMap


class LayerCall(NamedTuple):
    """One call of the layer: where its output entered the graph, its input, and the output's shape and dtype."""

    edge: GradientEdge
    features: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype


class LayerHessian:
    """Products with the Hessian of a loss with respect to `weight`, by way of the layer's calls; inside `with products(...)`.

    `detached` takes the Hessian as a constant: its products carry no graph. `past_calls` says that the loss depends on the weight
    past the calls as well. `on_weight` tells whether directions are weights, as they are then and for several calls; else they
    are outputs z of the only call.
    """

    def __init__(
        self,
        layer: LinearMap,
        weight: Tensor,
        calls: Sequence[LayerCall],
        detached: bool = False,
        past_calls: bool = False,
    ) -> None:
        self.layer, self.weight, self.calls, self.past_calls = layer, weight, calls, past_calls
        self.detached = detached or not torch.is_grad_enabled()
        self.on_weight = past_calls or len(calls) != 1
        self.device = weight.device
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.gradient: Tensor | None = None
        # what the first gradient is taken by: the weight, or the edge where the only call's output entered the graph
        self.origin: Any = weight if self.on_weight else calls[0].edge
        if not self.on_weight:
            # the input of the only call, in a dtype that sums can be formed in
            features = calls[0].features.to(torch.promote_types(calls[0].features.dtype, self.dtype))
            self.features: Tensor = features.detach() if self.detached else features

    def direction(self, weight: Tensor) -> Tensor:
        """The product's argument for a weight direction in canonical layout."""
        in_module = self.layer.to_module(weight, self.weight.shape)
        if self.on_weight:
            return in_module
        features = self.features
        return self.layer.apply(features, in_module.to(features.dtype))

    def matvec(self, directions: Tensor) -> Tensor:
        """Lambda d for a stack of directions (K, *shape); zero where the loss does not depend on z, or linearly."""
        return matvec([self], [directions])[0]

    def weight_product(self, weight: Tensor) -> Tensor:
        """H A for a weight direction A, both in canonical layout."""
        product = self.matvec(self.direction(weight).unsqueeze(0))[0]
        if self.on_weight:
            return self.layer.canonical(product)
        origin = torch.zeros_like(self.weight, dtype=product.dtype, requires_grad=True)
        with torch.enable_grad():
            z = self.layer.apply(self.features.to(product.dtype), origin)
        (pulled,) = torch.autograd.grad(z, origin, product, create_graph=not self.detached)
        return self.layer.canonical(pulled)


@contextmanager
def products(
    loss: Tensor, hessians: Sequence[LayerHessian], correct: Sequence[Any], doubtful: Sequence[str] = ()
) -> Iterator[None]:
    """Form the first gradients of `loss` for several layers in one backward pass; their products can be taken inside.

    The derivatives of the autograd nodes in `correct` are replaced meanwhile (fam_ext.derivatives.corrections). `doubtful` names
    nodes after the layers that have never been verified: only then the gradients are searched for operations that forbid a second
    derivative.
    """
    with corrections.corrected(correct):
        # an upstream gradient that requires grad itself: else an operation that forbids a second derivative may leave no trace
        one = torch.ones_like(loss).requires_grad_() if doubtful else None
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                loss, [h.origin for h in hessians], one, create_graph=True, allow_unused=True
            )
        for hessian, gradient in zip(hessians, gradients, strict=True):
            if gradient is not None and gradient.requires_grad:
                hessian.gradient = gradient
        if doubtful:
            _refuse_dead_ends([h.gradient for h in hessians if h.gradient is not None], doubtful)
        try:
            yield
        finally:
            for hessian in hessians:
                hessian.gradient = None


def matvec(hessians: Sequence[LayerHessian], directions: Sequence[Tensor]) -> list[Tensor]:
    """sum_k Lambda_jk d_k for every layer j, with one product of all layers at once; directions are stacks (K, *shape).

    Lambda_jk is the mixed second derivative of the loss by the outputs of layers j and k.
    """
    results = [torch.zeros_like(d) for d in directions]
    live = [k for k, h in enumerate(hessians) if h.gradient is not None]
    if not live:
        return results
    gradients: list[Any] = [hessians[k].gradient for k in live]
    origins = [hessians[k].origin for k in live]
    given = [directions[k].to(g.dtype) for k, g in zip(live, gradients, strict=True)]
    create_graph = not hessians[0].detached

    def product(vectors: Sequence[Tensor], batched: bool) -> list[Tensor]:
        taken = torch.autograd.grad(
            gradients, origins, vectors, create_graph=create_graph, retain_graph=True, allow_unused=True,
            is_grads_batched=batched,
        )  # fmt: skip
        return [torch.zeros_like(v) if r is None else r for v, r in zip(vectors, taken, strict=True)]

    stacked: list[Tensor] | None = None
    if len(given[0]) > 1 and not torch.is_anomaly_enabled():  # which would report a try that fails
        try:
            stacked = product(given, batched=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass  # vmap lacks a rule for something after the layer; an error of another kind comes again below
    if stacked is None:
        each = [product(vectors, batched=False) for vectors in zip(*given, strict=True)]
        stacked = [torch.stack(parts) for parts in zip(*each, strict=True)]
    for k, of_layer in zip(live, stacked, strict=True):
        results[k] = of_layer.to(results[k].dtype)
    return results


def _refuse_dead_ends(gradients: Sequence[Tensor], doubtful: Sequence[str]) -> None:
    """An operation that forbids a second derivative leaves an error node that leads nowhere: products would miss its part."""
    seen: set[Any] = set()
    stack: list[Any] = [gradient.grad_fn for gradient in gradients]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise UnsupportedError(
                "an operation between the layer and the loss can be differentiated once only (one of "
                f"{', '.join(doubtful)}); use method='finite_difference', or write it with differentiable operations"
            )
        stack.extend(following for following, _ in node.next_functions)
