"""Projections of nn.MultiheadAttention as layers: their weights, sizes and names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fam_ext import UnsupportedError
from fam_ext.layers.attention import PARTS, Projection, identity, parts, sizes


def names(projection: Projection) -> list[str]:
    """Of its parameters, in the attention."""
    known = {id(p): name for name, p in projection.attention.named_parameters()}
    return [known[id(p)] for p in projection.parameters()]


def test_parameters_and_sizes() -> None:
    packed = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    into, out = parts("test", packed)
    assert names(into) == ["in_proj_weight", "in_proj_bias"] and into.weight is packed.in_proj_weight
    assert names(out) == ["out_proj.weight", "out_proj.bias"] and out.weight is packed.out_proj.weight
    assert [p.part for p in (into, out)] == list(PARTS) and into.inputs == (4, 4, 4)
    assert into.linear_map("test").shape == (12, 4) and out.linear_map("test").shape == (4, 4)
    other = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False)
    into, out = parts("test", other)
    assert names(into) == ["q_proj_weight", "k_proj_weight", "v_proj_weight"] and into.inputs == (4, 3, 5)
    assert names(out) == ["out_proj.weight"] and into.linear_map("test").fan_in == 4


def test_modes_and_names() -> None:
    attention = nn.MultiheadAttention(4, 2)
    into, out = parts("test", attention)
    assert into.training and not Projection("test", attention.eval(), "in_proj").training
    assert identity(into) == identity(parts("test", attention)[0]) != identity(out)
    assert identity(into) != identity(parts("test", nn.MultiheadAttention(4, 2))[0])
    layer = nn.Linear(2, 2)
    assert identity(layer) == id(layer) and parts("test", layer) == [layer]
    assert repr(into) == "in_proj of MultiheadAttention"


def test_a_layer_of_sizes_alone() -> None:
    layer = sizes(10**6, 10**6)
    assert layer.weight.is_meta and (layer.in_features, layer.out_features) == (10**6, 10**6)


def test_a_forward_of_its_own_is_refused() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return args[0]

    class Named(nn.MultiheadAttention):
        pass

    with pytest.raises(UnsupportedError, match="test: Own is an"):
        parts("test", Own(4, 2))
    assert str(parts("test", Named(4, 2))[1]) == "out_proj of Named"
