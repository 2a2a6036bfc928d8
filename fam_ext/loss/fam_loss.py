"""FAMLoss: the criterion's loss plus strength times kappa, a drop-in for the criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext.head import one_pass
from fam_ext.hessian.estimate import Estimate
from fam_ext.layers import sharding
from fam_ext.layers.find import select_layers, select_with_strengths
from fam_ext.loss.advice import warn_of_a_guess
from fam_ext.loss.layer_criterion import outside_graph
from fam_ext.loss.num_items import summed
from fam_ext.loss.one_call import (
    LossCall,
    head_calls,
    hidden_terms,
    loss_and_terms,
    one_pass_head,
)
from fam_ext.loss.plan import CLOSED_FORM, UNUSED
from fam_ext.loss.step_record import StepRecord
from fam_ext.loss.training_criterion import TrainingCriterion
from fam_ext.options import Options
from fam_ext.schedules import Schedule, TargetRatio


class FAMLoss(TrainingCriterion):
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
        layer: nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d, for method="noise" an nn.MultiheadAttention as well, or a
            sequence of them: the sum of their terms. It does not become a submodule.
        strength: a number, which may be negative, or a schedule step -> number (fam_ext.schedules). 0 skips the term.
        measure: "neuronwise" (kappa above), "layerwise" |W|_F^norm_power Tr(H), "trace" Tr(H), "layerwise_eigenvalue"
            |W|_F^norm_power lambda_max(H), or "neuronwise_eigenvalue" sum_s |w_s|^2 lambda_max(H_ss).
        curvature: "hessian"; "ggn", the generalized Gauss-Newton matrix, never negative; "fisher", the same with `probes` draws
            of labels (with label smoothing, class weights or MSE: "ggn" with method="hutchinson"). On a head all are the Hessian.
        method: "auto", "closed_form", "exact", "hutchinson", "finite_difference" of a closure (see forward) for models that
            cannot be differentiated twice, or "noise": the model is perturbed in training so that the expected loss holds the
            term, without a value of kappa. "auto" takes the closed form on a head, else "exact" for up to 32 Hessian products,
            else "hutchinson"; `plan` tells which and why.
        probes: draws per step of an estimate, where `method` or `curvature` asks for one or "auto" takes one.
        generator: where draws come from; default: one of its own, for noise torch's global one. Without draws it is not used.
        per_sample_probes: None finds out with a product whether samples interact after the layer; True draws for every sample,
            which is biased where they do; False shares one draw. The exact value is the same with all three.
        max_bytes: bound on the estimated memory of the exact value.
        hold_statistics: with "ggn" and "fisher" behind batch_norm in training mode, where samples interact, the Jacobian is
            taken as if the batch's statistics were constants; False refuses that.
        normalize: None, or "fan_in" to divide by the layer's fan-in.
        norm_power: 2, or 1 for the layerwise measures (not invariant under rescaling of layers then).
        curvature_grad: False holds the Hessian constant; the gradient flows through <w_s, w_s'> only.
        every: add the term, unscaled, on training steps 0, every, 2 every, ... A step is a call, or an optimizer's (`follow`).
        backend: "auto", "native", "triton" or "reference".

    Raises:
        TypeError, ValueError: an argument does not fit.
        UnsupportedError: a number that is right cannot be given; the message says why and names a way out.

    Example:
        >>> import torch, fam_ext
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), layer=model[2], strength=0.1)
        >>> x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
        >>> loss = criterion(model(x), y)
        >>> loss.backward()
        >>> torch.allclose(loss.detach(), criterion.last.loss + 0.1 * criterion.last.flatness)
        True
        >>> criterion = criterion.eval()
        >>> torch.equal(criterion(model(x), y), torch.nn.functional.cross_entropy(model(x), y))  # no term
        True
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
        hold_statistics: bool | None = None,
    ) -> None:
        options = Options(
            "FAMLoss", measure, curvature, method, probes, normalize, norm_power, curvature_grad,
            generator, backend, per_sample_probes, max_bytes, hold_statistics,
        )  # fmt: skip
        super().__init__(criterion, layer, options, strength, every)
        alone = len(self.terms) == 1  # beside others a head's operation cannot be differentiated twice
        self._one_pass = options.closed_form and measure == "neuronwise"
        self._one_pass &= alone or (curvature != "hessian" and method == "auto")
        self._ordinary = self._one_pass and backend in ("auto", "native")
        self._head = self.terms[0]  # of several layers the one that was found to be a head
        self._guess: str | None = None  # how for_model chose a layer that was not named

    @classmethod
    def for_model(
        cls,
        criterion: Any,
        model: nn.Module,
        layer: str | nn.Module | Sequence[str | nn.Module] | None = None,
        *,
        strength: Any,
        **options: Any,
    ) -> FAMLoss:
        """FAMLoss on layers of `model` by name or glob pattern (several: the sum); default: the model's head.

        "*" is every Linear and convolution but those that cannot be regularized, which `left_out` lists with the reasons. kappa
        does not change when a ReLU network is rescaled, so that layers are comparable and one strength suits all of them;
        `strength` may also be a dict from patterns to numbers: each layer takes the number of the first pattern that matches, and
        the term is the sum of strength * kappa over the layers (`last.strength` is 1 then).

        Raises:
            TypeError, ValueError: an argument does not fit, or a name matches nothing (near names are listed).
            UnsupportedError: a layer that is named cannot be regularized.

        Example:
            >>> import torch, fam_ext
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
            >>> ce = torch.nn.CrossEntropyLoss()
            >>> len(fam_ext.FAMLoss.for_model(ce, net, "*", strength=0.01, method="noise").terms)
            2
            >>> [t.share for t in fam_ext.FAMLoss.for_model(ce, net, strength={"0": 0.01, "*": 0.1}).terms]
            [0.01, 0.1]
        """
        caller = "FAMLoss.for_model"
        shares: list[float] = []
        noise = options.get("method") == "noise"
        if isinstance(strength, dict):
            selection, shares = select_with_strengths(caller, model, layer, strength, noise)
            strength = 1.0
        else:
            selection = select_layers(caller, model, layer, noise)
        made = cls(criterion, list(selection.layers.values()), strength, **options)
        for term, share in zip(made.terms, shares, strict=False):
            term.set_share(share)
        made._take_names(selection)
        made._guess = selection.guess
        if made._noise:
            made._set_noise()
        return made

    def extra_repr(self) -> str:
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"{super().extra_repr()}, strength={self._strength}{left_out}"

    def forward(
        self,
        outputs: Any,
        *targets: Any,
        closure: Any = None,
        num_items: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The total loss; arguments as the criterion takes them.

        Args:
            closure: for method="finite_difference": a function that computes the loss anew, model included; others leave it.
            num_items: loss and kappa are those of the criterion's sum over its terms, divided by this number in place of their
                own number: for batches that share one mean (gradient accumulation, several ranks).

        Raises:
            UnsupportedError: a number that is right cannot be given; with num_items: the criterion is no known one whose
                reduction is "mean" or "sum", or has class weights under "mean".
            TypeError, ValueError: an argument does not fit.
        """
        if num_items is None:
            return self._forward(outputs, targets, kwargs, closure, None)
        arguments = (outputs, targets, kwargs, closure, num_items)
        if torch.compiler.is_compiling():
            compiled: Tensor = outside_graph(self._of_sum, *arguments)
            return compiled
        return self._of_sum(*arguments)

    def _of_sum(
        self, outputs: Any, targets: tuple[Any, ...], kwargs: dict[str, Any], closure: Any, items: Any
    ) -> Tensor:
        with summed(self.options, self.criterion, self._bind, targets, kwargs, items) as of_sum:
            return self._forward(outputs, targets, of_sum, closure, items)

    def _forward(
        self, outputs: Any, targets: tuple[Any, ...], kwargs: dict[str, Any], closure: Any, items: Any
    ) -> Tensor:
        training = self.training
        for term in self.terms:
            training = training and term.module.training
        if not training:
            if self._noise and self.training:
                self._reset_noise()
            plain: Tensor = self.criterion(outputs, *targets, **kwargs)
            return plain if items is None else plain / items
        if torch.compiler.is_compiling():
            compiled: Tensor = outside_graph(self._train, outputs, targets, kwargs, closure, items)
            return compiled
        return self._train(outputs, targets, kwargs, closure, items)

    def linear_cross_entropy(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        num_items: int | Tensor | None = None,
        parts: int = 2,
    ) -> Tensor:
        """The total loss from the layer's input, for models that hand out features instead of logits.

        The same as forward(F.linear(features, weight, bias), target), without ever holding the logits (see
        fam_ext.functional.linear_cross_entropy). The layer need not be called, nor the hook be attached. Training and evaluation
        mode, schedules, `every` and `last` are as in forward; TargetRatio takes one more pass for the values.

        Args:
            features: (*rows, I). weight: (V, I), of the layer's shape. bias: (V,) or None. target: class indices, (*rows).
            num_items: divides the sum over rows in place of their own number, as in forward.
            parts: 1 takes some of kappa's products in bfloat16 (see fam_ext.functional.linear_cross_entropy).

        Raises:
            UnsupportedError: not CrossEntropyLoss on one nn.Linear with the measure "neuronwise" in closed form.
            TypeError, ValueError, IndexError: an argument does not fit.

        Example:
            >>> import torch, fam_ext
            >>> head, features = torch.nn.Linear(8, 50), torch.randn(4, 8)
            >>> tokens = torch.tensor([3, 49, 0, -100])
            >>> criterion = fam_ext.FAMLoss(torch.nn.CrossEntropyLoss(), head, strength=0.1)
            >>> loss = criterion.linear_cross_entropy(features, head.weight, tokens, head.bias)
            >>> torch.allclose(loss, criterion(head(features), tokens))
            True
        """
        arguments = (features, weight, target, bias, num_items, parts)
        if torch.compiler.is_compiling():
            compiled: Tensor = outside_graph(self._from_features, *arguments)
            return compiled
        return self._from_features(*arguments)

    def _from_features(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        *how: Any,  # num_items, parts
    ) -> Tensor:
        weight, bias = sharding.exchange(self.terms[0].module, weight, bias)
        loss = one_pass.FeatureLoss(
            self.options,
            [term.layer for term in self.terms],
            self.criterion,
            self._bind_arguments((target,), {}),
            self.terms[0].factor,
            features,
            weight,
            target,
            bias,
            *how,
        )
        if not self.training or not self.terms[0].module.training:
            return loss(0.0)[0]
        self.reset()
        strength = self._strength_now()
        taken = not (isinstance(strength, float) and strength == 0)
        if isinstance(strength, TargetRatio):
            strength = float(strength.update(*loss.values()))
        total, kappa = loss(strength)
        self._finish(StepRecord(total.detach(), kappa if taken else None, strength))
        return total

    def _train(
        self, outputs: Any, targets: tuple[Any, ...], kwargs: dict[str, Any], closure: Any, items: Any = None
    ) -> Tensor:
        if self._noise:
            perturbed, strength = self._perturbed(outputs, targets, kwargs, items)
            self._finish(StepRecord(perturbed.detach(), None, strength))
            if self.changes:
                self._set_noise()
            return perturbed
        strength = self._strength
        if self._every != 1 or not isinstance(strength, float):
            strength = self._strength_now()
        if isinstance(strength, float) and strength == 0:
            self.reset()
            plain: Tensor = self.criterion(outputs, *targets, **kwargs)
            if items is not None:
                plain = plain / items
            self._finish(StepRecord(plain.detach(), None, 0.0))
            return plain
        options, term, several = self.options, self._head, len(self.terms) > 1
        criterion: Any = self._modules.get("criterion")  # None: a function
        if self._flattened is not None:
            criterion = self._flattened.func
            outputs, targets = self._flattened.arguments(outputs, targets)
        loss_hessian: Any = None
        if self._bind is not None and (options.closed_form or options.curvature != "hessian"):
            loss_hessian = self._bind(*targets, **kwargs)
        one_operation = (  # the one gate: whether head_cross_entropy stands for criterion and head
            self._one_pass
            and isinstance(strength, float)
            and one_pass.applies(criterion, loss_hessian, outputs)
        )
        taken = None
        ordinary = one_operation and self._ordinary and (not several or term.plan is CLOSED_FORM)
        if ordinary and (options.curvature != "fisher" or loss_hessian.fisher()):
            taken = one_pass.ordinary_step(
                options, term.layer, term.captures, outputs, loss_hessian, strength, term.factor
            )
        if taken is None or several:
            criterion = self.criterion if criterion is None else criterion
            call = LossCall(criterion, outputs, targets, kwargs, loss_hessian, closure)
        if taken is None:
            heads = head_calls(options, self.terms, call, self._no_closed_form)
            found = one_pass_head(self.terms, heads) if one_operation else None
            if found is None:
                return self._sum_of_parts(*loss_and_terms(options, self.terms, heads, call), strength, items)
            head, term = found
            self._head = term
            taken = one_pass.from_logits(
                options, outputs, head.features, head.weight, head.rows, loss_hessian, strength, term.factor
            )
        elif term.plan is not CLOSED_FORM:
            term.record_plan(CLOSED_FORM)
        (total, kappa), error = taken, None
        if several:
            others = [t for t in self.terms if t is not term]
            hidden = hidden_terms(options, others, call, total, outputs)
            if hidden:
                rest, error = Estimate.total(hidden)
                total, kappa = total + strength * rest, kappa + rest.detach()
        if items is not None:
            total, kappa = total / items, kappa / items
            error = None if error is None else error / items
        self._finish(StepRecord(total.detach(), kappa, strength, None, error))
        return total

    def _sum_of_parts(self, loss: Any, estimate: Estimate, strength: Any, items: Any) -> Tensor:
        """The criterion's own loss, and to it the terms."""
        kappa, error = estimate
        if items is not None:
            loss, kappa = loss / items, kappa / items
            error = None if error is None else error / items
        if self._guess is not None and self.plan not in (None, UNUSED):
            if self.plan is not CLOSED_FORM and self.options.closed_form and self._bind is not None:
                warn_of_a_guess(self.terms[0].module, self._guess)
            self._guess = None
        if isinstance(strength, TargetRatio):
            strength = strength.update(sharding.local(loss), kappa)
        alone = loss.detach()
        if type(loss) is Tensor:
            total: Tensor = loss + strength * kappa
        else:
            total, alone = sharding.add(self.options.caller, loss, strength * kappa), sharding.local(alone)
        self._finish(StepRecord(total.detach(), kappa.detach(), strength, alone, error))
        return total

    def _finish(self, last: StepRecord) -> None:
        """Close a training step, past nn.Module.__setattr__, which takes microseconds to see that these are no parameters."""
        state = self.__dict__
        state["last"] = last
        if last.flatness is not None:
            advice = state["_advice"]
            advice.steps = steps = advice.steps + 1
            if not steps & (steps - 1):  # the 1st, 2nd, 4th, 8th, ...
                self._advise(last)
        if state["_counts_calls"]:
            state["step"] += 1
