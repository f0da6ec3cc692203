"""What the ranks of a group share of their node's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .board import Board
from .mailboxes import Mailboxes

if TYPE_CHECKING:
    from .communicator import Communicator
    from .memory import Memory
    from .node_memory import NodeMemory


class Sharing:
    """The memories of a node, and where the ranks of one group meet and leave messages in them.

    board: None where not all of the group are on one node, or the node shares no memory.
    mail: None for a rank alone, or one that shares no memory.
    """

    def __init__(self, comm: Communicator, nodes: NodeMemory) -> None:
        """Open board and boxes; collective over the group."""
        self.nodes = nodes
        self.board = Board.open(comm, nodes)
        self.mail = None if comm.size == 1 else Mailboxes.open(comm, nodes)

    @property
    def memory(self) -> Memory | None:
        """Return this rank's memory, None where the node does not map it."""
        return self.nodes.memory if self.nodes.token else None

    def refuse(self, why: str) -> None:
        """Let no thread of this rank look there any more, before the ranks meet and close."""
        if self.board is not None:
            self.board.refuse(why)

    def close(self) -> None:
        """Give board and boxes back, which no rank of the group may look at any more."""
        for shared in (self.board, self.mail):
            if shared is not None:
                shared.close()
        self.board = self.mail = None
