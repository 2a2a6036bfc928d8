"""Runs random calls and collects what is wrong with them; every failure names the seed that repeats it."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fuzz_draws import Draws
from torch import Tensor

from fam_ext import UnsupportedError

REFUSALS = (ValueError, TypeError, IndexError, UnsupportedError)
# FAM_EXT_FUZZ="calls" or "calls:first seed", of all functions together; what `make fuzz` sets
CALLS, _, FIRST = os.environ.get("FAM_EXT_FUZZ", "").partition(":")
ORDINARY = 2000
SHOWN = 5


def check(name: str, call: Callable[[Draws], None], share: int) -> None:
    """Make `share` calls out of ORDINARY; raise AssertionError with those that failed."""
    calls = share if not CALLS else max(1, round(int(CALLS) * share / ORDINARY))
    first, failures = int(FIRST or 0), []
    for seed in range(first, first + calls):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(Draws(name, seed))
        except Exception as error:  # whatever is raised, the other calls are made too
            failures.append((seed, error))
    if failures:
        raise AssertionError(
            f"{len(failures)} of {calls} calls of {name} failed\n"
            + "\n".join(_told(name, seed, error) for seed, error in failures[:SHOWN])
        )


def _told(name: str, seed: int, error: Exception) -> str:
    where = [f for f in traceback.extract_tb(error.__traceback__) if "/fuzz_run.py" not in f.filename][-3:]
    lines = "".join(f"\n    {f.filename.rpartition('/')[2]}:{f.lineno} {f.line}" for f in where)
    again = f"FAM_EXT_FUZZ=1:{seed} python -m pytest tests/fuzz -k {name}"
    return f"  seed {seed}: {type(error).__name__}: {str(error)[:1500]}{lines}\n    again: {again}"


def refuses(
    function: str | tuple[str, ...], argument: str | tuple[str, ...], call: Callable[[], object], told: str
) -> None:
    """`call` raises an error of ours that names the function and the argument (one of several)."""
    functions = (function,) if isinstance(function, str) else function
    arguments = (argument,) if isinstance(argument, str) else argument
    try:
        result = call()
    except REFUSALS as error:
        text = str(error)
        assert any(f in text for f in functions), f"the error does not name the function: {text!r}; {told}"
        assert any(a in text for a in arguments), f"the error does not name {argument}: {text!r}; {told}"
        return
    except Exception as error:
        raised = f"{type(error).__name__}({str(error)[:300]!r})"
        raise AssertionError(f"raises {raised} instead of an error of ours; {told}") from error
    raise AssertionError(f"accepted, with result {described(result)}; {told}")


def described(value: Any) -> str:
    """Arguments in a few words."""
    if isinstance(value, Tensor):
        try:
            return f"{str(value.dtype)[6:]}{list(value.shape)}/{list(value.stride())}"
        except Exception:  # of no strides or no shape
            return type(value).__name__
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}={described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(described(v) for v in value) + "]"
    return repr(value)[:200]


@contextmanager
def unchanged(*values: Any) -> Iterator[None]:
    """Inside, no tensor among the values is written."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    before = [(t._version, t.detach().clone()) for t in tensors]
    yield
    for t, (version, copy) in zip(tensors, before, strict=True):
        assert t._version == version, f"an input was written: {described(t)}"
        assert torch.equal(t.detach().nan_to_num(), copy.nan_to_num()), f"an input changed: {described(t)}"
