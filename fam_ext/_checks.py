"""Argument checks with one message format: function, argument, expected, got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """A short description of a value for an error message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    return (
        text
        if isinstance(value, (bool, int, float, str, tuple, list, type(None)))
        else f"{type(value).__name__} {text}"
    )


def bad_value(function: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{function}: {argument} must be {expected}, got {describe(got)}")


def bad_type(function: str, argument: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"{function}: {argument} must be {expected}, got {describe(got)}")


def check_floating(function: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is a float32, float64, bfloat16 or float16 tensor."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATING:
        bad_type(function, argument, "a float32, float64, bfloat16 or float16 tensor", value)


def check_choice(function: str, argument: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        bad_value(function, argument, "one of " + ", ".join(repr(c) for c in choices), value)


def check_by_class(function: str, argument: str, value: object, classes: int) -> None:
    """Raise TypeError or ValueError unless `value` is None or a floating tensor with a number for each class."""
    if value is not None:
        check_floating(function, argument, value)
        if value.shape != (classes,):  # type: ignore[attr-defined]
            bad_value(function, argument, f"of shape ({classes},)", value)


def check_same_device(function: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every given tensor lives on the same device."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor)
        elif tensor.device != first[1].device:
            bad_value(function, name, f"on the device of {first[0]} ({first[1].device})", tensor)
