"""Pooling, convolution, resampling, padding and the moving about of pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from verified_cases_base import Case, Tail

ROW, IMAGE, VOLUME = (2, 3, 6), (2, 2, 4, 4), (1, 2, 3, 3, 4)
BY_DIMENSION = {1: ROW, 2: IMAGE, 3: VOLUME}


def _pools() -> list[Case]:
    cases = []
    for d, shape in BY_DIMENSION.items():

        def add(
            op: str, variant: str, *args: object, d: int = d, shape: tuple[int, ...] = shape, **kwargs: object
        ) -> None:
            kind = getattr(nn, f"{op}{d}d")
            cases.append(Case(kind.__name__, lambda: kind(*args, **kwargs), shape, variant))

        add("MaxPool", "", 2)
        add("MaxPool", "stride, padding, ceil", 2, stride=1, padding=1, ceil_mode=True)
        add("MaxPool", "dilation", 2, stride=1, dilation=2)
        add("AvgPool", "", 2)
        add("AvgPool", "stride, padding", 3, stride=2, padding=1, count_include_pad=False)
        add("AdaptiveMaxPool", "", 2)
        add("AdaptiveAvgPool", "", 2)
        add("AdaptiveAvgPool", "to 1", 1)
    return cases


def _lp_pool(d: int, p: float) -> Case:
    """Of positive numbers: at a sum of 0 the root has no derivative."""
    kind = getattr(nn, f"LPPool{d}d")
    return Case(
        f"LPPool{d}d",
        lambda: Tail(lambda m, z: m.pool(z.sigmoid()), pool=kind(p, 2)),
        BY_DIMENSION[d],
        f"p={p:g}",
    )


def _convolutions() -> list[Case]:
    cases = []
    for d, shape in BY_DIMENSION.items():
        channels = shape[1]
        for kind in (getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")):
            for variant, options in (
                ("", {}),
                ("groups", {"groups": channels}),
                ("dilation, stride, padding", {"dilation": 2, "stride": 2, "padding": 2}),
                ("no bias", {"bias": False}),
            ):

                def build(kind=kind, channels=channels, options=options) -> nn.Module:
                    return kind(channels, 2 * channels, 2, **options)

                cases.append(Case(kind.__name__, build, shape, variant))
        convolution = getattr(nn, f"Conv{d}d")
        for mode in ("reflect", "replicate", "circular"):

            def padded(kind=convolution, channels=channels, mode=mode) -> nn.Module:
                return kind(channels, 2, 2, padding=1, padding_mode=mode)

            cases.append(Case(convolution.__name__, padded, shape, f"padding_mode={mode}"))
        cases.append(
            Case(
                convolution.__name__,
                lambda kind=convolution, channels=channels: kind(channels, 2, 2, padding="same"),
                shape,
                "padding=same",
            )
        )
    return cases


def _interpolations() -> list[Case]:
    cases = []
    for d, modes in {
        1: ("nearest", "nearest-exact", "linear", "area"),
        2: ("nearest", "nearest-exact", "bilinear", "bicubic", "area"),
        3: ("nearest", "nearest-exact", "trilinear", "area"),
    }.items():
        for mode in modes:
            smooth = "linear" in mode or mode == "bicubic"
            for align in (False, True) if smooth else (None,):
                for size, word in ((5, "up"), (2, "down")):

                    def build(mode=mode, size=size, align=align):
                        return lambda z: F.interpolate(z, size=size, mode=mode, align_corners=align)

                    variant = f"{mode}, {d}-d, {word}" + (", align_corners" if align else "")
                    cases.append(Case("F.interpolate", build, BY_DIMENSION[d], variant))
    for mode in ("bilinear", "bicubic"):
        cases.append(
            Case(
                "F.interpolate",
                lambda mode=mode: lambda z: F.interpolate(z, size=2, mode=mode, antialias=True),
                IMAGE,
                f"{mode}, antialias",
            )
        )
    return cases


def _pads() -> list[Case]:
    cases = []
    for d, shape in BY_DIMENSION.items():
        for mode in ("constant", "reflect", "replicate", "circular"):

            def build(mode=mode, d=d):
                return lambda z: F.pad(z, (1, 2) + (1, 1) * (d - 1), mode=mode)

            cases.append(Case("F.pad", build, shape, f"{mode}, {d}-d"))
    cases.append(Case("F.pad", lambda: lambda z: F.pad(z, (-1, 1)), variant="constant, cropping"))
    return cases


def _unpool(d: int) -> Case:
    def build() -> Tail:
        pool, unpool = getattr(nn, f"MaxPool{d}d")(2, return_indices=True), getattr(nn, f"MaxUnpool{d}d")(2)
        return Tail(lambda m, z: m.unpool(*m.pool(z)), pool=pool, unpool=unpool)

    return Case(f"MaxUnpool{d}d", build, {1: ROW, 2: IMAGE, 3: (1, 2, 2, 2, 4)}[d])


def _grid_samples() -> list[Case]:
    cases = []
    for mode in ("bilinear", "bicubic", "nearest"):
        for padding in ("zeros", "border", "reflection"):
            options = {"mode": mode, "padding_mode": padding, "align_corners": False}

            def of_input(options=options) -> Tail:
                return Tail(
                    lambda m, z: F.grid_sample(z, m.g, **options),
                    g=nn.Parameter(1.2 * torch.randn(2, 2, 3, 2)),
                )

            def of_grid(options=options) -> Tail:
                return Tail(
                    lambda m, z: F.grid_sample(m.x, z.view(2, 2, 3, 2), **options),
                    x=nn.Parameter(torch.randn(2, 2, 4, 4)),
                )

            cases.append(Case("F.grid_sample", of_input, IMAGE, f"{mode}, {padding}"))
            cases.append(Case("F.grid_sample", of_grid, (4, 6), f"{mode}, {padding}, z as the grid"))
    for mode in ("bilinear", "nearest"):

        def of_volume(mode=mode) -> Tail:
            return Tail(
                lambda m, z: F.grid_sample(z, m.g, mode=mode, align_corners=True),
                g=nn.Parameter(torch.randn(1, 2, 2, 2, 3)),
            )

        def of_volume_grid(mode=mode) -> Tail:
            return Tail(
                lambda m, z: F.grid_sample(m.x, z.view(1, 2, 2, 2, 3), mode=mode, align_corners=True),
                x=nn.Parameter(torch.randn(1, 2, 3, 3, 4)),
            )

        cases.append(Case("F.grid_sample", of_volume, VOLUME, f"{mode}, 3-d"))
        cases.append(Case("F.grid_sample", of_volume_grid, (4, 6), f"{mode}, 3-d, z as the grid"))
    return cases


CASES = [
    *_grid_samples(),
    Case("F.affine_grid", lambda: lambda z: F.affine_grid(z, (2, 1, 2, 3), align_corners=False), (2, 2, 3)),
    *_pools(),
    *(_lp_pool(d, p) for d in (1, 2, 3) for p in (2.0, 3.0)),
    Case(
        "FractionalMaxPool2d",
        lambda: nn.FractionalMaxPool2d(2, output_size=2),
        IMAGE,
        "same regions in every product",
    ),
    Case(
        "FractionalMaxPool3d",
        lambda: nn.FractionalMaxPool3d(2, output_size=2),
        (1, 1, 4, 4, 5),
        "same regions in every product",
    ),
    *(_unpool(d) for d in (1, 2, 3)),
    *_convolutions(),
    Case(
        "F.conv_tbc",
        lambda: Tail(
            lambda m, z: torch.conv_tbc(z, m.w, m.b),
            w=nn.Parameter(torch.randn(2, 4, 3)),
            b=nn.Parameter(torch.randn(3)),
        ),
        (5, 2, 4),
    ),
    *_interpolations(),
    *_pads(),
    Case("F.pixel_shuffle", lambda: lambda z: F.pixel_shuffle(z, 2), (1, 8, 2, 4)),
    Case("F.pixel_unshuffle", lambda: lambda z: F.pixel_unshuffle(z, 2), IMAGE),
    Case("ChannelShuffle", lambda: nn.ChannelShuffle(2), (2, 4, 2, 4)),
    Case("F.unfold", lambda: lambda z: F.unfold(z, 2, padding=1, stride=2), IMAGE),
    Case("F.fold", lambda: lambda z: F.fold(z, (3, 3), 2), (2, 8, 4)),
]
