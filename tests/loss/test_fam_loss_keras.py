"""FAMLoss in a custom train_step of Keras 3 on torch: the updates of a loop by hand, evaluation with the plain loss."""

from __future__ import annotations

import os
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from inputs import expect
from torch import Tensor, nn

from fam_ext import FAMLoss
from fam_ext.schedules import Warmup

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="Keras is not installed")
if keras.backend.backend() != "torch":
    pytest.skip("Keras runs on another backend than torch", allow_module_level=True)
RATE = 0.2


class FAMModel(keras.Model):  # type: ignore[misc, name-defined]
    """Keras wraps torch modules that are attributes; `.module` is what it has wrapped."""

    def __init__(self, strength: Any) -> None:
        super().__init__()
        self.body = keras.layers.Dense(6, activation="tanh")
        self.head = nn.Linear(6, 3)
        self.fam = FAMLoss(nn.CrossEntropyLoss(), self.head.module, strength)
        self.fam.module.follow(None)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.head(self.body(x), training=training)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        self.zero_grad()
        total = self.fam.module(self(x, training=True), y)
        total.backward()
        weights = list(self.trainable_weights)
        with torch.no_grad():
            self.optimizer.apply([w.value.grad for w in weights], weights)
        self.fam.module.advance()
        return {"loss": total.detach(), **self.fam.module.last.as_dict("fam_")}


def test_updates(tmp_path: Any) -> None:
    keras.utils.set_random_seed(0)
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    model = FAMModel(Warmup(0.6, steps=3))
    model.compile(
        optimizer=keras.optimizers.SGD(RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model(x)
    weights: list[Tensor] = [
        w.value.detach().double().requires_grad_() for w in model.trainable_weights
    ]  # kernel (4, 6), bias, weight (3, 6), bias
    history = model.fit(x.numpy(), y.numpy(), batch_size=8, epochs=2, shuffle=False, verbose=0)
    kappas = []
    for step in range(4):
        rows = slice(8 * (step % 2), 8 * (step % 2) + 8)
        kernel, bias, weight, shift = weights
        phi = torch.tanh(x[rows].double() @ kernel + bias)

        def loss(w: Tensor, phi: Tensor = phi, shift: Tensor = shift, rows: slice = rows) -> Tensor:
            return F.cross_entropy(phi @ w.T + shift, y[rows])

        kappa = oracle.kappa(loss, weight)
        kappas.append(kappa.item())
        gradients = torch.autograd.grad(loss(weight) + min(0.2 * step, 0.6) * kappa, weights)
        weights = [(w - RATE * g).detach().requires_grad_() for w, g in zip(weights, gradients, strict=True)]
    for got, expected in zip(model.trainable_weights, weights, strict=True):
        torch.testing.assert_close(got.value.detach().double(), expected.detach(), rtol=1e-4, atol=1e-6)
    assert model.fam.module.step == 4
    assert history.history["fam_flatness"][-1] == pytest.approx(kappas[3], rel=1e-4)
    z = torch.tanh(x.double() @ weights[0] + weights[1]) @ weights[2].T + weights[3]
    assert model.evaluate(x.numpy(), y.numpy(), verbose=0) == pytest.approx(
        F.cross_entropy(z, y).item(), rel=1e-4
    )
    model.save_weights(tmp_path / "model.weights.h5")
    other = FAMModel(Warmup(0.6, steps=3))
    other(x)
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.fam.module.step == 4


def test_layers_of_keras_are_refused_by_name() -> None:
    expect(
        "got keras.src.layers.core.dense.Dense",
        lambda: FAMLoss(nn.CrossEntropyLoss(), keras.layers.Dense(3), 0.1),
    )
