"""The contract over MPI messages in compiled code, and over the plain executor it must equal."""

from collections.abc import Iterator

import contract
import numpy as np
import pytest
from contract import ALGORITHMS, CHECKS, NUMBERS

from ringfold import Communicator


@pytest.fixture(scope="module", params=["compiled", "plain"])
def messages(comm: Communicator, request: pytest.FixtureRequest) -> Iterator[Communicator]:
    """A communicator whose ranks send messages, though they share a node."""
    compiled = request.param == "compiled"
    with contract.reopened(comm, compiled=compiled, segment_bytes=4096) as other:
        x = np.ones(1)
        work = other.allreduce(x, algorithm="ring", blocking=False)
        work.wait()
        assert work.receipt.transport == ("mpi-compiled" if compiled else "mpi")
        yield other


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_keeps_its_promise(messages: Communicator, name: str) -> None:
    collective, algorithm = name.split(":")
    CHECKS[collective](messages, algorithm)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_type_is_reduced(messages: Communicator, dtype: str) -> None:
    contract.check_allreduce(messages, "ring", np.dtype(dtype))
