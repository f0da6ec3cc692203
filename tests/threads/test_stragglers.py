"""Who came last: by hand, and with a rank that is made late."""

import numpy as np
import pytest
from contract import come_late

import ringfold
from ringfold.comm.stragglers import judged

MS = 1_000_000


def test_the_last_of_each_call_is_counted_behind_the_one_before() -> None:
    tables = np.zeros((3, 4, 2), np.int64)
    tables[:, :, 0] = [1, 2, 3, 0]
    tables[0, :3, 1] = [10 * MS, 20 * MS, 30 * MS]
    tables[1, :3, 1] = [13 * MS, 19 * MS, 30 * MS - 1]
    tables[2, :3, 1] = [11 * MS, 26 * MS, 39 * MS]
    tables[1, 3] = 9, 1  # no other rank knows it
    found = judged(tables)
    assert found.calls == 3
    assert [row.last for row in found.ranks] == [0, 1, 2]
    assert [row.most for row in found.ranks] == pytest.approx([0, 2e-3, 9e-3])
    assert [row.behind for row in found.ranks] == pytest.approx([0, 2e-3, 7.5e-3])
    assert "   2     2         7.500         9.000" in str(found)


def test_a_rank_alone_comes_last_to_nothing() -> None:
    (found,) = ringfold.run_local(1, lambda comm: comm.allreduce(np.ones(1)) and comm.stragglers())
    assert found.ranks[0].last == 0


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_late_rank_is_named_on_all(size: int) -> None:
    late = size - 1

    def main(comm: ringfold.Communicator) -> object:
        group = comm.split(0)
        assert group is not None
        for _ in range(5):
            come_late(group, np.ones(3), late)
        return group.stragglers()

    reports = ringfold.run_local(size, main)
    assert all(report == reports[0] for report in reports)
    assert reports[0].calls == 5
    assert [row.last for row in reports[0].ranks] == [5 * (rank == late) for rank in range(size)]
    assert reports[0].ranks[late].most >= reports[0].ranks[late].behind > 0
