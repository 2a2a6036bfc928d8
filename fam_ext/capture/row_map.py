"""How the criterion's input is laid out relative to the layer's output, read from the autograd graph between them.

Views, dtype casts, permutations, slices and row selections move numbers and never change them. Following them from the
criterion's input back to the node that made the layer's output proves that every row the criterion sees is a row of the
layer's output, and tells which one.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fam_ext.derivatives.nodes import signed

Shape = tuple[int, ...]


class RowMap(NamedTuple):
    """The criterion's input as rows of the layer's output z.

    class_dim: dimension of the input that holds the layer's outputs; None where a single output was squeezed away.
    rows: for every row of the input, the index of z's row it is (shape: the input's without class_dim); None when the rows
        are z's rows in order. z's rows are counted in row-major order of its shape without the class dimension.
    """

    class_dim: int | None
    rows: Tensor | None


class NoRowMap(Exception):
    """An operation between the layer and the criterion does more than move numbers; carries its autograd name."""


_SAME = {
    "ToCopyBackward0",
    "CloneBackward0",
    "AliasBackward0",
    "BackwardHookFunctionBackward",
    "_DDPSinkBackward",
    # of DTensors; fam_ext.head.parallel refuses a shard of the numbers
    "_ToTorchTensorBackward",
    "RedistributeBackward",
}
_RESHAPE = {
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
}
_MAX_STEPS = 32  # a chain of layout operations is short; a longer walk is a network


def find(tensor: Tensor, key: object) -> tuple[Any, list[tuple[Any, Shape]]] | None:
    """Walk back from `tensor` to the node whose metadata holds (key, output number).

    Returns what is stored there and the steps from it to `tensor`, first to last: each an autograd node and the shape of its
    output. None when nothing on the way holds the key. Raises NoRowMap at an operation that is not a layout one.
    """
    node, number, shape = tensor.grad_fn, tensor.output_nr, tuple(tensor.shape)
    steps: list[tuple[Any, Shape]] = []
    while node is not None:
        stored = node.metadata.get((key, number))  # type: ignore[attr-defined]
        if stored is not None:
            return stored, steps[::-1]
        name = node.name()
        if len(steps) == _MAX_STEPS or (name not in _SAME and name not in _RESHAPE and name not in _HANDLERS):
            raise NoRowMap(name)
        steps.append((node, shape))
        shape = _input_shape(node, name, shape)
        following = node.next_functions
        node, number = following[number if name in _SAME and len(following) > 1 else 0]
    return None


def _input_shape(node: Any, name: str, shape: Shape) -> Shape:
    if name in _SAME:
        return shape
    if name == "TransposeBackward0":
        return tuple(_transposed(shape, node))
    if name == "PermuteBackward0":
        return tuple(shape[d] for d in _inverse(_dims(node._saved_dims, len(shape))))
    if name == "TBackward0":
        return shape[::-1]
    if name == "UnsqueezeBackward0":
        dim = signed(node._saved_dim) % len(shape)
        return shape[:dim] + shape[dim + 1 :]
    return tuple(node._saved_self_sym_sizes)


def replay(steps: list[tuple[Any, Shape]], shape: Shape, class_dim: int, device: torch.device) -> RowMap:
    """Apply the steps to z's row numbers. Raises NoRowMap where classes would be mixed with rows or dropped."""
    state = RowMap(class_dim, None)
    for node, out in steps:
        name = node.name()
        if name in _RESHAPE or name == "UnsqueezeBackward0":
            state = _reshape(state, name, shape, out)
        elif name not in _SAME:
            state = _HANDLERS[name](state, node, shape, device)
        shape = out
    return state


def _row_shape(shape: Shape, class_dim: int | None) -> Shape:
    return shape if class_dim is None else shape[:class_dim] + shape[class_dim + 1 :]


def _numbered(state: RowMap, shape: Shape, device: torch.device) -> Tensor:
    """The row numbers, counted out if they were in order so far."""
    if state.rows is not None:
        return state.rows
    rows = _row_shape(shape, state.class_dim)
    return torch.arange(prod(rows), device=device).view(rows)


def _reshape(state: RowMap, name: str, shape: Shape, out: Shape) -> RowMap:
    """Row-major order stays; the class dimension is the one with as many numbers before it and of the same size."""
    k = state.class_dim
    classes = 1 if k is None else shape[k]
    before = None if k is None else prod(shape[:k])
    candidates = [d for d in range(len(out)) if out[d] == classes and before in (None, prod(out[:d]))]
    if candidates:
        # dimensions of size 1 can make it ambiguous: they hold the same numbers, the nearest keeps its meaning
        dim = min(candidates, key=lambda d: abs(d - (len(out) if k is None else k)))
        after = prod(shape[k + 1 :]) if k is not None else None
        if after is not None and prod(out[dim + 1 :]) != after:
            raise NoRowMap(name)
    elif classes == 1:
        dim = None
    else:
        raise NoRowMap(name)
    rows = None if state.rows is None else state.rows.reshape(_row_shape(out, dim))
    return RowMap(dim, rows)


def _dims(saved: tuple[int, ...], rank: int) -> list[int]:
    return [signed(d) % rank for d in saved]


def _inverse(dims: list[int]) -> list[int]:
    return sorted(range(len(dims)), key=dims.__getitem__)


def _transposed(items: Any, node: Any) -> list[Any]:
    swapped = list(items)
    a, b = (signed(d) % len(swapped) for d in (node._saved_dim0, node._saved_dim1))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return swapped


def _permute(state: RowMap, dims: list[int], shape: Shape, device: torch.device) -> RowMap:
    k = state.class_dim
    row_dims = [d for d in dims if d != k]
    moved = None if k is None else dims.index(k)
    if [d for d in row_dims if shape[d] != 1] == sorted(d for d in row_dims if shape[d] != 1):
        # only the class dimension (or one of size 1) moved: the rows keep their order
        rows = state.rows
        if rows is not None:
            rows = rows.reshape([shape[d] for d in row_dims])
        return RowMap(moved, rows)
    order = [d if k is None or d < k else d - 1 for d in row_dims]
    return RowMap(moved, _numbered(state, shape, device).permute(order))


def _on_transpose(state: RowMap, node: Any, shape: Shape, device: torch.device) -> RowMap:
    return _permute(state, _transposed(range(len(shape)), node), shape, device)


def _on_permute(state: RowMap, node: Any, shape: Shape, device: torch.device) -> RowMap:
    return _permute(state, _dims(node._saved_dims, len(shape)), shape, device)


def _on_t(state: RowMap, node: Any, shape: Shape, device: torch.device) -> RowMap:
    return _permute(state, list(range(len(shape)))[::-1], shape, device)


def _row_dim(state: RowMap, node: Any, shape: Shape) -> int | None:
    """The saved dimension counted among the rows' dimensions; None if it is the class dimension."""
    dim = signed(node._saved_dim) % len(shape)
    if state.class_dim is None:
        return dim
    return None if dim == state.class_dim else dim - (dim > state.class_dim)


def _on_slice(state: RowMap, node: Any, shape: Shape, device: torch.device) -> RowMap:
    dim = _row_dim(state, node, shape)
    size = shape[signed(node._saved_dim) % len(shape)]
    selected = range(size)[signed(node._saved_start) : signed(node._saved_end) : node._saved_step]
    if len(selected) == size:
        return state
    if dim is None:
        raise NoRowMap(node.name())
    index = torch.tensor(selected, dtype=torch.int64, device=device)
    return RowMap(state.class_dim, _numbered(state, shape, device).index_select(dim, index))


def _on_select(state: RowMap, node: Any, shape: Shape, device: torch.device) -> RowMap:
    dim = _row_dim(state, node, shape)
    if dim is None:
        if shape[state.class_dim or 0] != 1:
            raise NoRowMap(node.name())
        return RowMap(None, state.rows)
    full = signed(node._saved_dim) % len(shape)
    rows = _numbered(state, shape, device).select(dim, signed(node._saved_index))
    return RowMap(None if state.class_dim is None else state.class_dim - (full < state.class_dim), rows)


def _on_index_select(state: RowMap, node: Any, shape: Shape, device: torch.device) -> RowMap:
    dim = _row_dim(state, node, shape)
    if dim is None:
        raise NoRowMap(node.name())
    return RowMap(state.class_dim, _numbered(state, shape, device).index_select(dim, node._saved_index))


def _on_index(state: RowMap, node: Any, shape: Shape, device: torch.device) -> RowMap:
    """z[mask], z[:, indices], ...: only ahead of a trailing class dimension, where its place afterwards is certain."""
    indices = list(node._saved_indices)
    while indices and indices[-1] is None:
        indices.pop()
    taken = sum(1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.dim() for i in indices)
    rank = len(shape)
    if state.class_dim is not None and (state.class_dim != rank - 1 or taken > rank - 1):
        raise NoRowMap(node.name())
    key = tuple(slice(None) if i is None else i for i in indices)
    rows = _numbered(state, shape, device)[key]
    return RowMap(None if state.class_dim is None else rows.dim(), rows)


_HANDLERS: dict[str, Callable[[RowMap, Any, Shape, torch.device], RowMap]] = {
    "TransposeBackward0": _on_transpose,
    "PermuteBackward0": _on_permute,
    "TBackward0": _on_t,
    "UnsqueezeBackward0": lambda state, node, shape, device: state,
    "SliceBackward0": _on_slice,
    "SelectBackward0": _on_select,
    "IndexSelectBackward0": _on_index_select,
    "IndexBackward0": _on_index,
}
