"""Noise on the input of a linear layer under tensor parallelism: one draw for all processes that share the layer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from fam_ext._dtypes import accumulation_dtype
from fam_ext.errors import UnsupportedError
from fam_ext.hessian.noise import amplitude
from fam_ext.hessian.noise_draws import Draw
from fam_ext.layers import collectives
from fam_ext.layers.sharding import describe


def is_split(caller: str, features: Any) -> bool:
    """Whether a DTensor of features is split along the fan-in; refused where it is split otherwise."""
    placement, mesh = features.placements[0], features.device_mesh
    split: bool = placement.is_shard(features.dim() - 1)
    if mesh.ndim != 1 or not (split or placement.is_replicate()):
        raise UnsupportedError(
            f"{caller}: the layer's input is a DTensor of {describe(features)}; method='noise' needs it whole on every process "
            "(Replicate) or split along the features, on a mesh of one dimension"
        )
    return split


def same_on_all(drawn: Draw, group: Any) -> Draw:
    """The draw of the group's first process, in place."""
    for numbers in drawn:
        if numbers is not None:
            dist.broadcast(numbers, group=group, group_src=0)
    return drawn


def perturb(caller: str, drawn: Draw, features: Any, strength: float | Tensor) -> Any:
    """phi + eps phi as fam_ext.hessian.noise.perturb_input has it, for a DTensor of features; the draw is of whole ones."""
    mesh, scale, split = features.device_mesh, amplitude(strength), is_split(caller, features)
    phi = features.to_local()
    width = phi.shape[-1]
    # this process's first column, as torch.chunk cuts
    begin = mesh.get_local_rank() * -(-features.shape[-1] // mesh.size()) if split else 0
    group = mesh.get_group()

    def whole(sums: Tensor) -> Tensor:
        """A sum over the fan-in, of which each process has a share, and which each applies to its own columns."""
        return collectives.shared(collectives.total(sums, group), group) if split else sums

    rows = phi.reshape(len(drawn.left), -1, width)  # all rows at once where one draw is for all samples
    left = drawn.left[..., begin : begin + width].to(phi.dtype)
    if drawn.channels is None:
        length = whole(rows.to(accumulation_dtype(rows)).square().sum(-1, keepdim=True)).sqrt()
        perturbed = rows + (length * scale).to(phi.dtype) * left
    else:
        right = drawn.channels[..., begin : begin + width].to(phi.dtype)
        perturbed = rows + scale * whole((rows * right).sum(-1, keepdim=True)) * left
    local = perturbed.reshape(phi.shape)
    layout = {"shape": features.shape, "stride": features.stride()}
    return type(features).from_local(local, mesh, features.placements, run_check=False, **layout)
