"""Hutchinson's estimator by finite differences of the loss: for models that cannot be differentiated twice.

For a random weight direction D with E[D D^T] = G kron 1, kappa = E[D^T H D], and D^T H D is about the second difference
[L(W + hD) + L(W - hD) - 2 L(W)] / h^2, whose ordinary gradient is the gradient of the estimate. The loss is evaluated by a
closure, 2 * probes + 1 times under the same random numbers; statistics of normalization layers are left as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import _checks
from fam_ext.hessian.estimate import Estimate
from fam_ext.hessian.hutchinson import probe_root, rademacher
from fam_ext.layers.linear_map import LinearMap

Closure = Callable[[], Tensor]


@contextmanager
def _buffers_set_aside() -> Iterator[None]:
    """Modules called within the block work on copies of their buffers; other threads' are left alone, but for replicas."""
    originals: dict[nn.Module, dict[str, Tensor | None]] = {}
    own = threading.get_ident()

    def before(module: nn.Module, args: Any) -> None:  # torch calls it for every module of the process
        if threading.get_ident() != own and not getattr(
            module, "_is_replica", False
        ):  # nn.DataParallel's have threads
            return
        if module._buffers and module not in originals:
            originals[module] = dict(module._buffers)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    handle = torch.nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        for module, buffers in originals.items():
            module._buffers.update(buffers)


@contextmanager
def _weight(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """`module` uses this tensor as its weight: an attribute of the instance is found before the parameter's name."""
    object.__setattr__(module, "weight", weight)
    try:
        yield
    finally:
        object.__delattr__(module, "weight")


def _evaluate(caller: str, closure: Closure, device: torch.device) -> Tensor:
    """The loss under the random numbers that come next on the CPU and on the layer's device, which both forget the evaluation."""
    forked = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
    with forked, _buffers_set_aside():
        loss = closure()
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        _checks.bad_value(
            caller, "closure", "a function that returns the criterion's loss, a 0-d tensor", loss
        )
    return loss


def hutchinson(
    caller: str,
    closure: Closure,
    layer: LinearMap,
    weighted: bool,
    probes: int,
    generator: torch.Generator,
) -> tuple[Estimate, float]:
    """The estimate from `probes` directions, and the size of its rounding error relative to it.

    The step h is eps^(1/4) |W| / |D|, eps that of the dtype the loss is computed in: truncation and rounding then balance.
    """
    module = layer.module
    weight: Tensor = module.weight
    canonical = layer.canonical(weight)
    groups, _, fan_in = canonical.shape
    root = probe_root(canonical, probes * fan_in, weighted)
    middle = _evaluate(caller, closure, weight.device)
    eps = torch.finfo(torch.promote_types(middle.dtype, torch.float32)).eps
    values, steps = [], []
    for _ in range(probes):
        noise = rademacher((groups, root.shape[2], fan_in), root, generator)
        direction = layer.to_module(root @ noise, weight.shape)
        h = eps**0.25 * weight.detach().norm() / direction.detach().norm().clamp(min=1e-30)
        sides = []
        for sign in (1, -1):
            with _weight(module, weight + sign * h * direction):
                sides.append(_evaluate(caller, closure, weight.device))
        values.append((sides[0] - middle + (sides[1] - middle)) / h**2)
        steps.append(h)
    stacked = torch.stack(values)
    rounding = 4 * eps * middle.detach().abs() / torch.stack(steps).mean() ** 2
    relative = float(rounding / stacked.detach().abs().mean().clamp(min=1e-30))
    return Estimate.of(stacked), relative
