"""Memory of Hessian products, counted while one is taken: what a graph's sizes do not tell."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fam_ext.errors import UnsupportedError


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make inside, and that are alive at a time.

    >>> with LiveBytes() as live:
    ...     x = torch.zeros(256)
    ...     y = x + 1
    ...     del x
    >>> live.peak, live.now
    (2048, 1024)

    What an operation takes inside itself and gives back (a convolution's workspace) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))
        }  # views and in-place results
        for value in _tensors(result):
            storage = value.untyped_storage()
            if storage._cdata not in given:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class ProductBytes(NamedTuple):
    """What one Hessian product takes: while it is formed, and afterwards as long as its result (and graph) lives."""

    peak: float
    kept: float

    def total(self, products: int, at_once: int) -> float:
        """Bytes of `products` of them whose graphs are all kept, `at_once` formed together."""
        return products * self.kept + min(products, at_once) * (self.peak - self.kept)


def count(take: Callable[[int], object], together: int) -> ProductBytes:
    """Take `together` products, `take(together)`, and count what one of them takes."""
    with LiveBytes() as live:
        result = take(together)
        counted = ProductBytes(live.peak / together, live.now / together)
        del result
    return counted


def at_once(caller: str, take: Callable[[int], object], most: int, max_bytes: int) -> int:
    """How many products, `most` at most, may be formed together within `max_bytes`; `take(k)` forms k of them for a count.

    Raises UnsupportedError where one product takes more.
    """
    one = count(take, 1).peak
    if one > max_bytes:
        raise UnsupportedError(
            f"{caller}: one Hessian product takes {one / 2**20:.4g} MiB here, over max_bytes={max_bytes}; raise max_bytes, use "
            "smaller batches, or method='finite_difference', which takes no Hessian product"
        )
    if most < 2 or 2 * one > max_bytes:
        return 1
    # products taken together need not take as much as one by one: vmap shares some tensors and expands others
    return max(1, min(most, int(max_bytes / count(take, 2).peak)))
