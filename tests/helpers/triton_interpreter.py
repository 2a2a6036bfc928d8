"""Whether Triton's interpreter works with the NumPy that is installed."""

from __future__ import annotations

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def _count(out, n):
    for i in range(n):
        tl.store(out + i, 1.0)


def why_not() -> str | None:
    """Why no kernel with a loop runs in the interpreter, None when it does."""
    out = torch.zeros(3)
    try:
        _count[(1,)](out, 3)
    except Exception as error:  # of a class that Triton's versions name differently
        versions = f"Triton {triton.__version__} and NumPy {numpy.__version__}"
        if "0-dimensional" not in str(error):
            return f"Triton's interpreter fails with {versions}: {error}"
        return (
            f"Triton's interpreter fails with {versions}: up to Triton 3.6 it counts loops by arrays of one number, which "
            "NumPy 2.4 and newer do not convert; install triton>=3.7, or numpy<2.4"
        )
    return None if bool((out == 1).all()) else "Triton's interpreter gives wrong numbers here"
