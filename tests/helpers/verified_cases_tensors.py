"""Indexing, reshaping, products and linear algebra."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verified_cases_base import Case, Tail, labels, of, parameter, with_other

INDEX = torch.tensor([[0, 2], [3, 3], [1, 0], [2, 1]])


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


def _grouped(m: Tail, z: Tensor) -> Tensor:
    """A product for each group of rows, as experts take it; torch's single operation has no float64."""
    if z.dtype == torch.float64:
        return torch.cat([z[:1] @ m.weight[0], z[1:] @ m.weight[1]])
    return F.grouped_mm(z, m.weight, offs=torch.tensor([1, 4], dtype=torch.int32))


MOVES = [
    of("view, reshape", lambda z: z.view(2, 8).reshape(8, 2).flatten(0, 1).unflatten(0, (4, 4))),
    of(
        "permute, transpose",
        lambda z: z.permute(2, 0, 1).transpose(0, 1).t_() if z.dim() == 2 else z.permute(2, 0, 1).mT,
        (2, 3, 4),
    ),
    of("t", lambda z: z.t().contiguous()),
    of("squeeze, unsqueeze", lambda z: z.unsqueeze(1).squeeze(1).unsqueeze(0).squeeze()),
    of("squeeze", lambda z: z[:1].unsqueeze(0).squeeze((0, 1))),
    of("expand, repeat", lambda z: z.unsqueeze(0).expand(2, -1, -1).repeat(1, 2, 1)),
    of("broadcast_to", lambda z: z.broadcast_to(2, 4, 4)),
    of("repeat_interleave", lambda z: z.repeat_interleave(2, 0)),
    of("tile", lambda z: z.tile(2, 2)),
    of("cat, stack", lambda z: torch.cat([z, torch.stack([z[0], z[2]]).sin()])),
    of("split, chunk, unbind", lambda z: z.split(2)[0] * z.chunk(2)[1] * z.unbind(0)[0]),
    of(
        "split",
        lambda z: z.split([1, 3])[0] * z.split([3, 1])[1] + torch.split(z, [1, 3], 1)[1].sum(),
        variant="of sizes",
    ),
    of("tensor_split", lambda z: z.tensor_split([1, 3])[1] * z.tensor_split(2, 1)[0].sum()),
    of("slice, select", lambda z: z[1:, ::2] * z[0, 1]),
    of("narrow", lambda z: z.narrow(0, 1, 2)),
    of("roll, flip, rot90", lambda z: z.roll(1, 0) * z.flip(1) * z.rot90()),
    of("tril, triu", lambda z: z.tril() + z.triu().square()),
    of("diagonal, diag, diag_embed", lambda z: z.diagonal().diag_embed() * z + z.diag().sum()),
    of("index", lambda z: z[torch.tensor([0, 2, 2])]),
    of("index", lambda z: z[torch.arange(4), torch.tensor([0, 2, 2, 1])], variant="of pairs"),
    of("index", lambda z: z[torch.eye(4).bool()], variant="mask"),
    of("masked_select", lambda z: z.masked_select(torch.eye(4).bool())),
    of("index_select", lambda z: z.index_select(0, torch.tensor([0, 2, 2]))),
    of("gather", lambda z: z.gather(1, INDEX)),
    of("take, take_along_dim", lambda z: z.take(INDEX) * z.take_along_dim(INDEX, 1)),
    of("scatter", lambda z: z.scatter(1, INDEX[:, :1], z[:, :1].sin())),
    of("scatter_add", lambda z: z.scatter_add(1, INDEX, z[:, :2].sin())),
    *(
        of("scatter_reduce", lambda z, r=r: z.scatter_reduce(1, INDEX, z[:, 1:3].sin(), r), variant=r)
        for r in ("sum", "mean", "amax", "amin", "prod")
    ),
    *(
        of(
            "index_reduce",
            lambda z, r=r: z.index_reduce(0, torch.tensor([0, 2, 2]), z[1:].sin(), r),
            variant=r,
        )
        for r in ("mean", "amax", "amin", "prod")
    ),
    of("index_add", lambda z: z.index_add(0, torch.tensor([0, 2]), z[:2].sin())),
    of("index_copy", lambda z: z.index_copy(0, torch.tensor([0, 2]), z[:2].sin())),
    of("index_put", lambda z: z.index_put((torch.tensor([0, 2]),), z[:2].sin())),
    of(
        "index_put",
        lambda z: z.index_put((torch.tensor([0, 0]),), z[:2].sin(), accumulate=True),
        variant="accumulate",
    ),
    of("index_fill", lambda z: z.index_fill(0, torch.tensor([0, 2]), 0.5)),
    of("masked_scatter", lambda z: z.masked_scatter(torch.eye(4).bool(), z.sin())),
    of("assignment to a slice", _assign),
    of("unfold of a dimension", lambda z: z.unfold(0, 2, 1)),
    of("as_strided", lambda z: z.as_strided((3, 4), (4, 1), 4)),
    Case("to", lambda: lambda z: z.double().sin().to(z.dtype), variant="other dtype", float32=True),
    of("clone, contiguous", lambda z: z.clone().mT.contiguous()),
    of("constant_pad_nd", lambda z: torch.constant_pad_nd(z, (1, 1), 0.5)),
    of("meshgrid, cartesian_prod", lambda z: torch.cartesian_prod(z[0], z[1])),
    of("view_as_complex, real, imag", _complex),
    of(
        "fft.rfft, irfft", lambda z: torch.fft.irfft(torch.fft.rfft(z) * torch.tensor([1, 0.5, 2]), n=4).sin()
    ),
    of(
        "stft",
        lambda z: torch.stft(z.flatten(), 8, window=torch.hann_window(8), return_complex=True).abs().square(),
    ),
    of("fft.fft2", lambda z: torch.fft.fft2(z).abs()),
]
PRODUCTS = [
    with_other("matmul", torch.matmul, parameter(4, 3)),
    of("matmul", lambda z: z @ z.mT, variant="with itself"),
    with_other("matmul", torch.matmul, parameter(4), variant="vector"),
    with_other("matmul", lambda z, p: p @ z, parameter(2, 1, 3, 2), (2, 4), "broadcast"),
    of("bmm", lambda z: torch.bmm(z, z.mT.sin()), (2, 3, 4)),
    with_other("addmm", lambda z, p: torch.addmm(p, z, z.t()), parameter(4, 4)),
    with_other("addmv, addr", lambda z, p: torch.addmv(p, z, z[0]) + torch.addr(p, z[0], z[1]), parameter(4)),
    with_other("baddbmm", lambda z, p: torch.baddbmm(p, z, z.mT), parameter(2, 3, 3), (2, 3, 4)),
    with_other("addbmm", lambda z, p: torch.addbmm(p, z, z.mT), parameter(3, 3), (2, 3, 4)),
    of("mv, dot", lambda z: torch.mv(z, z[0]) + torch.dot(z[1], z[2])),
    of("outer, inner", lambda z: torch.outer(z[0], z[1]) + torch.inner(z, z[:, :4])),
    with_other("einsum", lambda z, p: torch.einsum("bi,ijk,bj->bk", z, p, z), parameter(4, 4, 2)),
    with_other("tensordot", lambda z, p: torch.tensordot(z, p, 1), parameter(4, 2, 3)),
    of("kron", lambda z: torch.kron(z, z.sin()), (2, 2)),
    of("cross", lambda z: torch.linalg.cross(z, z.sin()[[1, 2, 0]]), (3, 3)),
    Case("Linear", lambda: nn.Linear(4, 3)),
    Case("Linear", lambda: nn.Linear(4, 3, bias=False), (2, 3, 4), "no bias, tokens"),
    Case("Bilinear", lambda: Tail(lambda m, z: m.f(z, z.sin()), f=nn.Bilinear(4, 4, 3))),
    of("linalg.inv", lambda z: torch.linalg.inv(z @ z.mT + 2 * torch.eye(4))),
    with_other(
        "linalg.solve", lambda z, p: torch.linalg.solve(z @ z.mT + 2 * torch.eye(4), p), parameter(4, 2)
    ),
    of("linalg.cholesky", lambda z: torch.linalg.cholesky(z @ z.mT + 2 * torch.eye(4))),
    of("linalg.det", torch.linalg.det),
    of("linalg.slogdet", lambda z: torch.linalg.slogdet(z @ z.mT + 2 * torch.eye(4)).logabsdet),
    of("logdet", lambda z: torch.logdet(z @ z.mT + 2 * torch.eye(4))),
    of("linalg.eigvalsh", lambda z: torch.linalg.eigvalsh(z + z.mT)),
    of("linalg.eigh", lambda z: torch.linalg.eigh(z + z.mT).eigenvectors.square()),
    of("linalg.eigvals", lambda z: torch.linalg.eigvals(z).abs()),
    of("linalg.svd", lambda z: torch.linalg.svd(z).U.square()),
    of("linalg.pinv", lambda z: torch.linalg.pinv(z[:3])),
    of("linalg.lstsq", lambda z: torch.linalg.lstsq(z, z.sin()).solution),
    of("linalg.lu", lambda z: torch.linalg.lu(z).U),
    of("linalg.householder_product", lambda z: torch.linalg.householder_product(z, z[0])),
    of("linalg.norm", lambda z: torch.linalg.norm(z, 2) * torch.linalg.norm(z, "nuc"), variant="2, nuclear"),
    with_other("sparse.mm", lambda z, p: torch.sparse.mm(p, z), lambda: torch.randn(3, 4).relu().to_sparse()),
    of(
        "cdist",
        lambda z: torch.cdist(z, z.cos(), compute_mode="use_mm_for_euclid_dist"),
        variant="use_mm_for_euclid_dist",
    ),
    of("linalg.svdvals", torch.linalg.svdvals),
    of("linalg.qr", lambda z: torch.linalg.qr(z).R.square()),
    of("linalg.matrix_exp", lambda z: torch.linalg.matrix_exp(0.3 * z)),
    of(
        "linalg.solve_triangular",
        lambda z: torch.linalg.solve_triangular(z.tril() + 3 * torch.eye(4), z, upper=False),
    ),
]

CASES: list[Case] = [
    *MOVES,
    *PRODUCTS,
    Case("F.grouped_mm", lambda: Tail(_grouped, weight=nn.Parameter(torch.randn(2, 4, 4))), float32=True),
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
