"""Layouts of the criterion's input: every operation that moves numbers is replayed on row numbers and compared with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fam_ext.capture import row_map
from fam_ext.capture.row_map import NoRowMap

pytestmark = pytest.mark.on_devices
KEY = object()
SHAPE = (4, 5, 6, 3)


def made(shape: tuple[int, ...]) -> Tensor:
    """z, marked as a captured call, whose entries tell where they are: rows in row-major order, and the class."""
    rows = torch.Size(shape[:-1]).numel()
    values = torch.arange(rows)[:, None] * 100 + torch.arange(shape[-1])
    z = values.reshape(shape).double().requires_grad_() * 1
    z.grad_fn.metadata[(KEY, 0)] = "stored"
    return z


def check(
    move: Callable[[Tensor], Tensor], shape: tuple[int, ...] = SHAPE, in_order: bool | None = None
) -> None:
    """The map of `move`'s result names the row and class that each of its numbers is."""
    z = made(shape)
    moved = move(z)
    hit = row_map.find(moved, KEY)
    assert hit is not None and hit[0] == "stored"
    class_dim, rows = row_map.replay(hit[1], tuple(z.shape), z.dim() - 1, z.device)
    numbers = moved.detach()
    if class_dim is None:
        numbers, class_dim = numbers.unsqueeze(-1), numbers.dim()
    numbers = numbers.movedim(class_dim, -1)
    assert numbers.shape[-1] == shape[-1]
    if in_order is not None:
        assert (rows is None) == in_order
    if rows is None:
        rows = torch.arange(numbers.shape[:-1].numel()).reshape(numbers.shape[:-1])
    expected = rows.unsqueeze(-1) * 100 + torch.arange(shape[-1])
    assert torch.equal(numbers, expected.double())


MASK = torch.tensor([True, False, True, True])

MOVES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "nothing": (lambda z: z, True),
    "view": (lambda z: z.view(-1, 3), True),
    "view_4_to_5": (lambda z: z.view(2, 2, 5, 6, 3), True),
    "reshape_of_a_permutation": (lambda z: z.permute(1, 0, 2, 3).reshape(20, 6, 3), False),
    "flatten": (lambda z: z.flatten(1, 2), True),
    "classes_first": (lambda z: z.permute(0, 3, 1, 2), True),
    "movedim": (lambda z: z.movedim(-1, 0), True),
    "transpose": (lambda z: z.transpose(0, 1), False),
    "transpose_of_classes": (lambda z: z.transpose(1, -1), False),
    "t": (lambda z: z.view(-1, 3).t(), True),
    "unsqueeze": (lambda z: z.unsqueeze(1), True),
    "unsqueeze_last": (lambda z: z.unsqueeze(-1), True),
    "squeeze": (lambda z: z.unsqueeze(0).squeeze(), True),
    "squeeze_of_a_dimension": (lambda z: z.unsqueeze(2).squeeze(2), True),
    "cast": (lambda z: z.float().double(), True),
    "clone": (lambda z: z.clone(), True),
    "alias": (lambda z: z.view_as(z), True),
    "slice": (lambda z: z[:, 1:4], False),
    "slice_with_a_step": (lambda z: z[1::2, :, ::3], False),
    "slice_of_everything": (lambda z: z[:, :100], True),
    "negative_slice": (lambda z: z[:, -2:], False),
    "select": (lambda z: z[:, 2], False),
    "select_from_the_end": (lambda z: z[:, :, -1], False),
    "select_behind_the_classes": (lambda z: z.movedim(-1, 0)[:, :, 4], False),
    "slice_behind_the_classes": (lambda z: z.movedim(-1, 1)[:, :, 1:3], False),
    "index_select": (lambda z: z.index_select(1, torch.tensor([4, 0, 0])), False),
    "index_select_of_moved": (lambda z: z.movedim(-1, 1).index_select(2, torch.tensor([3, 1])), False),
    "mask": (lambda z: z[MASK.to(z.device)], False),
    "mask_of_rows": (lambda z: z[z[..., 0] > 500], False),
    "indices": (lambda z: z[:, torch.tensor([3, 1])], False),
    "two_indices": (lambda z: z[torch.tensor([3, 1]), torch.tensor([0, 4])], False),
    "last_token": (lambda z: z[torch.arange(4), torch.tensor([0, 4, 2, 2])], False),
    "shifted_tokens": (lambda z: z[:, :-1].reshape(-1, 3), False),
    "a_chain": (lambda z: z.transpose(0, 1)[1:].flatten(0, 1).movedim(-1, 1)[:, :, 2].float().double(), False),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_rows_and_classes(name: str) -> None:
    move, in_order = MOVES[name]
    check(move, in_order=in_order)


@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (1, 1, 3), (1, 2, 1), (3, 3, 3)])
@pytest.mark.parametrize(
    "move", [lambda z: z.unsqueeze(0), lambda z: z.movedim(-1, 0), lambda z: z.flatten(0, -2)]
)
def test_sizes_of_one_and_sizes_alike(shape: tuple[int, ...], move: Callable[[Tensor], Tensor]) -> None:
    check(move, shape)


def test_a_single_output_that_is_squeezed_away() -> None:
    check(lambda z: z.squeeze(-1), (4, 1))
    check(lambda z: z[..., 0], (4, 5, 1))
    check(lambda z: z.squeeze(-1).t(), (4, 5, 1))
    check(lambda z: z.squeeze(-1)[:, 1:], (4, 5, 1))


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "arithmetic": (lambda z: z + 0, "AddBackward0"),
    "softmax": (lambda z: z.softmax(-1), "SoftmaxBackward0"),
    "arithmetic_under_a_view": (lambda z: (2 * z).view(-1, 3), "MulBackward0"),
    "a_slice_of_the_classes": (lambda z: z[..., :2], "SliceBackward0"),
    "one_of_the_classes": (lambda z: z[..., 1], "SelectBackward0"),
    "an_index_of_classes": (lambda z: z.index_select(-1, torch.tensor([1, 0, 2])), "IndexSelectBackward0"),
    "a_mask_of_classes": (lambda z: z[..., torch.tensor([True, True, False])], "IndexBackward0"),
    "a_mask_behind_the_classes": (lambda z: z.movedim(-1, 0)[:, MASK.to(z.device)], "IndexBackward0"),
    "rows_and_classes_mixed": (lambda z: z.reshape(4, 5, 18), "ViewBackward0"),
    "classes_split": (lambda z: z.movedim(-1, 0).reshape(36, 10), "UnsafeViewBackward0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_more_than_move_rows(name: str) -> None:
    move, node = REFUSED[name]
    z = made(SHAPE)

    def mapped() -> Any:
        hit = row_map.find(move(z), KEY)
        assert hit is not None
        return row_map.replay(hit[1], SHAPE, 3, z.device)

    with pytest.raises(NoRowMap) as refusal:
        mapped()
    assert str(refusal.value).rstrip("0") == node.rstrip("0") or "View" in str(refusal.value)


def test_the_walk_ends() -> None:
    """At a leaf, after a chain longer than layouts are, and for another output of the same node."""
    assert row_map.find(torch.ones(2, requires_grad=True), KEY) is None
    with pytest.raises(NoRowMap, match="AccumulateGrad"):
        row_map.find(torch.ones(2, requires_grad=True).view(2), KEY)
    z = made((4, 3))
    for _ in range(row_map._MAX_STEPS):
        z = z.view(4, 3)
    assert row_map.find(z, KEY) is not None
    with pytest.raises(NoRowMap):
        row_map.find(z.view(4, 3), KEY)
    assert row_map.find(made((4, 3)), KEY)
    with pytest.raises(NoRowMap):
        row_map.find(made((4, 3)), object())


def test_which_output_of_a_node() -> None:
    """A backward hook of a module stands between: its outputs keep their numbers."""
    x = torch.randn(4, 6, requires_grad=True)
    left, right = (x * 1).split(3, 1)
    left.grad_fn.metadata[(KEY, right.output_nr)] = "right"

    class Both(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a, b

    both = Both()
    both.register_full_backward_hook(lambda *args: None)
    first, second = both(left, right)
    hit = row_map.find(second.transpose(0, 1), KEY)
    assert hit is not None and hit[0] == "right"
    with pytest.raises(NoRowMap):
        row_map.find(first, KEY)
