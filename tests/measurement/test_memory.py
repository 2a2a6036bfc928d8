"""What fam_ext.measure takes: products leave no graph, as many are formed together as max_bytes allows."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from allocations import peak_memory
from torch import Tensor, nn

import fam_ext
from fam_ext.measurement import data_set

# 64 products behind outputs of 2 x 200,000 numbers: 1.6 MB each, of which a product takes several
PROGRAM = """
import sys
import torch
from torch import nn
import fam_ext

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 200_000))
batch = (torch.randn(2, 4), torch.tensor([3, 70_000]))
criterion = nn.CrossEntropyLoss()

def run(net, target, **options):
    return fam_ext.measure(
        net, [(batch[0], target)], "0", criterion, ["neuronwise", "trace"], progress=False, **options
    ).values

def peak():  # not ru_maxrss, which begins with the parent's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

options = eval(sys.argv[1])
run(nn.Sequential(net[0], nn.Tanh(), nn.Linear(16, 9)), torch.tensor([3, 8]), **options | {"max_bytes": 2**30})
torch.autograd.grad(criterion(net(batch[0]), batch[1]), list(net.parameters()), create_graph=True)
before = peak()
run(net, batch[1], **options)
print(peak() - before)
"""


def resident(**options: Any) -> int:
    """Bytes by which the resident memory of a process grows over what a forward pass and its gradient take.

    glibc keeps freed blocks below 32 MB for itself, in holes that larger ones do not fit in; here it gives them back.
    """
    command = [sys.executable, "-c", PROGRAM, repr(options)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("options", [{"method": "exact"}, {"method": "hutchinson", "probes": 64}])
def test_resident_memory_stays_within_max_bytes(options: dict[str, Any]) -> None:
    bound = 32 * 2**20
    assert resident(max_bytes=bound, **options) < 1.3 * bound
    assert resident(max_bytes=2**30, **options) > 1.5 * bound  # the bound is what holds it


def tail(samples: int = 2) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 20_000))
    return net, [(torch.randn(samples, 4), torch.randint(0, 20_000, (samples,)))]


@pytest.mark.parametrize("bound", [2**21, 2**23, 2**25])
@pytest.mark.parametrize("options", [{"method": "exact"}, {"method": "hutchinson", "probes": 64}])
def test_tensors_of_products_stay_within_max_bytes(options: dict[str, Any], bound: int) -> None:
    net, batches = tail()
    first = peak_memory(
        lambda: torch.autograd.grad(
            nn.functional.cross_entropy(net(batches[0][0]), batches[0][1]), net[0].weight, create_graph=True
        )
    )
    arguments: Any = (net, batches, "0", nn.CrossEntropyLoss(), ["neuronwise"])
    peak = peak_memory(lambda: fam_ext.measure(*arguments, progress=False, max_bytes=bound, **options))
    assert peak - first < 1.3 * bound
    values = [
        fam_ext.measure(*arguments, progress=False, max_bytes=b, **options).values["neuronwise"]
        for b in (bound, 2**30)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4 if options["method"] == "exact" else 1.0)


def test_one_product_over_the_bound_is_refused() -> None:
    net, batches = tail()
    with pytest.raises(fam_ext.UnsupportedError, match=r"one Hessian product takes .* over max_bytes=100000"):
        fam_ext.measure(net, batches, "0", nn.CrossEntropyLoss(), progress=False, max_bytes=100_000)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        torch.OutOfMemoryError("no more"),
    ],
)
def test_out_of_memory_names_the_settings(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(data_set, "_by_layer", fails)
    net, batches = tail()
    with pytest.raises((MemoryError, torch.OutOfMemoryError)) as caught:
        fam_ext.measure(net, batches, "0", nn.CrossEntropyLoss(), method="exact", probes=5, max_bytes=123456)
    for part in ("method='exact'", "probes=5", "max_bytes=123456", str(error)):
        assert part in str(caught.value)
    assert isinstance(caught.value, torch.OutOfMemoryError) == isinstance(error, torch.OutOfMemoryError)


def test_another_runtime_error_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(data_set, "_by_layer", fails)
    net, batches = tail()
    with pytest.raises(RuntimeError, match=r"^something else$"):
        fam_ext.measure(net, batches, "0", nn.CrossEntropyLoss())
