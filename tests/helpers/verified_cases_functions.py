"""Elementwise functions and reductions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from verified_cases_base import Case, of, parameter, positive, with_other


def _log_cumsum_exp(z: Tensor) -> Tensor:
    m = z.detach().amax(-1, keepdim=True)
    return (z - m).exp().cumsum(-1).log() + m


ELEMENTWISE = [
    of("exp", torch.exp),
    of("exp2", torch.exp2),
    of("expm1", torch.expm1),
    of("log", lambda z: (z * z + 1).log()),
    of("log1p", lambda z: (z * z).log1p()),
    of("log2", lambda z: (z * z + 1).log2()),
    of("log10", lambda z: (z * z + 1).log10()),
    of("sqrt", lambda z: (z * z + 1).sqrt()),
    of("rsqrt", lambda z: (z * z + 1).rsqrt()),
    of("reciprocal", lambda z: (z * z + 1).reciprocal()),
    of("square", torch.square),
    of("pow", lambda z: z**3, variant="3"),
    of("pow", lambda z: (z * z + 1) ** 1.7, variant="1.7"),
    of("pow", lambda z: 2.0**z, variant="of a number"),
    with_other("pow", lambda z, p: (z * z + 1) ** p, parameter(4), variant="of tensors"),
    with_other("pow", lambda z, p: p**z, lambda: positive(4), variant="exponent from the network"),
    of("abs", torch.abs),
    of("neg", torch.neg),
    of("sin, cos, tan", lambda z: z.sin() + z.cos() * z.mul(0.2).tan()),
    of("sinh, cosh", lambda z: z.sinh() + z.cosh()),
    of("asin, acos", lambda z: (0.3 * z).sin().mul(0.5).asin() + (0.3 * z).sin().mul(0.5).acos().square()),
    of("atan", torch.atan),
    with_other("atan2", torch.atan2, parameter(4)),
    with_other("hypot", torch.hypot, parameter(4)),
    of("asinh, atanh", lambda z: z.asinh() + (0.5 * z.tanh()).atanh()),
    of("acosh", lambda z: (z * z + 1.5).acosh()),
    of("erf, erfc", lambda z: z.erf() + z.erfc().square()),
    of("erfinv", lambda z: (0.5 * z.tanh()).erfinv()),
    of("lgamma", lambda z: (z * z + 1).lgamma()),
    of("digamma", lambda z: (z * z + 1).digamma()),
    of("logit", lambda z: (z.tanh() * 0.4 + 0.5).logit()),
    of("sinc", torch.sinc),
    of("special.i0", torch.special.i0),
    of("special.log_ndtr", torch.special.log_ndtr),
    of("special.entr", lambda z: torch.special.entr(z.sigmoid())),
    with_other("special.xlog1py", torch.special.xlog1py, lambda: positive(4)),
    of("special.i1, i0e, i1e", lambda z: torch.special.i1(z) + torch.special.i0e(z) * torch.special.i1e(z)),
    of(
        "special.erfcx, ndtri",
        lambda z: torch.special.erfcx(z.sin()) + torch.special.ndtri(z.sin().sigmoid()),
    ),
    of("special.zeta", lambda z: torch.special.zeta(torch.tensor(3.0), z * z + 1)),
    of("polygamma, mvlgamma", lambda z: torch.polygamma(1, z * z + 1) + torch.mvlgamma(z * z + 3, 2)),
    of(
        "igamma, igammac",
        lambda z: (
            torch.igamma(torch.tensor(2.0), z * z + 1) + torch.igammac(torch.tensor(2.0), z * z + 1).square()
        ),
    ),
    of("ldexp", lambda z: torch.ldexp(z, torch.tensor(2))),
    with_other("xlogy", torch.xlogy, lambda: positive(4)),
    with_other("logaddexp", torch.logaddexp, parameter(4)),
    with_other("logaddexp2", torch.logaddexp2, parameter(4)),
    with_other("add", torch.add, parameter(4)),
    of("add", lambda z: z + 1.5, variant="number"),
    with_other("sub", lambda z, p: p - z, parameter(4)),
    of("sub", lambda z: 1.5 - z, variant="from a number"),
    with_other("mul", torch.mul, parameter(4)),
    of("mul", lambda z: z * z.sin(), variant="of two outputs"),
    with_other("div", lambda z, p: p / (z * z + 1), parameter(4)),
    with_other("div", torch.div, lambda: positive(4), variant="by a parameter"),
    of("div", lambda z: z / (z.square().sum(-1, keepdim=True) + 1), variant="of two outputs"),
    of("remainder", lambda z: z.remainder(5.0)),
    of("fmod", lambda z: z.fmod(5.0)),
    with_other("addcmul", lambda z, p: torch.addcmul(p, z, z.sin(), value=0.5), parameter(4)),
    with_other("addcdiv", lambda z, p: torch.addcdiv(p, z, z * z + 1, value=0.5), parameter(4)),
    with_other("lerp", lambda z, p: torch.lerp(z, p, z.sigmoid()), parameter(4)),
    with_other("lerp", lambda z, p: torch.lerp(z, p, 0.3), parameter(4), variant="number"),
    of("clamp", lambda z: z.clamp(-0.5, 0.8)),
    of("clamp", lambda z: z.clamp(min=-0.2), variant="min"),
    with_other("clamp", lambda z, p: z.clamp(-p, p), lambda: positive(4), variant="tensors"),
    with_other("maximum, minimum", lambda z, p: torch.maximum(z, p) * torch.minimum(z, -p), parameter(4)),
    with_other("fmax, fmin", lambda z, p: torch.fmax(z, p) * torch.fmin(z, -p), parameter(4)),
    of("where", lambda z: torch.where(z > 0.1, z.exp(), z.sin())),
    of("masked_fill", lambda z: z.masked_fill(torch.eye(4).bool(), 0.5)),
    of("nan_to_num", torch.nan_to_num),
    of(
        "sign, round, floor, ceil",
        lambda z: z * z.sign() + (0.1 * z).round() + (0.1 * z + 0.5).floor().mul((0.1 * z + 0.5).ceil()),
    ),
    of("rad2deg, deg2rad", lambda z: z.rad2deg().mul(0.01) + z.deg2rad()),
    of("copysign", lambda z: z.copysign(torch.ones(4))),
]
REDUCTIONS = [
    of("sum", torch.sum),
    of("sum", lambda z: z.sum(0), variant="dimension"),
    of("mean", torch.mean),
    of("mean", lambda z: z.mean(-1, keepdim=True), variant="dimension"),
    of("var, std", lambda z: torch.stack([z.var(), z.std()])),
    of("var, std", lambda z: z.var(0, unbiased=False) * z.std(0), variant="dimension"),
    of("var_mean, std_mean", lambda z: torch.cat([*torch.var_mean(z, 0), *torch.std_mean(z, 0)])),
    of("nansum, nanmean", lambda z: z.nansum() * z.nanmean(0)),
    of("cov, corrcoef", lambda z: torch.cov(z) + torch.corrcoef(z)),
    of("max, min", lambda z: z.max() * z.min()),
    of("max, min", lambda z: z.max(0).values * z.min(0).values, variant="dimension"),
    of("amax, amin", lambda z: z.amax(0) * z.amin(0)),
    of("aminmax", lambda z: torch.stack([*torch.aminmax(z, dim=0)])),
    of("median", lambda z: z.median(0).values),
    of("quantile", lambda z: z.quantile(0.3, 0)),
    of("kthvalue", lambda z: z.kthvalue(2, 0).values),
    of("sort, topk", lambda z: z.sort(0).values * z.topk(4, 0).values),
    of("logsumexp", lambda z: z.logsumexp(-1)),
    of("logcumsumexp", _log_cumsum_exp, variant="written out"),
    of("cumsum", lambda z: z.cumsum(0)),
    of("cumprod", lambda z: z.cumprod(0)),
    of("cummax, cummin", lambda z: z.cummax(0).values * z.cummin(0).values),
    of("prod", torch.prod),
    of("prod", lambda z: z.prod(0), variant="dimension"),
    of("trapezoid", lambda z: torch.trapezoid(z)),
    of("diff", lambda z: z.diff()),
    of("norm", torch.norm),
    *(
        of("linalg.vector_norm", lambda z, p=p: torch.linalg.vector_norm(z, p, dim=-1), variant=f"p={p}")
        for p in (1, 2, 3, 1.5, float("inf"))
    ),
    *(of("norm", lambda z, p=p: torch.norm(z, p, dim=0), variant=f"p={p}") for p in (1, 3)),
    of("linalg.matrix_norm", lambda z: torch.linalg.matrix_norm(z)),
    of("F.pairwise_distance", lambda z: F.pairwise_distance(z[:2], z[2:])),
    with_other("F.cosine_similarity", F.cosine_similarity, parameter(4, 4)),
    of(
        "F.cosine_similarity", lambda z: F.cosine_similarity(z[:, None], z[None], dim=-1), variant="all pairs"
    ),
    with_other("dist", torch.dist, parameter(4, 4)),
    of("distances by broadcasting", lambda z: (z[:2, None] - z[None, 2:]).norm(dim=-1)),
    of(
        "distances by broadcasting",
        lambda z: (z[torch.tensor([0, 0, 1])] - z[torch.tensor([1, 2, 3])]).norm(dim=-1),
        variant="pairs",
    ),
    of("trace", torch.trace),
    of("renorm", lambda z: z.renorm(2, 0, 1.0)),
]
CASES: list[Case] = [*ELEMENTWISE, *REDUCTIONS]
