"""Memory that other processes open, with a runtime that gives addresses alone."""

import contextlib
import itertools
import os
import threading
from types import SimpleNamespace
from typing import Any

from ringfold.comm.transport.cuda_memory import BLOCK_BYTES, CudaMemory, Piece


def memory_of_nothing() -> CudaMemory:
    addresses = itertools.count(1 << 30, 2 * BLOCK_BYTES)
    runtime = SimpleNamespace(
        malloc=lambda nbytes: next(addresses),
        free=lambda address: None,
        ipcGetMemHandle=lambda address: b"h" * 64,
        deviceSynchronize=lambda: None,
        CUDARuntimeError=OSError,
    )
    cuda = SimpleNamespace(runtime=runtime, Device=lambda ordinal: contextlib.nullcontext())
    return CudaMemory(SimpleNamespace(cuda=cuda), 0)


def test_memory_is_shown_while_somebody_allocates() -> None:
    """A program's thread, while the one that advances operations looks for a piece."""
    memory = memory_of_nothing()
    first, later = memory.allocate(5), []

    class Disturbing:
        """One more allocation, which is followed by another when it is looked at."""

        @property
        def piece(self) -> Piece:
            later.append(memory.allocate(5))
            return Piece(7, 0, 1)

    kept: Any = [Disturbing() for _ in range(3)]
    for one in kept:
        memory._allocations.add(one)
    memory.export(first.piece.base + 1, BLOCK_BYTES)  # in none of them, so all are looked at
    assert len(later) == 3
    shown = memory.export(later[0].piece.base + 3, 2)
    assert shown is not None and shown.offset == 3


def test_a_fork_frees_no_memory_of_the_gpu() -> None:
    memory = memory_of_nothing()
    freed: list[int] = []
    memory._runtime.free = freed.append
    kept = [memory.allocate(5)]
    child = os.fork()
    if child == 0:
        kept.clear()
        os._exit(len(freed))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    kept.clear()
    assert len(freed) == 1


def test_spare_memory_is_looked_for_by_one_thread_at_a_time() -> None:
    """A piece of another size was taken out for a moment, and another thread found it gone."""
    memory = memory_of_nothing()
    found: list[Any] = []

    def look() -> None:
        try:
            found.append(memory._unused(BLOCK_BYTES))
        except IndexError as error:
            found.append(error)

    thread = threading.Thread(target=look)

    class Watched(Piece):
        """A piece during whose look another thread comes."""

        def __getattribute__(self, name: str) -> Any:
            if name == "nbytes" and thread.ident is None:
                thread.start()
                thread.join(0.1)
            return super().__getattribute__(name)

    memory._spare.append(Watched(1 << 30, BLOCK_BYTES, 1, b"h"))
    assert memory._unused(2 * BLOCK_BYTES) is None
    thread.join()
    assert isinstance(found[0], Piece), found
