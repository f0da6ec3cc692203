"""Collectives on device memory: in place by `ipc`, or through pinned host memory.

Where the ranks of a group open each other's memory, and what a collective reads of others is
registered, their kernels do it (`ipc`). Everything else is staged, window by window (`windowed`).

Operations of a group take turns, in the order of the calls. They have a copy of the group to
themselves: a copy of memory ends sooner on one rank than on another, so that ranks could not keep
one order of these operations and the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from .device import Device, DeviceArray, Event, Like, like
from .device_calls import Make, called
from .device_messages import REASON, DeviceMessages
from .dtypes import Typed
from .fingerprint import fingerprint
from .ipc import Ipc
from .ipc_trial import open_ipc
from .schedule import Algorithm
from .trace import Signature
from .transport.base import Channel
from .turns import Line
from .windowed import Copier, pinned, run_windows
from .windows import Window, elementwise, exchanged, gathered, scattered
from .work import Prepared, Receipt, Steps

if TYPE_CHECKING:
    from .communicator import Communicator
    from .operations import Operations

WINDOW_BYTES = 4 << 20
"""Of a window: long enough that a copy runs at full speed, short enough that many overlap."""

Prepare = Callable[["Operations", Typed], Prepared]
"""Prepare a window's collective on the host."""


class DeviceOperations:
    """Prepare operations on device memory for one rank of one group; as `Operations` does."""

    def __init__(
        self,
        comm: Communicator,
        find: Callable[[DeviceArray], Device],
        window_bytes: int = WINDOW_BYTES,
        like: Like = like,
    ) -> None:
        """find: return the device that an array lies on; the same object for the same device."""
        self._comm = comm
        self._find = find
        self._like = like
        self._window_bytes = window_bytes
        self._copiers: dict[str, Copier] = {}
        self._line = Line(comm.rank)
        self._group: Communicator | None = None
        self._ipc: Ipc | None = None
        self._why = REASON
        self._abandoned: list[object] = []
        self.messages = DeviceMessages(comm, self._copier)

    def close(self) -> list[object]:
        """Give the group back; collective where a collective was called.

        Returns: what must live until the other ranks have closed theirs.
        """
        group, self._group = self._group, None
        ipc, self._ipc = self._ipc, None
        if ipc is not None:
            ipc.close()
        kept = self.messages.close()
        copiers, self._copiers = self._copiers, {}
        # With a copier go its streams, and pinned memory, where copies may still be at.
        self._abandoned += [copier for copier in copiers.values() if not copier.ends()]
        if group is not None:
            group.close()
        return kept

    # -- collectives -------------------------------------------------------------------------

    def allreduce(self, array: DeviceArray, op: str, algorithm: Algorithm) -> Prepared:
        many = self._comm.size > 1
        return self._collective(
            Signature("allreduce", op, array.dtype.name, array.count),
            array,
            lambda: elementwise(array.count, self._most(array), sends=many, takes=many),
            lambda host, part: host.allreduce(part, op, algorithm),
            algorithm,
        )

    def reduce(self, array: DeviceArray, root: int, op: str, algorithm: Algorithm) -> Prepared:
        at_root = self._comm.rank == root
        return self._collective(
            Signature("reduce", op, array.dtype.name, array.count, root),
            array,
            lambda: elementwise(array.count, self._most(array), sends=True, takes=at_root),
            lambda host, part: host.reduce(part, root, op, algorithm),
            algorithm,
        )

    def broadcast(self, array: DeviceArray, root: int, algorithm: Algorithm) -> Prepared:
        at_root = self._comm.rank == root
        return self._collective(
            Signature("broadcast", "", array.dtype.name, array.count, root),
            array,
            lambda: elementwise(array.count, self._most(array), sends=at_root, takes=not at_root),
            lambda host, part: host.broadcast(part, root, algorithm),
            algorithm,
        )

    def reduce_scatter(self, array: DeviceArray, op: str, algorithm: Algorithm) -> Prepared:
        size, rank = self._comm.size, self._comm.rank
        own = -(-(array.count - rank) // size)
        return self._collective(
            Signature("reduce_scatter", op, array.dtype.name, array.count),
            array,
            lambda: scattered(array.count, size, rank, self._most(array)),
            lambda host, part: host.reduce_scatter(part, op, algorithm),
            algorithm,
            lambda device: self._like(device, array, (max(own, 0),)),
        )

    def allgather(self, array: DeviceArray, algorithm: Algorithm) -> Prepared:
        size = self._comm.size
        return self._collective(
            Signature("allgather", "", array.dtype.name, array.count),
            array,
            lambda: gathered(array.count, size, self._most(array), takes=True),
            lambda host, part: host.allgather(part, algorithm),
            algorithm,
            lambda device: self._like(device, array, (size, *array.shape)),
        )

    def gather(self, array: DeviceArray, root: int, algorithm: Algorithm) -> Prepared:
        size, at_root = self._comm.size, self._comm.rank == root
        return self._collective(
            Signature("gather", "", array.dtype.name, array.count, root),
            array,
            lambda: gathered(array.count, size, self._most(array), takes=at_root),
            lambda host, part: host.gather(part, root, algorithm),
            algorithm,
            lambda device: self._like(device, array, (size, *array.shape)) if at_root else None,
        )

    def scatter(self) -> Prepared:
        """Refuse: ranks that pass nothing cannot say on which device they want their row."""
        raise TypeError(
            "x: scatter takes host memory only, since the other ranks do not say where their row "
            "is to lie; broadcast it, or scatter a host copy"
        )

    def alltoall(self, array: DeviceArray, algorithm: Algorithm) -> Prepared:
        size = self._comm.size
        return self._collective(
            Signature("alltoall", "", array.dtype.name, array.count),
            array,
            lambda: exchanged(array.count // size, size, self._most(array)),
            lambda host, part: host.alltoall(part, algorithm),
            algorithm,
            lambda device: self._like(device, array, array.shape),
        )

    # -- the two ways ------------------------------------------------------------------------

    def _collective(
        self,
        signature: Signature,
        array: DeviceArray,
        cut: Callable[[], Sequence[Window]],
        prepare: Prepare,
        algorithm: Algorithm,
        make: Make | None = None,
    ) -> Prepared:
        """Prepare it both ways; when the ranks meet they find which one they take.

        cut: return the windows, where it is staged.
        make: None where the array itself takes the result.
        """
        copier, group = self._copier(array), self._copy_of_group(array)
        ipc = self._ipc if algorithm is None else None
        cut = cache(cut)

        def run(into: int, ready: Event, tag: int) -> Steps:
            def exchange(part: Typed) -> Steps:
                prepared = prepare(group.host_operations, part)
                group._runner.note(prepared)
                return (yield from prepared.run(tag))

            with self._line.turn() as turn:
                while not turn.done():
                    yield [turn]
                if ipc is not None:
                    last = yield from ipc.run(signature, array, into, ready, tag)
                    if last is not None:
                        return last, "ipc"
                windows = cut()
                last = yield from run_windows(
                    copier, group.rank, array, into, windows, exchange, ready
                )
            return last, f"staged, {group.host_operations.way}"

        name = "staged" if ipc is None else "ipc"
        return Prepared(
            self._receipt(signature, array, cut, ipc),
            Channel.COLLECTIVE,
            partial(called, copier.device, array, make, run, self._abandoned),
            signature,
            way=name,
            mark=fingerprint(signature, name),
        )

    def _copy_of_group(self, array: DeviceArray) -> Communicator:
        """Return this group's own copy, where device operations meet; collective at first.

        The ranks also try then whether they can open each other's memory.
        """
        if self._group is None:
            self._group = self._comm.split(0, self._comm.rank)
            self._ipc, no_ipc = open_ipc(self._group, self._find(array))
            if no_ipc:
                self.because(f"no ipc: {no_ipc}")
        return self._group

    def because(self, reason: str) -> None:
        """Let receipts of what is staged give one more reason."""
        self._why += f"; {reason}"

    def alike(self, comm: Communicator, like: Like) -> DeviceOperations:
        """Return the operations of another group on the same devices.

        like: makes what takes their results.
        """
        return DeviceOperations(comm, self._find, self._window_bytes, like)

    def open(self, array: DeviceArray) -> tuple[Communicator, bool]:
        """Return this group's own copy, and whether its ranks open each other's memory; collective.

        The same answer on all ranks.
        """
        group = self._copy_of_group(array)
        return group, self._ipc is not None

    def _copier(self, array: DeviceArray) -> Copier:
        """Return what this rank keeps for the device that an array lies on."""
        device = self._find(array)
        copier = self._copiers.get(device.name)
        if copier is None:
            staging = pinned(device, lambda nbytes: self._comm.empty(nbytes, np.uint8))
            copier = Copier(device, device.make_stream(), device.make_stream(), staging)
            self._copiers[device.name] = copier
        return copier

    def _most(self, array: DeviceArray) -> int:
        return max(1, self._window_bytes // array.dtype.itemsize)

    def _receipt(
        self,
        signature: Signature,
        array: DeviceArray,
        cut: Callable[[], Sequence[Window]],
        ipc: Ipc | None,
    ) -> Receipt:
        name, size, nbytes = signature.operation, self._comm.size, array.nbytes
        way = f"staged, {self._copy_of_group(array).host_operations.way}"
        offer = None if ipc is None else ipc.offer(signature, array)
        if offer is not None and offer.exported is not None:
            why = "registered memory of one node; staged where another rank's is not registered"
            return Receipt(name, "pairwise, in place", "ipc", size, nbytes, why)
        if offer is not None and offer.fits:
            why = "ipc where the root's memory is registered, which it alone knows"
            return Receipt(name, "pairwise, in place", f"ipc or {way}", size, nbytes, why)
        return Receipt(name, f"{len(cut())} windows", way, 1, nbytes, self._why)
