"""Memory that other processes open, with a runtime that gives addresses alone."""

import contextlib
import itertools
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cupy
import pytest

from ringfold import CommError
from ringfold.comm.transport.cuda_memory import BLOCK_BYTES, Allocation, CudaMemory, Piece


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


def memory_of(tmp_path: Path, blocks: int) -> tuple[CudaMemory, fake_cupy.Runtime]:
    """Return the memory of a pretended card of so many blocks."""
    runtime = fake_cupy.Runtime(tmp_path)
    runtime.capacity = blocks * BLOCK_BYTES
    return CudaMemory(fake_cupy.module(runtime), 0), runtime


@pytest.mark.parametrize("holder", ["cupy", "torch", "garbage"])
def test_memory_that_nobody_uses_is_asked_back(
    holder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools had it, or a cycle that was not collected yet, and training ended with a CommError."""
    memory, runtime = memory_of(tmp_path, 3)
    empty = SimpleNamespace(empty_cache=lambda: None)
    if holder == "cupy":
        runtime.pooled.append(2 * BLOCK_BYTES)
    elif holder == "torch":
        runtime.capacity = 0
        empty = SimpleNamespace(empty_cache=lambda: setattr(runtime, "capacity", 3 * BLOCK_BYTES))
    else:
        cycle: list[Any] = [memory.allocate(2 * BLOCK_BYTES)]
        cycle.append(cycle)
        del cycle
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=empty))
    kept = memory.allocate(2 * BLOCK_BYTES)
    assert runtime.allocated == kept.piece.nbytes and not runtime.pooled


def test_memory_that_is_full_is_told(tmp_path: Path) -> None:
    memory, runtime = memory_of(tmp_path, 3)
    kept = memory.allocate(2 * BLOCK_BYTES)
    with pytest.raises(MemoryError, match=f"no {2 * BLOCK_BYTES} bytes .* {2 * BLOCK_BYTES} bytes"):
        memory.allocate(2 * BLOCK_BYTES)
    with pytest.raises(CommError, match="bytes of GPU memory are left"):
        memory.allocate(2 * BLOCK_BYTES)
    del kept
    memory.allocate(3 * BLOCK_BYTES)

    def malloc(size: int) -> int:
        raise fake_cupy.CUDARuntimeError(fake_cupy.ILLEGAL_ADDRESS)

    runtime.malloc = malloc  # type: ignore[method-assign]
    with pytest.raises(CommError, match="cannot be had: cudaErrorIllegalAddress") as told:
        memory.allocate(1)
    assert not isinstance(told.value, MemoryError)


def shown(memory: CudaMemory, blocks: int) -> Allocation:
    made = memory.allocate(blocks * BLOCK_BYTES)
    assert memory.export(made.piece.base, 1) is not None
    return made


def test_arrays_of_many_lengths_use_shown_memory_again(tmp_path: Path) -> None:
    """Only those of the very same length did: a card was full of what nobody used."""
    memory, runtime = memory_of(tmp_path, 32)
    for blocks in range(9, 0, -1):
        shown(memory, blocks)
    assert runtime.allocated == (9 + 4 + 1) * BLOCK_BYTES
    one, other = shown(memory, 3), shown(memory, 3)
    assert [made.piece.nbytes // BLOCK_BYTES for made in (one, other)] == [4, 3]
    runtime.capacity = 0
    last = shown(memory, 2)
    assert last.piece.nbytes == 9 * BLOCK_BYTES


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
