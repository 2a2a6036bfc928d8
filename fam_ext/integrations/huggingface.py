"""Hugging Face causal language models: training with CE + strength * kappa of the lm_head, the logits never formed, or with
noise in the layers of the blocks (huggingface_noise.py).

The idea of changing the head and the loss of a model in place is Liger-Kernel's (github.com/linkedin/Liger-Kernel), which
replaces whole forward methods; here the model's own forward runs, and what goes from lm_head to loss stands for the logits.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.integrations.huggingface_noise import NoisePatch, patch_with_noise
from fam_ext.integrations.huggingface_trainer import FAMTrainerMixin as FAMTrainerMixin
from fam_ext.layers import adapters
from fam_ext.loss.fam_loss import FAMLoss

NAME = "patch_causal_lm"
_IGNORED = -100  # transformers' own
_OF_ESTIMATES = ("probes", "generator", "per_sample_probes", "hold_statistics", "max_bytes")


class DeferredLogits(Tensor):
    """The lm_head's input in place of its output. Casts, and factors where the head has no bias, pass; all else raises."""

    bias: bool

    @classmethod
    def of(cls, features: Tensor, bias: bool) -> DeferredLogits:
        deferred = features.as_subclass(cls)
        deferred.bias = bias
        return deferred

    def features(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "size", "dim", "as_subclass", "requires_grad_", "__repr__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in ("float", "to", "contiguous", "type"):  # the operation accumulates in float32 anyway
            return args[0]
        if name == "_is_view":  # asked by torch.compile, which takes this for an input of a graph
            raise UnsupportedError(
                f"{NAME}: compile the model's body, model.base_model.compile(), not the whole model"
            )
        scales = {"mul": operator.mul, "__mul__": operator.mul, "__rmul__": operator.mul,
                  "div": operator.truediv, "true_divide": operator.truediv, "__truediv__": operator.truediv}  # fmt: skip
        value, factor = (*args, None, None)[:2]
        if name in scales and isinstance(value, cls) and isinstance(factor, (int, float)) and not value.bias:
            return cls.of(scales[name](value.features(), factor), value.bias)  # (a phi) W^T = a (phi W^T)
        raise UnsupportedError(
            f"{NAME}: this model applies {name} to its logits, which are never formed; restore() it, and take FAMLoss of the "
            "logits instead"
        )


class CausalLMPatch:
    """A patched model; undone by restore(), or at the end of a with block. `criterion.last` has the latest loss and kappa."""

    def __init__(self, model: nn.Module, head: nn.Linear, criterion: FAMLoss, parts: int = 2) -> None:
        self.model = model
        self.criterion = criterion
        self._head = head
        self._parts = parts
        self._active = False
        self._taken = False  # by the call at hand
        self._handed_on = False
        self._taken_at: int | None = None  # version of the weights that the latest term was taken at
        self._signature = inspect.signature(model.forward)
        self._kept = {k: vars(model)[k] for k in ("_loss_function",) if k in vars(model)}
        self._original_loss: Any = model.loss_function
        # bound methods: a deep copy of the model gets a patch of its own
        head.forward = self._project  # type: ignore[assignment]
        model.loss_function = self._loss  # type: ignore[assignment]
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def last(self) -> Any:
        """Loss and kappa of the latest training step, as FAMLoss.last."""
        return self.criterion.last

    def restore(self) -> None:
        """Give the model its own head and loss back; without effect the second time."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        vars(self._head).pop("forward", None)
        vars(self.model).pop("_loss_function", None)
        vars(self.model).update(self._kept)

    def __enter__(self) -> CausalLMPatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def _project(self, features: Tensor) -> Tensor:
        if self._active:
            self._handed_on = True
            return DeferredLogits.of(features, self._head.bias is not None)
        return nn.Linear.forward(self._head, features)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._labels = self._signature.bind(*args, **kwargs).arguments.get("labels") is not None
        self._active = self._labels and model.training and self._head.training
        self._taken = self._handed_on = False

    def _after(self, model: nn.Module, args: Any, output: Any) -> Any:
        was_active, self._active = self._active, False
        if output is None:
            return None
        if not self._taken and model.training and torch.is_grad_enabled():
            if self._handed_on:
                raise UnsupportedError(self._without_the_term())
            self._guard(output)
        if not was_active:
            return None
        if isinstance(output, tuple):  # return_dict=False
            return tuple(None if isinstance(value, DeferredLogits) else value for value in output)
        return type(output)(**{k: None if isinstance(v, DeferredLogits) else v for k, v in output.items()})

    def _guard(self, output: Any) -> None:
        """Raise in the backward pass of a loss of `output`, unless these weights have had their term in another call."""
        message = self._without_the_term()

        def check(gradient: Tensor) -> None:
            if self._handles and self._taken_at != self._version():
                raise UnsupportedError(message)

        for value in output if isinstance(output, tuple) else output.values():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(check)  # type: ignore[no-untyped-call]

    def _version(self) -> int:
        """Counts the optimizer's updates, in place, of a weight that is trained."""
        weight = self._head.weight
        if not weight.requires_grad:
            weight = next((p for p in self.model.parameters() if p.requires_grad), weight)
        return weight._version

    def _without_the_term(self) -> str:
        if self._labels:
            cause = (
                "it was called with labels, but its loss_function was not asked: the trainer forms the loss itself, as TRL's do "
                "with a head of their own; derive the trainer from FAMTrainerMixin as well"
            )
        else:
            cause = (
                "it was called without labels: transformers' Trainer takes them away for label_smoothing_factor (give "
                f"{NAME}(..., label_smoothing=) instead) and for compute_loss_func; pass labels"
            )
        return (
            f"{NAME}: the patched model is trained with a loss that lacks strength * kappa, since {cause}. Or restore() the "
            "model to train it without"
        )

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = _IGNORED,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """In place of transformers' ForCausalLMLoss: position t predicts label t + 1."""
        if not isinstance(logits, DeferredLogits):  # evaluation
            return self._original_loss(
                logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, ignore_index=ignore_index,
                shift_labels=shift_labels, **kwargs,
            )  # fmt: skip
        if vocab_size not in (None, self._head.out_features):
            raise UnsupportedError(
                f"{NAME}: the lm_head has {self._head.out_features} outputs, the model's loss takes {vocab_size}"
            )
        if ignore_index != _IGNORED:
            raise UnsupportedError(f"{NAME}: ignore_index must be {_IGNORED}, got {ignore_index}")
        features = logits.features()
        self._taken, self._taken_at = True, self._version()
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
        return self.criterion.linear_cross_entropy(
            features,
            self._head.weight,
            shift_labels.reshape(features.shape[:-1]).to(features.device),
            self._head.bias,
            num_items=num_items_in_batch,
            parts=self._parts,
        )


@overload
def patch_causal_lm(
    model: nn.Module, strength: Any, layers: Any = None, *, method: Literal["noise"], **options: Any
) -> NoisePatch: ...


@overload
def patch_causal_lm(
    model: nn.Module, strength: Any, layers: None = None, *, method: Literal["auto"] = "auto", **options: Any
) -> CausalLMPatch: ...


def patch_causal_lm(
    model: nn.Module, strength: Any, layers: Any = None, *, method: str = "auto", **options: Any
) -> CausalLMPatch | NoisePatch:
    """Make a causal language model train with loss + strength * kappa: of its lm_head exactly, or of its blocks by noise.

    **method="noise"**: the linear layers that `layers` names (default "*", all of the model's body) are perturbed in training, so
    that the expected loss is loss + strength * kappa, to first order in strength, at the price of a forward pass without
    noise. Any loss will do: the model's own, a fused one that forms no logits, or a trainer's, and any mask, attention kernel,
    checkpointing, precision, torch.compile of the whole model (fullgraph=True), DistributedDataParallel, low-rank adapters (the
    noise is that of the effective weight). Each sequence has draws of its own, of rank one. kappa is that of the mean over
    tokens; each entry of a token's features phi gets noise of variance 2 strength |phi|^2, however many tokens there are, so
    that a strength keeps its meaning for other lengths and batches. Where attention_mask (B, T) is given, padding gets no
    noise. Evaluation, generate() and all passes without grad are left alone.

    **method="auto"**: `model(input_ids, labels=labels)` trains with CE + strength * kappa of its lm_head (linear_cross_entropy).

    In training mode with labels, the lm_head hands its input on, and the loss is formed from it in chunks of rows: no logits
    exist, and `outputs.logits` is None. Labels are shifted as transformers does (or given as `shift_labels`), -100 is ignored,
    and `num_items_in_batch`, which transformers.Trainer passes for gradient accumulation, divides loss and kappa in place of the
    number of tokens. In evaluation mode and without labels nothing changes. Where the lm_head's weight is tied to the embedding,
    kappa is that of the lm_head's calls alone, and the gradient goes to the shared weight.

    Models whose forward takes the logits through anything but casts and constant factors (softcapping, additional biases) raise
    at their first training step. With torch.compile, compile the body alone: `model.base_model.compile()`.

    Args:
        model: a transformers model with a head for causal language modelling whose output embedding is an nn.Linear. For noise
            any model; a PeftModel as well.
        strength: as in FAMLoss: a number or a schedule; for noise also a dict from patterns of layers to numbers.
        layers: for noise, a name, a glob pattern or several, as in FAMLoss.for_model. The output embedding only where it is named
            exactly.
        options: normalize, curvature_grad, every, backend of FAMLoss, parts of its linear_cross_entropy, and label_smoothing;
            for noise normalize, every and per_sample_probes.

    A trainer that forms the loss itself, without the model's loss_function, would train without the term: the backward pass of
    such a loss raises an error, unless the model's own loss was taken with the same weights too. FAMTrainerMixin takes it in any
    Trainer, TRL's SFTTrainer among them.

    Returns:
        The patch: `.last` for logs, `.restore()`, or use it in a with statement; `.criterion` is the FAMLoss.

    Example:
        >>> import torch, transformers
        >>> from fam_ext.integrations.huggingface import patch_causal_lm
        >>> config = transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)
        >>> model = transformers.GPT2LMHeadModel(config).train()
        >>> patch = patch_causal_lm(model, strength=1e-4, method="noise")
        >>> [name for name, module in model.named_modules() if module in [t.module for t in patch.criterion.terms]][0]
        'transformer.h.0.attn.c_attn'
        >>> ids = torch.randint(0, 50, (2, 8))
        >>> model(ids, labels=ids).loss.backward()  # of the perturbed model
        >>> patch.restore()

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: an argument does not fit, or `layers` names nothing.
        UnsupportedError: its lm_head is no plain nn.Linear, or it has no loss function that can be replaced. In training: the
            loss lacks the term.
    """
    if method not in ("auto", "noise"):
        _checks.bad_value(
            NAME, "method", "'auto' (the head) or 'noise'; else take FAMLoss of the logits", method
        )
    if method == "noise":
        return patch_with_noise(model, strength, layers, options)
    if layers is not None:
        _checks.bad_value(
            NAME, "layers", "None, the head, with method='auto'; for others method='noise'", layers
        )
    for name in _OF_ESTIMATES:
        if name in options:
            expected = f"none named {name} with method='auto', which takes the head's exact kappa"
            _checks.bad_value(NAME, "options", expected, options[name])
    try:
        from transformers import PreTrainedModel
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError as error:
        raise ImportError(f"{NAME} needs transformers; pip install transformers") from error
    if not isinstance(model, PreTrainedModel):
        _checks.bad_type(
            NAME, "model", "a transformers.PreTrainedModel (for a PeftModel pass its get_base_model())", model
        )
    untyped: Any = model
    head = adapters.active_copy(untyped.get_output_embeddings())
    if isinstance(head, nn.Linear) and "forward" in vars(head):
        raise UnsupportedError(
            f"{NAME}: the forward of the model's output embedding has been replaced, by an earlier patch perhaps: restore() it"
        )
    if type(head) is not nn.Linear:
        raise UnsupportedError(
            f"{NAME}: the model's output embedding must be an nn.Linear, got {type(head).__module__}."
            f"{type(head).__qualname__}; take FAMLoss of the logits instead"
        )
    if model.loss_function is not ForCausalLMLoss:
        raise UnsupportedError(
            f"{NAME}: the model's loss_function must be transformers' ForCausalLMLoss, got {model.loss_function}"
        )
    smoothing, parts = options.pop("label_smoothing", 0.0), options.pop("parts", 2)
    criterion = FAMLoss(nn.CrossEntropyLoss(label_smoothing=smoothing), head, strength, **options)
    criterion.detach()  # the features come from the patch, not from a hook
    return CausalLMPatch(model, head, criterion, parts)
