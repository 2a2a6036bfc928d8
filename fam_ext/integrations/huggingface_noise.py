"""Hugging Face language models with noise inside: whoever forms the loss, its mean is loss + strength * kappa of the layers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fam_ext import _checks
from fam_ext.errors import UnsupportedError
from fam_ext.layers.find import select_layers
from fam_ext.loss.fam_loss import FAMLoss
from fam_ext.loss.noise_hook import Gate, NoiseHook

NAME = "patch_causal_lm"
_NO_NOISE = (
    "measure",
    "curvature",
    "probes",
    "norm_power",
    "curvature_grad",
    "generator",
    "backend",
    "label_smoothing",
    "hold_statistics",
    "max_bytes",
)


class NoisePatch:
    """A model whose layers are perturbed in training; undone by restore(), or at the end of a with block.

    A forward pass of the model's body in training mode with grad enabled is a step: it has draws of its own. Passes without grad
    (generate(), a reference model's) and evaluation are not perturbed. `criterion` holds strength, schedule and step:
    `criterion.follow(optimizer)` counts updates in place of passes. `left_out` names layers that have no noise, with the reason.
    """

    def __init__(self, body: nn.Module, criterion: FAMLoss, names: Sequence[str]) -> None:
        self.criterion = criterion
        self._names = names
        self._gate = Gate()
        for term, hook in zip(criterion.terms, self._hooks(), strict=True):
            term.gate = hook.gate = self._gate
        names = list(inspect.signature(body.forward).parameters)
        self._mask_at = names.index("attention_mask") if "attention_mask" in names else None
        self._passes = 0
        self._handle: Any = body.register_forward_pre_hook(_BodyHook(self), with_kwargs=True)

    def _hooks(self) -> list[NoiseHook]:
        """Those on the layers now: attach() makes new ones."""
        return [term.hook for term in self.criterion.terms if isinstance(term.hook, NoiseHook)]

    @property
    def last(self) -> Any:
        """The strength of the latest step that ended; noise has no value of kappa, and the loss is the model's to tell."""
        return self.criterion.last

    @property
    def left_out(self) -> Mapping[str, str]:
        return self.criterion.left_out

    def restore(self) -> None:
        """Take the noise out of the model; without effect the second time."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            self.criterion.detach()

    def __enter__(self) -> NoisePatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def begin(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: whether it is perturbed, and where it has padding."""
        compiling = torch.compiler.is_compiling()
        gate, criterion = self._gate, self.criterion
        gate.repeats_all = not compiling and torch._C._current_graph_task_id() != -1
        if gate.repeats_all:
            return  # a checkpoint around the whole body: the hooks repeat the draws
        gate.open = body.training and criterion.training and torch.is_grad_enabled()
        if not gate.open:
            return
        mask = kwargs.get("attention_mask")
        if mask is None and self._mask_at is not None and self._mask_at < len(args):
            mask = args[self._mask_at]
        gate.positions = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if compiling:
            if criterion.changes and criterion._counts_calls:
                raise UnsupportedError(
                    f"{NAME}: a compiled model cannot count its passes: call criterion.follow(optimizer) of the patch for a "
                    "strength that changes and for every > 1"
                )
            for hook in self._hooks():
                hook.drawn, hook.later = None, None
            return
        if self._passes == 1:
            self._look_for_silent_layers()
        if self._passes:
            criterion.next_pass()
        self._passes += 1

    def _look_for_silent_layers(self) -> None:
        """After the first pass: layers that have noise and were never called."""
        loud = [(name, hook) for name, hook in zip(self._names, self._hooks(), strict=True) if hook.value]
        silent = [name for name, hook in loud if not hook.seen]
        if not silent:
            return
        what = f"{len(silent)} of {len(loud)} layers have not been called ({', '.join(silent[:3])}, ...) and had no noise"
        why = "fused kernels may multiply with their weights without calling them"
        if len(silent) == len(loud):
            raise UnsupportedError(f"{NAME}: {what}: {why}; name layers that the model calls")
        warnings.warn(f"{NAME}: {what}: experts without tokens are such layers, and {why}", stacklevel=2)


class _BodyHook:
    """The pre-hook of the model's body; a copy of the model has an inert one."""

    __name__ = "fam_ext_body_hook"

    def __init__(self, patch: NoisePatch | None = None) -> None:
        self.patch = patch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.patch is not None:
            self.patch.begin(module, args, kwargs)

    def __reduce__(self) -> Any:
        return _BodyHook, ()


def patch_with_noise(
    model: Any, strength: Any, layers: str | Sequence[str] | None, options: dict[str, Any]
) -> NoisePatch:
    """patch_causal_lm(..., method="noise"); see there."""
    for name in _NO_NOISE:
        if name in options:
            _checks.bad_value(NAME, "options", f"none named {name} with method='noise'", options[name])
    wanted = "*" if layers is None else layers
    selection = select_layers(NAME, model, wanted, noise=True)
    exact = [wanted] if isinstance(wanted, str) else list(wanted)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    names = [name for name, module in selection.layers.items() if module is not head or name in exact]
    if not names:
        _checks.bad_value(NAME, "layers", "a pattern of layers inside of the model", wanted)
    criterion = FAMLoss.for_model(_of_model, model, names, strength=strength, method="noise", **options)
    criterion.left_out = selection.left_out | {
        name: "the output embedding, which fused losses multiply with without calling it; name it exactly to have it"
        for name in selection.layers
        if name not in names
    }
    body = getattr(inner, "base_model", inner)
    return NoisePatch(body if isinstance(body, nn.Module) else inner, criterion, names)


def _of_model(loss: Tensor) -> Tensor:
    """The model forms its loss itself."""
    return loss
