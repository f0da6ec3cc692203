"""Choose, for each operation on device memory, the way that it takes.

1. `ipc`: ranks of one node read each other's registered memory (`ipc`, tried by `open_ipc`), and
   send notes of where a message lies (`device_mail`).
2. `gpu-aware mpi`: where data goes through MPI anyway, and a child process has seen the library
   send device memory (`direct`). For messages that is decided by each pair of ranks; either end may
   be in host memory, so the two need not agree. A collective takes it where all ranks can.
3. `staged`: through pinned host memory (`device_operations`), everywhere else.

Large collectives over several nodes take the first within them and another between them
(`device_nesting`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .device import Device, DeviceArray, Like, describe, like
from .device_messages import gpu_aware
from .device_nesting import Nested
from .device_nesting_trial import open_nested
from .device_operations import DeviceOperations
from .direct import Direct
from .schedule import Algorithm
from .transport.cuda_probe import Verdict
from .work import Prepared

if TYPE_CHECKING:
    from .communicator import Communicator

Find = Callable[[DeviceArray], Device]
Side = Nested | Direct | DeviceOperations
"""What prepares a collective one way."""


class DeviceWays:
    """Prepare operations on device memory for one rank of one group; as `Operations` does."""

    def __init__(
        self,
        comm: Communicator,
        find: Find,
        staged: DeviceOperations,
        aware: Callable[[], Verdict],
        like: Like = like,
    ) -> None:
        """aware: tell whether this rank's MPI library sends device memory; asked once, if at all.

        It is asked only where MPI messages would carry the data.

        like: makes what takes a result.
        """
        self._comm, self._find, self._staged, self._aware = comm, find, staged, aware
        self._like = like
        self._verdict: Verdict | None = None
        self._flat: Direct | DeviceOperations = staged  # for what is not nested
        self._nested: Nested | None = None
        self._asked = False

    def close(self) -> list[object]:
        """Give the group back; collective where a collective was called.

        Returns: what must live until the other ranks have closed theirs.
        """
        self._flat = self._staged
        nested, self._nested = self._nested, None
        if nested is not None:
            nested.close()
        return self._staged.close()

    def alike(self, comm: Communicator, like: Like) -> DeviceWays:
        """Return the ways of another group's memory on the same devices; `like` makes results."""
        return DeviceWays(comm, self._find, self._staged.alike(comm, like), self._aware, like)

    def keeping(self) -> DeviceWays:
        """Return this for plans, which make their results on the device anew."""
        return self

    # -- collectives -------------------------------------------------------------------------

    def allreduce(self, x: Any, op: str = "sum", algorithm: Algorithm = None) -> Prepared:
        array = describe(x, writable=True)
        side = self._reducing(array, op, algorithm)
        return side.allreduce(array, op, algorithm)

    def reduce(
        self, x: Any, root: int = 0, op: str = "sum", algorithm: Algorithm = None
    ) -> Prepared:
        root = self._comm.host_operations.root(root)
        array = describe(x, writable=self._comm.rank == root)
        side = self._reducing(array, op, algorithm)
        return side.reduce(array, root, op, algorithm)

    def reduce_scatter(self, x: Any, op: str = "sum", algorithm: Algorithm = None) -> Prepared:
        array = describe(x, writable=False)
        side = self._reducing(array, op, algorithm)
        return side.reduce_scatter(array, op, algorithm)

    def broadcast(self, x: Any, root: int = 0, algorithm: Algorithm = None) -> Prepared:
        root = self._comm.host_operations.root(root)
        array = describe(x, writable=self._comm.rank != root)
        side = self._moving(array, array.nbytes, algorithm)
        return side.broadcast(array, root, algorithm)

    def allgather(self, x: Any, algorithm: Algorithm = None) -> Prepared:
        array = describe(x, writable=False)
        side = self._moving(array, array.nbytes * self._comm.size, algorithm)
        return side.allgather(array, algorithm)

    def gather(self, x: Any, root: int = 0, algorithm: Algorithm = None) -> Prepared:
        root = self._comm.host_operations.root(root)
        array = describe(x, writable=False)
        side = self._moving(array, array.nbytes * self._comm.size, algorithm)
        return side.gather(array, root, algorithm)

    def scatter(self, x: Any = None, root: int = 0, algorithm: Algorithm = None) -> Prepared:
        return self._staged.scatter()

    def alltoall(self, x: Any, algorithm: Algorithm = None) -> Prepared:
        array, size = describe(x, writable=False), self._comm.size
        if not array.shape or array.shape[0] != size:
            raise ValueError(
                f"x: expected a first axis of {size}, a row per rank, got shape {array.shape}"
            )
        side = self._moving(array, array.nbytes, algorithm)
        return side.alltoall(array, algorithm)

    # -- arrays ------------------------------------------------------------------------------

    def kind(self, x: Any) -> tuple[str, tuple[int, ...]]:
        """Return the element type's name, and the shape."""
        array = describe(x, writable=False)
        return array.dtype.name, array.shape

    def like(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Return a new array of x's library, device and element type."""
        array = describe(x, writable=False)
        return self._like(self._find(array), array, shape)

    where = " on a GPU"

    def octets(self, x: Any, most: int | None = None) -> None:
        """Return no bytes: they lie on a device."""

    # -- point to point ----------------------------------------------------------------------

    def send(self, x: Any, dst: int, tag: int = 0) -> Prepared:
        array, host = describe(x, writable=False), self._comm.host_operations
        empty, tag = host.send(np.empty(0, np.uint8), dst, tag), host.tag(tag)
        return self._message(array, empty, tag) or self._staged.messages.send(array, empty, tag)

    def recv(self, x: Any, src: int, tag: int = 0) -> Prepared:
        array, host = describe(x, writable=True), self._comm.host_operations
        empty, tag = host.recv(np.empty(0, np.uint8), src, tag), host.tag(tag)
        return self._message(array, empty, tag) or self._staged.messages.recv(array, empty, tag)

    def _message(self, array: DeviceArray, empty: Prepared, tag: int) -> Prepared | None:
        messages, peer = self._comm._transport.device_messages, empty.signature.peer
        if messages is None or self.way_to(peer) is not None:
            return None
        return gpu_aware(self._comm, messages, self._find(array), array, empty, tag)

    def opens(self, x: Any) -> bool:
        """Tell whether the group's ranks open each other's memory; collective."""
        return self._staged.open(describe(x, writable=False))[1]

    def way_to(self, peer: int) -> str | None:
        """Return why messages to a peer are staged; None where MPI sends them as they lie."""
        if self._comm._transport.device_messages is None:
            return f"{self._comm._transport.name} messages are of host memory"
        if self._comm.host_operations.by_mail(peer):
            return "the two share memory"
        verdict = self._judge()
        return None if verdict.aware else verdict.reason

    # -- choosing ----------------------------------------------------------------------------

    def _reducing(self, array: DeviceArray, op: str, algorithm: Algorithm) -> Side:
        """Return what computes a reduction."""
        array.dtype.require(op)
        side = self._moving(array, array.nbytes, algorithm)
        return side if array.dtype.on_devices else self._staged

    def _moving(self, array: DeviceArray, nbytes: int, algorithm: Algorithm) -> Side:
        """Return what moves nbytes of every rank's."""
        self._open(array)
        nested = self._nested if algorithm is None else None
        return nested if nested is not None and nested.takes(nbytes) else self._flat

    def _judge(self) -> Verdict:
        if self._verdict is None:
            self._verdict = self._aware()
        return self._verdict

    def _open(self, array: DeviceArray) -> None:
        """Find the ways that the group has, once; collective."""
        if not self._asked:
            self._asked = True
            self._flat = self._agree(array) or self._staged
            group, device = self._staged.open(array)[0], self._find(array)
            self._nested = open_nested(group, array, device, self.alike)

    def _agree(self, array: DeviceArray) -> Direct | None:
        """Return the direct side of the group where all of its ranks have one."""
        group, has_ipc = self._staged.open(array)
        messages = group._transport.device_messages
        if group.size == 1 or has_ipc or messages is None:
            return None
        if group.host_operations.way == "shared":
            return None
        device, verdict = self._find(array), self._judge()
        arithmetic = device.arithmetic
        able = verdict.aware and arithmetic is not None
        if not group.allreduce(np.array([able], np.uint8), "min")[0]:
            why = verdict.reason if not verdict.aware else "not on every rank"
            self._staged.because(f"no gpu-aware MPI: {why}")
            return None
        assert arithmetic is not None
        return Direct(group, messages, device, arithmetic, verdict.reason, self._like)
