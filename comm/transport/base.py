"""What the executor needs from a transport."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Channel(Enum):
    """Keep the messages of collectives and of users' sends apart."""

    COLLECTIVE = 0
    POINT_TO_POINT = 1


class Request(Protocol):
    """One message on its way; keeps its buffer alive."""

    @property
    def peer(self) -> int:
        """Return the rank at the other end."""
        ...

    def done(self) -> bool:
        """Tell whether the buffer may be used again; never waits.

        Raises: MismatchError where the peer's message has another length.
        """
        ...


class Receiving(Request, Protocol):
    """A message that is to come."""

    def cancel(self) -> bool:
        """Take a receive back; tell whether the message, if any comes, is left for another."""
        ...


@dataclass(frozen=True)
class Calls:
    """How compiled code sends a transport's collective messages: addresses and handles.

    isend, irecv, test, get_count: MPI's functions of these names.  pause: sched_yield.
    comm, byte: MPI handles, as integers.
    wrong_size: the error for (peer, bytes got, bytes wanted).
    refused: the error for (MPI error code, peer, bytes wanted or None for a send).
    """

    isend: int
    irecv: int
    test: int
    get_count: int
    pause: int
    comm: int
    byte: int
    status_bytes: int
    wrong_size: Callable[[int, int, int], Exception]
    refused: Callable[[int, int, int | None], Exception]


class DeviceMessages(Protocol):
    """Messages whose bytes lie in device memory, for a library that sends such.

    They meet those of the same transport that lie in host memory. Only where `cuda_probe` has seen
    the library do it: another one would read the address as a host's, and the process would die.
    The bytes must be there, or free to be written, when the call is made; no stream is looked at.
    """

    def isend_device(
        self, address: int, nbytes: int, dst: int, tag: int, channel: Channel
    ) -> Request:
        """Start to send nbytes at a device address, which stay until it is done."""
        ...

    def irecv_device(
        self, address: int, nbytes: int, src: int, tag: int, channel: Channel
    ) -> Receiving:
        """Start to receive exactly nbytes to a device address."""
        ...


class Transport(Protocol):
    """Messages between the ranks of one group.

    Messages between two ranks with the same channel and tag arrive in the order they were sent.
    threads: several threads of a rank may call at once.
    world: the members' ranks in the group that everything was split from.
    calls: how compiled code sends; None where it cannot.
    library: what carries the messages, with its version.
    soiled: an operation has ended in an error, so that messages of it may be left.
    together: the ranks of a group close it together; else one may end, and others go on.
    device_messages: what sends device memory, if the library can; None where it never does.
    """

    name: str
    library: str
    rank: int
    size: int
    max_tag: int
    threads: bool
    world: tuple[int, ...]
    calls: Calls | None
    soiled: bool
    together: bool

    @property
    def device_messages(self) -> DeviceMessages | None:
        """Return what sends device memory."""
        ...

    def isend(self, data: Bytes, dst: int, tag: int, channel: Channel) -> Request:
        """Start to send 1-D contiguous bytes."""
        ...

    def irecv(self, data: Bytes, src: int, tag: int, channel: Channel) -> Receiving:
        """Start to receive exactly as many bytes as data has."""
        ...

    def pause(self, spins: int) -> None:
        """Let others run, longer the more often this rank has looked in vain."""
        ...

    def check(self, peers: Iterable[int]) -> None:
        """Raise PeerLost where one of the peers is known to have left the job."""
        ...

    def tell(self, ranks: Iterable[int], data: bytes) -> None:
        """Send a notice to ranks of the world, beside all messages; never waits."""
        ...

    def heard(self) -> list[tuple[int, bytes]]:
        """Return notices that have come, each with its sender's rank in the world."""
        ...

    def departed(self) -> set[int]:
        """Return the ranks of the world that are known to have left in good order."""
        ...

    def split(self, color: int | None, key: int) -> Transport | None:
        """Return the transport of the ranks of the same color, ordered by key; collective."""
        ...

    def node(self) -> Transport:
        """Return the transport of the ranks on this rank's node; collective."""
        ...

    def leave(self) -> None:
        """Tell the other ranks that this one leaves the job; not collective."""
        ...

    def abort(self, status: int) -> Any:
        """End the job on every rank, now."""
        ...

    def close(self) -> None:
        """Give the group back; collective."""
        ...
