"""What random calls are made of: sizes, tensors of every dtype and layout, and values that no argument takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from inputs import DTYPES, LAYOUTS, make_input
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

Kwargs = dict[str, Any]
Corruption = Callable[["Draws", Any], Any]


class Draws:
    """Random choices that a seed repeats; torch's own generator is seeded alike."""

    def __init__(self, name: str, seed: int) -> None:
        self.random = random.Random(f"{name} {seed}")
        torch.manual_seed(self.random.getrandbits(60))

    def one_of(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def size(self, least: int = 0, most: int = 70) -> int:
        """Mostly small and odd, now and then past a tile or a vector."""
        drawn: int = self.one_of(0, 1, 1, 2, 3, 3, 5, 7, 8, 17, 33, 66)
        return max(least, min(drawn, most))

    def dtype(self) -> torch.dtype:
        return DTYPES[self.between(0, len(DTYPES) - 1)]

    def dtypes(self, count: int) -> list[torch.dtype]:
        """One for all tensors, or one for each."""
        if self.chance(0.5):
            return [self.dtype()] * count
        return [self.dtype() for _ in range(count)]

    def tensor(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float64,
        expanded: bool = True,
        scale: float = 1.0,
    ) -> Tensor:
        """Random numbers in a random layout. Scaling an expanded tensor keeps it expanded."""
        layouts = [kind for kind in LAYOUTS if expanded or kind != "expanded"]
        if len(shape) < 2:
            layouts = ["contiguous", *(["strided", "sliced"] if shape else [])]
        drawn = make_input(shape, dtype, self.one_of(*layouts), self.between(0, 10**6))
        if scale == 1.0:
            return drawn
        return torch.empty_strided(drawn.shape, [0] * drawn.dim(), dtype=dtype).fill_(scale) * drawn

    def scale(self) -> float:
        """Of logits: from a uniform prediction to one of 1 - max p far below an eps."""
        return float(self.one_of(0.01, 1.0, 1.0, 3.0, 10.0, 40.0))


def not_floating(d: Draws, value: Any) -> Any:
    """What is no dense floating tensor."""
    t = value if isinstance(value, Tensor) else torch.ones(2, 2)
    t = t.detach()
    return d.one_of(
        lambda: None,
        lambda: 1.5,
        lambda: "tensor",
        lambda: t.tolist(),
        lambda: t.long(),
        lambda: t.bool(),
        lambda: t.to(torch.complex64),
        lambda: t.to(torch.float8_e4m3fn),
        lambda: t.to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged),
        lambda: torch.quantize_per_tensor(torch.ones(t.shape), 0.1, 0, torch.qint8),
        lambda: UninitializedParameter(),
        lambda: (t,),
    )()


def not_real(d: Draws, value: Any) -> Any:
    """As `not_floating`, for an optional tensor: None is no error."""
    while (bad := not_floating(d, value)) is None:
        pass
    return bad


def of_another_shape(d: Draws, value: Tensor) -> Tensor:
    """One more in a dimension, or another number of dimensions."""
    if value.dim() == 0:
        return value.detach().reshape(1, 1)
    k = d.between(0, value.dim() - 1)
    longer = [n + (j == k) for j, n in enumerate(value.shape)]
    shape = d.one_of(longer, [*value.shape, 2], [3, *value.shape])
    return torch.zeros(shape, dtype=value.dtype)


def of_no_class_count(d: Draws, value: Tensor | None) -> Tensor:
    """For a number by class, which may be None."""
    classes = 3 if value is None else value.numel()
    return torch.ones(d.one_of((classes + 100,), (classes, 1, 1), ()))


def elsewhere(d: Draws, value: Tensor | None) -> Tensor:
    return torch.ones(3, device="meta") if value is None else value.detach().to("meta")


def not_integer(d: Draws, value: Any) -> Any:
    return d.one_of(1.5, "1", True, None, [1], torch.tensor(1), 1j, torch.ones(2))


def below(least: int) -> Corruption:
    return lambda d, value: d.one_of(least - 1, -3, -(2**63), -(2**70))


def too_large(d: Draws, value: Any) -> int:
    return int(d.one_of(2**25, 2**31, 2**62, 2**63 - 1, 2**63, 2**80))


def not_number(d: Draws, value: Any) -> Any:
    return d.one_of("0.1", None, 1j, [0.1], float("nan"), True, torch.ones(2), torch.tensor(1j), object())


def not_finite(d: Draws, value: Any) -> Any:
    return d.one_of(float("inf"), -float("inf"), float("nan"), 10**400)


def not_bool(d: Draws, value: Any) -> Any:
    return d.one_of("no", 1, 0, None, torch.tensor(True), [])


def not_choice(d: Draws, value: Any) -> Any:
    return d.one_of(
        "other", "", None, 3, ("mean",), str(value).upper() + "x", ["mean"], b"mean", torch.ones(2)
    )


def outside_of_0_to_1(d: Draws, value: Any) -> Any:
    return d.one_of(-0.1, 1.5, float("nan"), float("inf"), "0.1", None, True, [0.1], 1j, torch.tensor(0.1))


def corrupted(d: Draws, kwargs: Kwargs, corruptions: dict[str, Sequence[Corruption]]) -> tuple[Kwargs, str]:
    """The arguments with one that is wrong, and its name."""
    name = d.one_of(*corruptions)
    return {**kwargs, name: d.one_of(*corruptions[name])(d, kwargs.get(name))}, name
