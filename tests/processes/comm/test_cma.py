"""Ranks that read and write each other's own memory: the contract, and what may be refused."""

from collections.abc import Callable, Iterator

import contract
import numpy as np
import pytest
from contract import CHECKS, data, expected

from ringfold import CommError, CommTimeout, Communicator, Settings, Work
from ringfold.comm import cma, fused
from ringfold.comm.buffer import Buffer
from ringfold.comm.fused_rows import STAGE_BYTES
from ringfold.kernels.records import Note, WorkWord

LARGE = STAGE_BYTES // 4 * 2 + 1235
READ = ("allreduce", "reduce_scatter", "allgather", "gather", "alltoall")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every collective that can take this form, however small its buffers."""
    monkeypatch.setattr(fused, "READ_FROM", dict.fromkeys(READ, 0))
    monkeypatch.setattr(fused, "EAGER_BYTES", 0)
    yield


def reads(comm: Communicator) -> bool:
    """Tell whether the ranks have access to each other's own memory."""
    board = None if comm._sharing is None else comm._sharing.board
    return board is not None and board.reads


def algorithm_of(comm: Communicator, name: str, x: np.ndarray) -> str:
    work = getattr(comm, name)(x, blocking=False)
    work.wait()
    return work.receipt.algorithm


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_it_keeps_the_promise(comm: Communicator, always: None, name: str) -> None:
    CHECKS[name](comm, None)


@pytest.mark.parametrize("dtype", ["int8", "int64", "float16", "float64"])
def test_types_of_every_width(comm: Communicator, always: None, dtype: str) -> None:
    contract.check_allreduce(comm, None, np.dtype(dtype))


@pytest.mark.parametrize("count", [1, 17, LARGE, 3 * LARGE])
@pytest.mark.parametrize("registers", ["nobody", "rank 0", "all but rank 0"])
def test_any_mixture(comm: Communicator, always: None, count: int, registers: str) -> None:
    is_first = comm.rank == 0
    shares = {"nobody": False, "rank 0": is_first}.get(registers, not is_first)
    for turn in range(3):
        values = data(comm.rank, count, np.float32) + turn
        x = comm.empty(count) if shares else np.empty(count, np.float32)
        x[:] = values
        rows = np.stack([data(rank, count, np.float32) + turn for rank in range(comm.size)])
        np.testing.assert_array_equal(comm.allgather(x), rows)
        np.testing.assert_array_equal(comm.allreduce(x), rows.sum(axis=0, dtype=np.float32))


def test_the_sum_is_the_same_in_every_form(comm: Communicator, always: None) -> None:
    random = np.random.default_rng(comm.rank)
    values = random.standard_normal(LARGE).astype(np.float32)
    read = comm.allreduce(values.copy())
    shared = comm.empty(LARGE)
    shared[:] = values
    np.testing.assert_array_equal(read, comm.allreduce(shared))
    with Communicator(settings=Settings(cma=False)) as other:
        np.testing.assert_array_equal(read, other.allreduce(values.copy()))


def test_buffers_from_a_size_on_are_read(comm: Communicator) -> None:
    if not reads(comm):
        return
    large = np.ones(comm.size << 19)
    assert algorithm_of(comm, "allreduce", large) == "pairwise, cma"
    assert algorithm_of(comm, "allreduce", large[1:]) == "pairwise, staged"
    assert algorithm_of(comm, "allgather", large[:9999]) == "pairwise, cma"
    with Communicator(settings=Settings(cma=False)) as other:
        assert algorithm_of(other, "allreduce", large) == "pairwise, staged"


def test_receipts_tell_who_writes_to_the_memory_of_others(comm: Communicator) -> None:
    """All were said to write there, though only an allreduce does."""
    if not reads(comm):
        return
    large = np.ones(comm.size << 19)
    written = {
        name: "written" in _reason(getattr(comm, name)(large, blocking=False))
        for name in ("allreduce", "reduce_scatter", "allgather")
    }
    assert written == {"allreduce": True, "reduce_scatter": False, "allgather": False}


def _reason(work: Work) -> str:
    work.wait()
    assert work.receipt.algorithm == "pairwise, cma"
    return work.receipt.reason


def _reads_nothing(process: int, address: int) -> int | None:
    return None


def _writes_elsewhere(process: int, address: int, value: int) -> bool:
    return True


@pytest.mark.parametrize("fault", [_reads_nothing, _writes_elsewhere])
def test_one_rank_that_may_not_read_or_write_is_enough(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., object]
) -> None:
    if comm.size == 1:
        return
    if comm.rank == comm.size - 1:
        name = "_read_word" if fault is _reads_nothing else "_write_word"
        monkeypatch.setattr(cma, name, fault)
    with Communicator() as other:
        x = data(comm.rank, 2 << 18, np.float64)
        assert algorithm_of(other, "allreduce", x) == "pairwise, staged"
        np.testing.assert_array_equal(x, expected("sum", comm.size, 2 << 18, np.float64))


def test_memory_that_has_gone_is_a_timeout_that_names_the_rank(
    comm: Communicator, always: None
) -> None:
    if not reads(comm):
        return
    last = comm.size - 1
    with Communicator(settings=Settings(timeout=1.0)) as other:
        prepared = other._operations.allreduce(np.ones(LARGE, np.float32))
        assert prepared.meeting is not None
        if comm.rank == last:  # nothing is mapped at the beginning of a process
            prepared.meeting._record[WorkWord.NOTE + Note.ADDRESS] = 8
        assert other._sharing is not None and other._sharing.board is not None
        work = other._runner.start(prepared, False)
        missed = rf"for ranks \[{last}\]" if comm.rank != last else "allreduce"
        with pytest.raises(CommTimeout, match=missed):
            work.wait()
        other._progress.give_up(lambda one: one is work, lambda _: CommError("enough"))
        ((_, kept),) = other._sharing.board.memory._kept  # a peer that goes on might write there
        assert isinstance(kept, Buffer) and kept.owner is prepared.owner
        comm.barrier()
