"""Who came last, over processes: meetings in shared memory, and messages."""

import numpy as np
import pytest
from contract import come_late, reopened

from ringfold import Communicator


@pytest.mark.parametrize("shared", [True, False])
def test_a_late_rank_is_named_on_all(comm: Communicator, shared: bool) -> None:
    with reopened(comm, shared=shared) as group:
        part = group.split(0)
        assert part is not None
        x = group.empty(100, np.float64)
        x[:] = 1
        late = group.size - 1
        for _ in range(5):
            come_late(part, x, late)
        found = part.stragglers()
        part.close()
        assert found.calls >= 5 and len(found.ranks) == group.size
        if group.size > 1:
            assert found.ranks[late].last >= 5
            assert found.ranks[late].most >= found.ranks[late].behind > 0
