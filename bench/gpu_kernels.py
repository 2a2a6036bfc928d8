"""Every CUDA kernel once, on small odd sizes, for compute-sanitizer: python bench/gpu_kernels.py [cpu]"""

from __future__ import annotations

import sys

import torch

from fam_ext import functional


def main(device: str = "cuda") -> None:
    backend = "native" if device == "cuda" else "auto"
    torch.set_default_device(device)
    narrow, wide = torch.bfloat16, torch.float64
    for dtype, other in (
        (torch.float32, torch.float32),
        (narrow, narrow),
        (torch.float16, torch.float16),
        (wide, wide),
        (narrow, torch.float32),  # the kernels that find the dtype of each tensor when they run
        (torch.float32, wide),
    ):
        for rows, classes, fan_in in ((37, 5, 19), (600, 32, 24), (40, 33, 16), (7, 260, 129)):
            z, phi, w = (
                torch.randn(shape).to(d).requires_grad_()
                for shape, d in (
                    ((rows, classes), dtype),
                    ((rows, fan_in), other),
                    ((classes, fan_in), other),
                )
            )
            target = torch.arange(rows) % classes
            target[::3] = -100
            for form in ("pairwise", "shifted"):
                functional.softmax_trace(z, w, form=form, backend=backend).sum().backward()
            for y in (target, torch.rand(rows, classes)):
                loss, _ = functional.head_cross_entropy(z, phi, w, y, label_smoothing=0.1, backend=backend)
                loss.backward()
        if dtype != other:
            continue
        for shape in ((2, 16, 7, 9), (2, 16, 8, 8), (2, 4, 3, 5, 6), (2, 6, 33)):
            axes = len(shape) - 2
            x = torch.randn(shape).to(dtype)
            for layout in (x, x.movedim(1, -1).contiguous().movedim(-1, 1), x[..., 1:]):
                for groups in (1, 2):
                    leaf = layout.detach().requires_grad_()
                    for window in (((3,) * axes, 2, 1, 1), ((1,) * axes, 1, 0, 1)):
                        functional.patch_sqnorm(leaf, *window, groups, backend=backend).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main(*sys.argv[1:])
