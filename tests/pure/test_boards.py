"""Collectives on a board step by step, both ranks of it in one process: no luck needed."""

import ctypes
import threading
import time
from typing import Any

import numpy as np
import pytest
from two_ranks import TwoBoards, accessing

from ringfold.comm import fused
from ringfold.comm.meeting import Meeting
from ringfold.comm.trace import State
from ringfold.kernels.meeting import serve_kernel
from ringfold.kernels.records import BellWord, BoardWord, Count, Status, WorkWord

FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)


def step(meeting: Meeting) -> int:
    return int(meeting._advance(meeting.address))


def state(two: TwoBoards, rank: int) -> State:
    return two.rings[rank].entries()[-1].state


def arrays(count: int, number: int = 0) -> list[np.ndarray[Any, Any]]:
    return [np.arange(count, dtype=np.float32) + 100 * rank + number for rank in range(2)]


def total(count: int, number: int = 0) -> np.ndarray[Any, Any]:
    first, second = arrays(count, number)
    return first + second


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_a_rank_a_call_ahead_does_not_disturb_the_other(dtype: type) -> None:
    """Notes and places are used by turns, and flags only grow: the late one finds its own call."""
    two = TwoBoards()
    calls = [[x.astype(dtype) for x in arrays(5 + number, number)] for number in range(5)]
    ranks = [[two.allreduce(rank, xs[rank]) for xs in calls] for rank in range(2)]
    ahead, behind = ranks
    assert behind[0].launch() == Status.RUNNING
    for number in range(4):
        assert ahead[number].launch() == Status.DONE
        assert ahead[number + 1].launch() == Status.RUNNING
        assert step(behind[number]) == Status.DONE
        for x in calls[number]:
            np.testing.assert_array_equal(x, total(5 + number, number))
        ahead, behind = behind, ahead


def finish(two: TwoBoards, meetings: list[Meeting]) -> None:
    """Go on by turns with two calls, one of which is started; who is waited for has to ring."""
    rung = True
    for turn in range(1000):
        rank = turn % 2
        two.bells[1 - rank].value = 1
        before = meetings[rank]._record.tobytes()
        if turn == 0:
            meetings[rank].launch()
        else:
            step(meetings[rank])
        assert rung or meetings[rank]._record.tobytes() == before, f"nobody wakes rank {rank}"
        rung = two.bells[1 - rank].value == 0
        if not any(meeting.flying for meeting in meetings):
            return
    raise AssertionError("they wait for each other")


@pytest.mark.parametrize("form", ["eager", "staged", "cma"])
def test_who_is_waited_for_wakes_the_other(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "READ_FROM", {"allreduce": 0})
    two, count = TwoBoards(form == "cma"), 5 if form == "eager" else 400_000
    for number in range(3):
        xs = arrays(count, number)
        meetings = [two.allreduce(rank, xs[rank]) for rank in range(2)]
        assert [meeting.form for meeting in meetings] == [form, form]
        assert meetings[1].launch() == Status.RUNNING
        finish(two, meetings)
        for x in xs:
            np.testing.assert_array_equal(x, total(count, number))


def test_calls_that_differ_are_noted_as_failed_and_what_follows_is_right() -> None:
    two = TwoBoards()
    two.counters[1][Count.HISTORY] = 7  # of other calls by messages before
    for status, outcome in ((Status.MISMATCH, State.FAILED), (Status.DONE, State.DONE)):
        meetings = [two.allreduce(rank, x) for rank, x in enumerate(arrays(5))]
        assert meetings[0].launch() == Status.RUNNING
        assert meetings[1].launch() == step(meetings[0]) == status
        assert [state(two, rank) for rank in range(2)] == [outcome, outcome]
        assert not any(meeting.flying for meeting in meetings)
        assert [counter[Count.HISTORY] for counter in two.counters] == [0, 0]


def test_what_stands_behind_a_call_given_up_is_refused_and_noted() -> None:
    two = TwoBoards()
    works = [two.allreduce(0, x) for x in arrays(5)]
    assert [work.launch() for work in works] == [Status.RUNNING] * 2
    assert works[0].launch() == Status.REFUSED  # as it is in flight
    assert step(works[1]) == Status.RUNNING
    works[0].abandon()
    assert not works[0].running and not works[0].flying and works[1].flying
    assert step(works[1]) == Status.REFUSED and not works[1].flying
    assert works[1].launch() == two.allreduce(0, np.ones(5)).launch() == Status.REFUSED
    assert [entry.state for entry in two.rings[0].entries()] == [State.FAILED, State.FAILED]


@pytest.mark.parametrize("way", [BoardWord.READ, BoardWord.WRITE])
def test_whose_memory_cannot_be_reached_is_waited_for(
    way: BoardWord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "READ_FROM", {"allreduce": 0})
    two, xs = TwoBoards(), arrays(400_000)
    meetings = [two.allreduce(rank, x) for rank, x in enumerate(xs)]
    reaches = int(two.boards[0].record[way])
    two.boards[0].record[way], kept = accessing(lambda *_: -1)
    assert meetings[1].launch() == Status.RUNNING
    meetings[0]._record[WorkWord.WAITING_FOR] = 0
    assert meetings[0].launch() == step(meetings[0]) == Status.RUNNING and kept
    assert meetings[0]._record[WorkWord.WAITING_FOR] == 1
    two.boards[0].record[way] = reaches
    while any(meeting.flying for meeting in meetings):
        step(meetings[0]), step(meetings[1])
    np.testing.assert_array_equal(xs[0], total(400_000))


def test_what_the_kernel_copies_in_part_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux copies 2 GiB at once, and less where a signal comes."""
    monkeypatch.setattr(fused, "READ_FROM", {"allreduce": 0})
    two, xs = TwoBoards(), arrays(100_000)

    def read(own: int, remote: int, nbytes: int) -> int:
        ctypes.memmove(own, remote, min(nbytes, 10_001))
        return min(nbytes, 10_001)

    def write(own: int, remote: int, nbytes: int) -> int:
        return read(remote, own, nbytes)

    kept = [accessing(read), accessing(write)]
    for board in two.boards:
        board.record[BoardWord.READ], board.record[BoardWord.WRITE] = (one[0] for one in kept)
    meetings = [two.allreduce(rank, x) for rank, x in enumerate(xs)]
    assert meetings[1].launch() == Status.RUNNING
    finish(two, meetings)
    for x in xs:
        np.testing.assert_array_equal(x, total(100_000))


# -- what the background thread does meanwhile --------------------------------------------------


def test_a_call_that_another_thread_is_at_is_left_alone() -> None:
    two = TwoBoards()
    meeting = two.allreduce(0, np.ones(5))
    assert meeting.launch() == Status.RUNNING
    meeting._record[WorkWord.LOCK] = 1
    before = meeting._record.copy()
    two.boards[0].record[BoardWord.BROKEN] = 1
    assert step(meeting) == Status.RUNNING
    np.testing.assert_array_equal(meeting._record, before)
    two.boards[0].record[BoardWord.BROKEN] = 0
    ends = threading.Thread(target=meeting.abandon)
    ends.start()
    time.sleep(0.05)
    assert meeting.flying and ends.is_alive()
    meeting._record[WorkWord.LOCK] = 0
    ends.join(10)
    assert not meeting.flying and not ends.is_alive()


def test_a_call_is_not_started_again_while_the_background_still_looks_at_it() -> None:
    two = TwoBoards()
    meeting = two.allreduce(0, np.ones(5))
    meeting._record[WorkWord.LOCK] = 1
    starts = threading.Thread(target=meeting.launch)
    starts.start()
    time.sleep(0.05)
    assert not meeting.flying and starts.is_alive()
    meeting._record[WorkWord.LOCK] = 0
    starts.join(10)
    assert meeting.flying and not starts.is_alive()


def test_the_background_serves_until_one_has_ended_or_there_is_something_else_to_do() -> None:
    two, calls, statuses = TwoBoards(), [], [Status.RUNNING, Status.RUNNING, Status.DONE]

    def advance(record: int) -> int:
        calls.append(record)
        return statuses[len(calls) - 1]

    function, turn, bell = FUNCTION(advance), np.zeros(1, np.int64), two.boards[0]._bell
    bell[BellWord.NANOSECONDS] = 1000
    functions = np.array([ctypes.cast(function, ctypes.c_void_p).value] * 2, np.int64)

    def serve(expected: int, sleeps: int) -> None:
        records, at = np.array([5, 6], np.int64), turn.ctypes.data
        arguments = functions, records, at, expected, bell.ctypes.data, sleeps
        thread = threading.Thread(target=serve_kernel(), args=arguments, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "it sleeps for ever"

    serve(1, 9)
    assert not calls
    serve(0, 9)
    assert calls == [5, 6, 5]
    statuses[:] = [Status.RUNNING] * 20
    calls.clear()
    serve(0, 3)
    assert calls == [5, 6] * 3


def test_who_closes_waits_for_a_launch_in_the_middle_and_then_nothing_goes_on() -> None:
    """A group's close gave its board to the next group, where a thread was still at it."""
    two = TwoBoards()
    board = two.boards[0]
    flying, launching, later = (two.allreduce(0, arrays(4, number)[0]) for number in range(3))
    assert flying.launch() == Status.RUNNING
    launching._record[WorkWord.LOCK] = 1  # as if a thread was in the middle of it
    closing = threading.Thread(target=board.refuse, args=("closed",))
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    launching._record[WorkWord.LOCK] = 0
    closing.join(10)
    assert not closing.is_alive()
    tickets = int(board.record[BoardWord.TICKET])
    assert later.launch() == Status.REFUSED and launching.launch() == Status.REFUSED
    assert board.record[BoardWord.TICKET] == tickets
    assert step(flying) == Status.REFUSED and not flying.flying


def test_a_group_is_closed_while_another_thread_prepares_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """close() ended with an AttributeError: it met a call that had no record yet."""
    two = TwoBoards()
    lists = two.boards[0].lists

    def closed_meanwhile() -> Any:
        two.boards[0].refuse("closed")
        return lists()

    monkeypatch.setattr(two.boards[0], "lists", closed_meanwhile)
    assert two.allreduce(0, np.ones(5)).launch() == Status.REFUSED
