"""Look up in a manifest what an object needs, and say what does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .files import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from .manifest import Manifest

__all__ = ["fit", "value_at"]


def fit(manifest: Manifest, path: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless the checkpoint has a tensor of this name, dtype and shape."""
    entry = manifest.tensors.get(path)
    if entry is None:
        raise CheckpointError(f"tensor {path}: the checkpoint of step {manifest.step} has none")
    expected = DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
    if (entry.dtype, entry.shape) != expected:
        raise CheckpointError(
            f"tensor {path}: expected {expected[0]} {expected[1]}, the checkpoint of step "
            f"{manifest.step} has {entry.dtype} {entry.shape}"
        )


def value_at(manifest: Manifest, path: str) -> Any:
    """Return an encoded value; CheckpointError if the checkpoint has none."""
    if path not in manifest.values:
        raise CheckpointError(f"{path}: the checkpoint of step {manifest.step} has no such value")
    return manifest.values[path]
