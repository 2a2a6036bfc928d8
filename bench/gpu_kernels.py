"""Every CUDA kernel once, on small odd sizes, for compute-sanitizer: python bench/gpu_kernels.py [cpu]"""

from __future__ import annotations

import sys

import torch

from fam_ext import functional


def main(device: str = "cuda") -> None:
    backend = "native" if device == "cuda" else "auto"
    torch.set_default_device(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rows, classes, fan_in in ((37, 5, 19), (600, 32, 24), (40, 33, 16), (70, 130, 129)):
            z, phi, w = (
                torch.randn(shape).to(dtype).requires_grad_()
                for shape in ((rows, classes), (rows, fan_in), (classes, fan_in))
            )
            target = torch.arange(rows) % classes
            target[::3] = -100
            for form in ("pairwise", "shifted"):
                functional.softmax_trace(z, w, form=form, backend=backend).sum().backward()
            for y in (target, torch.rand(rows, classes)):
                loss, _ = functional.head_cross_entropy(z, phi, w, y, label_smoothing=0.1, backend=backend)
                loss.backward()
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
