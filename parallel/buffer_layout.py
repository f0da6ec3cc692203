"""Agree on which buffers a module has before they are sent, several in one piece.

Layers may replace buffers as they run, such as a table of angles that grows with the longest
sequence that a rank has seen. Pieces of other shapes than the sender's would not arrive, or arrive
in the wrong buffer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .replicas import check_equal, describe
from .roster import Roster

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["BufferLayout"]


class BufferLayout:
    """What the ranks have agreed on: the shapes and dtypes of a module's buffers, in their order.

    When it is made they are known to be equal on all ranks. A rank that sees others later tells the
    ranks so with what it sends anyway, and then all call `agree`.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._agreed = self._found()

    @property
    def changed(self) -> bool:
        """Tell whether this rank's are others than those that were agreed on."""
        return self._found() != self._agreed

    def agree(self, comm: Communicator, what: str = "buffers of the module") -> None:
        """Agree on what they are now; collective.

        ValueError on every rank, naming the first buffer that differs, its shapes and the ranks.
        """
        what = f"{what}, which one rank sends to all unless broadcast_buffers=False,"
        check_equal(comm, describe(self._roster.named_buffers()), what)
        self._agreed = self._found()

    def _found(self) -> list[tuple[torch.Size, torch.dtype]]:
        return [(buffer.shape, buffer.dtype) for buffer in self._roster.buffers()]
