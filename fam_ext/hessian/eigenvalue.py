"""Largest eigenvalue of a layer's Hessian from its products, by SciPy's Lanczos solver.

It is differentiable with the eigenvector held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fam_ext.errors import UnsupportedError
from fam_ext.hessian.products import LayerHessian

_DENSE = 32  # up to this size the matrix is formed
_TOLERANCE = 1e-6  # relative, of the eigenvalue


def largest(hessian: LayerHessian, neuron: int | None = None) -> Tensor:
    """lambda_max of H, or of the block H_ss of one neuron (counted over all groups), 0-d.

    Its derivative is v^T (dH) v with v the unit eigenvector, right where the eigenvalue is simple.

    Raises UnsupportedError where SciPy is missing, and where Lanczos does not converge.
    """
    weight = hessian.layer.canonical(hessian.weight).to(hessian.dtype)
    eigenvector = largest_direction(lambda d: hessian.weight_product(d).detach(), weight, neuron)
    direction = hessian.direction(eigenvector).unsqueeze(0)
    return (direction * hessian.matvec(direction)).sum()


def largest_direction(
    product: Callable[[Tensor], Tensor], weight: Tensor, neuron: int | None = None
) -> Tensor:
    """Unit eigenvector of the largest eigenvalue of H, or of one neuron's block H_ss, as a weight direction.

    `product` gives H D; D, the products, the result and `weight` are in canonical layout (fam_ext.layers.linear_map).
    """
    _, _, fan_in = shape = weight.shape
    size = weight.numel() if neuron is None else fan_in

    def embed(vector: Tensor) -> Tensor:
        if neuron is None:
            return vector.reshape(shape)
        full = vector.new_zeros(shape).reshape(-1, fan_in)
        full[neuron] = vector
        return full.reshape(shape)

    def on_vector(vector: Tensor) -> Tensor:
        result = product(embed(vector))
        return result.flatten() if neuron is None else result.reshape(-1, fan_in)[neuron]

    solve = _dense if size <= _DENSE else _lanczos
    return embed(solve(on_vector, size, weight.dtype, weight.device))


def _dense(
    product: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    basis = torch.eye(size, dtype=dtype, device=device)
    matrix = torch.stack([product(row) for row in basis])
    if not bool(matrix.isfinite().all()):  # nan and inf come out as nan
        return torch.full_like(basis[0], torch.nan)
    vector: Tensor = torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors[:, -1]
    return vector.detach()


def _lanczos(
    product: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    try:
        import numpy as np
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError as error:
        raise UnsupportedError(
            f"eigenvalue measures need SciPy: pip install scipy ({error}); or use measure='layerwise' or 'neuronwise'"
        ) from None

    def matvec(x: Any) -> Any:
        vector = torch.as_tensor(x.ravel(), dtype=dtype, device=device)
        return product(vector).to("cpu", torch.float64).numpy()

    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)  # numpy's global state is left alone
    first = matvec(start)
    if not first.any() or not np.isfinite(first).all():  # H = 0: any vector will do; nan comes out as nan
        anything = torch.as_tensor(start + 0 * first, dtype=dtype, device=device)
        unit: Tensor = anything / anything.norm()
        return unit
    try:
        _, vectors = eigsh(operator, k=1, which="LA", v0=start, tol=_TOLERANCE)
    except ArpackNoConvergence as error:
        raise UnsupportedError(
            f"the largest eigenvalue of the layer's Hessian did not converge: {error}"
        ) from None
    return torch.as_tensor(vectors[:, 0], dtype=dtype, device=device)


def neuronwise(squares: Tensor, largest: Tensor) -> Tensor:
    """sum_s |w_s|^2 lambda_max(H_ss) from the neurons' squared norms and eigenvalues, (O,) each."""
    return (squares * largest).sum()
