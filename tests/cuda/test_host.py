"""The CUDA kernels and bindings, compiled as C++ over a shim, against float64: indices, sums, formulas and the launches' logic.

A fiber stands for each CUDA thread; between two barriers threads run in an order of the test's choice. Shared memory holds NaN
before it is written, with guard bytes behind it; misaligned 16-byte accesses end the process. Not covered: what nvcc compiles,
divergence within a warp, the memory model between blocks, streams, anything asynchronous.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_host_library
import head_problems as head
import oracle
import patch_problems as patch
import pytest
import torch
import trace_problems as trace
from cuda_host_library import Shim, kernels_on_the_host
from hypothesis import example, given, settings
from inputs import DTYPES, LAYOUTS, confident_logits, make_input, needs_native
from tolerance import relative_error
from torch import Tensor

from fam_ext.ops import head_cross_entropy as head_module
from fam_ext.ops.softmax_trace import softmax_trace

pytestmark = [
    needs_native,
    pytest.mark.skipif(sys.platform != "linux", reason="the shim's fibers are Linux's"),
    pytest.mark.skipif(cuda_host_library.compiler() is None, reason="no C++ compiler was found"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
]
HEAD_SHAPES = [(37, 5), (3, 34, 2, 5), (19, 1)]


@pytest.fixture(autouse=True, scope="module")
def shim() -> Iterator[Shim]:
    with kernels_on_the_host() as shim:
        yield shim


@pytest.fixture(params=trace.FORMS)
def form(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(head_module, "choose_form", lambda *sizes: request.param)
    return request.param


def test_the_cuda_kernels_are_what_runs(shim: Shim) -> None:
    shim.launches()
    softmax_trace(make_input((5, 3)), make_input((3, 4)), backend="native")
    assert shim.launches() > 0


@pytest.mark.parametrize(("shape", "fan_in"), trace.LOGITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_softmax_trace(shape: Any, fan_in: int, dtype: torch.dtype, form: str) -> None:
    trace.check(3 * make_input(shape, dtype), make_input((shape[1], fan_in), dtype, seed=1), form, "native")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES[:3]], ids=str)
def test_softmax_trace_layouts_and_dtypes(layout: str, dtypes: Any, form: str) -> None:
    for shape in ((3, 36, 5), (2, 4, 3, 10)):
        weight = make_input((shape[1], 21), dtypes[1], layout, seed=1)
        trace.check(make_input(shape, dtypes[0], layout), weight, form, "native")


def test_many_row_dimensions_are_copied(form: str) -> None:
    """Eight dimensions whose strides do not merge are more than a kernel's view holds."""
    for classes in (3, 34):
        z = make_input((2, classes, 2, 2, 2, 2, 2, 2, 2), layout="transposed")
        trace.check(z, make_input((classes, 5), seed=1), form, "native")


def test_several_shares_and_tiles(form: str) -> None:
    """Blocks that take several tiles: more rows than 128 times the most shares."""
    trace.check(
        make_input((1024 * 128 + 77, 2)), make_input((2, 3), seed=1), form, "native"
    ) if form == "pairwise" else None
    trace.check(make_input((5000, 3)), make_input((3, 3), seed=1), form, "native")


@pytest.mark.parametrize("classes", [2, 10, 32, 33, 100])
def test_confident_predictions(classes: int, form: str) -> None:
    for digits in (2, 5, 8):
        z, y = confident_logits(67, classes, 10.0**-digits)
        phi, weight, upstream = torch.randn(67, 37), torch.randn(classes, 37), torch.rand(67)
        results = trace.differentiate(trace.call(form, "native"), z, weight, upstream)
        truth = trace.differentiate(oracle.softmax_trace, z.double(), weight.double(), upstream)
        results += head.differentiate(lambda *t: head_module.head_cross_entropy(*t, y), (z, phi, weight))  # noqa: B023
        inputs = (z.double(), phi.double(), weight.double())
        truth += head.differentiate(lambda *t: head.exact(*t, y, strength=1.0), inputs)  # noqa: B023
        assert max(relative_error(a, b) for a, b in zip(results, truth, strict=True)) <= 2e-6


def test_bad_numbers_stay_in_their_rows(form: str) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for shape in ((20, 4), (20, 40)):
            trace.check_bad_numbers_stay_in_their_rows(bad, shape, form, "native")
    for classes in (4, 40):
        trace.check_masked_class_is_no_class(classes, form, "native")


@pytest.mark.parametrize("variant", head.VARIANTS)
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=str)
def test_head_cross_entropy(variant: str, shape: Any, form: str) -> None:
    head.check(head.make_problem(shape, 21), *head.VARIANTS[variant](shape), "native")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtypes", [*((d,) * 3 for d in DTYPES), *(DTYPES[k : k + 3] for k in range(2))], ids=str
)
def test_head_layouts_and_dtypes(layout: str, dtypes: Any, form: str) -> None:
    for shape, fan_in in (((2, 36, 5), 23), ((2, 4, 3, 10), 16)):
        inputs = head.make_problem(shape, fan_in, dtypes, layout)
        head.check(inputs, head.indices(shape, -100), {"strength": 0.1}, "native")
        soft = make_input(shape, dtypes[2], layout, seed=5).abs()
        head.check(inputs, soft, {"label_smoothing": 0.1}, "native")


def test_head_edges(form: str) -> None:
    head.check_all_rows_ignored(form, "native")
    head.check_no_rows(form, "native")
    for shape in ((20, 4), (20, 40), (4, 3, 5)):
        head.check_ignored_rows_may_hold_anything("smoothing weights", shape, form, "native")
    for where in range(3):
        head.check_bad_numbers_come_out(torch.nan, where, form, "native")


@pytest.mark.parametrize("rows", [1, 513, 4100])
def test_head_sums_over_blocks(rows: int) -> None:
    shape = (rows, 6)
    options = {"class_weight": head.omega(shape), "label_smoothing": 0.1}
    head.check(
        head.make_problem(shape, 5), head.indices(shape, -100 if rows > 1 else None), options, "native"
    )


@pytest.mark.parametrize("name", patch.CASES)
def test_patch_sqnorm(name: str) -> None:
    shape, *case = patch.CASES[name]
    patch.check(make_input(shape), case, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_patch_layouts_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    for name in (
        "1d-stride-dilation",
        "2d-all",
        "2d-depthwise-stride",
        "2d-pointwise-groups",
        "3d-all",
        "rows-groups",
    ):
        shape, *case = patch.CASES[name]
        patch.check(make_input(shape, dtype, layout), case, "native")
    for shape, groups in (((2, 32, 8, 4), 2), ((2, 8, 4, 4), 1), ((3, 32, 1, 3), 4)):  # whole 16-byte packs
        patch.check(make_input(shape, dtype, layout), ((3, 2), (1, 2), (1, 0), (1, 1), groups), "native")


@settings(max_examples=60, deadline=None)
@example((torch.zeros(1, 0), ((), (), (), (), 1)))
@given(patch.problems())
def test_any_patch_problem(problem: Any) -> None:
    x, case = problem
    patch.check(x, case, "native")


def test_a_window_beyond_shared_memory() -> None:
    """One tile's sources along the first axis exceed it: two passes over global memory take over."""
    for shape, padding in (((1, 1, 700, 40), 0), ((1, 2, 350, 8), 175)):
        x = make_input(shape, torch.float64)
        patch.check(x, ((3, 2), (1, 1), (padding, 0), (300 if padding == 0 else 260, 1), 1), "native")


def everything() -> list[Tensor]:
    """Results of every kernel on sizes that make several blocks, shares and tiles."""
    results: list[Tensor] = []
    for shape, fan_in in (((600, 7), 40), ((70, 40), 33), ((9, 130), 140)):
        logits, phi, weight = head.make_problem(shape, fan_in)
        target = torch.arange(shape[0]) % shape[1]
        for form in trace.FORMS if shape[0] < 100 else ["pairwise"]:
            results += trace.differentiate(
                trace.call(form, "native"), logits, weight, torch.rand(1).expand(shape[0])
            )
            arguments = (
                logits,
                phi,
                weight,
                target,
                None,
                1,
                0.1,
                True,
                0.5,
                True,
                form == "pairwise",
                True,
                True,
                True,
            )
            results += torch.ops.fam_ext.head_cross_entropy_forward(*arguments)
    for x in (
        make_input((2, 64, 9, 12)),
        make_input((2, 64, 9, 12), layout="channels_last"),
        make_input((2, 6, 4, 5, 7)),
    ):
        results += patch.run(x, ((3,) * (x.dim() - 2), 1, 1, 1, 2), "native")
    return [t.clone() for t in results]


@pytest.mark.parametrize("order", [1, 2])
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(order: int, shim: Shim) -> None:
    """To the last bit: a barrier stands between the thread that makes a value and those that read it, and no sum depends on which
    block comes first."""
    torch.manual_seed(1)
    expected = everything()
    shim.set_order(order)
    try:
        torch.manual_seed(1)
        for a, b in zip(everything(), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        shim.set_order(0)


def count(shim: Shim, action: Callable[[], Any]) -> tuple[int, Any]:
    shim.launches()
    result = action()
    return shim.launches(), result


# (rows, classes, features) -> phases of softmax_trace, of its backward, of head_cross_entropy: launches where they are not fused
SMALL_HEADS = {
    (128, 10, 64): (1, 2, 2),  # every block prepares and adds up for itself
    (19, 10, 700): (2, 2, 3),  # more differences than a block should take alone
    (128, 17, 64): (2, 3, 4),  # more pairs than threads
}


@pytest.mark.parametrize("sizes", SMALL_HEADS, ids=str)
def test_few_classes_take_one_launch_each_way(sizes: tuple[int, int, int], shim: Shim) -> None:
    """The same bits come out where the device has no cooperative launch, or too few processors for one."""
    rows, classes, fan_in = sizes
    logits, phi, weight = head.make_problem((rows, classes), fan_in)
    target = torch.arange(rows) % classes
    arguments = (logits, phi, weight, target, None, -100, 0.0, True, 0.5, True, True, True, True, True)
    forward = lambda: torch.ops.fam_ext.softmax_trace(logits, weight, True)  # noqa: E731
    saved = forward()[1]
    actions = [
        forward,
        lambda: torch.ops.fam_ext.softmax_trace_backward(
            torch.ones(rows), logits, weight, saved, True, True, True
        ),
        lambda: torch.ops.fam_ext.head_cross_entropy_forward(*arguments),
    ]
    for action, phases in zip(actions, SMALL_HEADS[sizes], strict=True):
        shim.set_cooperative(True)
        shim.grid_barriers()
        launches, one = count(shim, action)
        assert (launches, shim.grid_barriers()) == (1, phases - 1)
        for supported, processors in ((False, 64), (True, 1)):
            shim.set_cooperative(supported, processors)
            launches, several = count(shim, action)
            assert launches == phases
            assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    shim.set_cooperative(True)


@pytest.mark.parametrize(
    ("rows", "classes", "fan_in"), [(40, 10, 728), (40, 15, 273), (4096, 3, 5), (9, 2, 9000)]
)
def test_what_every_block_does_itself(rows: int, classes: int, fan_in: int) -> None:
    """The largest sizes of it; the last weight does not fit in shared memory at once."""
    shape = (rows, classes)
    options = {"class_weight": head.omega(shape), "label_smoothing": 0.1}
    for inputs in (head.make_problem(shape, fan_in), head.make_problem(shape, fan_in, (torch.float64,) * 3)):
        head.check(inputs, head.indices(shape, -100), options, "native")


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)], ids=str
)
def test_logits_and_features_of_different_dtypes(dtypes: Any) -> None:
    for shape in ((20, 7), (20, 40)):
        inputs = head.make_problem(shape, 16, (*dtypes, torch.float32))
        soft = make_input(shape, torch.float16, seed=5).abs()
        head.check(inputs, soft, {"label_smoothing": 0.1}, "native")
        head.check(inputs, head.indices(shape, -100), {}, "native")


def test_many_pairs_of_classes() -> None:
    """Where a block takes a tile of pairs, and on both sides of that size."""
    for classes in (255, 257):
        trace.check(make_input((5, classes)), make_input((classes, 37), seed=1), "pairwise", "native")


def test_class_index_out_of_range_stops_the_kernel() -> None:
    code = """
import torch, cuda_host_library
from fam_ext.functional import head_cross_entropy
with cuda_host_library.kernels_on_the_host():
    head_cross_entropy(torch.zeros(4, CLASSES), torch.zeros(4, 5), torch.zeros(CLASSES, 5), torch.tensor([0, 1, CLASSES, 2]))
"""
    for classes in ("3", "40"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code.replace("CLASSES", classes)],
            cwd=Path(cuda_host_library.__file__).parent,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode < 0
        assert "target must be a class index or ignore_index" in done.stderr
