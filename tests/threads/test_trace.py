"""The ring of last operations: what it keeps, in which order, and how operations end there."""

import time

import numpy as np
import pytest

from ringfold import CommError, Communicator, run_local, trace
from ringfold.comm.trace import TRACE_BYTES, Ring, Signature, Sites, State, entries_in
from ringfold.kernels.records import RING_CALLS, RING_ENTRIES, Outcome


def note(ring: Ring, count: int) -> int:
    return ring.begin(
        ring.intern(Signature("allreduce", "sum", "int8", count), "world", 2, "a:1"), 7
    )


def test_a_ring_keeps_the_newest_in_order():
    ring = Ring()
    for count in range(RING_ENTRIES + 3):
        ring.end(note(ring, count), Outcome.DONE)
    kept = ring.entries()
    assert [entry.signature.elements for entry in kept] == list(range(3, RING_ENTRIES + 3))
    assert [entry.number for entry in kept] == list(range(4, RING_ENTRIES + 4))
    assert [entry.signature.elements for entry in ring.entries(2)] == [
        RING_ENTRIES + 1,
        RING_ENTRIES + 2,
    ]
    assert all(0 < entry.start <= entry.end for entry in kept)


def test_the_end_of_an_overwritten_operation_changes_no_other():
    ring = Ring()
    old = note(ring, 0)
    for count in range(1, RING_ENTRIES + 1):
        newest = note(ring, count)
    ring.end(old, Outcome.FAILED)
    assert {entry.state for entry in ring.entries()} == {State.RUNNING}
    ring.end(newest, Outcome.FAILED)
    assert ring.entries(1)[0].state is State.FAILED


def test_a_call_that_left_the_table_is_left_out_not_shown_as_another():
    ring = Ring()
    first = ring.intern(Signature("barrier"), "world", 2, "a:1")
    ring.begin(first, 1)
    for count in range(RING_CALLS):
        ring.intern(Signature("send", "", "int8", count, 0), "world", 2, "b:2")
    assert ring.entries() == ()
    again = ring.intern(Signature("barrier"), "world", 2, "a:1")
    assert again != first
    ring.begin(again, 2)
    assert [(entry.sequence, entry.signature.operation) for entry in ring.entries()] == [
        (2, "barrier")
    ]


def test_a_call_that_a_signal_interrupts_as_it_is_written_down_is_written_again(monkeypatch):
    """It was known from then on, without a text; the watchdog's thread ended when it read that."""
    ring = Ring()
    for count in range(RING_CALLS + 2):  # so that there is one before it
        ring.intern(Signature("send", "", "int8", count, 0), "world", 2, "b:2")

    def interrupted(key):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ringfold.comm.trace._encoded", interrupted)
        note(ring, 5)
    for _ in range(2):
        note(ring, 5)
    assert [str(entry.signature) for entry in ring.entries()] == ["allreduce(sum, int8)"] * 2


def test_a_call_that_is_held_stays_in_the_table_as_long_as_somebody_holds_it():
    """A call that was prepared once was no longer told of behind a thousand others."""
    ring = Ring()
    first = ring.intern(Signature("barrier"), "world", 2, "a:1")
    held = ring.hold(first)
    for count in range(3 * RING_CALLS):
        ring.intern(Signature("send", "", "int8", count, 0), "world", 2, "b:2")
    ring.begin(first, 7)
    assert [(entry.sequence, entry.signature.operation) for entry in ring.entries()] == [
        (7, "barrier")
    ]
    assert ring.intern(Signature("barrier"), "world", 2, "a:1") == first
    assert ring.hold(first) is held
    del held
    for count in range(2 * RING_CALLS):  # some are held a while longer
        ring.hold(ring.intern(Signature("send", "", "int16", count, 0), "world", 2, "b:2"))
    assert ring.entries() == ()


def test_where_all_calls_are_held_new_ones_are_told_of_nevertheless():
    ring, held = Ring(), []
    for count in range(2 * RING_CALLS):
        held.append(ring.hold(note(ring, count)))
        assert ring.entries(1)[0].signature.elements == count
    assert len({id(one) for one in held}) == 2 * RING_CALLS


def test_a_ring_moves_with_its_entries_and_an_unwritten_one_is_empty():
    ring = Ring()
    note(ring, 5)
    elsewhere = np.zeros(TRACE_BYTES, np.uint8)
    assert entries_in(elsewhere) == ()
    ring.move(elsewhere)
    note(ring, 6)
    assert [entry.signature.elements for entry in entries_in(elsewhere)] == [5, 6]


def test_a_long_path_is_cut_at_its_front():
    ring = Ring()
    site = "/" + "\u00e9" * 300 + "/train.py:12"
    ring.begin(
        ring.intern(Signature("gather", "", "complex128", 2**62, 2**31), "world", 2, site), 1
    )
    entry = ring.entries()[0]
    assert entry.signature == ("gather", "", "complex128", 2**62, 2**31)
    assert entry.site.startswith("\u00e9") and entry.site.endswith("/train.py:12")


def test_any_text_comes_back_though_it_may_be_cut():
    """A ring that cannot be read would end the program that looks for where its ranks are."""
    ring = Ring()
    long = "\u00e9" * 300
    cases = [
        ("world", "a\tb.py:3", "ring"),
        ("wo\trld", "/x\ty\tz.py:3", "my\tway"),
        (long, long, long),
        ("", "", ""),
        ("world", "/\udc80/x.py:3", "ring"),
    ]
    signature = Signature("reduce_scatter", "prod", "complex128", -(2**62), -(2**31))
    for group, site, way in cases:
        ring.begin(ring.intern(signature, group, 2**31, site, way), 1)
    entries = ring.entries()
    assert [entry.signature for entry in entries] == [signature] * len(cases)
    assert [entry.site for entry in entries[:2]] == ["a\tb.py:3", "/x\ty\tz.py:3"]
    assert all(entry.size == 2**31 for entry in entries)
    assert entries[2].group and entries[2].site and entries[2].way


def test_groups_of_groups_have_names_that_fit_and_differ():
    def main(comm: Communicator):
        group, groups = comm, [comm]
        for _ in range(40):
            group = group.split(0)
            group.allreduce(np.ones(1))
            groups += [group, group.split(0)]
        assert {entry.group for entry in group.recent()} <= {one.name for one in groups}
        return [one.name for one in groups]

    first, second = run_local(2, main)
    assert first == second and len(set(first)) == len(first)
    assert max(len(name) for name in first) <= 64
    assert first[:4] == ["world", "world.1", "world.1.1", "world.1.2"]


def test_a_site_is_the_innermost_frame_outside_the_library():
    assert Sites().here().rpartition(":")[0] == __file__


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_keeps_its_own_calls(size: int):
    def main(comm: Communicator):
        before = time.monotonic_ns()
        comm.allreduce(np.ones(3, np.float32), op="max")
        comm.reduce(np.ones(2), root=size - 1)
        group = comm.split(0)
        group.barrier()
        step = comm.plan("broadcast", np.zeros(0, np.int8), 0)
        step()
        step()
        comm.allgather(np.ones(1), blocking=False).wait()
        if comm.rank == 0:
            comm.isend(np.ones(4, np.int16), size - 1, 3)
        if comm.rank == size - 1:
            comm.recv(np.ones(4, np.int16), 0, 3)
        return before, comm.recent(), time.monotonic_ns()

    for rank, (before, entries, after) in enumerate(run_local(size, main)):
        mine = [entry for entry in entries if entry.start >= before]
        in_world = [e for e in mine if e.group == "world" and e.signature.operation != "send"]
        collectives = [e for e in in_world if e.signature.operation != "recv"]
        numbers = [e.sequence for e in collectives]
        assert numbers == list(range(numbers[0], numbers[0] + 6))
        assert [e.signature.operation for e in collectives] == [
            "allreduce",
            "reduce",
            "split",
            "broadcast",
            "broadcast",
            "allgather",
        ]
        assert all(before <= e.start <= e.end <= after for e in collectives)
        assert all(e.state is State.DONE and e.site.startswith(__file__) for e in collectives)
        assert (
            "world.1",
            "barrier",
        ) in [(e.group, e.signature.operation) for e in mine]
        sent = [e for e in mine if e.signature.operation in ("send", "recv")]
        assert len(sent) == (rank == 0) + (rank == size - 1)
        assert all(
            e.signature[2:] == ("int16", 4, size - 1 if e.signature[0] == "send" else 0)
            for e in sent
        )


def test_what_fails_is_kept_as_failed():
    def main(comm: Communicator):
        with pytest.raises(CommError):
            if comm.rank == 0:
                comm.send(np.ones(3), 1)
            else:
                comm.recv(np.ones(2), 0)
        return comm.recent(1)[0]

    entry = run_local(2, main)[1]
    assert entry.state is State.FAILED
    assert entry.signature == ("recv", "", "float64", 2, 0)
    assert str(entry).endswith("failed")


def test_what_a_with_statement_calls_is_shown_at_its_line():
    def main(comm: Communicator):
        before = len(comm.recent())
        with trace(comm, None):
            pass
        return comm.recent()[before:]

    for entries in run_local(2, main):
        assert entries and all(entry.site.startswith(__file__) for entry in entries)
