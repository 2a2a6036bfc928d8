"""Argument checks with one message format: function, argument, expected, got."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_PLAIN = (Tensor, nn.Parameter)


def describe(value: object) -> str:
    """A short description of a value for an error message."""
    if isinstance(value, Tensor) and nn.parameter.is_lazy(value):  # it has no shape
        return "an uninitialized parameter"
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


def check_dense(function: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor whose numbers lie in one piece of memory here."""
    if type(value) in _PLAIN and value.layout is torch.strided and not value.is_nested:  # type: ignore[attr-defined]
        return
    kind = None
    if not isinstance(value, Tensor):
        bad_type(function, argument, "a tensor", value)
    elif nn.parameter.is_lazy(value):
        kind = "an uninitialized parameter (run one batch through the model first)"
    elif any(t.__name__ == "DTensor" for t in type(value).__mro__):
        kind = "a DTensor (gather it first: of FSDP2 by unshard() of its module, else by full_tensor())"
    elif value.is_nested:
        kind = "a nested tensor (pad it, or take its values())"
    elif value.layout is not torch.strided:
        kind = f"a tensor of layout {value.layout} (call to_dense() first)"
    if kind is not None:
        raise TypeError(f"{function}: {argument} must be a dense tensor, got {kind}")


def check_floating(function: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is a dense float32, float64, bfloat16 or float16 tensor."""
    if not isinstance(value, Tensor):
        bad_type(function, argument, "a float32, float64, bfloat16 or float16 tensor", value)
    check_dense(function, argument, value)
    if value.dtype not in FLOATING:
        bad_type(function, argument, "a float32, float64, bfloat16 or float16 tensor", value)


def check_real(function: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is a dense tensor of real numbers, integers and booleans included."""
    check_dense(function, argument, value)
    if value.dtype not in (*FLOATING, *_INTEGERS):  # type: ignore[attr-defined]
        bad_type(function, argument, "a tensor of real numbers", value)


def check_class_target(function: str, argument: str, value: object) -> bool:
    """Whether the target holds class probabilities rather than indices; raises TypeError unless it is one of both.

    Indices are int64, or uint8, which torch's cross_entropy takes too, and nothing else.
    """
    check_dense(function, argument, value)
    dtype = value.dtype  # type: ignore[attr-defined]
    if dtype is not torch.int64 and dtype is not torch.uint8 and dtype not in FLOATING:
        bad_type(
            function,
            argument,
            "class indices of int64 (or uint8), or floating class probabilities; call .long() on other integers",
            value,
        )
    return dtype in FLOATING


def check_class_indices(function: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError unless all are from 0 to classes - 1 or ignored. Reads them where that is possible."""
    if not readable(target):
        return
    target = target.long()  # in uint8 -100 is 156, and 300 is 44
    invalid = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(invalid.any()):
        raise IndexError(
            f"{function}: target must be a class index from 0 to {classes - 1} or ignore_index ({ignore_index}), got "
            f"{int(target[invalid][0])}"
        )


def readable(value: Tensor) -> bool:
    """Whether the tensor's numbers can be looked at: not in a compiled graph, under a torch.func transform, fake or on meta."""
    return not (
        torch.compiler.is_compiling()
        or value.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(value)
        or is_fake(value)
    )


def check_integer(function: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is an integer (and no bool)."""
    if isinstance(value, bool) or not isinstance(value, int):
        bad_type(function, argument, "an integer", value)


def check_positive(function: str, argument: str, value: object) -> int:
    """The value; raises TypeError unless it is an integer (and no bool), ValueError unless it is at least 1."""
    check_integer(function, argument, value)
    if value < 1:  # type: ignore[operator]
        bad_value(function, argument, "at least 1", value)
    return value  # type: ignore[return-value]


def check_bool(function: str, argument: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        bad_type(function, argument, "True or False", value)


def check_number(function: str, argument: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is a finite real number; a 0-d tensor is one unless it requires grad."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        if value.requires_grad:
            bad_value(function, argument, "a number (a tensor's gradient would be lost; detach it)", value)
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        bad_type(function, argument, "a number", value)
    # unlike math.isfinite this can be traced; an integer may be too large for a float
    if not -sys.float_info.max <= value <= sys.float_info.max:  # type: ignore[operator]
        bad_value(function, argument, "a finite number", value)


def check_between(function: str, argument: str, value: object, low: float, high: float) -> None:
    """Raise TypeError or ValueError unless `value` is a real number from `low` to `high`; an infinite bound is no bound."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        bad_type(function, argument, "a number", value)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        bad_value(function, argument, "within the range of a float", value)
    if not low <= float(value) <= high:
        expected = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        bad_value(function, argument, expected, value)


def check_count(function: str, argument: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is a number, or a 0-d tensor, of at least 0.

    What a sum is divided by: 0 gives what the mean over nothing is. A number on another device is not read.
    """
    if isinstance(value, Tensor):
        if value.dim() or value.is_complex() or value.dtype == torch.bool or value.requires_grad:
            expected = "a number, or a tensor of shape () that does not require grad"
            bad_value(function, argument, expected, value)
        if not value.is_cpu or not readable(value):
            return
        value = value.item()
    check_between(function, argument, value, 0.0, math.inf)


def check_cross_entropy_options(
    function: str, ignore_index: object, label_smoothing: object, strength: object, curvature_grad: object
) -> None:
    """The numbers that the cross-entropy operations share; raises TypeError or ValueError."""
    check_integer(function, "ignore_index", ignore_index)
    check_between(function, "label_smoothing", label_smoothing, 0.0, 1.0)
    check_number(function, "strength", strength)
    check_bool(function, "curvature_grad", curvature_grad)


def check_broadcasts(function: str, argument: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless `value` broadcasts to `shape` without changing it."""
    own = tuple(value.shape)
    pairs = zip(reversed(own), reversed(tuple(shape)), strict=False)
    if len(own) > len(shape) or any(mine not in (1, size) for mine, size in pairs):
        bad_value(function, argument, f"of a shape that broadcasts to {tuple(shape)}", value)


def check_choice(function: str, argument: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:  # an array would be compared element by element
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
