"""Every algorithm over MPI messages, and MPI's own collectives as the yardstick."""

import contract
import numpy as np
import pytest
from contract import ALGORITHMS, CHECKS, NUMBERS, data

from ringfold import Communicator


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_keeps_its_promise(comm: Communicator, name: str) -> None:
    collective, algorithm = name.split(":")
    CHECKS[collective](comm, algorithm)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_type_is_reduced(comm: Communicator, dtype: str) -> None:
    contract.check_allreduce(comm, "ring", np.dtype(dtype))


@pytest.mark.parametrize(
    "check",
    [
        contract.check_messages,
        contract.check_overlapping_works,
        contract.check_groups,
        contract.check_uneven_rows,
        contract.check_plans,
    ],
)
def test_works_groups_and_plans(comm: Communicator, check: contract.Callable) -> None:
    check(comm)


@pytest.mark.parametrize("count", [0, 1, 3, 1001, 300_007])
@pytest.mark.parametrize("op", ["SUM", "MAX", "MIN", "PROD"])
def test_equals_mpi_itself(comm: Communicator, op: str, count: int) -> None:
    from mpi4py import MPI

    ours = data(comm.rank, count, np.float64)
    theirs = ours.copy()
    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, theirs, getattr(MPI, op))
    np.testing.assert_array_equal(comm.allreduce(ours, op.lower()), theirs)


def test_moves_equal_mpi_itself(comm: Communicator) -> None:
    from mpi4py import MPI

    x = data(comm.rank, comm.size * 1001, np.float32).reshape(comm.size, 1001)
    theirs = np.empty_like(x)
    MPI.COMM_WORLD.Alltoall(x, theirs)
    np.testing.assert_array_equal(comm.alltoall(x), theirs)
    theirs = np.empty((comm.size, *x.shape), x.dtype)
    MPI.COMM_WORLD.Allgather(x, theirs)
    np.testing.assert_array_equal(comm.allgather(x), theirs)


def test_embeds_beside_the_programs_own_messages() -> None:
    """The program's own message with the same tag is not taken for one of ours."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    ahead, behind = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    with Communicator(world) as comm:
        own = world.Isend(np.array([world.rank + 100]), ahead, 0)
        work = comm.isend(np.array([comm.rank]), ahead, 0)
        assert comm.recv(np.empty(1, np.int64), behind)[0] == behind
        work.wait()
        got = np.empty(1, np.int64)
        world.Recv(got, behind, 0)
        own.Wait()
        assert got[0] == behind + 100


def test_a_part_of_the_world(comm: Communicator) -> None:
    from mpi4py import MPI

    half = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2)
    with Communicator(half) as part:
        assert part.allreduce(np.array([1]))[0] == part.size == half.size
    half.Free()
