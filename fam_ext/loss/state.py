"""A criterion's state as a tensor of bytes: what safetensors and other savers of tensors can hold."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor


def to_bytes(state: dict[str, Any]) -> Tensor:
    """A uint8 tensor (bytes,) of a dict of plain values and tensors."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def from_bytes(state: Tensor | dict[str, Any]) -> dict[str, Any]:
    """The inverse of `to_bytes`, with tensors on the CPU: the device that they were saved on may not be there.

    A dict, which earlier versions saved, is returned as it is. Nothing in it is executed.
    """
    if isinstance(state, dict):
        return state
    raw = bytes(state.detach().to("cpu", torch.uint8).tolist())
    loaded: dict[str, Any] = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return loaded
