"""Ranks as threads of one process: the transport of `run_local` and of most tests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from ..errors import CommError, MismatchError, PeerLost
from .base import Bytes, Calls, Channel, DeviceMessages, Transport

_Key = tuple[Hashable, Channel, int, int, int]
"""(context, channel, src, dst, tag), ranks as in the world."""


class LocalRequest:
    """One side of a message; done once the bytes were copied."""

    def __init__(self, data: Bytes, peer: int, wake: threading.Event, world: World) -> None:
        self.data = data
        self.peer = peer
        self._wake = wake
        self._world = world
        self._done = False
        self._error: Exception | None = None

    def finish(self, error: Exception | None = None) -> None:
        """Mark as done and wake the rank that waits."""
        self._error = error
        self._done = True
        self._wake.set()

    def done(self) -> bool:
        """Tell whether the bytes were copied."""
        if self._error is not None:
            raise self._error
        return self._done

    def cancel(self) -> bool:
        """Take a receive back, unless a send has met it."""
        return self._world.take_back(self)


class World:
    """What the ranks of one run share: mailboxes, meeting points, and who failed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.wakes = [threading.Event() for _ in range(size)]
        self._lost: dict[int, str] = {}
        self._failed: list[int] = []
        self._condition = threading.Condition()
        self._sends: dict[_Key, deque[LocalRequest]] = {}
        self._receives: dict[_Key, deque[LocalRequest]] = {}
        self._meetings: dict[Hashable, dict[int, Any]] = {}
        self.notices: list[deque[tuple[int, bytes]]] = [deque() for _ in range(size)]

    def post(self, request: LocalRequest, key: _Key, sending: bool) -> None:
        """Match a send with the oldest receive of the same key, or leave it for one to come."""
        mine, others = (self._sends, self._receives) if sending else (self._receives, self._sends)
        with self._condition:
            waiting = others.get(key)
            if not waiting:
                mine.setdefault(key, deque()).append(request)
                return
            match = waiting.popleft()
            if not waiting:
                del others[key]
        send, receive = (request, match) if sending else (match, request)
        if send.data.size == receive.data.size:
            np.copyto(receive.data, send.data)
            error = None
        else:
            error = MismatchError(
                f"rank {key[2]} sends {send.data.size} bytes where rank {key[3]} expects "
                f"{receive.data.size} (tag {key[4]})"
            )
        send.finish(error)
        receive.finish(error)

    def take_back(self, request: LocalRequest) -> bool:
        """Withdraw a receive; tell whether no send had met it."""
        with self._condition:
            for key, waiting in self._receives.items():
                if request in waiting:
                    waiting.remove(request)
                    if not waiting:
                        del self._receives[key]
                    return True
        return False

    def meet(self, place: Hashable, rank: int, value: Any, members: tuple[int, ...]) -> list[Any]:
        """Bring one value of every member together; returns them in the order of members."""
        with self._condition:
            seen = self._meetings.setdefault(place, {})
            seen[rank] = value
            self._condition.notify_all()
            while len(seen) < len(members):
                self.check(set(members) - set(seen), members)
                self._condition.wait(0.1)
        return [seen[member] for member in members]

    def lose(self, rank: int, reason: str, failed: bool) -> None:
        """Note that a rank is gone, and wake everybody who might wait for it.

        failed: it broke down, so that no group with it can end well; else it just ended.
        """
        with self._condition:
            self._lost[rank] = reason
            if failed:
                self._failed.append(rank)
            self._condition.notify_all()
        for wake in self.wakes:
            wake.set()

    def check(self, peers: Iterable[int], members: tuple[int, ...]) -> None:
        """Raise PeerLost where one of the members failed, or one of the peers has ended."""
        for rank in (*(rank for rank in self._failed if rank in members), *peers):
            if rank in self._lost:
                raise PeerLost(f"rank {rank} is gone: {self._lost[rank]}")


class LocalTransport:
    """One rank's end of a World, or of a group within it."""

    name = "local"
    library = "threads"
    max_tag = (1 << 31) - 1
    threads = True
    calls: Calls | None = None
    soiled = False
    together = False
    device_messages: DeviceMessages | None = None

    def __init__(
        self, world: World, members: tuple[int, ...], rank: int, context: Hashable = ()
    ) -> None:
        self.rank = rank
        self.size = len(members)
        self._world = world
        self._members = members
        self.world = members
        self._context = context
        self._splits = 0

    def isend(self, data: Bytes, dst: int, tag: int, channel: Channel) -> LocalRequest:
        """Start to send; the bytes are copied when the receive meets the send."""
        here, there = self._members[self.rank], self._members[dst]
        return self._post(data, dst, (self._context, channel, here, there, tag), sending=True)

    def irecv(self, data: Bytes, src: int, tag: int, channel: Channel) -> LocalRequest:
        """Start to receive."""
        here, there = self._members[self.rank], self._members[src]
        return self._post(data, src, (self._context, channel, there, here, tag), sending=False)

    def _post(self, data: Bytes, peer: int, key: _Key, sending: bool) -> LocalRequest:
        wake = self._world.wakes[self._members[self.rank]]
        request = LocalRequest(data, peer, wake, self._world)
        self._world.post(request, key, sending)
        return request

    def pause(self, spins: int) -> None:
        """Sleep until a request of this rank is done, or a rank is lost."""
        wake = self._world.wakes[self._members[self.rank]]
        wake.wait(0.05)
        wake.clear()

    def check(self, peers: Iterable[int]) -> None:
        """Raise PeerLost where a rank of the group has failed, or a peer has ended."""
        self._world.check([self._members[peer] for peer in peers], self._members)

    def tell(self, ranks: Iterable[int], data: bytes) -> None:
        """Put a notice into the box of each rank, and wake it."""
        for rank in ranks:
            self._world.notices[rank].append((self._members[self.rank], data))
            self._world.wakes[rank].set()

    def heard(self) -> list[tuple[int, bytes]]:
        """Empty this rank's box."""
        box = self._world.notices[self._members[self.rank]]
        return [box.popleft() for _ in range(len(box))]

    def departed(self) -> set[int]:
        """Return nobody: the world itself knows who is lost."""
        return set()

    def split(self, color: int | None, key: int) -> Transport | None:
        """Return the group of the ranks of the same color."""
        self._splits += 1
        place = (self._context, self._splits)
        told = self._world.meet(
            place, self._members[self.rank], (color, key, self.rank), self._members
        )
        if color is None:
            return None
        group = [
            entry[2] for entry in sorted((e for e in told if e[0] == color), key=lambda e: e[1:])
        ]
        members = tuple(self._members[rank] for rank in group)
        return LocalTransport(self._world, members, group.index(self.rank), (*place, color))

    def node(self) -> Transport:
        """Return a group of all ranks: threads share their node."""
        group = self.split(0, self.rank)
        assert group is not None
        return group

    def leave(self) -> None:
        """Note that this rank has ended."""
        self._world.lose(self._members[self.rank], "it has left the job", failed=False)

    def abort(self, status: int) -> None:
        """Refuse: the other ranks are threads of the same process."""
        raise CommError(f"rank {self.rank} asked to abort the job with status {status}")

    def close(self) -> None:
        """Do nothing: the world ends with the run."""
