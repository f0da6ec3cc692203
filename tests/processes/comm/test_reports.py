"""Users' reports, over MPI."""

import numpy as np
import pytest
from reports import REPORTS

from ringfold import Communicator


@pytest.mark.parametrize("report", REPORTS)
def test_report(comm: Communicator, report: str) -> None:
    REPORTS[report](comm)


@pytest.mark.slow
@pytest.mark.limit(300)
def test_more_than_a_32_bit_count(comm: Communicator) -> None:
    """PR-03, opt-in: about 3 GiB a rank."""
    x = np.ones(2**31 + 11, np.uint8)
    comm.allreduce(x)
    places = [0, -1, *range(2**31 - 2, 2**31 + 2)]
    assert (x[places] == comm.size).all()
    assert int(x[::4099].min()) == int(x[::4099].max()) == comm.size
