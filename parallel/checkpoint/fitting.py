"""Look up in a manifest what an object needs, and say what does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, text_of
from .files import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from .manifest import Entry, Manifest
    from .state import Part

__all__ = ["entry_at", "fit", "fit_shared", "value_at", "wanted_by"]


def entry_at(manifest: Manifest, path: str) -> Entry:
    """Return what a checkpoint has of a tensor; CheckpointError if it has none of this name."""
    if path not in manifest.tensors:
        raise CheckpointError(f"tensor {path}: {manifest.title} has none")
    return manifest.tensors[path]


def fit(manifest: Manifest, path: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless the checkpoint has a tensor of this name, dtype and shape.

    A tensor on the meta device is refused as well: torch's own load would only warn.
    """
    entry = entry_at(manifest, path)
    if tensor.is_meta:
        raise CheckpointError(f"tensor {path}: on the meta device it takes no values")
    expected = DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
    if (entry.dtype, entry.shape) != expected:
        raise CheckpointError(
            f"tensor {path}: expected {expected[0]} {expected[1]}, {manifest.title} has "
            f"{entry.dtype} {entry.shape}"
        )


def fit_shared(manifest: Manifest, path: str, names: Iterable[Sequence[str]]) -> None:
    """Raise CheckpointError if the checkpoint has different values for one shared parameter.

    names: all names of each parameter that layers share. Each rank would load the value under the
        names of its own layers.
    """
    for alike in names:
        entries = {f"{path}/{name}": manifest.tensors.get(f"{path}/{name}") for name in alike}
        sums = {full: entry.sha256 for full, entry in entries.items() if entry is not None}
        first = next(iter(sums), "")
        for other in (full for full in sums if sums[full] != sums[first]):
            raise CheckpointError(
                f"tensors {first} and {other} are one weight, which layers share, but "
                f"{manifest.title} has another value for each: is it of a model that does not "
                "share it?"
            )


def value_at(manifest: Manifest, path: str) -> Any:
    """Return an encoded value; CheckpointError if the checkpoint has none."""
    if path not in manifest.values:
        raise CheckpointError(f"{path}: {manifest.title} has no such value")
    return manifest.values[path]


def wanted_by(parts: Mapping[str, Part], manifest: Manifest) -> list[str]:
    """Return the tensors that this rank needs of a checkpoint, not collectively.

    CheckpointError if one does not fit, or an object does not tell what it is.
    """
    found = []
    for path, part in parts.items():
        try:
            found += part.wanted(manifest)
        except CheckpointError:
            raise
        except Exception as error:  # code of the user's
            raise CheckpointError(f"{path} did not tell its state: {text_of(error)}") from error
    return found
