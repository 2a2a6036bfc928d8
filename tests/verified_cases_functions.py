"""Elementwise functions, reductions, indexing, products and linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verified_cases_base import Case, Function, Tail, labels, param, positive


def _f(op: str, function: Function, shape: tuple[int, ...] = (4, 4), variant: str = "") -> Case:
    return Case(op, lambda: function, shape, variant)


def _with(
    op: str,
    function: Callable[[Tensor, Any], Tensor],
    other: Callable[[], Any],
    shape: tuple[int, ...] = (4, 4),
    variant: str = "",
) -> Case:
    """A function of z and of something else, a parameter unless it is a constant."""
    return Case(op, lambda: Tail(lambda m, z: function(z, m.other), other=other()), shape, variant)


def _p(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: param(*shape)


def _index(z: Tensor) -> Tensor:
    return torch.tensor([[0, 2], [3, 3], [1, 0], [2, 1]])


def _log_cumsum_exp(z: Tensor) -> Tensor:
    m = z.detach().amax(-1, keepdim=True)
    return (z - m).exp().cumsum(-1).log() + m


ELEMENTWISE = [
    _f("exp", torch.exp),
    _f("exp2", torch.exp2),
    _f("expm1", torch.expm1),
    _f("log", lambda z: (z * z + 1).log()),
    _f("log1p", lambda z: (z * z).log1p()),
    _f("log2", lambda z: (z * z + 1).log2()),
    _f("log10", lambda z: (z * z + 1).log10()),
    _f("sqrt", lambda z: (z * z + 1).sqrt()),
    _f("rsqrt", lambda z: (z * z + 1).rsqrt()),
    _f("reciprocal", lambda z: (z * z + 1).reciprocal()),
    _f("square", torch.square),
    _f("pow", lambda z: z**3, variant="3"),
    _f("pow", lambda z: (z * z + 1) ** 1.7, variant="1.7"),
    _f("pow", lambda z: 2.0**z, variant="of a number"),
    _with("pow", lambda z, p: (z * z + 1) ** p, _p(4), variant="of tensors"),
    _with("pow", lambda z, p: p**z, lambda: positive(4), variant="exponent from the network"),
    _f("abs", torch.abs),
    _f("neg", torch.neg),
    _f("sin, cos, tan", lambda z: z.sin() + z.cos() * z.mul(0.2).tan()),
    _f("sinh, cosh", lambda z: z.sinh() + z.cosh()),
    _f("asin, acos", lambda z: (0.3 * z).sin().mul(0.5).asin() + (0.3 * z).sin().mul(0.5).acos().square()),
    _f("atan", torch.atan),
    _with("atan2", torch.atan2, _p(4)),
    _with("hypot", torch.hypot, _p(4)),
    _f("asinh, atanh", lambda z: z.asinh() + (0.5 * z.tanh()).atanh()),
    _f("acosh", lambda z: (z * z + 1.5).acosh()),
    _f("erf, erfc", lambda z: z.erf() + z.erfc().square()),
    _f("erfinv", lambda z: (0.5 * z.tanh()).erfinv()),
    _f("lgamma", lambda z: (z * z + 1).lgamma()),
    _f("digamma", lambda z: (z * z + 1).digamma()),
    _f("logit", lambda z: (z.tanh() * 0.4 + 0.5).logit()),
    _f("sinc", torch.sinc),
    _f("special.i0", torch.special.i0),
    _f("special.log_ndtr", torch.special.log_ndtr),
    _f("special.entr", lambda z: torch.special.entr(z.sigmoid())),
    _with("special.xlog1py", torch.special.xlog1py, lambda: positive(4)),
    _f("special.i1, i0e, i1e", lambda z: torch.special.i1(z) + torch.special.i0e(z) * torch.special.i1e(z)),
    _f(
        "special.erfcx, ndtri",
        lambda z: torch.special.erfcx(z.sin()) + torch.special.ndtri(z.sin().sigmoid()),
    ),
    _f("special.zeta", lambda z: torch.special.zeta(torch.tensor(3.0), z * z + 1)),
    _f("polygamma, mvlgamma", lambda z: torch.polygamma(1, z * z + 1) + torch.mvlgamma(z * z + 3, 2)),
    _f(
        "igamma, igammac",
        lambda z: (
            torch.igamma(torch.tensor(2.0), z * z + 1) + torch.igammac(torch.tensor(2.0), z * z + 1).square()
        ),
    ),
    _f("ldexp", lambda z: torch.ldexp(z, torch.tensor(2))),
    _with("xlogy", torch.xlogy, lambda: positive(4)),
    _with("logaddexp", torch.logaddexp, _p(4)),
    _with("logaddexp2", torch.logaddexp2, _p(4)),
    _with("add", torch.add, _p(4)),
    _f("add", lambda z: z + 1.5, variant="number"),
    _with("sub", lambda z, p: p - z, _p(4)),
    _f("sub", lambda z: 1.5 - z, variant="from a number"),
    _with("mul", torch.mul, _p(4)),
    _f("mul", lambda z: z * z.sin(), variant="of two outputs"),
    _with("div", lambda z, p: p / (z * z + 1), _p(4)),
    _with("div", torch.div, lambda: positive(4), variant="by a parameter"),
    _f("div", lambda z: z / (z.square().sum(-1, keepdim=True) + 1), variant="of two outputs"),
    _f("remainder", lambda z: z.remainder(5.0)),
    _f("fmod", lambda z: z.fmod(5.0)),
    _with("addcmul", lambda z, p: torch.addcmul(p, z, z.sin(), value=0.5), _p(4)),
    _with("addcdiv", lambda z, p: torch.addcdiv(p, z, z * z + 1, value=0.5), _p(4)),
    _with("lerp", lambda z, p: torch.lerp(z, p, z.sigmoid()), _p(4)),
    _with("lerp", lambda z, p: torch.lerp(z, p, 0.3), _p(4), variant="number"),
    _f("clamp", lambda z: z.clamp(-0.5, 0.8)),
    _f("clamp", lambda z: z.clamp(min=-0.2), variant="min"),
    _with("clamp", lambda z, p: z.clamp(-p, p), lambda: positive(4), variant="tensors"),
    _with("maximum, minimum", lambda z, p: torch.maximum(z, p) * torch.minimum(z, -p), _p(4)),
    _with("fmax, fmin", lambda z, p: torch.fmax(z, p) * torch.fmin(z, -p), _p(4)),
    _f("where", lambda z: torch.where(z > 0.1, z.exp(), z.sin())),
    _f("masked_fill", lambda z: z.masked_fill(torch.eye(4).bool(), 0.5)),
    _f("nan_to_num", torch.nan_to_num),
    _f(
        "sign, round, floor, ceil",
        lambda z: z * z.sign() + (0.1 * z).round() + (0.1 * z + 0.5).floor().mul((0.1 * z + 0.5).ceil()),
    ),
    _f("rad2deg, deg2rad", lambda z: z.rad2deg().mul(0.01) + z.deg2rad()),
    _f("copysign", lambda z: z.copysign(torch.ones(4))),
]
REDUCTIONS = [
    _f("sum", torch.sum),
    _f("sum", lambda z: z.sum(0), variant="dimension"),
    _f("mean", torch.mean),
    _f("mean", lambda z: z.mean(-1, keepdim=True), variant="dimension"),
    _f("var, std", lambda z: torch.stack([z.var(), z.std()])),
    _f("var, std", lambda z: z.var(0, unbiased=False) * z.std(0), variant="dimension"),
    _f("var_mean, std_mean", lambda z: torch.cat([*torch.var_mean(z, 0), *torch.std_mean(z, 0)])),
    _f("nansum, nanmean", lambda z: z.nansum() * z.nanmean(0)),
    _f("cov, corrcoef", lambda z: torch.cov(z) + torch.corrcoef(z)),
    _f("max, min", lambda z: z.max() * z.min()),
    _f("max, min", lambda z: z.max(0).values * z.min(0).values, variant="dimension"),
    _f("amax, amin", lambda z: z.amax(0) * z.amin(0)),
    _f("aminmax", lambda z: torch.stack([*torch.aminmax(z, dim=0)])),
    _f("median", lambda z: z.median(0).values),
    _f("quantile", lambda z: z.quantile(0.3, 0)),
    _f("kthvalue", lambda z: z.kthvalue(2, 0).values),
    _f("sort, topk", lambda z: z.sort(0).values * z.topk(4, 0).values),
    _f("logsumexp", lambda z: z.logsumexp(-1)),
    _f("logcumsumexp", _log_cumsum_exp, variant="written out"),
    _f("cumsum", lambda z: z.cumsum(0)),
    _f("cumprod", lambda z: z.cumprod(0)),
    _f("cummax, cummin", lambda z: z.cummax(0).values * z.cummin(0).values),
    _f("prod", torch.prod),
    _f("prod", lambda z: z.prod(0), variant="dimension"),
    _f("trapezoid", lambda z: torch.trapezoid(z)),
    _f("diff", lambda z: z.diff()),
    _f("norm", torch.norm),
    *(
        _f("linalg.vector_norm", lambda z, p=p: torch.linalg.vector_norm(z, p, dim=-1), variant=f"p={p}")
        for p in (1, 2, 3, 1.5, float("inf"))
    ),
    *(_f("norm", lambda z, p=p: torch.norm(z, p, dim=0), variant=f"p={p}") for p in (1, 3)),
    _f("linalg.matrix_norm", lambda z: torch.linalg.matrix_norm(z)),
    _f("F.pairwise_distance", lambda z: F.pairwise_distance(z[:2], z[2:])),
    _with("F.cosine_similarity", F.cosine_similarity, _p(4, 4)),
    _f(
        "F.cosine_similarity", lambda z: F.cosine_similarity(z[:, None], z[None], dim=-1), variant="all pairs"
    ),
    _with("dist", torch.dist, _p(4, 4)),
    _f("distances by broadcasting", lambda z: (z[:2, None] - z[None, 2:]).norm(dim=-1)),
    _f(
        "distances by broadcasting",
        lambda z: (z[torch.tensor([0, 0, 1])] - z[torch.tensor([1, 2, 3])]).norm(dim=-1),
        variant="pairs",
    ),
    _f("trace", torch.trace),
    _f("renorm", lambda z: z.renorm(2, 0, 1.0)),
]
MOVES = [
    _f("view, reshape", lambda z: z.view(2, 8).reshape(8, 2).flatten(0, 1).unflatten(0, (4, 4))),
    _f(
        "permute, transpose",
        lambda z: z.permute(2, 0, 1).transpose(0, 1).t_() if z.dim() == 2 else z.permute(2, 0, 1).mT,
        (2, 3, 4),
    ),
    _f("t", lambda z: z.t().contiguous()),
    _f("squeeze, unsqueeze", lambda z: z.unsqueeze(1).squeeze(1).unsqueeze(0).squeeze()),
    _f("squeeze", lambda z: z[:1].unsqueeze(0).squeeze((0, 1))),
    _f("expand, repeat", lambda z: z.unsqueeze(0).expand(2, -1, -1).repeat(1, 2, 1)),
    _f("broadcast_to", lambda z: z.broadcast_to(2, 4, 4)),
    _f("repeat_interleave", lambda z: z.repeat_interleave(2, 0)),
    _f("tile", lambda z: z.tile(2, 2)),
    _f("cat, stack", lambda z: torch.cat([z, torch.stack([z[0], z[2]]).sin()])),
    _f("split, chunk, unbind", lambda z: z.split(2)[0] * z.chunk(2)[1] * z.unbind(0)[0]),
    _f("slice, select", lambda z: z[1:, ::2] * z[0, 1]),
    _f("narrow", lambda z: z.narrow(0, 1, 2)),
    _f("roll, flip, rot90", lambda z: z.roll(1, 0) * z.flip(1) * z.rot90()),
    _f("tril, triu", lambda z: z.tril() + z.triu().square()),
    _f("diagonal, diag, diag_embed", lambda z: z.diagonal().diag_embed() * z + z.diag().sum()),
    _f("index", lambda z: z[torch.tensor([0, 2, 2])]),
    _f("index", lambda z: z[torch.arange(4), torch.tensor([0, 2, 2, 1])], variant="of pairs"),
    _f("index", lambda z: z[torch.eye(4).bool()], variant="mask"),
    _f("masked_select", lambda z: z.masked_select(torch.eye(4).bool())),
    _f("index_select", lambda z: z.index_select(0, torch.tensor([0, 2, 2]))),
    _f("gather", lambda z: z.gather(1, _index(z))),
    _f("take, take_along_dim", lambda z: z.take(_index(z)) * z.take_along_dim(_index(z), 1)),
    _f("scatter", lambda z: z.scatter(1, _index(z)[:, :1], z[:, :1].sin())),
    _f("scatter_add", lambda z: z.scatter_add(1, _index(z), z[:, :2].sin())),
    *(
        _f("scatter_reduce", lambda z, r=r: z.scatter_reduce(1, _index(z), z[:, 1:3].sin(), r), variant=r)
        for r in ("sum", "mean", "amax", "amin", "prod")
    ),
    *(
        _f(
            "index_reduce",
            lambda z, r=r: z.index_reduce(0, torch.tensor([0, 2, 2]), z[1:].sin(), r),
            variant=r,
        )
        for r in ("mean", "amax", "amin", "prod")
    ),
    _f("index_add", lambda z: z.index_add(0, torch.tensor([0, 2]), z[:2].sin())),
    _f("index_copy", lambda z: z.index_copy(0, torch.tensor([0, 2]), z[:2].sin())),
    _f("index_put", lambda z: z.index_put((torch.tensor([0, 2]),), z[:2].sin())),
    _f(
        "index_put",
        lambda z: z.index_put((torch.tensor([0, 0]),), z[:2].sin(), accumulate=True),
        variant="accumulate",
    ),
    _f("index_fill", lambda z: z.index_fill(0, torch.tensor([0, 2]), 0.5)),
    _f("masked_scatter", lambda z: z.masked_scatter(torch.eye(4).bool(), z.sin())),
    _f("assignment to a slice", lambda z: _assign(z)),
    _f("unfold of a dimension", lambda z: z.unfold(0, 2, 1)),
    _f("as_strided", lambda z: z.as_strided((3, 4), (4, 1), 4)),
    Case("to", lambda: lambda z: z.double().sin().to(z.dtype), variant="other dtype", float32=True),
    _f("clone, contiguous", lambda z: z.clone().mT.contiguous()),
    _f("constant_pad_nd", lambda z: torch.constant_pad_nd(z, (1, 1), 0.5)),
    _f("meshgrid, cartesian_prod", lambda z: torch.cartesian_prod(z[0], z[1])),
    _f("view_as_complex, real, imag", lambda z: _complex(z)),
    _f(
        "fft.rfft, irfft", lambda z: torch.fft.irfft(torch.fft.rfft(z) * torch.tensor([1, 0.5, 2]), n=4).sin()
    ),
    _f(
        "stft",
        lambda z: torch.stft(z.flatten(), 8, window=torch.hann_window(8), return_complex=True).abs().square(),
    ),
    _f("fft.fft2", lambda z: torch.fft.fft2(z).abs()),
]
PRODUCTS = [
    _with("matmul", torch.matmul, _p(4, 3)),
    _f("matmul", lambda z: z @ z.mT, variant="with itself"),
    _with("matmul", torch.matmul, _p(4), variant="vector"),
    _with("matmul", lambda z, p: p @ z, _p(2, 1, 3, 2), (2, 4), "broadcast"),
    _f("bmm", lambda z: torch.bmm(z, z.mT.sin()), (2, 3, 4)),
    _with("addmm", lambda z, p: torch.addmm(p, z, z.t()), _p(4, 4)),
    _with("addmv, addr", lambda z, p: torch.addmv(p, z, z[0]) + torch.addr(p, z[0], z[1]), _p(4)),
    _with("baddbmm", lambda z, p: torch.baddbmm(p, z, z.mT), _p(2, 3, 3), (2, 3, 4)),
    _with("addbmm", lambda z, p: torch.addbmm(p, z, z.mT), _p(3, 3), (2, 3, 4)),
    _f("mv, dot", lambda z: torch.mv(z, z[0]) + torch.dot(z[1], z[2])),
    _f("outer, inner", lambda z: torch.outer(z[0], z[1]) + torch.inner(z, z[:, :4])),
    _with("einsum", lambda z, p: torch.einsum("bi,ijk,bj->bk", z, p, z), _p(4, 4, 2)),
    _with("tensordot", lambda z, p: torch.tensordot(z, p, 1), _p(4, 2, 3)),
    _f("kron", lambda z: torch.kron(z, z.sin()), (2, 2)),
    _f("cross", lambda z: torch.linalg.cross(z, z.sin()[[1, 2, 0]]), (3, 3)),
    Case("Linear", lambda: nn.Linear(4, 3)),
    Case("Linear", lambda: nn.Linear(4, 3, bias=False), (2, 3, 4), "no bias, tokens"),
    Case("Bilinear", lambda: Tail(lambda m, z: m.f(z, z.sin()), f=nn.Bilinear(4, 4, 3))),
    _f("linalg.inv", lambda z: torch.linalg.inv(z @ z.mT + 2 * torch.eye(4))),
    _with("linalg.solve", lambda z, p: torch.linalg.solve(z @ z.mT + 2 * torch.eye(4), p), _p(4, 2)),
    _f("linalg.cholesky", lambda z: torch.linalg.cholesky(z @ z.mT + 2 * torch.eye(4))),
    _f("linalg.det", torch.linalg.det),
    _f("linalg.slogdet", lambda z: torch.linalg.slogdet(z @ z.mT + 2 * torch.eye(4)).logabsdet),
    _f("logdet", lambda z: torch.logdet(z @ z.mT + 2 * torch.eye(4))),
    _f("linalg.eigvalsh", lambda z: torch.linalg.eigvalsh(z + z.mT)),
    _f("linalg.eigh", lambda z: torch.linalg.eigh(z + z.mT).eigenvectors.square()),
    _f("linalg.eigvals", lambda z: torch.linalg.eigvals(z).abs()),
    _f("linalg.svd", lambda z: torch.linalg.svd(z).U.square()),
    _f("linalg.pinv", lambda z: torch.linalg.pinv(z[:3])),
    _f("linalg.lstsq", lambda z: torch.linalg.lstsq(z, z.sin()).solution),
    _f("linalg.lu", lambda z: torch.linalg.lu(z).U),
    _f("linalg.householder_product", lambda z: torch.linalg.householder_product(z, z[0])),
    _f("linalg.norm", lambda z: torch.linalg.norm(z, 2) * torch.linalg.norm(z, "nuc"), variant="2, nuclear"),
    _with("sparse.mm", lambda z, p: torch.sparse.mm(p, z), lambda: torch.randn(3, 4).relu().to_sparse()),
    _f(
        "cdist",
        lambda z: torch.cdist(z, z.cos(), compute_mode="use_mm_for_euclid_dist"),
        variant="use_mm_for_euclid_dist",
    ),
    _f("linalg.svdvals", torch.linalg.svdvals),
    _f("linalg.qr", lambda z: torch.linalg.qr(z).R.square()),
    _f("linalg.matrix_exp", lambda z: torch.linalg.matrix_exp(0.3 * z)),
    _f(
        "linalg.solve_triangular",
        lambda z: torch.linalg.solve_triangular(z.tril() + 3 * torch.eye(4), z, upper=False),
    ),
]


def _assign(z: Tensor) -> Tensor:
    out = torch.zeros(5, 4)
    out[1:] = z.sin()
    out[0] += z[1]
    return out


def _complex(z: Tensor) -> Tensor:
    c = torch.view_as_complex(z.reshape(-1, 2)) * torch.tensor(0.3 + 0.7j)
    return c.real * c.imag + c.abs() + torch.view_as_real(c).sum(-1) + c.angle().sin()


def _mixture(m: Tail, z: Tensor) -> Tensor:
    """A top-2 mixture of experts: routing by topk, combination by index_add."""
    weight, chosen = m.router(z).softmax(-1).topk(2, -1)
    out = torch.zeros_like(z)
    for e, expert in enumerate(m.experts):
        row, slot = (chosen == e).nonzero(as_tuple=True)
        out = out.index_add(0, row, expert(z[row]) * weight[row, slot, None])
    return out


CASES = [
    *ELEMENTWISE,
    *REDUCTIONS,
    *MOVES,
    *PRODUCTS,
    Case(
        "mixture of experts",
        lambda: Tail(
            _mixture, router=nn.Linear(4, 3), experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ),
        (6, 4),
    ),
    Case(
        "F.embedding",
        lambda: Tail(lambda m, z: z * m.e(m.i), e=nn.Embedding(5, 4), i=labels(5, 4)),
        variant="times z",
    ),
    Case("F.embedding", lambda: lambda z: F.embedding(torch.tensor([0, 2, 2]), z), variant="z as the table"),
    Case(
        "F.embedding",
        lambda: Tail(lambda m, z: z + m.e(m.i), e=nn.Embedding(5, 4), i=labels(5, 4)),
        variant="added to z",
    ),
    Case(
        "F.embedding",
        lambda: lambda z: F.embedding(torch.tensor([[0, 2], [2, 1]]), z).mean(1),
        variant="mean of a bag, z as the table",
    ),
]
