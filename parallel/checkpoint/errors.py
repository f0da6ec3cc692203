"""What can go wrong with a checkpoint."""

from __future__ import annotations

__all__ = ["CheckpointError", "Damaged"]


class CheckpointError(RuntimeError):
    """Raise, on every rank alike, when a checkpoint cannot be written, read or fitted."""


class Damaged(Exception):
    """Say which file or tensor of one checkpoint is not what was written; another may be whole."""
