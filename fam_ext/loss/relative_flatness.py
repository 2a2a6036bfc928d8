"""RelativeFlatness: the term that FAMLoss adds, alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.layers.find import select_layers
from fam_ext.loss.layer_criterion import LayerCriterion, outside_graph
from fam_ext.loss.one_call import LossCall, head_calls, loss_and_terms
from fam_ext.options import Options


class RelativeFlatness(LayerCriterion):
    """The relative flatness alone, differentiable: the term that FAMLoss adds, before its strength.

    Arguments as for FAMLoss. The features are kept in the layer's evaluation mode and under torch.no_grad too, as long as the
    layer's output lives, so that a trained model can be measured; `eval()` of this module stops that, and it cannot be called
    then. Called itself under torch.no_grad it gives the value without a graph: the Hessian is held, products are taken a few at
    a time within `max_bytes`, and nothing of them is kept. A model that was called under torch.no_grad can be measured on its
    head only. With reduction="none" the result is per row (elementwise losses: per element). `standard_error` is that of the
    latest estimate from several probes, else None.

    Example:
        >>> import torch, fam_ext
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
        >>> flatness = fam_ext.RelativeFlatness(torch.nn.CrossEntropyLoss(), model[2])
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> outputs = model(x)
        >>> kappa = flatness(outputs, y)
        >>> by_sample = flatness(outputs, y, per_sample=True)
        >>> torch.allclose(by_sample.sum(), kappa)
        True
    """

    any_mode = True
    standard_error: Tensor | None = None

    def __init__(
        self,
        criterion: Any,
        layer: nn.Module | Sequence[nn.Module],
        *,
        measure: str = "neuronwise",
        curvature: str = "hessian",
        method: str = "auto",
        probes: int = 1,
        normalize: str | None = None,
        norm_power: int = 2,
        curvature_grad: bool = True,
        generator: torch.Generator | None = None,
        backend: str = "auto",
        per_sample_probes: bool | None = None,
        max_bytes: int = 2**30,
        hold_statistics: bool | None = None,
    ) -> None:
        caller = "RelativeFlatness"
        options = Options(
            caller, measure, curvature, method, probes, normalize, norm_power, curvature_grad,
            generator, backend, per_sample_probes, max_bytes, hold_statistics,
        )  # fmt: skip
        super().__init__(criterion, layer, options)

    @classmethod
    def for_model(
        cls, criterion: Any, model: nn.Module, layer: str | nn.Module | None = None, **options: Any
    ) -> RelativeFlatness:
        """RelativeFlatness on layers of `model` by name or glob pattern (several: the sum); default: the last Linear or Conv."""
        selection = select_layers("RelativeFlatness.for_model", model, layer)
        made = cls(criterion, list(selection.layers.values()), **options)
        made._take_names(selection)
        return made

    def forward(
        self, outputs: Any, *targets: Any, per_sample: bool = False, closure: Any = None, **kwargs: Any
    ) -> Tensor:
        """kappa; per_sample=True gives its summands by sample, (B,), B the first dimension of the layer's output.

        The summands are shares of the batch's kappa, as the criterion's reduction weights them. The kappa of each sample alone:
        the same with reduction="sum", or B times the summands of a plain mean. `closure` as in FAMLoss.
        """
        if not self.training:
            raise UnsupportedError(
                "RelativeFlatness: in evaluation mode nothing is captured; call train() on it first"
            )
        _checks.check_bool("RelativeFlatness", "per_sample", per_sample)
        if torch.compiler.is_compiling():
            compiled: Tensor = outside_graph(self._measure, outputs, targets, kwargs, per_sample, closure)
            return compiled
        return self._measure(outputs, targets, kwargs, per_sample, closure)

    def _measure(
        self, outputs: Any, targets: tuple[Any, ...], kwargs: dict[str, Any], per_sample: bool, closure: Any
    ) -> Tensor:
        criterion = self.criterion
        if self._flattened is not None:
            criterion = self._flattened.func
            outputs, targets = self._flattened.arguments(outputs, targets)
        loss_hessian = self._bind_arguments(targets, kwargs)
        call = LossCall(criterion, outputs, targets, kwargs, loss_hessian, closure, per_sample)
        heads = head_calls(self.options, self.terms, call, self._no_closed_form)
        _, (kappa, self.standard_error) = loss_and_terms(
            self.options, self.terms, heads, call, need_loss=False
        )
        return kappa
