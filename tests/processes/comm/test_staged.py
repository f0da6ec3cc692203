"""Device memory, staged, over MPI and in the ranks' shared memory; the device is a fake."""

import time
from typing import Any

import numpy as np
import pytest
from contract import reopened
from fake_device import AWARE, use_fake
from staged_contract import CHECKS, late, run

from ringfold import MismatchError


@pytest.mark.parametrize("name", CHECKS)
def test_contract(comm: Any, name: str) -> None:
    run(comm, name)


@pytest.mark.parametrize("name", ["reductions", "messages"])
def test_contract_of_a_library_that_sends_device_memory(comm: Any, name: str) -> None:
    """By address: MPI cannot tell the fake's memory from the host's, so that it sends any."""
    with reopened(comm, shared=False, compiled=False, segment_bytes=400, timeout=30) as other:
        run(other, name, AWARE)


def test_a_group_goes_on_where_ranks_have_differed_on_a_device(comm: Any) -> None:
    """All ranks of a node are told in one call; those that follow are compared without it."""
    group = comm.split(0)
    gpu = use_fake(group)
    for _ in range(2 * (group.size > 1)):
        with pytest.raises(MismatchError):
            group.allreduce(late(gpu, np.ones(5 + group.rank, np.float32)))
        if group.rank == 0:
            time.sleep(0.5)  # the others tell meanwhile what they have called
        assert group.allreduce(np.ones(3))[0] == group.size
        x = group.allreduce(late(gpu, np.ones(5, np.float32)))
        np.testing.assert_array_equal(x.get(), np.full(5, group.size, np.float32))
    group.close()


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
