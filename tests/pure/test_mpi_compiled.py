"""The compiled executor against a make-believe MPI, whose every call is seen."""

import ctypes
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ringfold.comm.executor import Arithmetic, Native, Route
from ringfold.comm.program import Op, Program
from ringfold.comm.trace import Ring, Signature, State
from ringfold.comm.transport.base import Calls, Channel
from ringfold.comm.transport.mpi_abi import find_calls, handle_value
from ringfold.comm.transport.mpi_compiled import Compiled, can_run
from ringfold.kernels.records import RING_ENTRIES, Outcome

POST = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_void_p),
)
TEST = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
COMM, BYTE, TRUNCATED = -2080374783, 0x4C00010D, 15


class Loopback:
    """An MPI of one rank that sends to itself, with 32-bit handles.

    patience: how often a message is tested in vain.  code: what `fails` returns.
    """

    def __init__(
        self, patience: int = 0, cut: int = 0, code: int = 0, fails: str = "test recv"
    ) -> None:
        self.patience, self.cut, self.code, self.fails = patience, cut, code, fails
        self.box: deque[bytes] = deque()
        self.requests: list[list[Any]] = []
        self.log: list[tuple[str, int, int, int]] = []
        self.in_flight = self.most_in_flight = self.got = 0
        self._kept = (POST(self.isend), POST(self.irecv), TEST(self.test), TEST(self.get_count))
        isend, irecv, test, get_count = (
            ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self._kept
        )
        pause = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
        self.calls = Calls(
            *(isend, irecv, test, get_count, pause, COMM, BYTE),
            status_bytes=20,
            wrong_size=lambda peer, got, wanted: ValueError(f"{peer}: {got} for {wanted}"),
            refused=lambda code, peer, wanted: OSError(f"{peer}: {code} for {wanted}"),
        )
        self.name, self.rank, self.size, self.max_tag, self.threads = "loopback", 0, 1, 99, True

    def _post(self, kind: str, request: int, *what: Any) -> int:
        if self.fails == kind:
            return self.code
        ctypes.c_int32.from_address(request).value = len(self.requests)
        self.requests.append([kind, self.patience, *what])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return 0

    def isend(
        self, at: int, count: int, kind: int, peer: int, tag: int, comm: int, request: int
    ) -> int:
        assert (kind, comm) == (BYTE, COMM)
        self.log.append(("send", peer, tag, count))
        self.box.append(ctypes.string_at(at, count))
        return self._post("send", request)

    def irecv(
        self, at: int, count: int, kind: int, peer: int, tag: int, comm: int, request: int
    ) -> int:
        assert (kind, comm) == (BYTE, COMM)
        self.log.append(("recv", peer, tag, count))
        return self._post("recv", request, at)

    def test(self, request: int, flag: int, status: int) -> int:
        entry = self.requests[ctypes.c_int32.from_address(request).value]
        entry[1] -= 1
        if entry[1] >= 0:
            return 0
        if self.code and self.fails == f"test {entry[0]}":
            return self.code
        if entry[0] == "recv":
            data = self.box.popleft()
            self.got = len(data) - self.cut
            ctypes.memmove(entry[2], data, self.got)
        self.in_flight -= 1
        ctypes.c_int32.from_address(flag).value = 1
        return 0

    def get_count(self, status: int, kind: int, count: int) -> int:
        assert kind == BYTE
        ctypes.c_int32.from_address(count).value = self.got
        return 0


def program(*rows: tuple[int, Op, int, int]) -> Program:
    """Return a program of (round, op, offset, count) with rank 0."""
    return Program(np.array([(r, op, 0, at, n) for r, op, at, n in rows], np.int64).reshape(-1, 5))


def route(mpi: Loopback, segment_bytes: int = 64, window: int = 4, moving: int = 0) -> Route:
    return Route(mpi, Channel.COLLECTIVE, 7, segment_bytes, window, moving)  # type: ignore[arg-type]


def run_compiled(
    program: Program, route: Route, x: Any, target: Any, *arithmetic: Arithmetic
) -> Any:
    return Compiled(program, route, x, target, *arithmetic).run(route.tag)


def finish(steps: Any) -> int:
    """Run to the end; return how often it had to wait, somebody waiting for it."""
    waits = 0
    try:
        steps.send(None)
        while True:
            waits += 1
            assert waits < 10_000, "it waits in vain"
            steps.send(True)
    except StopIteration:
        return waits


def adding() -> Arithmetic:
    from ringfold.kernels.pieces import combine_callback

    return Arithmetic(np.add, native=lambda: Native(combine_callback("sum", "int32")))


SWAP = program((0, Op.SEND, 0, 50), (0, Op.RECV, 50, 50))


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_segments_travel_in_order_and_a_window_at_a_time(window: int) -> None:
    mpi = Loopback(patience=2)
    x = np.arange(100, dtype=np.int32)
    finish(run_compiled(SWAP, route(mpi, 64, window), x, x))
    assert (x[50:] == np.arange(50)).all()
    sizes = [64, 64, 64, 8]
    assert mpi.log == [(kind, 0, 7, n) for n in sizes for kind in ("recv", "send")]
    assert mpi.most_in_flight == 2 * min(window, 4)


def test_a_run_is_noted_from_its_start_to_its_end_well_or_not() -> None:
    ring = Ring()
    call = ring.intern(Signature("allreduce", "sum", "int32", 100), "world", 2, "a:1")
    x = np.arange(100, dtype=np.int32)
    well = Compiled(SWAP, route(Loopback(patience=2)), x, x)
    well.note(ring, call, 7)
    finish(well.run(7))
    (entry,) = ring.entries()
    assert (entry.sequence, entry.state, entry.signature.elements) == (7, State.DONE, 100)
    assert 0 < entry.start <= entry.end <= time.monotonic_ns()
    ring.time_ends()
    well.note(ring, call, 7)
    before = time.monotonic_ns()
    finish(well.run(7))
    after = time.monotonic_ns()
    assert before <= ring.entries(1)[0].start < ring.entries(1)[0].end <= after
    given_up = Compiled(SWAP, route(Loopback(patience=1000)), x, x)
    given_up.note(ring, call, 8)
    steps = given_up.run(7)
    steps.send(None)
    assert ring.entries(1)[0].state is State.RUNNING
    given_up.note(ring, call, 9)  # once more, while the first still flies
    again = given_up.run(7)
    again.send(None)
    again.close()
    steps.close()
    assert [(e.sequence, e.state) for e in ring.entries(2)] == [
        (8, State.FAILED),
        (9, State.FAILED),
    ]
    finish(Compiled(SWAP, route(Loopback()), x, x).run(7))
    assert len(ring.entries()) == 4  # nobody asked for a note


def test_a_run_that_takes_long_leaves_entries_that_took_its_place_alone() -> None:
    ring = Ring()
    call = ring.intern(Signature("allreduce", "sum", "int32", 100), "world", 2, "a:1")
    for number in range(RING_ENTRIES):
        ring.end(ring.begin(call, number), Outcome.DONE)
    x = np.arange(100, dtype=np.int32)
    run = Compiled(SWAP, route(Loopback(patience=1000)), x, x)
    run.note(ring, call, 5)
    steps = run.run(7)
    steps.send(None)
    (entry,) = ring.entries(1)  # where another one had ended well
    assert (entry.sequence, entry.state, entry.end) == (5, State.RUNNING, 0)
    for number in range(RING_ENTRIES):
        ring.begin(call, number)
    finish_from(steps)
    assert (x[50:] == np.arange(50)).all()
    assert {entry.state for entry in ring.entries()} == {State.RUNNING}


def test_more_segments_fly_where_nothing_is_added() -> None:
    mpi = Loopback(patience=3)
    x = np.arange(100, dtype=np.int32)
    add = program((0, Op.SEND, 0, 50), (0, Op.RECV_REDUCE, 50, 50))
    finish(run_compiled(add, route(mpi, 64, 2, moving=3), x, x, adding()))
    assert mpi.most_in_flight == 4
    assert (x[50:] == np.arange(50, 100) + np.arange(50)).all()
    finish(run_compiled(SWAP, route(mpi, 64, 2, moving=3), x, x))
    assert mpi.most_in_flight == 6
    assert (x[50:] == np.arange(50)).all()


def test_rounds_run_one_after_the_other_and_empty_rows_send_nothing() -> None:
    mpi = Loopback()
    x = np.arange(9, dtype=np.int32)
    rows = program(
        (0, Op.SEND, 0, 3),
        (0, Op.SEND, 3, 0),
        (0, Op.RECV_REDUCE, 3, 3),
        (4, Op.SEND, 3, 3),
        (4, Op.RECV, 6, 3),
        (4, Op.RECV, 0, 0),
    )
    finish(run_compiled(rows, route(mpi), x, x, adding()))
    assert x.tolist() == [0, 1, 2, 3, 5, 7, 3, 5, 7]
    assert [n for _, _, _, n in mpi.log] == [12] * 4


def test_a_program_without_rows_ends_at_once() -> None:
    mpi = Loopback()
    x = np.zeros(0, np.int32)
    assert finish(run_compiled(program(), route(mpi), x, x)) == 0
    assert not mpi.log


def test_more_to_receive_than_to_send_uses_slots_of_one_kind() -> None:
    mpi = Loopback()
    mpi.box.extend(bytes([k] * 64) for k in range(5))
    x = np.zeros(5 * 64, np.uint8)
    finish(run_compiled(program((0, Op.RECV, 0, 320)), route(mpi, 64, 2), x, x))
    assert x.tolist() == [k for k in range(5) for _ in range(64)]
    assert mpi.most_in_flight == 2


def test_a_message_of_another_size_is_an_error() -> None:
    x = np.arange(100, dtype=np.int32)
    with pytest.raises(ValueError, match="0: 63 for 64"):
        finish(run_compiled(SWAP, route(Loopback(cut=1)), x, x))


@pytest.mark.parametrize("fails", ["recv", "send", "test recv", "test send"])
def test_what_mpi_refuses_is_an_error_and_its_memory_is_kept(fails: str) -> None:
    x, wanted = np.arange(100, dtype=np.int32), 64 if "recv" in fails else None
    run = Compiled(SWAP, route(Loopback(code=TRUNCATED, fails=fails)), x, x)
    with pytest.raises(OSError, match=f"0: 15 for {wanted}"):
        finish(run.run(7))
    assert [kept[0] for kept in run._in_flight.abandoned] == [run]  # type: ignore[index]


def test_it_yields_the_rank_it_waits_for_and_is_taken_up_again() -> None:
    mpi = Loopback(patience=2000)
    x = np.arange(100, dtype=np.int32)
    steps = run_compiled(SWAP, route(mpi), x, x)
    assert [request.peer for request in steps.send(None)] == [0, 0]
    before = mpi.requests[0][1]
    steps.send(None)
    assert mpi.requests[0][1] == before - 1, "without anybody waiting it looks once"
    assert finish_from(steps) > 1
    assert (x[50:] == np.arange(50)).all()


def finish_from(steps: Iterator[Any]) -> int:
    return sum(1 for _ in iter(lambda: _more(steps), None))


def _more(steps: Any) -> bool | None:
    try:
        steps.send(True)
    except StopIteration:
        return None
    return True


def test_a_second_run_reuses_the_scratch_and_one_given_up_does_not() -> None:
    mpi = Loopback()
    x = np.arange(100, dtype=np.int32)
    rows = program((0, Op.SEND, 0, 50), (0, Op.RECV_REDUCE, 50, 50))
    run = Compiled(rows, route(mpi), x, x, adding())
    finish(run.run(1))
    (scratch,) = run._in_flight.free
    finish(run.run(2))
    assert run._in_flight.free[0] is scratch
    mpi.patience = 10**6
    given_up = run.run(3)
    given_up.send(None)
    given_up.close()
    mpi.patience = 0
    mpi.box.clear()
    finish(run.run(4))
    assert run._in_flight.free[0] is not scratch
    assert x[50:].tolist() == [50 + 4 * k for k in range(50)]


def test_it_runs_what_has_native_arithmetic_on_a_transport_with_calls() -> None:
    adds = program((0, Op.RECV_REDUCE, 0, 1))
    calls = Loopback().calls
    assert can_run(calls, SWAP, Arithmetic(np.add))
    assert can_run(calls, adds, adding())
    assert not can_run(calls, adds, Arithmetic(np.add))
    assert not can_run(None, SWAP, adding())


class Library:
    """What of mpi4py finds functions and handles."""

    def __init__(self, kind: Any, file: str) -> None:
        self._kind, self.__file__ = kind, file
        self.BYTE = kind(BYTE)
        self.Status = object

    def _sizeof(self, kind: Any) -> int:
        return ctypes.sizeof(self._kind)

    def _addressof(self, handle: Any) -> int:
        return ctypes.addressof(handle)


@pytest.mark.parametrize("kind", [ctypes.c_int32, ctypes.c_int64])
def test_handles_are_read_at_their_own_width(kind: Any) -> None:
    mpi = Library(kind, "")
    assert handle_value(mpi, kind(COMM)) == COMM
    assert handle_value(mpi, mpi.BYTE) == BYTE


def test_a_library_without_mpis_functions_has_no_calls() -> None:
    import _ctypes

    assert find_calls(Library(ctypes.c_int64, _ctypes.__file__), ctypes.c_int64(1)) is None
    assert find_calls(Library(ctypes.c_int64, "/no/such/library"), ctypes.c_int64(1)) is None


def test_the_kernel_may_take_everything_above_widen_for_narrow() -> None:
    assert [op for op in Op if op >= Op.WIDEN] == [Op.WIDEN, Op.NARROW]
