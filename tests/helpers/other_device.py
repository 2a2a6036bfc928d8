"""Device "other": not the CPU, but for any machine (other_device.cpp). Values are the CPU's; mixing the two is an error."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

NAME = "other"


@cache
def register() -> Any:
    """Compile and register the device, once in a process; the module counts `reads` by the host."""
    import ninja
    from torch.utils import cpp_extension

    source = Path(__file__).with_suffix(".cpp")
    # an environment need not be activated
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])
    library = cpp_extension.load("fam_ext_other_device", [str(source)], extra_cflags=["-O0"])
    torch.utils.rename_privateuse1_backend(NAME)
    module = SimpleNamespace(
        device=lambda index: nullcontext(),
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    torch._register_device_module(NAME, module)  # type: ignore[arg-type]
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return library
