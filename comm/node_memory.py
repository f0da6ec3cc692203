"""The memories of the ranks of one node, mapped by all of them."""

from __future__ import annotations

import ctypes
import os
import platform
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..kernels.records import BellWord
from .cma import accessible
from .errors import CommError
from .memory import BELL_AT, Handle, Mapping, Memory

if TYPE_CHECKING:
    from .communicator import Communicator

Words = npt.NDArray[np.int64]

_SLEEP = 2_000_000
"""Nanoseconds that a thread sleeps without looking whether something else is to be done."""

_FUTEX = {"x86_64": 202, "ppc64le": 221, "s390x": 238}
_FUTEX_ELSEWHERE = 98
"""The number of futex(2), by machine: Linux' tables of system calls; newer machines share one."""


class NodeMemory:
    """The memories of a node's ranks, all mapped by all of them, or by none.

    token: what the ranks of one node agree on; 0 without shared memory.
    reason: why there is none.
    traces: every rank's ring of operations, for trace.entries_in.
    bell: this rank's BellWord record.
    processes: of each rank, where all can read each other's own memory too; else None.
    """

    def __init__(self, node: Communicator, reads: bool = True) -> None:
        """Create this rank's memory and map the others'; collective over the node.

        reads: try whether ranks have access to each other's own memory.
        """
        self.rank = node.rank
        self.memory: Memory | None = None
        self.token = 0
        self.reason = ""
        self.addresses: list[int] = []
        self.bell = np.zeros(BellWord.WORDS, np.int64)
        self.processes: Words | None = None
        self._mappings: list[Mapping] = []
        self.traces: list[npt.NDArray[np.uint8]] = []
        handle = np.zeros(4, np.int64)
        try:
            self.memory = Memory(node.rank, node.size)
            handle = self.memory.handle.words()
        except (OSError, ValueError) as error:
            self.reason = f"rank {node.rank} of the node gets no shared memory: {error}"
        handles = node.allgather(handle)
        if handles[:, 0].all():  # the descriptor may be 0, where stdin is closed
            self._open(handles)
        told = np.array([not self.reason], np.uint8)
        if node.allreduce(told, op="min")[0]:
            self.token = int(handles[0, 3])
            _equip(self.bell, self.bell_of(self.rank))
            self.processes = accessible(node) if reads and node.size > 1 else None
        else:
            self.reason = self.reason or "another rank of the node cannot map this rank's memory"

    def bell_of(self, node_rank: int) -> int:
        """Return the address of a rank's bell."""
        return self.addresses[node_rank] + BELL_AT

    def _open(self, handles: Words) -> None:
        assert self.memory is not None
        try:
            for rank, words in enumerate(handles.tolist()):
                if rank == self.rank:
                    self.addresses.append(self.memory.address)
                    self.traces.append(self.memory.trace)
                else:
                    self._mappings.append(Mapping(Handle(*words)))
                    self.addresses.append(self._mappings[-1].address)
                    self.traces.append(self._mappings[-1].trace)
        except (OSError, CommError) as error:
            self.reason = str(error)


def _equip(bell: Words, own: int) -> None:
    """Fill in a rank's record of how to sleep and to wake others."""
    library = ctypes.CDLL(None)
    bell[BellWord.OWN] = own
    bell[BellWord.SYSTEM_CALL] = ctypes.cast(library.syscall, ctypes.c_void_p).value or 0
    bell[BellWord.FUTEX] = _FUTEX.get(platform.machine(), _FUTEX_ELSEWHERE)
    bell[BellWord.SECONDS], bell[BellWord.NANOSECONDS] = 0, _SLEEP


def yielding() -> int:
    """Return the address of sched_yield."""
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def look_counts(num_ranks: int) -> tuple[int, int]:
    """Return how often a rank spins, and then yields, before it returns to Python.

    It spins where every rank of the node has a core, and yields where they share cores.
    """
    return (2000, 20) if num_ranks <= len(os.sched_getaffinity(0)) else (4, 100)
