"""method="noise" in the projections of nn.MultiheadAttention: what its forward pass does while they are perturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_ext.capture.hook import exporting
from fam_ext.errors import UnsupportedError
from fam_ext.hessian import attention_noise, noise_draws
from fam_ext.layers import sharding
from fam_ext.layers.attention import Projection, sizes
from fam_ext.layers.linear_map import LinearMap
from fam_ext.loss.noise_hook import NoiseHook

_CALLER = "FAMLoss"
Result = tuple[Tensor, Tensor | None]


class ProjectionHook(NoiseHook):
    """The noise of one projection: its draws and strength, by the rules of every layer's."""

    def __init__(self, projection: Projection, generator: Any, shared: bool, by_fan_in: bool) -> None:
        inputs = projection.inputs if projection.part == "in_proj" else projection.inputs[:1]
        self.layers = [LinearMap(_CALLER, sizes(size, 1)) for size in inputs]
        super().__init__(LinearMap(_CALLER, sizes(sum(inputs), 1)), generator, shared)
        self.part = projection.part
        self._drawn_for_output: noise_draws.Draw | None = (
            None  # between `directions` and `output` of one call
        )
        # the strength is that of E features
        self._shares = [inputs[0] / size if by_fan_in else 1.0 for size in inputs]

    def inputs(self, given: list[Tensor]) -> list[Tensor]:
        """Query, key and value, (S, N, I) each, with the noise of in_proj."""
        like = given[0].new_empty((len(given[0]), 1, self._layer().inputs))
        drawn, strength = self._draw(like), self._strength()
        strengths = [strength * share for share in self._shares]
        perturbed = attention_noise.perturb_inputs(self.layers, drawn, given, strengths)
        self._remember(*perturbed)
        return perturbed

    def directions(self, query: Tensor) -> Tensor:
        """What out_proj is to multiply its input with besides; `query` (S, N, E)."""
        drawn = self._drawn_for_output = self._draw(query.new_empty((len(query), 1, self._layer().inputs)))
        return attention_noise.directions(drawn)

    def output(self, weight: Tensor, z: Tensor, products: Tensor) -> Tensor:
        """out_proj's output, (N, S, E), with its noise; `products` are those with `directions`."""
        drawn, self._drawn_for_output = self._drawn_for_output, None
        assert drawn is not None
        perturbed = attention_noise.perturb_product(drawn, weight, z, products, self._strength())
        self._remember(perturbed)
        return perturbed


class AttentionForward:
    """Stands in the place of an attention's forward while it has noise. A copy of the attention has one without hooks.

    Without noise to add, in evaluation mode and at strength 0, it calls the attention's own forward. With noise it hands torch's
    function what the attention does, but for perturbed inputs and an out_proj with further rows.
    """

    __name__ = "forward"

    def __init__(self, attention: nn.Module) -> None:
        self.attention: Any = attention
        self.hooks: list[ProjectionHook] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Result:
        own: Callable[..., Result] = type(self.attention).forward
        inputs = (query, key, value)
        options = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if not self._perturbs(inputs):
            return own(self.attention, *inputs, **options)
        self._check_plain(inputs)
        return self._perturbed(list(inputs), options)

    def _perturbs(self, inputs: tuple[Tensor, ...]) -> bool:
        """Not where torch will refuse the inputs."""
        attention = self.attention
        if not attention.training or exporting() or not any(hook.active for hook in self.hooks):
            return False
        wanted = (attention.embed_dim, attention.kdim, attention.vdim)
        return all(
            not x.is_nested and x.dim() == inputs[0].dim() in (2, 3) and x.shape[-1] == size
            for x, size in zip(inputs, wanted, strict=True)
        )

    def _perturbed(self, inputs: list[Tensor], options: dict[str, Any]) -> Result:
        m = self.attention
        batched = inputs[0].dim() == 3
        samples_first = m.batch_first and batched
        if not samples_first:
            inputs = self._turned(inputs, batched)
        for hook in self._active("in_proj"):
            inputs = hook.inputs(inputs)
        added = [(hook, hook.directions(inputs[0])) for hook in self._active("out_proj")]
        weight, bias, counts = _with_rows(m.out_proj.weight, m.out_proj.bias, [rows for _, rows in added])
        inputs = self._turned(inputs, batched)
        multiply: Any = F.multi_head_attention_forward
        product, weights = multiply(
            *inputs, m.embed_dim, m.num_heads, m.in_proj_weight, m.in_proj_bias, m.bias_k, m.bias_v, m.add_zero_attn,
            m.dropout, weight, bias, training=True, use_separate_proj_weight=not m._qkv_same_embed_dim,
            q_proj_weight=m.q_proj_weight, k_proj_weight=m.k_proj_weight, v_proj_weight=m.v_proj_weight, **options,
        )  # fmt: skip
        z, *products = torch.split(product if batched else product.unsqueeze(1), counts, dim=2)
        for (hook, _), product in zip(added, products, strict=True):
            z = hook.output(m.out_proj.weight, z, product)
        return (z.transpose(0, 1) if samples_first else z if batched else z.squeeze(1)), weights

    @staticmethod
    def _turned(inputs: list[Tensor], batched: bool) -> list[Tensor]:
        """(S, N, I) from (N, S, I) and back; (1, N, I) from (N, I) and back.

        Inputs that are one tensor stay one: torch's function asks for that.
        """

        def turned(k: int) -> Tensor:
            x = inputs[k]
            return x.transpose(0, 1) if batched else x.squeeze(0) if x.dim() == 3 else x.unsqueeze(0)

        return attention_noise.each(inputs, turned)

    def _active(self, part: str) -> list[ProjectionHook]:
        return [hook for hook in self.hooks if hook.active and hook.part == part]

    def _check_plain(self, inputs: tuple[Tensor, ...]) -> None:
        m = self.attention
        weights = (*m._parameters.values(), m.out_proj.weight)
        split = next((t for t in (*inputs, *weights) if sharding.is_dtensor(t)), None)
        if split is None:
            return
        if m.out_proj in sharding.owners(m.out_proj):
            raise UnsupportedError(
                f"{_CALLER}: out_proj of nn.MultiheadAttention is a group of FSDP2 that nothing gathers, since it is not called; "
                "call fully_shard on the nn.MultiheadAttention, not on its out_proj"
            )
        raise UnsupportedError(
            f"{_CALLER}: nn.MultiheadAttention is split by tensor parallelism, {sharding.describe(split)}; method='noise' "
            "takes linear layers there: write the attention with layers for its projections, or leave it out"
        )

    def remove(self, hook: ProjectionHook) -> None:
        """Take a hook out, and with the last one this object."""
        self.hooks = [other for other in self.hooks if other is not hook]
        if not self.hooks and vars(self.attention).get("forward") is self:
            del vars(self.attention)["forward"]

    def __reduce__(self) -> Any:
        return AttentionForward, (self.attention,)


class Handle:
    """Takes a hook off its attention."""

    def __init__(self, forward: AttentionForward, hook: ProjectionHook) -> None:
        self._forward, self._hook = forward, hook

    def remove(self) -> None:
        self._forward.remove(self._hook)


def attach(projection: Projection, hook: ProjectionHook) -> Handle:
    """Put the hook on the projection's attention.

    Raises UnsupportedError where something else has replaced the attention's forward.
    """
    attention = projection.attention
    forward = vars(attention).get("forward")
    if forward is None:
        forward = vars(attention)["forward"] = AttentionForward(attention)
    elif not isinstance(forward, AttentionForward):
        raise UnsupportedError(
            f"{_CALLER}: the forward of {type(attention).__name__} has been replaced by {forward!r}, so that its projections "
            "cannot be perturbed; make the criterion before that"
        )
    forward.hooks.append(hook)
    return Handle(forward, hook)


def _with_rows(
    weight: Tensor, bias: Tensor | None, added: list[Tensor]
) -> tuple[Tensor, Tensor | None, list[int]]:
    """A linear layer with further rows, without bias, and the numbers of rows."""
    counts = [len(weight), *(len(rows) for rows in added)]
    if not added:
        return weight, bias, counts
    stacked = torch.cat([weight, *(rows.to(weight.dtype) for rows in added)])
    return stacked, None if bias is None else F.pad(bias, (0, sum(counts[1:]))), counts
