"""Sparse gradients, such as those of embeddings: as dense ones, and whose they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["as_dense", "sparse_parameters"]


def as_dense(gradient: Tensor) -> Tensor:
    """Return a gradient of any layout with all its elements; a strided one as it is."""
    if gradient.layout == torch.strided:
        return gradient
    if gradient.layout == torch.sparse_coo and gradient._nnz() == 1:
        # torch reads a single row that is expanded, as after sum(), as zeros; contiguous() would
        # leave it, since a dimension of one element is contiguous whatever its stride.
        values = gradient._values().clone(memory_format=torch.contiguous_format)
        gradient = torch.sparse_coo_tensor(
            gradient._indices(),
            values,
            gradient.shape,
            device=values.device,
            check_invariants=False,
        )
    return gradient.to_dense()


def sparse_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the weights of layers whose attribute `sparse` is True, as nn.Embedding may have it.

    So a rank without a gradient of such a weight knows that it is to be sparse.
    """
    layers = (layer for layer in module.modules() if getattr(layer, "sparse", None) is True)
    weights = (getattr(layer, "weight", None) for layer in layers)
    return {weight for weight in weights if isinstance(weight, nn.Parameter)}
