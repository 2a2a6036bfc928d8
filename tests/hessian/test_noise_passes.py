"""The compiled passes against the form in plain PyTorch: values, gradients, gradients of gradients, and what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import needs_native
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fam_ext import FAMLoss
from fam_ext.hessian import noise, noise_draws, noise_passes
from fam_ext.layers.linear_map import LinearMap

pytestmark = needs_native

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "rows": (lambda: nn.Linear(37, 5), (9, 37)),
    "one row": (lambda: nn.Linear(37, 5), (37,)),
    "tokens": (lambda: nn.Linear(19, 5), (3, 7, 19)),
    "many tokens": (lambda: nn.Linear(70, 5), (2, 300, 70)),
    "1d": (lambda: nn.Conv1d(2, 3, 2), (3, 2, 5)),
    "1d reflect": (lambda: nn.Conv1d(3, 4, 5, padding=4, padding_mode="reflect"), (3, 3, 9)),
    "2d": (lambda: nn.Conv2d(5, 7, 3, padding=1), (21, 5, 6, 9)),
    "2d wide": (lambda: nn.Conv2d(3, 33, 3, stride=2, padding=1, bias=False), (2, 3, 70, 66)),
    "2d groups": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1), dilation=2, groups=2),
        (4, 4, 9, 8),
    ),
    "2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (3, 2, 4, 5)),
    "2d replicate": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=3, padding_mode="replicate"), (3, 2, 4, 5)),
    "2d same": (lambda: nn.Conv2d(2, 3, (4, 2), padding="same"), (3, 2, 5, 4)),
    "2d pointwise": (lambda: nn.Conv2d(18, 3, 1, stride=2, groups=3), (4, 18, 35, 37)),
    "2d transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (3, 4, 4, 5),
    ),
    "3d": (lambda: nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)), (2, 2, 3, 4, 5)),
}
PASSES = ("_with_length", "_rank_one", "_project", "_outer")


class Setting:
    """A layer, its input and a draw."""

    def __init__(self, name: str, dtype: torch.dtype, shared: bool = False, last: bool = False) -> None:
        torch.manual_seed(3)
        make, shape = LAYERS[name]
        self.layer = LinearMap("test", make().to(dtype))
        self.x = torch.randn(shape, dtype=dtype)
        if last:
            self.x = self.x.movedim(1, -1).contiguous().movedim(-1, 1)
        self.drawn = noise_draws.draw(self.layer, self.x, None, shared)
        if name == "tokens" and not shared:
            self.drawn = self.drawn._replace(positions=(torch.rand(shape[:2]) < 0.6).to(dtype))

    def output(self, x: Tensor, weight: Tensor, strength: Any = 0.2) -> Tensor:
        if noise_draws.on_input(self.layer):
            return self.layer.apply(noise.perturb_input(self.layer, self.drawn, x, strength), weight)
        x, inner = noise.products(self.layer, self.drawn, x)
        z = self.layer.apply(x, weight)
        return noise.perturb_output(self.layer, self.drawn, x, weight, z, strength, inner)

    def all(self, upstream: Tensor | None = None) -> list[Tensor]:
        """z and the gradients of features and weight."""
        x = self.x.clone().requires_grad_()
        weight = self.layer.module.weight.detach().clone().requires_grad_()
        z = self.output(x, weight)
        made = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).reshape(z.shape)
        return [z.detach(), *torch.autograd.grad(z, [x, weight], made if upstream is None else upstream)]


def plainly(monkeypatch: pytest.MonkeyPatch, setting: Setting, **keywords: Any) -> list[Tensor]:
    """The same from plain PyTorch."""
    with monkeypatch.context() as patch:
        patch.setattr(noise_passes, "_outer", None)
        return setting.all(**keywords)


def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that give a result from now on."""
    taken: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            taken.extend([name] * (result is not None))
            return result

        return call

    for name in PASSES:
        monkeypatch.setattr(noise_passes, name, counted(name, getattr(noise_passes, name)))
    return taken


def expected_passes(name: str) -> list[str]:
    if name in ("rows", "one row"):
        return ["_with_length"]
    return ["_rank_one"] if "tokens" in name or "pointwise" in name else ["_project", "_outer"]


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(name: str, shared: bool, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if last and LAYERS[name][0]().__class__ is nn.Linear:
        last = False
    setting = Setting(name, torch.float64, shared, last)
    expected = plainly(monkeypatch, setting)
    taken = count(monkeypatch)
    for got, right in zip(setting.all(), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    alone = name in ("rows", "one row") and shared  # one draw for all rows: rank one
    assert taken == (["_rank_one"] if alone else expected_passes(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["rows", "tokens", "2d groups", "2d pointwise", "2d transposed"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    setting = Setting(name, dtype)
    exact = copy.copy(setting)
    exact.layer = LinearMap("test", copy.deepcopy(setting.layer.module).double())
    exact.x = setting.x.double()
    exact.drawn = noise_draws.Draw(*(None if t is None else t.double() for t in setting.drawn))
    eps = torch.finfo(dtype).eps
    for got, right in zip(setting.all(), exact.all(), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), right, rtol=0, atol=12 * eps * float(right.abs().max()))


@pytest.mark.parametrize("name", ["rows", "tokens", "1d", "1d reflect", "2d circular", "2d pointwise"])
def test_gradients_of_gradients(name: str) -> None:
    setting = Setting(name, torch.float64)
    setting.x = setting.x[:2, ..., :8] if name != "rows" else setting.x[:2]
    if name == "tokens":
        setting.layer = LinearMap("test", nn.Linear(8, 2).double())
    if name == "2d pointwise":
        setting.x = setting.x[:, :, :2, :2].contiguous()
    setting.x = setting.x.contiguous()
    setting.drawn = noise_draws.draw(setting.layer, setting.x)
    inputs = (setting.x.requires_grad_(), setting.layer.module.weight.detach().requires_grad_())
    assert torch.autograd.gradcheck(setting.output, inputs)
    assert torch.autograd.gradgradcheck(setting.output, inputs)


@pytest.mark.parametrize("name", ["rows", "tokens", "2d", "2d pointwise"])
def test_gradients_that_others_hold_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook keeps the gradient that comes from behind; the same one goes to another branch, too."""
    setting = Setting(name, torch.float64)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        held: list[Tensor] = []
        x = setting.x.clone().requires_grad_()
        other = torch.zeros_like(x, requires_grad=True)
        if noise_draws.on_input(setting.layer):
            noisy = noise.perturb_input(setting.layer, setting.drawn, x, 0.2)
        else:
            noisy, inner = noise.products(setting.layer, setting.drawn, x)
        noisy.register_hook(held.append)
        loss = (noisy + other).square().sum()
        if not noise_draws.on_input(setting.layer):
            loss = loss + inner.square().sum()
        gradients = torch.autograd.grad(loss, [x, other])
        return held[0].clone(), *gradients

    got = run()
    with monkeypatch.context() as patch:
        patch.setattr(noise_passes, "_outer", None)
        expected = run()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["rows", "tokens", "2d", "2d pointwise"])
def test_upstream_gradients_of_other_layouts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(name, torch.float64)
    shape = setting.all()[0].shape
    turned = torch.randn(tuple(reversed(shape)), dtype=torch.float64).permute(*reversed(range(len(shape))))
    for upstream in (torch.ones((), dtype=torch.float64).expand(shape), turned):
        expected = plainly(monkeypatch, setting, upstream=upstream)
        for got, right in zip(setting.all(upstream=upstream), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_what_is_not_ordinary_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = count(monkeypatch)

    class Kind(Tensor):
        pass

    for name in ("rows", "tokens", "2d", "2d pointwise"):
        setting = Setting(name, torch.float64)
        weight = setting.layer.module.weight.detach()
        expected = setting.output(setting.x, weight)
        taken.clear()
        every_other = torch.stack([setting.x, setting.x], -1)[..., 0]  # strided
        found = [setting.output(setting.x.as_subclass(Kind), weight), setting.output(every_other, weight)]
        with FlopCounterMode(display=False):
            found.append(setting.output(setting.x, weight))
        if name == "rows":  # the others' functions have no rule for these in plain PyTorch either
            found.append(torch.func.vmap(lambda x, s=setting, w=weight: s.output(x, w))(setting.x[None])[0])
            found.append(
                torch.func.jvp(lambda x, s=setting, w=weight: s.output(x, w), (setting.x,), (setting.x,))[0]
            )
        found.append(setting.output(setting.x, weight, torch.tensor(0.2, dtype=torch.float64)))
        for got in found:
            torch.testing.assert_close(torch.as_tensor(got).as_subclass(Tensor), expected)
        assert not taken or set(taken) == {"_project"}, name  # which a strength as a tensor does not stop


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """W a is formed in the weight's dtype, whatever the output's is."""
    setting = Setting("2d", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = setting.all(), plainly(monkeypatch, setting)
    assert got[0].dtype == torch.bfloat16
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() < 0.01 * b.float().norm()


def test_without_gradients() -> None:
    for name in LAYERS:
        setting = Setting(name, torch.float32)
        weight = setting.layer.module.weight.detach()
        with torch.no_grad():
            alone = setting.output(setting.x, weight)
        x = setting.x.clone().requires_grad_()
        torch.testing.assert_close(setting.output(x, weight), alone)
        assert not alone.requires_grad
        assert torch.equal(x, setting.x)


def test_signs_are_those_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((), (1,), (55,), (57,), (3, 0), (300, 7)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            like = torch.zeros(1, dtype=dtype)
            made = noise_draws.signs(shape, like, torch.Generator().manual_seed(1))
            with monkeypatch.context() as patch:
                patch.setattr(noise_passes, "_signs", None)
                expected = noise_draws.signs(shape, like, torch.Generator().manual_seed(1))
            assert made.dtype == dtype and torch.equal(made, expected)


def test_a_network_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps with the hooks, batch_norm behind, in both memory formats."""

    def train(memory_format: torch.memory_format) -> Tensor:
        torch.manual_seed(0)
        net: Any = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 3)
        ).to(memory_format=memory_format)  # fmt: skip
        criterion = FAMLoss.for_model(nn.CrossEntropyLoss(), net, "*", strength=1e-2, method="noise")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        x = torch.randn(6, 3, 4, 4).to(memory_format=memory_format)
        for _ in range(3):
            optimizer.zero_grad()
            criterion(net(x), torch.arange(6) % 3).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    for memory_format in (torch.contiguous_format, torch.channels_last):
        got = train(memory_format)
        with monkeypatch.context() as patch:
            patch.setattr(noise_passes, "_outer", None)
            expected = train(memory_format)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert F.cosine_similarity(got, expected, dim=0) > 1 - 1e-6
