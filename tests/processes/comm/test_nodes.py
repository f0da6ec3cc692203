"""Which ranks share a node, and what is chosen for it: on one host, and on two (tests/hosts)."""

import numpy as np
import pytest
from contract import data, expected

from ringfold import Communicator


def hosts(comm: Communicator) -> list[str]:
    from mpi4py import MPI

    names: list[str] = MPI.COMM_WORLD.allgather(MPI.Get_processor_name())
    return names


def test_the_node_holds_the_ranks_of_this_host(comm: Communicator) -> None:
    names = hosts(comm)
    mates = [rank for rank, name in enumerate(names) if name == names[comm.rank]]
    assert comm.node.allgather(np.array([comm.rank])).ravel().tolist() == mates


@pytest.mark.parametrize("order", ["rising", "falling", "interleaved"])
def test_large_buffers_take_two_levels_where_nodes_hold_several_ranks(
    comm: Communicator, order: str
) -> None:
    rank, size = comm.rank, comm.size
    keys = {"rising": rank, "falling": -rank, "interleaved": rank % 2 * size + rank}
    group = comm.split(0, keys[order])
    assert group is not None
    names = hosts(comm)
    several = 1 < len(set(names)) < comm.size
    for name, args in (("allreduce", ()), ("reduce", (comm.size - 1,)), ("broadcast", ())):
        x = data(group.rank, 100_003, np.float64)
        work = getattr(group, name)(x, *args, blocking=False)
        work.wait()
        assert (work.receipt.algorithm == "hierarchical") == several, work.receipt
        if several:
            assert work.receipt.reason.startswith(f"{len(set(names))} nodes of ")
        if name == "allreduce":
            np.testing.assert_array_equal(x, expected("sum", comm.size, x.size, x.dtype))
        elif name == "broadcast":
            np.testing.assert_array_equal(x, data(0, x.size, x.dtype))
        elif group.rank == args[0]:
            np.testing.assert_array_equal(x, expected("sum", comm.size, x.size, x.dtype))
    small = group.allreduce(np.ones(3), blocking=False)
    small.wait()
    assert small.receipt.algorithm != "hierarchical"
    group.close()


def test_groups_within_one_host_do_not_nest(comm: Communicator) -> None:
    names = hosts(comm)
    group = comm.split(sorted(set(names)).index(names[comm.rank]), comm.rank)
    assert group is not None
    work = group.allreduce(np.ones(100_000), blocking=False)
    assert (work.wait() == group.size).all()
    assert work.receipt.algorithm != "hierarchical"
    group.close()
