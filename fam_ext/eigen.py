"""Largest eigenvalue of a layer's Hessian from its products, by SciPy's Lanczos solver.

It is differentiable with the eigenvector held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fam_ext.curvature import Curvature
from fam_ext.errors import UnsupportedError

_DENSE = 32  # up to this size the matrix is formed
_TOLERANCE = 1e-6  # relative, of the eigenvalue


def largest(curvature: Curvature, neuron: int | None = None) -> Tensor:
    """lambda_max of H, or of the block H_ss of one neuron (counted over all groups), 0-d.

    Its derivative is v^T (dH) v with v the unit eigenvector, right where the eigenvalue is simple.

    Raises UnsupportedError where SciPy is missing, and where Lanczos does not converge.
    """
    layer = curvature.layer
    shape = layer.canonical(curvature.weight).shape
    groups, neurons, fan_in = shape
    size = groups * neurons * fan_in if neuron is None else fan_in

    def embed(vector: Tensor) -> Tensor:
        if neuron is None:
            return vector.reshape(shape)
        full = torch.zeros(groups * neurons, fan_in, dtype=vector.dtype, device=vector.device)
        full[neuron] = vector
        return full.reshape(shape)

    def product(vector: Tensor) -> Tensor:
        pulled = curvature.weight_product(embed(vector)).detach()
        return pulled.flatten() if neuron is None else pulled.reshape(groups * neurons, fan_in)[neuron]

    vector = largest_eigenvector(product, size, curvature.dtype, curvature.device)
    direction = curvature.direction(embed(vector)).unsqueeze(0)
    return (direction * curvature.apply(direction)).sum()


def largest_eigenvector(
    product: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Unit eigenvector of the largest eigenvalue of a symmetric matrix, (size,), from its products with vectors."""
    solve = _dense if size <= _DENSE else _lanczos
    return solve(product, size, dtype, device)


def _dense(
    product: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    basis = torch.eye(size, dtype=dtype, device=device)
    matrix = torch.stack([product(row) for row in basis])
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
    try:
        _, vectors = eigsh(operator, k=1, which="LA", v0=start, tol=_TOLERANCE)
    except ArpackNoConvergence as error:
        raise UnsupportedError(
            f"the largest eigenvalue of the layer's Hessian did not converge: {error}"
        ) from None
    return torch.as_tensor(vectors[:, 0], dtype=dtype, device=device)
