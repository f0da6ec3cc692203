"""Who belongs to a run, and what has happened to it, for the report."""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any

from ..comm.texts import gather_texts

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..comm.elastic import Loss

__all__ = ["History"]


class History:
    """The run's ranks by their first numbers, their hosts, and its events; the same on all ranks.

    A rank keeps the number that it came with, below `first`; one that joins later gets the next
    that is free, and knows nothing before `share`.
    """

    def __init__(self, since: float | None = None) -> None:
        """since: from when on this rank has been joining a run under way."""
        self.members: list[int] = []
        self.hosts: dict[int, str] = {}
        self.first = 0
        self.next = 0
        self.events: list[dict[str, Any]] = []
        self._since = since

    @classmethod
    def begin(cls, comm: Communicator) -> History:
        """Start with the ranks of `comm`."""
        made = cls()
        made.members = list(range(comm.size))
        made.first = made.next = comm.size
        made._learn_hosts(comm)
        return made

    def _learn_hosts(self, comm: Communicator) -> None:
        hosts = gather_texts(comm, socket.gethostname())
        self.hosts = dict(zip(self.members, hosts, strict=True))

    def _note(self, event: str, rank: int, step: int, lost: str) -> None:
        self.events.append(
            {
                "event": event,
                "step": step,
                "rank": rank,
                "host": self.hosts.get(rank, "unknown"),
                "lost": lost,
                "seconds": None,
            }
        )

    def lose(self, loss: Loss, step: int, since: float, planned: bool) -> None:
        """Note ranks that have gone, `step` steps being done; since: when this was known."""
        if not self.members:  # one that was just joining, and will be told
            return
        gone = [self.members[place] for place in loss.ranks]
        for rank in gone:
            if planned:
                self._note("left", rank, step, "nothing")
            else:
                self._note("died", rank, step, "at most the step in flight, which is repeated")
        self.members = [rank for rank in self.members if rank not in gone]
        self.members += range(self.next, self.next + loss.joined)
        self.next += loss.joined
        self._since = since

    def share(self, comm: Communicator, step: int) -> None:
        """Make every rank's history that of rank 0, and note who has joined.  Collective."""
        mine = json.dumps([self.members, self.first, self.next, self.events])
        told = json.loads(gather_texts(comm, mine)[0])
        self.members, self.first, self.next, self.events = told
        self._learn_hosts(comm)
        # Also in a recovery before, which one more death has broken off.
        noted = {event["rank"] for event in self.events if event["event"] == "joined"}
        for rank in self.members:
            if rank >= self.first and rank not in noted:
                self._note("joined", rank, step, "nothing")

    def fell_back(self, step: int) -> None:
        """Note that the run goes on from a checkpoint of `step`."""
        for event in self.events:
            if event["seconds"] is None and event["event"] == "died":
                event["lost"] = f"all since the checkpoint of step {step}"

    def went_on(self) -> None:
        """Note that training goes on, from the first step on that is finished."""
        if self._since is None:
            return
        seconds, self._since = time.perf_counter() - self._since, None
        for event in self.events:
            if event["seconds"] is None:
                event["seconds"] = seconds

    def news(self) -> list[str]:
        """Say what has happened since training last went on."""
        return [
            f"rank {event['rank']} on {event['host']} has {event['event']} after "
            f"{event['step']} steps"
            for event in self.events
            if event["seconds"] is None
        ]

    def lines(self) -> list[str]:
        """Say what has happened, a line each."""
        return [
            f"rank {event['rank']} on {event['host']} has {event['event']} after "
            f"{event['step']} steps: lost {event['lost']}; training went on in "
            f"{event['seconds']:.2f} s"
            for event in self.events
        ]
