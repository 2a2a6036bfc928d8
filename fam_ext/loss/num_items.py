"""A criterion as the sum over its terms, for a mean that several batches share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fam_ext import _checks
from fam_ext.criteria import uncompiled
from fam_ext.errors import UnsupportedError
from fam_ext.loss_hessians import SUPPORTED
from fam_ext.options import Options

_WAY_OUT = "pass a criterion with reduction='sum', and divide by num_items yourself"


@contextmanager
def summed(
    options: Options, criterion: Any, known: Any, kwargs: dict[str, Any], num_items: Any = None
) -> Iterator[dict[str, Any]]:
    """Within it `criterion` sums over its terms: a module's `reduction` is "sum", a function gets it as an argument.

    Args:
        known: how the criterion's arguments are bound (fam_ext.loss_hessians.read), None where nothing is known about it.
        kwargs: the call's keyword arguments; what is yielded stands for them.
        num_items: what the sum is to be divided by, which is checked.

    Raises:
        UnsupportedError: nothing is known about the criterion, it has class weights under "mean", or the loss is a closure's.
        ValueError: its reduction is neither "mean" nor "sum".
        TypeError, ValueError: num_items is no number.
    """
    caller = options.caller
    if num_items is not None:
        _checks.check_count(caller, "num_items", num_items)
    if options.method == "finite_difference":
        raise UnsupportedError(
            f"{caller}: num_items with method='finite_difference', whose closure forms a loss of its own; {_WAY_OUT}, in the "
            "closure too"
        )
    inner = uncompiled(criterion)
    inner = getattr(inner, "func", inner) if isinstance(getattr(inner, "func", None), nn.Module) else inner
    if known is None:
        raise UnsupportedError(
            f"{caller}: num_items needs a criterion that is known to be a sum or mean of terms: {SUPPORTED}; for others "
            + _WAY_OUT
        )
    given = {**getattr(inner, "keywords", {}), **kwargs}  # of a functools.partial
    module = isinstance(inner, nn.Module)
    reduction = inner.reduction if module else given.get("reduction", "mean")
    _checks.check_choice(caller, "reduction of the criterion, with num_items,", reduction, ("mean", "sum"))
    weight = getattr(inner, "weight", None) if module else given.get("weight")
    if reduction == "mean" and weight is not None:
        raise UnsupportedError(
            f"{caller}: num_items counts terms, the criterion's weights do not; use reduction='sum'"
        )
    if not module:
        yield {**kwargs, "reduction": "sum"}
        return
    inner.reduction = "sum"
    try:
        yield kwargs
    finally:
        inner.reduction = reduction
