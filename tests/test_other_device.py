"""On a device that is not the CPU: nothing is made on the CPU beside it, and what the host reads back is counted.

The device is the CPU under another name, so no kernel for a GPU runs here; what is found is every tensor without a device, in the
package and in the tests that a GPU runs. It stays registered for good, hence the process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import other_device
import pytest
import torch
from inputs import ON_OTHER
from torch import Tensor, nn

from fam_ext import FAMLoss

pytestmark = pytest.mark.on_devices

here = pytest.mark.skipif(not ON_OTHER, reason="test_every_way_to_kappa runs these in another process")


@pytest.mark.slow
@pytest.mark.skipif(ON_OTHER, reason="this is that process")
def test_every_way_to_kappa(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-m",
            "on_devices",
            "--ignore=ops",
            "--ignore=derivatives",
        ],
        env={**os.environ, "FAM_EXT_TEST_DEVICE": other_device.NAME, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 500


@here
def test_the_device_refuses_tensors_of_the_cpu() -> None:
    x = torch.ones(3)
    assert x.device.type == other_device.NAME
    for beside in (
        lambda: x + torch.ones(3, device="cpu"),
        lambda: torch.cat([x, torch.ones(3, device="cpu")]),
    ):
        with pytest.raises(RuntimeError, match="device"):
            beside()
    before = other_device.register().reads()
    assert (x + torch.tensor(1.0, device="cpu")).sum().item() == 6
    assert other_device.register().reads() == before + 1


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(80, 4))  # fmt: skip


# layer, options, numbers that the host waits for in each step but the first, which finds out whether samples interact, and the
# 1st, 2nd, 4th, 8th, ... after it, which check that again
STEPS: dict[str, tuple[int, dict[str, Any], int]] = {
    "head": (6, {}, 0),
    "label smoothing": (6, {"criterion": nn.CrossEntropyLoss(label_smoothing=0.1)}, 0),
    "fisher": (3, {"curvature": "fisher"}, 0),
    "ggn": (3, {"curvature": "ggn"}, 0),
    "hutchinson": (3, {"method": "hutchinson"}, 1),  # whether the Gram matrix's Cholesky factor can be had
    "behind batch_norm": (0, {"method": "hutchinson"}, 1),
}


@here
@pytest.mark.parametrize("name", STEPS)
def test_the_host_waits_for_nothing_else(name: str) -> None:
    index, options, expected = STEPS[name]
    net, x, y = network(), torch.randn(6, 3, 8, 8), torch.randint(4, (6,))
    criterion = FAMLoss(
        **{"criterion": nn.CrossEntropyLoss(), "layer": net[index], "strength": 0.1, **options}
    )
    step: Callable[[], Tensor] = lambda: criterion(net(x), y)  # noqa: E731
    for _ in range(9):  # advice on the term, and checks of samples, read at the 1st, 2nd, 4th, 8th, ... time
        step().backward()
    before = other_device.register().reads()
    for _ in range(3):
        step().backward()
    assert other_device.register().reads() - before == 3 * expected


@here
def test_finite_differences_under_the_same_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the device are drawn again, too."""
    device = getattr(torch, other_device.NAME)
    states = []
    monkeypatch.setattr(device, "set_rng_state", lambda state, device=None: states.append(device))
    net, x, y = network(), torch.randn(6, 3, 8, 8), torch.randint(4, (6,))
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[3], 0.1, method="finite_difference", probes=2)
    loss = criterion(net(x), y, closure=lambda: criterion.criterion(net(x), y))
    loss.backward()
    assert loss.isfinite() and net[3].weight.grad is not None
    assert states == [net[3].weight.device] * 5
