"""Layers under FSDP2 (torch.distributed.fsdp.fully_shard): whole weights for the term, and for as long as it needs them.

FSDP2 gathers the weights of a group before its forward pass and may free them after it; the layer's module holds the shard again
when the loss is taken. `gather` fills the very parameter that the layer has multiplied with, and leaves it whole until FSDP2
frees it in the backward pass, for which it would have gathered it anyway. So the term's gradient is part of that parameter's, and
FSDP2 reduces both at once, in the way it is set to. Where the term takes backward passes of its own, `held` keeps FSDP2's hooks
from freeing weights and reducing gradients in them.

FSDP2 has no public way from a parameter to its group; what is read of it stands in this module alone.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fam_ext import _checks
from fam_ext.errors import UnsupportedError

_STATES = "torch.distributed._composable_state"
_FSDP = "torch.distributed.fsdp._fully_shard._fsdp_state"

# modules of fully_shard whose weights were gathered for a term
_gathered: weakref.WeakSet[Any] = weakref.WeakSet()
_follows_optimizers: list[Any] = []


def is_dtensor(value: object) -> bool:
    """Whether `value` is a torch.distributed.tensor.DTensor, which is not imported for the answer."""
    kind = type(value)
    return (
        kind is not Tensor and kind is not nn.Parameter and any(k.__name__ == "DTensor" for k in kind.__mro__)
    )


def describe(tensor: Any) -> str:
    """The layout of a DTensor, for messages."""
    placements = ", ".join(str(placement) for placement in tensor.placements)
    return f"placements ({placements}) on {tensor.device_mesh}"


def _states() -> list[Any]:
    """FSDP2's state of every module that fully_shard was called on."""
    known = getattr(sys.modules.get(_STATES), "_module_state_mapping", None)
    kind = getattr(sys.modules.get(_FSDP), "FSDPState", None)
    if not known or kind is None:
        return []
    states = [reference() for reference in known.values()]
    return list(dict.fromkeys(state for state in states if isinstance(state, kind)))


def _groups(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def owners(module: nn.Module) -> tuple[Any, ...]:
    """The modules of fully_shard that hold parameters of `module` in their groups; () without FSDP2.

    >>> owners(nn.Linear(2, 2))
    ()
    """
    states = _states()
    if not states:
        return ()
    parts = set(module.modules())
    found = []
    for state in states:
        places = [p._module_info for group in _groups(state) for p in group.fsdp_params]
        if any(not parts.isdisjoint((place.module, *place.shared_modules)) for place in places):
            found.append(state._modules[0])
    return tuple(found)


def gather(modules: tuple[Any, ...]) -> None:
    """Gather the weights of these modules of fully_shard, without effect where they are whole.

    An optimizer's step frees them where no backward pass has: they would be old then.
    """
    if modules and not _follows_optimizers:
        _follows_optimizers.append(register_optimizer_step_post_hook(_free))
    for module in modules:
        module.unshard()
        _gathered.add(module)


def exchange(module: nn.Module, *given: Any) -> tuple[Any, ...]:
    """Parameters of `module` that were given, whole where FSDP2 shards them; anything else as it is."""
    if not any(is_dtensor(value) for value in given):
        return given
    names = {id(parameter): name for name, parameter in module._parameters.items() if parameter is not None}
    gather(owners(module))
    return tuple(getattr(module, names[id(value)]) if id(value) in names else value for value in given)


def _free(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Free what an optimizer's step has made old; within a backward pass, as some optimizers step, FSDP2 does it."""
    if torch._C._current_graph_task_id() != -1:
        return
    updated: set[int] | None = None
    for module in list(_gathered):
        whole = [group for group in _groups(module._get_fsdp_state()) if group.is_unsharded]
        if whole and updated is None:
            updated = {id(p) for settings in optimizer.param_groups for p in settings["params"]}
        if any(id(p.sharded_param) in (updated or ()) for group in whole for p in group.fsdp_params):
            module.reshard()


@contextmanager
def held() -> Iterator[None]:
    """FSDP2 frees no weights and reduces no gradients meanwhile, whatever backward passes are taken."""
    states = _states()
    groups = [group for state in states for group in _groups(state)]
    contexts = list({id(state._state_ctx): state._state_ctx for state in states}.values())
    settings = [
        *((group, name) for group in groups for name in ("reshard_after_backward", "reduce_grads")),
        *((context, "is_last_backward") for context in contexts),
    ]
    before = [getattr(owner, name) for owner, name in settings]
    whole = {id(group) for group in groups if group.is_unsharded}
    try:
        for owner, name in settings:
            setattr(owner, name, False)
        yield
    finally:
        for (owner, name), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
        for group in groups:  # a pass may have begun to gather what lies before the layer
            if getattr(group, "_all_gather_result", None) is not None:
                group.wait_for_unshard()
        for state in states:  # and has gathered what lies after it
            if any(group.is_unsharded and id(group) not in whole for group in _groups(state)):
                _gathered.add(state._modules[0])


def check_whole(caller: str, weight: Tensor) -> None:
    """Refuse a weight whose memory was freed after the layer's call."""
    if is_dtensor(weight) or not weight.numel() or not _checks.readable(weight):
        return
    if weight.untyped_storage().nbytes():
        return
    raise UnsupportedError(
        f"{caller}: the layer's weight, of shape {tuple(weight.shape)}, was freed after its forward pass, as FSDP1 does outside "
        "the root's group; use sharding_strategy=ShardingStrategy.SHARD_GRAD_OP there, FSDP2 "
        "(torch.distributed.fsdp.fully_shard) or method='noise'"
    )


def local(value: Any) -> Tensor:
    """A plain tensor as it is; of a DTensor, what this process holds."""
    plain: Tensor = value.to_local() if is_dtensor(value) else value
    return plain


def add(caller: str, loss: Any, term: Tensor) -> Tensor:
    """The criterion's loss, which under loss_parallel is a DTensor, plus a term that is the same on every process."""
    if is_dtensor(loss):
        if not all(placement.is_replicate() for placement in loss.placements):
            raise UnsupportedError(
                f"{caller}: the loss is a DTensor of {describe(loss)}; it must be the same on every process (Replicate)"
            )
        term = type(loss).from_local(term, loss.device_mesh, loss.placements, run_check=False)
    total: Tensor = loss + term
    return total


_OF_DTENSORS = {
    "RedistributeBackward",
    "NestedRedistributeBackward",
    "_ToTorchTensorBackward",
    "_FromTorchTensorBackward",
}


def check_local(caller: str, *tensors: Any) -> None:
    """Refuse a hidden layer under tensor parallelism."""
    for tensor in tensors:
        if is_dtensor(tensor):
            raise UnsupportedError(
                f"{caller}: the layer is split by tensor parallelism, {describe(tensor)}, through whose communication second "
                "derivatives do not go, nor method='finite_difference'; regularize a head in closed form, or use method='noise'"
            )


def check_between(caller: str, nodes: Iterable[Any]) -> None:
    """Refuse tensor parallelism between a hidden layer and the loss: second derivatives of its communication are wrong."""
    for node in nodes:
        if node.name() in _OF_DTENSORS:
            name = node.name().strip("_").removesuffix("Backward")
            raise UnsupportedError(
                f"{caller}: tensor parallelism lies between the layer and the loss ({name}), through whose communication second "
                "derivatives do not go; regularize a head in closed form, or use method='noise'"
            )


def is_flat(parameter: object) -> bool:
    """Whether `parameter` is what FSDP1 keeps a group's weights in."""
    return bool(getattr(parameter, "_is_flat_param", False))


def check_flat(caller: str, leaves: Iterable[Any]) -> None:
    """Refuse FSDP1 between a hidden layer and the loss: its hooks free weights in the term's own backward passes."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    if any(is_flat(leaf) for leaf in leaves):
        raise UnsupportedError(
            f"{caller}: the layer lies inside FSDP1 (FullyShardedDataParallel), whose hooks free weights in the backward "
            "passes that the term takes of its own; use FSDP2 (torch.distributed.fsdp.fully_shard), "
            "DistributedDataParallel or method='noise'"
        )
