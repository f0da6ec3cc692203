"""Lowering: what one rank does, as a table; both ends of a message agree about it."""

import pytest

from ringfold.comm.algorithms import BUILDERS, build
from ringfold.comm.program import Op, Program, part_of, with_accumulator
from ringfold.comm.program import lower as lay_out
from ringfold.comm.schedule import Schedule


def lower(schedule: Schedule, rank: int, count: int) -> Program:
    return lay_out(part_of(schedule, rank), count)


def test_the_rings_rows() -> None:
    program = lower(build("allreduce", "ring", 2), rank=0, count=5)
    assert program.rows.tolist() == [
        [0, Op.SEND, 1, 0, 3],
        [0, Op.RECV_REDUCE, 1, 3, 2],
        [1, Op.SEND, 1, 3, 2],
        [1, Op.RECV, 1, 0, 3],
    ]


def test_a_run_that_wraps_around_is_two_pieces() -> None:
    program = lower(build("scatter", "tree", 4, 3), rank=3, count=8)
    assert program.rows.tolist() == [
        [0, Op.SEND, 1, 2, 4],
        [1, Op.SEND, 0, 0, 2],
    ]
    wrapping = lower(build("scatter", "tree", 4, 2), rank=2, count=8)
    assert wrapping.rows.tolist()[0] == [0, Op.SEND, 0, 0, 4]
    gather = lower(build("allgather", "recursive_doubling", 3), rank=1, count=6)
    assert [row[:3] for row in gather.rows.tolist() if row[1] == Op.SEND] == [
        [1, Op.SEND, 2],
        [2, Op.SEND, 0],
    ]


@pytest.mark.parametrize("collective, algorithm", BUILDERS)
@pytest.mark.parametrize("count", [0, 1, 7, 120])
def test_every_send_has_a_receive_of_its_size(collective: str, algorithm: str, count: int) -> None:
    for size in (1, 2, 3, 5, 8):
        total = count * size
        schedule = build(collective, algorithm, size)
        sent: dict[tuple[int, int, int], list[int]] = {}
        received: dict[tuple[int, int, int], list[int]] = {}
        for rank in range(size):
            for index, op, peer, offset, length in lower(schedule, rank, total).rows.tolist():
                assert length > 0 and 0 <= offset <= total - length
                pair = (index, rank, peer) if op == Op.SEND else (index, peer, rank)
                (sent if op == Op.SEND else received).setdefault(pair, []).append(length)
        assert sent == received


def test_no_elements_move_nothing() -> None:
    assert lower(build("allreduce", "ring", 4), 2, 0).rows.shape == (0, 5)
    assert lower(build("allreduce", "ring", 1), 0, 9).rows.shape == (0, 5)


def test_an_accumulator_is_opened_once_and_rounded_before_it_is_sent() -> None:
    program = with_accumulator(lower(build("allreduce", "pairwise", 3), rank=0, count=3))
    assert [Op(op).name for op in program.rows[:, 1]] == [
        *("SEND", "WIDEN", "RECV_REDUCE"),
        *("SEND", "RECV_REDUCE"),
        *("NARROW", "SEND", "RECV"),
        *("SEND", "RECV"),
    ]
    alone = with_accumulator(lower(build("reduce", "pairwise", 3), rank=0, count=3))
    assert [Op(op).name for op in alone.rows[:, 1]] == [
        *("WIDEN", "RECV_REDUCE", "RECV_REDUCE", "NARROW"),
    ]
    assert with_accumulator(lower(build("reduce", "pairwise", 1), 0, 3)).rows.shape == (0, 5)
