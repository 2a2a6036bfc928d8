"""FAMLoss as the criterion of skorch's nets: the updates of a loop by hand, and predict_proba gives probabilities."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import FAMLoss

pytest.importorskip("scipy", reason="skorch needs SciPy, which is not installed")
model_selection = pytest.importorskip("sklearn.model_selection", reason="skorch needs scikit-learn")
skorch = pytest.importorskip("skorch", reason="skorch is not installed")
STRENGTH, RATE = 0.2, 0.1


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def data() -> tuple[np.ndarray, np.ndarray]:
    torch.manual_seed(1)
    return torch.randn(12, 4, dtype=torch.float64).numpy(), torch.randint(0, 3, (12,)).numpy()


def options(**given: Any) -> dict[str, Any]:
    return {
        "optimizer": torch.optim.SGD, "lr": RATE, "batch_size": 6, "max_epochs": 2, "train_split": None, "verbose": 0,
        "iterator_train__shuffle": False, **given,
    }  # fmt: skip


def by_hand(net: nn.Sequential) -> nn.Sequential:
    x, y = (torch.as_tensor(part) for part in data())
    for _ in range(2):
        for rows in (slice(0, 6), slice(6, 12)):

            def loss(weight: Tensor, rows: slice = rows) -> Tensor:
                outputs = torch.func.functional_call(net, {"2.weight": weight}, (x[rows],))
                return F.cross_entropy(outputs, y[rows])

            total = F.cross_entropy(net(x[rows]), y[rows]) + STRENGTH * oracle.kappa(loss, net[2].weight)
            gradients = torch.autograd.grad(total, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradients, strict=True):
                    p -= RATE * g
    return net


class FAMClassifier(skorch.NeuralNetClassifier):  # type: ignore[misc, name-defined]
    """Makes the criterion for its own module, so that scikit-learn may copy it."""

    def __init__(self, *args: Any, strength: float = STRENGTH, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strength = strength

    def initialize_criterion(self) -> Any:
        super().initialize_criterion()
        self.criterion_ = FAMLoss.for_model(self.criterion_, self.module_, strength=self.strength)
        return self


def test_updates_and_probabilities() -> None:
    net, (x, y) = network(), data()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], STRENGTH)
    classifier = skorch.NeuralNetClassifier(net, criterion=criterion, **options())
    classifier.fit(x, y)
    expected = by_hand(network())
    torch.testing.assert_close(dict(net.named_parameters()), dict(expected.named_parameters()))
    probabilities = torch.as_tensor(classifier.predict_proba(x))
    torch.testing.assert_close(probabilities, expected(torch.as_tensor(x)).softmax(-1).detach())
    assert classifier.score(x, y) == (probabilities.argmax(1).numpy() == y).mean()


def test_binary_probabilities() -> None:
    net, (x, y) = network(1), data()
    binary = (y > 0).astype(np.float64)
    net = nn.Sequential(*net, nn.Flatten(0))
    criterion = FAMLoss(nn.BCEWithLogitsLoss(), net[2], STRENGTH)
    classifier = skorch.NeuralNetBinaryClassifier(net, criterion=criterion, **options()).fit(x, binary)
    assert criterion.plan.method == "closed_form"
    positive = torch.sigmoid(net(torch.as_tensor(x))).detach()
    expected = torch.stack([1 - positive, positive], 1).numpy()
    np.testing.assert_allclose(classifier.predict_proba(x), expected, rtol=1e-6)


def test_scikit_learn_may_copy_it() -> None:
    x, y = data()
    classifier = FAMClassifier(network(), criterion=nn.CrossEntropyLoss, **options())
    classifier.fit(x, y)
    expected = by_hand(network())
    torch.testing.assert_close(dict(classifier.module_.named_parameters()), dict(expected.named_parameters()))
    search = model_selection.GridSearchCV(
        FAMClassifier(network(), criterion=nn.CrossEntropyLoss, **options(max_epochs=1)),
        {"strength": [0.0, 0.1]}, cv=2, scoring="neg_log_loss", error_score="raise",
    )  # fmt: skip
    search.fit(x, y)
    assert len(set(search.cv_results_["mean_test_score"])) == 2
    loaded = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_allclose(loaded.predict_proba(x), classifier.predict_proba(x))


def test_what_is_copied_apart_from_its_module_is_refused() -> None:
    """A criterion that belongs to another module than the one that is trained is an error, not a plain run."""
    net, (x, y) = network(), data()
    criterion = FAMLoss(nn.CrossEntropyLoss(), net[2], STRENGTH)
    apart = skorch.NeuralNetClassifier(copy.deepcopy(net), criterion=criterion, **options())
    with pytest.raises(Exception, match="was not called since the last loss"):
        apart.fit(x, y)
