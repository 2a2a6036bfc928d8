"""A criterion as the sum over its terms, for a mean that several batches share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fam_ext.criteria import SUPPORTED, uncompiled
from fam_ext.errors import UnsupportedError
from fam_ext.head.one_pass import check_num_items
from fam_ext.options import Options

_WAY_OUT = "pass a criterion with reduction='sum', and divide by num_items yourself"


@contextmanager
def summed(
    options: Options,
    criterion: Any,
    known: Any,
    targets: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_items: Any = None,
) -> Iterator[dict[str, Any]]:
    """Within it `criterion` sums over its terms: a module's `reduction` is "sum", a function gets it as an argument.

    Args:
        known: how the criterion's arguments are bound (fam_ext.criteria.read), None where nothing is known about it.
        targets, kwargs: the call's arguments after the outputs; what is yielded stands for the keyword arguments.
        num_items: what the sum is to be divided by, which is checked.

    Raises:
        UnsupportedError: nothing is known about the criterion, it has class weights under "mean", or the loss is a closure's.
        ValueError: its reduction is neither "mean" nor "sum".
        TypeError, ValueError: num_items is no number of at least 0, or the arguments are not the criterion's.
    """
    caller = options.caller
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
    module = isinstance(inner, nn.Module)
    reduction = check_num_items(caller, known(*targets, **kwargs), num_items)
    if not module:
        yield kwargs if reduction == "sum" else {**kwargs, "reduction": "sum"}
        return
    inner.reduction = "sum"
    try:
        yield kwargs
    finally:
        inner.reduction = reduction
