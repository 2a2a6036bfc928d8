"""Sizes that the compiled operations share among threads: with one thread and with four the results are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from inputs import needs_native
from torch import Tensor

from fam_ext import functional

pytestmark = needs_native


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def few_classes() -> tuple[Callable[..., Tensor], list[Tensor]]:
    target = torch.arange(3000) % 10
    inputs = [leaf(3000, 10), leaf(3000, 64, seed=1), leaf(10, 64, seed=2)]
    return lambda *t: functional.head_cross_entropy(*t, target, backend="native")[0], inputs


def many_classes() -> tuple[Callable[..., Tensor], list[Tensor]]:
    target = torch.arange(500) % 300
    inputs = [leaf(500, 300), leaf(500, 200, seed=1), leaf(300, 200, seed=2)]
    return lambda *t: functional.head_cross_entropy(*t, target, backend="native")[0], inputs


def trace(form: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    inputs = [leaf(2000, 100), leaf(100, 128, seed=1)]
    return lambda *t: functional.softmax_trace(*t, form=form, backend="native").square().sum(), inputs


def vocabulary() -> tuple[Callable[..., Tensor], list[Tensor]]:
    target = torch.arange(700) % 500
    inputs = [leaf(700, 64), leaf(500, 64, seed=1)]
    return lambda x, w: functional.linear_cross_entropy(x, w, target, backend="native", max_bytes=2**20)[
        0
    ], inputs


def patches() -> tuple[Callable[..., Tensor], list[Tensor]]:
    return lambda x: functional.patch_sqnorm(x, 3, padding=1, backend="native").square().sum(), [
        leaf(8, 32, 20, 20)
    ]


CASES = {
    "few classes": few_classes,
    "many classes": many_classes,
    "pairwise trace": lambda: trace("pairwise"),
    "shifted trace": lambda: trace("shifted"),
    "vocabulary": vocabulary,
    "patches": patches,
}


@pytest.mark.parametrize("name", CASES)
def test_one_thread_and_four(name: str) -> None:
    function, inputs = CASES[name]()
    results = {}
    for count in (1, 4):
        torch.set_num_threads(count)
        loss = function(*inputs)
        results[count] = [loss.detach(), *torch.autograd.grad(loss, inputs)]
    torch.testing.assert_close(results[4], results[1], rtol=1e-12, atol=1e-14)
