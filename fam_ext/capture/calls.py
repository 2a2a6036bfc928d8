"""Captured forward calls of a layer: its input is kept for the loss, and no longer than the graph it belongs to.

The layer's input (features phi) is stored on the autograd node that made the layer's output z (`Node.metadata`): it lives
as long as z's graph, through views and casts of z, and is gone with it when a batch is skipped. Only weak references are
kept elsewhere.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from fam_ext import _checks
from fam_ext.capture import row_map
from fam_ext.errors import LayerNotCalled, NoClosedForm, UnsupportedError
from fam_ext.layers import adapters, sharding

_ATTRIBUTE = "_fam_ext_capture"  # on z itself where z has no autograd node


class CapturedCall:
    """One forward call of the layer: its input, its weight at that moment, the shape and version of its output."""

    __slots__ = (
        "__weakref__", "dtype", "features", "features_ref", "first", "on_output", "output_ref", "output_version", "shape", "used",
        "version", "weight", "weight_version",
    )  # fmt: skip

    def __init__(self, features: Tensor | None, weight: Tensor | None, output: Tensor | None) -> None:
        self.features = features
        self.on_output = False  # kept by the output itself, which has no graph that would hold the features
        self.features_ref: TensorWeakRef | None = None
        self.weight = weight
        plain = weight is not None and type(weight) is nn.Parameter and not weight.is_inference()
        self.weight_version = weight._version if plain and weight is not None else -1
        self.first: Tensor | None = (
            None  # first row of the output, kept where the layer's map must be checked
        )
        self.used = [False]  # shared by all criteria that captured this call: one of them has taken its loss
        if features is not None and output is not None:
            self.version = -1 if features.is_inference() else features._version
            self.output_version = -1 if output.is_inference() else output._version
            self.shape: tuple[int, ...] = output.shape
            self.dtype = output.dtype
            self.output_ref = TensorWeakRef(output if output._base is None else output._base)

    def waits(self) -> bool:
        """Whether the output (or a view of it) is alive and no loss has been taken of it."""
        return self.features is not None and not self.used[0] and self.output_ref() is not None

    def release(self) -> None:
        """Keep the features by weak reference only: a second loss on the same output still finds them in the graph, if any."""
        if self.features is not None and not self.on_output:
            self.features_ref = TensorWeakRef(self.features)
            self.features = None

    def take(self, caller: str) -> Tensor:
        """The features, released; refused where they are gone or were changed."""
        features = self.features
        if features is None and self.features_ref is not None:
            features = self.features_ref()
        self.release()
        if features is None:
            raise UnsupportedError(
                f"{caller}: the features of this forward call are gone, used by an earlier loss and freed by its backward; "
                "take every loss of an output before backward(), or call the model again"
            )
        if self.version >= 0 and features._version != self.version:
            raise UnsupportedError(
                f"{caller}: the layer's input was modified in place after the layer used it; use an out-of-place operation"
            )
        if self.weight_changed():
            raise UnsupportedError(
                f"{caller}: the layer's weight was modified in place between the forward pass and the loss; take the loss before "
                "the optimizer's step, or call the model again"
            )
        return features

    def weight_changed(self) -> bool:
        """Whether a plain weight was modified in place since the call."""
        weight = self.weight
        return weight is not None and 0 <= self.weight_version != weight._version

    def __reduce__(self) -> Any:
        return CapturedCall, (None, None, None)  # a copied or saved tensor carries no features


def layer_weight(layer: nn.Module) -> Tensor:
    """The weight that the forward pass just used: parametrizations are evaluated without updating their state."""
    if adapters.is_adapter(layer):
        return adapters.effective_weight(layer)
    # getattr would form an error message at each call
    parametrizations: Any = layer._modules.get("parametrizations")
    if parametrizations is None or "weight" not in parametrizations:
        weight = layer._parameters.get("weight")
        return layer.weight if weight is None else weight  # type: ignore[return-value]
    training = [m for m in parametrizations["weight"].modules() if m.training]
    try:
        for m in training:
            m.training = False  # spectral_norm would take another power iteration
        return layer.weight  # type: ignore[return-value]
    finally:
        for m in training:
            m.training = True


class CapturedCalls:
    """The forward calls of one criterion's layer that no loss has used yet."""

    def __init__(self, layer: str, class_dim: int, check: bool) -> None:
        self.layer = layer  # for messages
        self.class_dim = class_dim  # dimension of the output's neurons
        self.check = check  # whether the output's first row is always to be kept for a check
        self.pending: list[weakref.ref[CapturedCall]] = []
        self.called_without_grad = False
        self.seen = False  # a call with gradients has been captured before
        # modules of FSDP2 that hold the layer's weight (fam_ext.layers.sharding)
        self.owners: tuple[Any, ...] = ()
        self.split = False  # the weight is a DTensor: tensor parallelism
        self._known: Any = None  # the parameter that both were looked up for
        self._module: Any = None

    def record(
        self, layer: nn.Module, features: Any, output: Any, without_grad: bool, check: bool = False
    ) -> None:
        if not torch.is_grad_enabled() and not without_grad:
            self.called_without_grad = True
            return
        if not isinstance(features, Tensor) or not isinstance(output, Tensor):
            return
        weight: Any = layer._parameters.get("weight")
        parameter = next(layer.parameters(), None) if weight is None else weight
        if parameter is not self._known:
            self._known, self._module, self.owners = parameter, layer, sharding.owners(layer)
            self.split = not self.owners and sharding.is_dtensor(parameter)
        if weight is None and not self.owners:
            weight = layer_weight(layer)
        capture = CapturedCall(features, weight, output)
        if self.owners:
            capture.weight_version = -1  # filled and freed in place
        if (check or self.check) and output.numel() and output.dim() == features.dim():
            local: Any = output
            if sharding.is_dtensor(output):
                local = local.to_local()
            neurons_last = local.detach().movedim(self.class_dim, -1)
            capture.first = neurons_last.reshape(-1, neurons_last.shape[-1])[0].clone()
            device = output.device.type
            if torch.is_autocast_enabled(device):  # a hook may have cast what was computed in less precision
                capture.first = capture.first.to(torch.get_autocast_dtype(device))
        if self.pending:
            self.pending = [ref for ref in self.pending if ref() is not None]
        node = output.grad_fn
        if node is not None:
            place: Any = node.metadata
            key: Any = (self, output.output_nr)
            used: Any = (_ATTRIBUTE, output.output_nr)
        else:
            place, key, used = output.__dict__.setdefault(_ATTRIBUTE, {}), id(self), _ATTRIBUTE
            capture.on_output = True
        place[key] = capture
        capture.used = place.setdefault(used, capture.used)
        if torch.is_grad_enabled():
            self.pending.append(weakref.ref(capture))
            self.called_without_grad = False
            self.seen = True

    def done(self) -> None:
        """The loss of the calls at hand has been taken; second losses still find them through the graph."""
        for ref in self.pending:
            capture = ref()
            if capture is not None:
                capture.release()
        self.pending = []

    def reset(self) -> None:
        for ref in self.pending:
            capture = ref()
            if capture is not None:
                capture.features = None
        self.pending = []
        self.called_without_grad = False

    def take(
        self, caller: str, outputs: Tensor, class_dim: int
    ) -> tuple[CapturedCall, Tensor, row_map.RowMap | None]:
        """The capture that `outputs` belongs to, its features, and the layout of `outputs` (None: z itself)."""
        node = outputs.grad_fn
        capture: CapturedCall | None = None if node is None else node.metadata.get((self, outputs.output_nr))  # type: ignore[attr-defined]
        rows: row_map.RowMap | None = None
        steps: list[Any] = []
        blocked = None
        if capture is None and node is None:
            capture, steps = self._without_node(outputs)
        elif capture is None:
            try:
                hit = row_map.find(outputs, self)
                if hit is not None:
                    capture, steps = hit
            except row_map.NoRowMap as error:
                blocked = str(error)
        pending = self.pending
        if capture is not None and len(pending) == 1 and pending[0]() is capture and capture.waits():
            apart = False  # one call, one loss: the training step
        else:
            alive = [c for c in (ref() for ref in pending) if c is not None and c.waits()]
            # a call without grad leaves another call's pending loss alone (RelativeFlatness beside a training step)
            apart = capture is not None and capture.features is not None and capture not in alive
            if capture is None or (not apart and (len(alive) > 1 or (alive and alive[0] is not capture))):
                raise self._explain(caller, outputs, capture, alive, blocked)
        if not outputs.is_inference() and outputs._version not in (0, capture.output_version):
            raise NoClosedForm(
                f"{caller}: outputs were modified in place after the layer returned them; the criterion does not "
                "receive the layer's own output then. Use an out-of-place operation and regularize the layer whose own output "
                "the criterion receives"
            )
        if steps:
            try:
                dim = class_dim % len(capture.shape)
                rows = row_map.replay(steps, capture.shape, dim, outputs.device)
            except row_map.NoRowMap as error:
                raise self._refusal(caller, str(error)) from None
        features = capture.take(caller)
        self.gather(capture)
        capture.used[0] = True
        if not apart:
            self.done()
        return capture, features, rows

    def gather(self, *calls: CapturedCall) -> None:
        """Make the weight of the layer's calls whole, where FSDP2 shards it: it has exchanged the parameters by now."""
        if self.owners:
            sharding.gather(self.owners)
            for call in calls:
                call.weight = layer_weight(self._module)

    def only(self, outputs: Tensor) -> CapturedCall | None:
        """The call that returned `outputs`, this very tensor, where no other waits for a loss and nothing was changed since."""
        node: Any = outputs.grad_fn
        pending = self.pending
        capture = pending[0]() if len(pending) == 1 else None
        if node is None or capture is None or node.metadata.get((self, outputs.output_nr)) is not capture:
            return None
        features = capture.features
        if features is None or capture.version < 0 or capture.used[0] or capture.first is not None:
            return None
        if features._version != capture.version or outputs._version != capture.output_version:
            return None
        if self.split or capture.weight_changed():
            return None
        if self.owners:
            self.gather(capture)
            if sharding.is_dtensor(capture.weight):
                return None
        elif not capture.weight.is_leaf:  # type: ignore[union-attr]
            return None  # FSDP1 may have freed it
        return capture

    def _without_node(self, outputs: Tensor) -> tuple[CapturedCall | None, list[Any]]:
        """z that requires no gradient carries its capture itself; a contiguous view of it has its rows in order."""
        for z in (outputs, outputs._base):
            captures = None if z is None else z.__dict__.get(_ATTRIBUTE)
            capture = None if captures is None else captures.get(id(self))
            if capture is None:
                continue
            if z is outputs:
                return capture, []
            if (
                z is not None
                and outputs.is_contiguous()
                and z.is_contiguous()
                and outputs.numel() == z.numel()
            ):
                return capture, [(_View, tuple(outputs.shape))]
        return None, []

    def _explain(
        self,
        caller: str,
        outputs: Tensor,
        capture: CapturedCall | None,
        alive: list[CapturedCall],
        blocked: str | None,
    ) -> UnsupportedError:
        if len(alive) > 1:
            return NoClosedForm(
                f"{caller}: the layer was called {len(alive)} times since the last loss and all of its outputs are alive; the "
                "closed form is that of a weight used once. Call the criterion after each forward call, or reset() it to drop "
                "calls that no loss follows"
            )
        if capture is not None:
            return NoClosedForm(
                f"{caller}: outputs are those of an earlier forward call of the layer, and a later one is still without a loss; "
                "call the criterion after each forward call, or reset() it to drop the later one"
            )
        if all(c is None or c.features is None for c in (ref() for ref in self.pending)):
            if self.called_without_grad:
                return UnsupportedError(
                    f"{caller}: the layer was called under torch.no_grad or inference_mode (or by reentrant checkpointing: set "
                    "use_reentrant=False): its output has no graph; call the model with gradients enabled, or call "
                    "criterion.eval() for the plain loss"
                )
            if not torch.is_grad_enabled():
                return UnsupportedError(
                    f"{caller}: {self.layer} did not return these outputs. Without gradients they must be the very tensor that "
                    "it returned, or under torch.no_grad a contiguous view of it: no graph tells of casts, slices, "
                    "permutations and further layers; call the model and the criterion with gradients enabled, and let the layer "
                    "or something before it require grad (a frozen model's does not)"
                )
            return self.not_called(caller)
        if not outputs.requires_grad:
            return UnsupportedError(
                f"{caller}: outputs do not require grad although the layer's output does; do not detach them, or call "
                "criterion.eval() for the plain loss"
            )
        return self._refusal(caller, blocked)

    def idle(self) -> bool:
        """Whether no forward call waits for a loss, with or without gradients."""
        return not self.called_without_grad and all(
            c is None or c.features is None for c in (ref() for ref in self.pending)
        )

    def not_called(self, caller: str) -> LayerNotCalled:
        return LayerNotCalled(
            f"{caller}: {self.layer} was not called since the last loss; call the model in training mode before each use of "
            "the criterion, and check that `layer` is the very module the model uses: torch bypasses the modules inside some "
            "layers, nn.MultiheadAttention's out_proj for one; a model that torch.compile has compiled before the criterion was "
            "made does not know of it (make it first, or call torch.compiler.reset()). Where neither it nor anything before it "
            "requires grad, only its own output keeps a call"
        )

    @staticmethod
    def _refusal(caller: str, blocked: str | None) -> UnsupportedError:
        hints = {
            "LogSoftmaxBackward0": "pass the logits to CrossEntropyLoss instead of log_softmax",
            "SoftmaxBackward0": "pass the logits instead of probabilities",
            "SigmoidBackward0": "pass the logits to BCEWithLogitsLoss instead of probabilities",
        }
        between = (
            ""
            if blocked is None
            else f" ({blocked.removesuffix('0').removesuffix('Backward')} is in between)"
        )
        hint = hints.get(
            blocked or "", "pass the last layer, whose output the criterion receives, as `layer`"
        )
        return NoClosedForm(
            f"{caller}: the criterion's input is not the output of `layer`{between}, so the layer is not a head of this "
            f"criterion and method='closed_form' has no answer: {hint}, or use method='auto'"
        )


class _View:
    """Stands for the view of a tensor without graph."""

    @staticmethod
    def name() -> str:
        return "ViewBackward0"


def check_tensor(caller: str, outputs: object) -> Tensor:
    if not isinstance(outputs, Tensor) or nn.parameter.is_lazy(outputs):
        _checks.bad_type(
            caller,
            "outputs",
            "the tensor the layer returned (of a model's output object, its logits)",
            outputs,
        )
    return outputs
