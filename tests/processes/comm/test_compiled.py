"""The contract over MPI messages in compiled code, and over the plain executor it must equal."""

from collections.abc import Iterator

import contract
import numpy as np
import pytest
from contract import ALGORITHMS, CHECKS, NUMBERS
from own_schedules import check_own_schedules

from ringfold import Communicator, MismatchError


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


@pytest.mark.parametrize(
    "check",
    [contract.check_overlapping_works, contract.check_groups, contract.check_plans],
)
def test_works_groups_and_plans(messages: Communicator, check: contract.Callable) -> None:
    check(messages)


def test_whatever_is_proven_runs_right(messages: Communicator) -> None:
    check_own_schedules(messages, 5)


@pytest.mark.parametrize("op", ["sum", "mean", "min", "prod"])
@pytest.mark.parametrize("algorithm", ["pairwise", "ring"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_both_executors_agree_to_the_last_bit(
    comm: Communicator, dtype: str, algorithm: str, op: str
) -> None:
    rng = np.random.default_rng(comm.rank)
    mine = rng.normal(size=5003).astype(dtype)
    results = []
    for compiled in (True, False):
        with contract.reopened(comm, compiled=compiled, segment_bytes=1000) as messages:
            results.append(messages.allreduce(mine.copy(), op, algorithm=algorithm))
    np.testing.assert_array_equal(results[0].view(np.uint8), results[1].view(np.uint8))


def test_works_of_one_preparation_may_overlap(messages: Communicator) -> None:
    x = np.full(3001, messages.rank, np.float64)
    prepared = messages._operations.broadcast(x, messages.size - 1)
    works = [messages._start(prepared, blocking=False) for _ in range(3)]
    for work in works:
        work.wait()
    assert (x == messages.size - 1).all()


def test_a_plans_steps_take_no_memory(messages: Communicator) -> None:
    if messages._operations.barrier().receipt.transport.endswith("-compiled"):
        contract.check_steps_take_no_memory(messages, np.ones((messages.size, 100_003)))


def test_other_lengths_are_named(comm: Communicator) -> None:
    """Messages of ranks that disagree never meet; each rank learns what the other called."""
    if comm.size < 2:
        return  # a rank agrees with itself
    for compiled in (True, False):
        with contract.reopened(comm, compiled=compiled) as messages:
            pair = messages.split(0 if comm.rank < 2 else None)
            if pair is None:
                continue
            with pytest.raises(MismatchError, match=f"rank {1 - comm.rank}: allreduce"):
                pair.allreduce(np.ones(10 + 2 * comm.rank), algorithm="ring")
            pair.close()
