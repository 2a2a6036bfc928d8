"""Calls of nn.MultiheadAttention whose projections are perturbed: its mean over a design of draws, and kappa, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import noise_designs
import oracle
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fam_ext import FAMLoss
from fam_ext.hessian import noise_draws
from fam_ext.hessian.noise_draws import Draw

STRENGTH = 1e-6  # what is left of higher orders is of its size; float64 has digits to spare


@dataclass
class Call:
    """`attention` with `inputs` (a query, a key, a value: one tensor may stand for several) and options of its forward pass."""

    attention: Any
    inputs: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    coupled: bool = False  # samples meet in the loss

    def __post_init__(self) -> None:
        self.attention = self.attention.double()
        self.leaves = [x.double().requires_grad_() for x in self.inputs]
        self.wires = torch.randn(64, dtype=torch.float64)

    def three(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        x = self.leaves
        return (x[0], x[0], x[0]) if len(x) == 1 else (x[0], x[1], x[-1])

    def loss(self, output: Tensor) -> Tensor:
        """No quadratic function. A sum over samples, unless they are coupled."""
        rows = output.flatten()
        weighted = rows * self.wires[: rows.numel()]
        alone = weighted.sin().sum() + rows.square().sum()
        return alone + weighted.sum().cosh() if self.coupled else alone

    def __call__(self, weights: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
        """The loss of a call; with other weights, by name."""
        given = self.options | options
        if weights is None:
            output = self.attention(*self.three(), **given)[0]
        else:
            output = functional_call(self.attention, weights, self.three(), given)[0]
        return self.loss(output)

    def kappa(self, part: str) -> Tensor:
        """From the full Hessian. The unfused path of torch's function: its derivatives are right to any order."""
        m = self.attention

        def of(name: str, rows: slice = slice(None)) -> Tensor:
            whole = m.get_parameter(name)

            def loss(own: Tensor) -> Tensor:
                before, after = (
                    whole[: rows.start or 0],
                    whole[len(whole) if rows.stop is None else rows.stop :],
                )
                return self({name: torch.cat([before, own, after])}, need_weights=True)

            return oracle.kappa(loss, whole[rows])

        if part == "out_proj":
            return of("out_proj.weight")
        if m.in_proj_weight is None:
            return of("q_proj_weight") + of("k_proj_weight") + of("v_proj_weight")
        size, packed = m.embed_dim, "in_proj_weight"
        if len(self.leaves) == 1:
            return of(packed)
        if len(self.leaves) == 2:
            return of(packed, slice(0, size)) + of(packed, slice(size, 3 * size))
        return (
            of(packed, slice(0, size))
            + of(packed, slice(size, 2 * size))
            + of(packed, slice(2 * size, 3 * size))
        )

    def columns(self, part: str) -> list[bool]:
        """Which entries of a draw of the part count: the others belong to tensors that came before."""
        sizes = [self.attention.embed_dim, self.attention.kdim, self.attention.vdim]
        if part == "out_proj":
            return [True] * sizes[0]
        return [k < len(self.leaves) for k, size in enumerate(sizes) for _ in range(size)]

    def samples(self) -> int:
        x = self.leaves[0]
        return 1 if x.dim() == 2 else x.shape[0 if self.attention.batch_first else 1]


def designed(call: Call, part: str, shared: bool) -> Iterator[Draw]:
    """All draws of a design: in the mean over them products of two entries of a, and of b, are what the expectation is."""
    samples = 1 if shared else call.samples()
    counts = torch.tensor(call.columns(part)).expand(samples, 1, -1)

    def spread(signs: Tensor) -> Tensor:
        return torch.ones(counts.shape, dtype=torch.float64).masked_scatter(counts, signs)

    for right in noise_designs.signs(int(counts.sum())):
        for left in noise_designs.signs(int(counts.sum()), negatives=True):
            yield Draw(spread(left), spread(right), None)


def mean_loss(call: Call, part: str, shared: bool, monkeypatch: Any) -> Tensor:
    """Of the perturbed calls, over a design."""
    draws = list(designed(call, part, shared))
    queue = iter(draws)
    monkeypatch.setattr(noise_draws, "draw", lambda *_: next(queue))
    options: dict[str, Any] = {"per_sample_probes": False} if shared else {}
    criterion = FAMLoss.for_model(
        lambda loss: loss, call.attention, part, strength=STRENGTH, method="noise", **options
    )
    losses = torch.stack([criterion(call()) for _ in draws])
    criterion.detach()
    assert next(queue, None) is None  # all of them have been used, each in one call
    return losses.mean()


def _mask(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).triu(1)


def _padding() -> Tensor:
    return torch.tensor([[False, False, True], [False, False, False]])


CALLS: dict[str, Callable[[], Call]] = {
    "self": lambda: Call(nn.MultiheadAttention(4, 2, batch_first=True), (torch.randn(2, 3, 4),)),
    "sequence first, weights not wanted": lambda: Call(
        nn.MultiheadAttention(4, 2), (torch.randn(3, 2, 4),), {"need_weights": False}
    ),
    "causal, no bias": lambda: Call(
        nn.MultiheadAttention(4, 2, bias=False, batch_first=True),
        (torch.randn(2, 3, 4),),
        {"attn_mask": _mask(3, 3), "is_causal": True, "average_attn_weights": False},
    ),
    "padding": lambda: Call(
        nn.MultiheadAttention(4, 1, batch_first=True),
        (torch.randn(2, 3, 4),),
        {"key_padding_mask": _padding(), "need_weights": False},
    ),
    "unbatched": lambda: Call(
        nn.MultiheadAttention(4, 2, batch_first=True),
        (torch.randn(3, 4),),
        {"attn_mask": torch.randn(3, 3).double()},
    ),
    "more keys": lambda: Call(
        nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True), (torch.randn(2, 2, 4),)
    ),
    "key is value": lambda: Call(
        nn.MultiheadAttention(2, 2, batch_first=True), (torch.randn(2, 2, 2), torch.randn(2, 3, 2))
    ),
    "all differ": lambda: Call(
        nn.MultiheadAttention(2, 1), (torch.randn(2, 1, 2), torch.randn(3, 1, 2), torch.randn(3, 1, 2))
    ),
    "other sizes": lambda: Call(
        nn.MultiheadAttention(2, 1, kdim=3, vdim=1, batch_first=True),
        (torch.randn(2, 2, 2), torch.randn(2, 3, 3), torch.randn(2, 3, 1)),
        {"key_padding_mask": _padding()},
    ),
}
