"""Tensors of every dtype and memory layout, logits of a given confidence, the backends there are, and expected refusals."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fam_ext import UnsupportedError
from fam_ext.ops import backends

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "transposed", "strided", "sliced", "expanded"]
# every tensor on a device that is neither CPU nor GPU (tests/test_other_device.py): it has no compiled kernels
ON_OTHER = os.environ.get("FAM_EXT_TEST_DEVICE") == "other"
needs_native = pytest.mark.skipif(
    not backends.native_loaded() or ON_OTHER,
    reason="the compiled library is not loaded, or not for this device",
)
TRITON_ON_GPU = (
    os.environ.get("FAM_EXT_TEST_TRITON") == "gpu"
)  # compiled kernels instead of Triton's interpreter
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


def on_device(tensor: Tensor) -> Tensor:
    """The tensor on the device of the test, which is the default one: the same numbers on every device."""
    return tensor.to(torch.get_default_device())


def make_input(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0
) -> Tensor:
    """A tensor of random numbers whose strides are those of `layout`."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*sizes: int) -> Tensor:
        return on_device(torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu").to(dtype))

    if layout == "channels_last":
        return rand(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    if layout == "transposed":
        return rand(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "strided":
        return rand(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "sliced":
        return rand(*(size + 1 for size in shape))[tuple(slice(1, None) for _ in shape)]
    if layout == "expanded":
        return rand(shape[0], *(1 for _ in shape[1:-1]), shape[-1]).expand(shape)
    return rand(*shape)


def confident_logits(rows: int, classes: int, doubt: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float32 logits (N, O) with max p = 1 - doubt in every row, and each row's most likely class."""
    generator = torch.Generator().manual_seed(seed)
    z = on_device(torch.randn(rows, classes, generator=generator, dtype=torch.float64, device="cpu"))
    y = on_device(torch.randint(0, classes, (rows,), generator=generator, device="cpu"))
    others = z.scatter(1, y[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return z.scatter(1, y[:, None], others + math.log((1 - doubt) / doubt)).float(), y


def network() -> torch.nn.Sequential:
    """Takes the features of batch()."""
    return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5), torch.randint(0, 4, (8,))


def expect(message: str, action: Callable[[], object]) -> None:
    with pytest.raises(UnsupportedError, match=message):
        action()
