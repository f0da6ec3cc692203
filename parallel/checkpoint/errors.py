"""What can go wrong with a checkpoint."""

from __future__ import annotations

__all__ = ["CheckpointError", "Damaged", "text_of"]


class CheckpointError(RuntimeError):
    """Raise, on every rank alike, when a checkpoint cannot be written, read or fitted."""


class Damaged(Exception):
    """Say which file or tensor of one checkpoint is not what was written; another may be whole."""


def text_of(error: Exception) -> str:
    """Return what an error says: the words of a CheckpointError, of any other its class, too."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
