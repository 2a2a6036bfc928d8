"""Attention, recurrent networks, transformers and checkpointing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from verified_cases_base import Case, Tail, param

HEADS = (2, 2, 3, 4)  # (batch, heads, tokens, width of a head)


def attend(z: Tensor, backend: SDPBackend, keys: int = 3, heads: int = 2, **options: Any) -> Tensor:
    """Self-attention whose q, k and v are three functions of z."""
    k, v = z[:, :heads, :keys].sin(), z[:, :heads, :keys].cos()
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(z, k, v, **options)


def _attentions() -> list[Case]:
    cases = []
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    empty = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1]]).bool()
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        name = "MATH" if backend is SDPBackend.MATH else "FLASH"
        for variant, shape, options in (
            ("", HEADS, {}),
            ("scale", HEADS, {"scale": 0.7}),
            ("causal", HEADS, {"is_causal": True}),
            ("causal, fewer keys", HEADS, {"is_causal": True, "keys": 2}),
            ("boolean mask", HEADS, {"attn_mask": mask}),
            ("boolean mask, a row without keys", HEADS, {"attn_mask": empty}),
            ("additive mask", HEADS, {"attn_mask": "additive"}),
            ("mask by sample", HEADS, {"attn_mask": mask.expand(2, 1, 3, 3)}),
            ("grouped queries", (1, 4, 3, 4), {"heads": 2, "enable_gqa": True}),
            ("grouped queries, causal", (1, 4, 3, 4), {"heads": 2, "enable_gqa": True, "is_causal": True}),
        ):

            def build(backend=backend, options=options):
                given = dict(options)
                if isinstance(given.get("attn_mask"), str):
                    given["attn_mask"] = torch.randn(3, 3)
                return lambda z: attend(z, backend, **given)

            cases.append(
                Case("F.scaled_dot_product_attention", build, shape, f"{name}, {variant}".rstrip(", "))
            )
    return cases


def _recurrent() -> list[Case]:
    cases = []
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        for variant, options in (
            ("", {}),
            ("2 layers, both directions", {"num_layers": 2, "bidirectional": True}),
            ("no bias", {"bias": False}),
            ("dropout, same mask in every product", {"num_layers": 2, "dropout": 0.4}),
        ):

            def build(kind=kind, options=options) -> Tail:
                return Tail(lambda m, z: m.net(z)[0], net=kind(4, 2, batch_first=True, **options))

            # in float32 another kernel takes some of them
            cases.append(Case(kind.__name__, build, (2, 3, 4), variant, float32="dropout" not in options))

        def packed(kind=kind) -> Tail:
            return Tail(_packed, net=kind(4, 2, batch_first=True))

        cases.append(Case(kind.__name__, packed, (2, 3, 4), "packed sequence"))
    return cases


def _packed(m: Tail, z: Tensor) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(z, torch.tensor([3, 2]), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(m.net(rows)[0], batch_first=True)[0]


def _encoder(dropout: float, **options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 5, dropout, batch_first=True, **options)


def _multihead(**options: Any) -> Tail:
    need = options.pop("need_weights", False)
    causal = options.pop("causal", False)
    mask = torch.ones(3, 3).triu(1).bool() if causal else None
    return Tail(
        lambda m, z: m.net(z, z, z, need_weights=need, attn_mask=mask, is_causal=causal)[0],
        net=nn.MultiheadAttention(4, 2, batch_first=True, **options),
    )


def _padding_mask(m: Tail, z: Tensor) -> Tensor:
    padding = torch.tensor([[0, 0, 0], [0, 0, 1]]).bool()
    return m.net(z, src_key_padding_mask=padding)


def _hooked() -> nn.Module:
    """A module with a full backward hook, whose outputs and inputs pass through nodes of its own."""
    module = nn.Linear(4, 3)
    module.register_full_backward_hook(lambda module, into, out: None)
    return module


def _checkpointed(m: Tail, z: Tensor) -> Tensor:
    return checkpoint(m.net, z, use_reentrant=False)


TOKENS = (2, 3, 4)
CASES = [
    *_attentions(),
    Case(
        "F.scaled_dot_product_attention",
        lambda: Tail(
            lambda m, z: F.scaled_dot_product_attention(z, z.sin(), z.cos(), m.bias), bias=param(3, 3)
        ),
        HEADS,
        "learned additive mask",
    ),
    Case(
        "F.scaled_dot_product_attention",
        lambda: lambda z: F.scaled_dot_product_attention(z, z.sin(), z.cos(), dropout_p=0.3),
        HEADS,
        "default, dropout, same mask in every product",
    ),
    Case(
        "F.scaled_dot_product_attention",
        lambda: lambda z: F.scaled_dot_product_attention(z, z.sin(), z[..., :2]),
        HEADS,
        "default, values of another width",
    ),
    Case("MultiheadAttention", _multihead, TOKENS),
    Case("MultiheadAttention", lambda: _multihead(causal=True), TOKENS, "causal"),
    Case("MultiheadAttention", lambda: _multihead(need_weights=True), TOKENS, "need_weights"),
    Case(
        "MultiheadAttention", lambda: _multihead(dropout=0.3), TOKENS, "dropout, same mask in every product"
    ),
    Case(
        "MultiheadAttention",
        lambda: _multihead(add_bias_kv=True, add_zero_attn=True, need_weights=True),
        TOKENS,
        "add_bias_kv, add_zero_attn",
    ),
    Case("TransformerEncoderLayer", lambda: _encoder(0.0), TOKENS),
    Case(
        "TransformerEncoderLayer",
        lambda: _encoder(0.0, norm_first=True, activation="gelu"),
        TOKENS,
        "norm_first, gelu",
    ),
    Case("TransformerEncoderLayer", lambda: _encoder(0.3), TOKENS, "dropout, same mask in every product"),
    Case("TransformerEncoderLayer", lambda: _encoder(0.0).eval(), TOKENS, "evaluation"),
    Case("TransformerEncoderLayer", lambda: Tail(_padding_mask, net=_encoder(0.0)), TOKENS, "padding mask"),
    Case(
        "TransformerDecoderLayer",
        lambda: Tail(
            lambda m, z: m.net(z, z.sin()), net=nn.TransformerDecoderLayer(4, 2, 5, 0.0, batch_first=True)
        ),
        TOKENS,
    ),
    *_recurrent(),
    Case("LSTM", lambda: Tail(lambda m, z: m.net(z)[0], net=nn.LSTM(4, 3, proj_size=2)), TOKENS, "proj_size"),
    Case(
        "LSTM",
        lambda: Tail(lambda m, z: torch.cat(m.net(z)[1], -1), net=nn.LSTM(4, 3)),
        TOKENS,
        "last state",
        float32=True,
    ),
    Case("register_full_backward_hook", _hooked),
    Case(
        "torch.compile",
        lambda: torch.compile(lambda z: z.sin().exp(), backend="eager"),
        variant="backend='eager'",
    ),
    Case(
        "RNN", lambda: Tail(lambda m, z: m.net(z)[0], net=nn.RNN(4, 3, nonlinearity="relu")), TOKENS, "relu"
    ),
    Case("LSTMCell", lambda: Tail(lambda m, z: torch.cat(m.net(z)), net=nn.LSTMCell(4, 3))),
    Case("GRUCell", lambda: nn.GRUCell(4, 3)),
    Case("RNNCell", lambda: nn.RNNCell(4, 3)),
    Case(
        "checkpoint",
        lambda: Tail(_checkpointed, net=nn.Sequential(nn.Linear(4, 3), nn.Tanh())),
        variant="use_reentrant=False",
    ),
    Case(
        "checkpoint",
        lambda: Tail(_checkpointed, net=nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))),
        variant="use_reentrant=False, LayerNorm",
    ),
    Case(
        "checkpoint",
        lambda: Tail(_checkpointed, net=_encoder(0.3)),
        TOKENS,
        "use_reentrant=False, encoder layer, dropout",
    ),
]
