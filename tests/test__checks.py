"""Argument checks: what passes, and that a refusal names function, argument, expectation and what was given."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from fam_ext import _checks


class Fraction(float):
    """A real number of another type."""


GOOD: list[tuple[str, tuple[Any, ...]]] = [
    ("check_floating", (torch.ones(2, dtype=torch.bfloat16),)),
    ("check_floating", (nn.Parameter(torch.ones(2)),)),
    ("check_floating", (torch.nn.Buffer(torch.ones(2)),)),
    ("check_real", (torch.ones(2, dtype=torch.bool),)),
    ("check_integer", (-100,)),
    ("check_bool", (False,)),
    ("check_number", (Fraction(0.5),)),
    ("check_number", (torch.tensor(0.5),)),
    ("check_number", (-3,)),
    ("check_between", (1.0, 0.0, 1.0)),
    ("check_between", (1e300, 0.0, math.inf)),
    ("check_count", (0,)),
    ("check_count", (torch.tensor(7),)),
    ("check_count", (torch.empty((), device="meta"),)),
    ("check_broadcasts", (torch.ones(3, 1), (2, 3, 4))),
    ("check_by_class", (None, 3)),
    ("check_choice", ("b", ("a", "b"))),
]


@pytest.mark.parametrize(("check", "arguments"), GOOD, ids=lambda v: v if isinstance(v, str) else "")
def test_good_values_pass(check: str, arguments: tuple[Any, ...]) -> None:
    getattr(_checks, check)("f", "x", *arguments)


BAD: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("check_floating", ([1.0],), TypeError, r"a float32, .* tensor, got \[1.0\]"),
    ("check_floating", (torch.ones(2).int(),), TypeError, "got a int32 tensor of shape"),
    ("check_floating", (torch.ones(2).to_sparse(),), TypeError, "layout torch.sparse_coo"),
    ("check_floating", (nn.LazyLinear(2).weight,), TypeError, "an uninitialized parameter"),
    ("check_floating", (torch.nested.nested_tensor([torch.ones(2)]),), TypeError, "a nested tensor"),
    ("check_real", (torch.ones(2) * 1j,), TypeError, "real numbers, got a complex64"),
    ("check_integer", (True,), TypeError, "an integer, got True"),
    ("check_integer", ("a",), TypeError, "an integer, got 'a'"),
    ("check_bool", ("no",), TypeError, "True or False, got 'no'"),
    ("check_number", ("a",), TypeError, "a number, got 'a'"),
    ("check_number", (math.nan,), ValueError, "a finite number, got nan"),
    ("check_number", (torch.tensor(1.0, requires_grad=True),), ValueError, "gradient would be lost"),
    ("check_number", (torch.ones(2),), TypeError, "a number"),
    ("check_count", ("a",), TypeError, "a number, got 'a'"),
    ("check_count", (True,), TypeError, "a number, got True"),
    ("check_count", (-1,), ValueError, "at least 0, got -1"),
    ("check_count", (torch.tensor(-1),), ValueError, "at least 0, got -1"),
    ("check_count", (math.nan,), ValueError, "at least 0, got nan"),
    ("check_count", (torch.ones(2),), ValueError, r"a tensor of shape \(\)"),
    ("check_count", (torch.tensor(True),), ValueError, r"a tensor of shape \(\)"),
    ("check_count", (torch.tensor(1.0, requires_grad=True),), ValueError, "does not require grad"),
    ("check_between", ("a", 0.0, 1.0), TypeError, "a number"),
    ("check_between", (10**400, 0.0, math.inf), ValueError, "within the range of a float"),
    ("check_between", (-(10**400), 0.0, math.inf), ValueError, "within the range of a float"),
    ("check_between", (math.nan, 0.0, 1.0), ValueError, "between 0 and 1, got nan"),
    ("check_between", (-1.0, 0.0, math.inf), ValueError, "at least 0, got -1.0"),
    ("check_broadcasts", (torch.ones(2, 1), (3, 4)), ValueError, r"broadcasts to \(3, 4\), got .*\(2, 1\)"),
    ("check_broadcasts", (torch.ones(1, 3, 4), (3, 4)), ValueError, "broadcasts to"),
    ("check_by_class", (torch.ones(2), 3), ValueError, r"of shape \(3,\)"),
    ("check_choice", (numpy.ones(2), ("a", "b")), ValueError, "one of 'a', 'b', got ndarray"),
    ("check_choice", ("c", ("a", "b")), ValueError, "one of 'a', 'b', got 'c'"),
]


@pytest.mark.parametrize(
    ("check", "arguments", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else ""
)
def test_bad_values(check: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="f: x must be .*" + message):
        getattr(_checks, check)("f", "x", *arguments)


def test_class_targets_are_indices_or_probabilities() -> None:
    assert _checks.check_class_target("f", "x", torch.rand(2, 3, dtype=torch.float16))
    assert not _checks.check_class_target("f", "x", torch.zeros(2, dtype=torch.uint8))
    for dtype in (torch.bool, torch.int8, torch.int16, torch.int32, torch.complex64):
        with pytest.raises(TypeError, match=r"f: x must be class indices.*call .long\(\)"):
            _checks.check_class_target("f", "x", torch.zeros(2, dtype=dtype))


def test_readable() -> None:
    ones = torch.ones(2)
    assert _checks.readable(ones) and not _checks.readable(ones.to("meta"))
    seen = []
    torch.func.vmap(lambda x: seen.append(_checks.readable(x)) or x)(ones)
    assert seen == [False]


def test_same_device() -> None:
    _checks.check_same_device("f", a=torch.ones(1), b=None, c=torch.ones(2))
    with pytest.raises(ValueError, match=r"f: c must be on the device of a \(cpu\), got .* on meta"):
        _checks.check_same_device("f", a=torch.ones(1), b=None, c=torch.ones(2, device="meta"))


def test_long_values_are_cut_in_messages() -> None:
    assert len(_checks.describe("x" * 500)) == 80
    assert _checks.describe({1}) == "set {1}"


def test_an_uninitialized_parameter_is_described() -> None:
    assert _checks.describe(nn.LazyLinear(2).weight) == "an uninitialized parameter"


def test_positive_integers() -> None:
    assert _checks.check_positive("f", "n", 3) == 3
    for value, error in (
        (0, ValueError),
        (-2, ValueError),
        (True, TypeError),
        (1.0, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match="f: n must be"):
            _checks.check_positive("f", "n", value)
