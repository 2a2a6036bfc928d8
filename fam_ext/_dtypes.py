"""The dtype that sums are formed in: the package's one accumulation rule, which autocast does not change."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32: what sums are formed and values returned in."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off on the tensor's device, where it is on."""
    kind = like.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # there is no autocast of "meta"
        return nullcontext()
    return torch.autocast(kind, enabled=False)
