"""FAMLoss: the criterion's loss plus strength times kappa, a drop-in for the criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import _checks
from fam_ext.head.from_features import FeatureLoss
from fam_ext.head.one_pass import fused_step, fusible, ordinary_step
from fam_ext.layers.find import find_layers
from fam_ext.loss.layer_criterion import LayerCriterion
from fam_ext.loss.relative_flatness import _outside_graph
from fam_ext.loss.step_record import Last
from fam_ext.options import Options
from fam_ext.schedules import Schedule, TargetRatio, check_strength


class FAMLoss(LayerCriterion):
    r"""The criterion's loss plus strength times the relative flatness of a layer, or of several.

    .. math:: L + \mathrm{strength} \cdot \kappa, \qquad
              \kappa = \sum_{s,s'} \langle w_s, w_{s'} \rangle \, \mathrm{Tr}(H_{s,s'})

    (Adilova et al. 2023, Eq. 3; Petzka et al. 2021, Definition 3), with H the Hessian of the loss with respect to the layer's
    weight. For a head, whose output (or a view, cast or selection of rows of it) is what the criterion receives, kappa is a
    closed form where the criterion has one. Elsewhere it is formed from Hessian products through the layer's output: exactly
    where few products do, else by Hutchinson's estimator. A forward hook keeps the layer's input until the loss is taken. In
    evaluation mode, of this module or of the layer, the result is the criterion's plain loss and nothing is kept.

    Args:
        criterion: any module or function of (outputs, *targets) that returns the loss. Closed forms: CrossEntropyLoss, MSELoss,
            BCEWithLogitsLoss, PoissonNLLLoss and GaussianNLLLoss, or their functional forms; with reduction="none" the result is
            loss_i + strength * kappa_i per row then (elementwise losses: per element).
        layer: nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, or a sequence of them: the sum of their terms. It does not
            become a submodule.
        strength: a number, which may be negative, or a schedule step -> number (fam_ext.schedules). 0 skips the term.
        measure: "neuronwise" (kappa above), "layerwise" |W|_F^norm_power Tr(H), "trace" Tr(H), "layerwise_eigenvalue"
            |W|_F^norm_power lambda_max(H), or "neuronwise_eigenvalue" sum_s |w_s|^2 lambda_max(H_ss).
        curvature: "hessian"; "ggn", the generalized Gauss-Newton matrix, never negative; "fisher", the same with `probes` draws
            of labels. On a head all three are the Hessian.
        method: "auto", "closed_form", "exact", "hutchinson", or "finite_difference" of a closure (see forward) for models that
            cannot be differentiated twice. "auto" takes the closed form on a head, else "exact" for up to 32 Hessian products,
            else "hutchinson"; `plan` tells which and why.
        probes, generator: draws per step and where they come from (default: a generator of its own).
        per_sample_probes: None finds out with a product whether samples interact after the layer; True draws for every sample,
            which is biased where they do; False shares one draw.
        max_bytes: bound on the estimated memory of the exact value.
        hold_statistics: with "ggn" and "fisher" behind batch_norm in training mode, where samples interact: take the network's
            Jacobian as if the batch's statistics were constants.
        normalize: None, or "fan_in" to divide by the layer's fan-in.
        norm_power: 2, or 1 for the layerwise measures (not invariant under rescaling of layers then).
        curvature_grad: False holds the Hessian constant; the gradient flows through <w_s, w_s'> only.
        every: add the term, unscaled, on training steps 0, every, 2 every, ...
        backend: "auto", "native", "triton" or "reference".

    Raises:
        TypeError, ValueError: an argument does not fit.
        UnsupportedError: a number that is right cannot be given; the message says why and names a way out.
    """

    def __init__(
        self,
        criterion: Any,
        layer: nn.Module | Sequence[nn.Module],
        strength: float | Schedule | TargetRatio,
        *,
        measure: str = "neuronwise",
        curvature: str = "hessian",
        method: str = "auto",
        probes: int = 1,
        normalize: str | None = None,
        norm_power: int = 2,
        curvature_grad: bool = True,
        every: int = 1,
        generator: torch.Generator | None = None,
        backend: str = "auto",
        per_sample_probes: bool | None = None,
        max_bytes: int = 2**30,
        hold_statistics: bool = False,
    ) -> None:
        options = Options(
            "FAMLoss",
            measure,
            curvature,
            method,
            probes,
            normalize,
            norm_power,
            curvature_grad,
            generator,
            backend,
            per_sample_probes,
            max_bytes,
            hold_statistics,
        )
        if isinstance(every, bool) or not isinstance(every, int):
            _checks.bad_type("FAMLoss", "every", "an integer", every)
        if every < 1:
            _checks.bad_value("FAMLoss", "every", "at least 1", every)
        checked = self._check_strength(strength)
        super().__init__(criterion, layer, options)
        self._strength = checked
        self.every = every
        self.step = 0
        self.last = Last()
        self._may_fuse = (
            options.closed_form
            and measure == "neuronwise"
            and self.parts[0].layer.linear
            and not self.parts[0].layer.input_first
            and len(self.parts) == 1
        )

    @staticmethod
    def _check_strength(value: object) -> Any:
        return value if isinstance(value, TargetRatio) else check_strength("FAMLoss", "strength", value)

    @property
    def strength(self) -> Any:
        """The number or schedule in use; may be set at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float | Schedule | TargetRatio) -> None:
        self._strength = self._check_strength(value)

    @classmethod
    def for_model(
        cls,
        criterion: Any,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        *,
        strength: Any,
        **options: Any,
    ) -> FAMLoss:
        """FAMLoss on layers of `model` by name or glob pattern (several: the sum); default: its last Linear or Conv layer."""
        return cls(criterion, find_layers("FAMLoss.for_model", model, layer), strength, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, strength={self._strength}"

    def get_extra_state(self) -> dict[str, Any]:
        schedule = self._strength
        state = schedule.state_dict() if hasattr(schedule, "state_dict") else None
        return {"step": self.step, "schedule": state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        if state["schedule"] is not None and hasattr(self._strength, "load_state_dict"):
            self._strength.load_state_dict(state["schedule"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.last = Last()

    def forward(self, outputs: Any, *targets: Any, closure: Any = None, **kwargs: Any) -> Tensor:
        """The total loss; arguments as the criterion takes them.

        `closure`, for method="finite_difference": a function that computes the criterion's loss anew, model included.
        """
        if not self.training or not self._layers_train():
            plain: Tensor = self.criterion(outputs, *targets, **kwargs)
            return plain
        if torch.compiler.is_compiling():
            compiled: Tensor = _outside_graph(self._train, outputs, targets, kwargs, closure)
            return compiled
        return self._train(outputs, targets, kwargs, closure)

    def _finish(self, last: Last) -> None:
        """Close a training step, past nn.Module.__setattr__, which takes microseconds to see that these are no parameters."""
        state = self.__dict__
        state["last"] = last
        state["step"] += 1

    def _strength_now(self) -> Any:
        """This step's strength: a number, or TargetRatio. 0 on a step without the term."""
        if self.step % self.every:
            return 0.0
        strength = self._strength
        if not isinstance(strength, (float, TargetRatio)):
            what = "the value of the strength schedule"
            strength = check_strength("FAMLoss", what, strength(self.step))
            if callable(strength):
                _checks.bad_type("FAMLoss", what, "a number", strength)
        return strength

    def linear_cross_entropy(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """The total loss from the layer's input, for models that hand out features instead of logits.

        The same as forward(F.linear(features, weight, bias), target), without ever holding the logits (see
        fam_ext.functional.linear_cross_entropy). The layer need not be called, nor the hook be attached. Training and evaluation
        mode, schedules, `every` and `last` are as in forward; TargetRatio takes one more pass for the values.

        Args:
            features: (*rows, I). weight: (V, I), of the layer's shape. bias: (V,) or None. target: class indices, (*rows).
            num_items: divides the sum over rows in place of their own number, for batches that share one mean (gradient
                accumulation).

        Raises:
            UnsupportedError: not CrossEntropyLoss on one nn.Linear with the measure "neuronwise" in closed form.
            TypeError, ValueError, IndexError: an argument does not fit.
        """
        arguments = (features, weight, target, bias, num_items)
        if torch.compiler.is_compiling():
            compiled: Tensor = _outside_graph(self._from_features, *arguments)
            return compiled
        return self._from_features(*arguments)

    def _from_features(self, *arguments: Any) -> Tensor:
        loss = FeatureLoss(self, *arguments)
        if not self.training or not self.parts[0].module.training:
            return loss(0.0)[0]
        self.reset()
        strength = self._strength_now()
        by_ratio = isinstance(strength, TargetRatio)
        if by_ratio:
            strength = float(strength.update(*loss.values()))
        total, kappa = loss(strength)
        if strength == 0 and not by_ratio:
            self._finish(Last(total.detach(), None, None, 0.0))
        else:
            self._finish(Last(None, total.detach(), kappa, strength))
        return total

    def _train(self, outputs: Any, targets: tuple[Any, ...], kwargs: dict[str, Any], closure: Any) -> Tensor:
        strength = self._strength_now()
        if isinstance(strength, float) and strength == 0:
            self.reset()
            loss: Tensor = self.criterion(outputs, *targets, **kwargs)
            self._finish(Last(loss.detach(), None, None, 0.0))
            return loss
        self._check_ready()
        bound = self._bound(targets, kwargs)
        fused = fusible(self, outputs, bound, strength) if self._may_fuse else None
        found = None if fused is None else ordinary_step(self, outputs, fused, strength)
        if found is None:
            taken = [self._take(part, outputs, bound) for part in self.parts]
            if fused is None or taken[0] is None:
                loss = self.criterion(outputs, *targets, **kwargs)
                if any(head is not None for head in taken):
                    self._check_hooks(loss, outputs, targets, kwargs)
                term, error = self._terms(taken, loss, outputs, bound, closure)
                if isinstance(strength, TargetRatio):
                    strength = strength.update(loss, term)
                total: Tensor = loss + strength * term
                self._finish(Last(loss.detach(), None, term.detach(), strength, error))
                return total
            found = fused_step(self, outputs, taken[0], fused, strength)
        total, kappa = found
        self._finish(Last(None, total.detach(), kappa, strength))
        return total
