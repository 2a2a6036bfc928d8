"""torch.library.opcheck of every registered operation: schema, fake kernel, autograd registration, traced graphs."""

from __future__ import annotations

import pytest
import torch
from inputs import needs_native
from operator_samples import SAMPLES
from torch import Tensor

pytestmark = [pytest.mark.on_devices, needs_native]


@pytest.mark.parametrize(("op", "k"), [(op, k) for op in SAMPLES for k in range(len(SAMPLES[op]))])
def test_opcheck(op: str, k: int) -> None:
    torch.library.opcheck(getattr(torch.ops.fam_ext, op).default, SAMPLES[op][k]())


@pytest.mark.parametrize("op", SAMPLES)
def test_fake_outputs_have_the_strides_of_real_ones(op: str) -> None:
    """opcheck compares strides of a fresh trace only; compiled code relies on them for every output."""
    operator = getattr(torch.ops.fam_ext, op).default
    for sample in SAMPLES[op]:
        arguments = sample()
        with torch.no_grad():
            real = operator(*arguments)
            with torch._subclasses.FakeTensorMode() as mode:
                fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
        if real is None:  # row kernels write into what they are given
            assert fake is None
            continue
        for a, b in [(real, fake)] if isinstance(real, Tensor) else zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            assert a.numel() == 0 or a.stride() == b.stride()


def test_every_schema_has_samples() -> None:
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fam_ext::")}
    # tests/kernels has Triton's; what a test defines stays known to torch after it
    names -= {n for n in names if n.startswith(("fam_ext::triton_", "fam_ext::of_a_test_"))}
    assert names == {f"fam_ext::{op}" for op in SAMPLES}
