"""Device memory, staged, over MPI and in the ranks' shared memory; the device is a fake."""

from typing import Any

import numpy as np
import pytest
from contract import reopened
from fake_device import AWARE, use_fake
from staged_contract import CHECKS, late, run


@pytest.mark.parametrize("name", CHECKS)
def test_contract(comm: Any, name: str) -> None:
    run(comm, name)


@pytest.mark.parametrize("name", ["reductions", "messages"])
def test_contract_of_a_library_that_sends_device_memory(comm: Any, name: str) -> None:
    """By address: MPI cannot tell the fake's memory from the host's, so that it sends any."""
    with reopened(comm, shared=False, compiled=False, segment_bytes=400, timeout=30) as other:
        run(other, name, AWARE)


def test_the_pair_decides(comm: Any) -> None:
    """Where two ranks share memory their messages pass through it, whatever MPI can."""
    with reopened(comm, timeout=30) as other:
        gpu = use_fake(other, aware=AWARE)
        x = late(gpu, np.ones(5, np.float32))
        sending = other.isend(x, (comm.rank + 1) % comm.size)
        y = late(gpu, np.zeros(5, np.float32))
        other.recv(y, (comm.rank - 1) % comm.size)
        sending.wait()
        np.testing.assert_array_equal(y.get(), np.ones(5, np.float32))
        alone = not other.host_operations.by_mail(comm.rank)
        assert sending.receipt.transport == ("gpu-aware mpi" if alone else "staged, shared")
