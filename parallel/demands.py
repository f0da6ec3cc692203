"""What engines ask of their arguments; told by name, before the ranks say a word."""

from __future__ import annotations

from ..comm.arguments import require
from ..comm.communicator import Communicator

__all__ = ["require_comm"]


def require_comm(given: object) -> None:
    """Raise TypeError for what is no Communicator."""
    require("comm", given, Communicator, "ringfold.Communicator()")
