"""Numbers and targets that head_cross_entropy and linear_cross_entropy refuse alike, compiled and not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fam_ext import functional

PHI, WEIGHT, Y = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([0, 1, 1])


def call(name: str, target: Tensor = Y, **options: Any) -> tuple[Tensor, Tensor]:
    if name == "head_cross_entropy":
        return functional.head_cross_entropy(PHI @ WEIGHT.T, PHI, WEIGHT, target, **options)
    return functional.linear_cross_entropy(PHI, WEIGHT, target, **options)


@pytest.mark.parametrize("name", ["head_cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strength": "a"}, TypeError, "strength must be a number, got 'a'"),
        ({"strength": math.inf}, ValueError, "strength must be a finite number"),
        (
            {"strength": torch.tensor(0.1, requires_grad=True)},
            ValueError,
            "strength .*gradient would be lost",
        ),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1"),
        ({"ignore_index": "a"}, TypeError, "ignore_index must be an integer"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"ignore_index": torch.tensor(1)}, TypeError, "ignore_index must be an integer"),
        (
            {"ignore_index": torch.ones(2), "reduction": "none"},
            TypeError,
            "ignore_index must be an integer",
        ),
        ({"label_smoothing": torch.tensor(0.1)}, TypeError, "label_smoothing must be a number"),
        ({"curvature_grad": "no"}, TypeError, "curvature_grad must be True or False"),
        ({"target": Y.int()}, TypeError, "target must be class indices of int64"),
        ({"target": Y.bool()}, TypeError, "target must be class indices of int64"),
    ],
    ids=str,
)
def test_refused(
    name: str, options: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    with pytest.raises(error, match=f"{name}: {message}"):
        call(name, backend=backend, **options)


@pytest.mark.parametrize("name", ["head_cross_entropy", "linear_cross_entropy"])
def test_bytes_are_class_indices(name: str, backend: str) -> None:
    torch.testing.assert_close(call(name, Y.byte(), backend=backend), call(name, backend=backend))
    torch.testing.assert_close(
        call(name, strength=torch.tensor(0.5), backend=backend), call(name, strength=0.5, backend=backend)
    )


def test_probabilities_have_no_ignored_class(backend: str) -> None:
    with pytest.raises(ValueError, match="head_cross_entropy: ignore_index must be left out"):
        call("head_cross_entropy", torch.rand(3, 4), ignore_index=1, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["head_cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("index", [-1, 4])
def test_a_class_that_is_not_there(index: int, name: str, reduction: str, backend: str) -> None:
    with pytest.raises(IndexError, match=rf"{name}: target must be a class index from 0 to 3 .*got {index}"):
        call(name, torch.tensor([0, index, 1]), reduction=reduction, backend=backend)


def test_uninitialized_weights(backend: str) -> None:
    lazy = torch.nn.LazyLinear(4).weight
    with pytest.raises(TypeError, match=r"head_cross_entropy: weight .*an uninitialized parameter"):
        functional.head_cross_entropy(torch.zeros(3, 4), PHI, lazy, Y, backend=backend)
    with pytest.raises(TypeError, match=r"linear_cross_entropy: weight .*an uninitialized parameter"):
        functional.linear_cross_entropy(PHI, lazy, Y, backend=backend)
