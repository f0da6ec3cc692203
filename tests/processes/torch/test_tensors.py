"""The same tensor passed again, when it is no longer what it was."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from contract import data, expected

from ringfold import Communicator

CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "nothing": lambda x: x,
    "other memory": lambda x: x.set_(torch.empty(24)),
    "another part": lambda x: x.set_(x.untyped_storage(), 4, (8,)),
    "transposed": lambda x: x.t_(),
    "strided": lambda x: x.set_(x.untyped_storage(), 0, (4, 3), (6, 2)),
    "shape": lambda x: x.resize_(6, 4),
    "data": lambda x: setattr(x, "data", torch.empty(7, dtype=torch.float64)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tensor_that_was_changed_is_not_taken_for_what_it_was(
    comm: Communicator, change: str
) -> None:
    x = torch.zeros(4, 6)
    for _ in range(2):
        for _ in range(2):
            dtype = x.numpy().dtype
            x.copy_(torch.from_numpy(data(comm.rank, x.numel(), dtype).reshape(x.shape)))
            assert comm.allreduce(x) is x
            wanted = expected("sum", comm.size, x.numel(), dtype).reshape(x.shape)
            np.testing.assert_array_equal(x.numpy(), wanted)
        CHANGES[change](x)


def test_another_tensor_over_the_same_memory_is_seen_as_it_is(comm: Communicator) -> None:
    x = torch.zeros(4, 6)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "another": lambda x: x.view(-1),
        "shorter": lambda x: x.view(-1)[:20],
        "strided": lambda x: x.t(),
        "bits": lambda x: x.view(torch.int32),
    }
    for name in (*ways, *ways):
        y = ways[name](x)
        storage = y.numpy().dtype
        mine = data(comm.rank, y.numel(), storage).reshape(y.shape)
        y.copy_(torch.from_numpy(mine.copy()))
        assert comm.allreduce(y) is y
        wanted = expected("sum", comm.size, y.numel(), storage).reshape(y.shape)
        np.testing.assert_array_equal(y.numpy(), wanted)
    for negated in (x._neg_view(), x.view(-1)._neg_view()):
        with pytest.raises(TypeError, match=r"x: .*negated.*pass resolve_neg"):
            comm.allreduce(negated)
        with pytest.raises(TypeError, match="negated"):
            comm.allgather(negated)


def test_memory_that_came_back_is_known_again(comm: Communicator) -> None:
    x = torch.zeros(600_000)
    for turn in range(4):
        x.fill_(comm.rank + turn)
        again = x.view(-1)  # another tensor each time
        assert comm.allreduce(again, "max") is again
        assert (x == comm.size - 1 + turn).all()
    if comm.size > 1 and comm._operations.way == "shared":
        assert comm._memo.recall(x, "allreduce", ("max",)) is not None
        assert comm._memo.recall(x, "allreduce", ("sum",)) is None
        assert comm._memo.recall(x, "reduce_scatter", ("max",)) is None
    assert comm._memo.recall(x.numpy(), "allreduce", ("max",)) is None


def test_every_call_on_a_tensor_again_and_again(comm: Communicator) -> None:
    """By its memory, whatever tensor stands for it; what looks at it in another way is another."""
    x = torch.zeros(3, 40, 2)
    rows = torch.arange(float(comm.size)).reshape(-1, 1, 1, 1)
    peer = comm.size - 1 - comm.rank
    for turn in range(4):
        x.fill_(comm.rank + turn)
        again = x[:]
        gathered = comm.allgather(again)
        assert gathered.shape == (comm.size, 3, 40, 2)
        assert torch.equal(gathered, (rows + turn).expand_as(gathered))
        assert comm.allgather(x.view(-1)).shape == (comm.size, 240)
        assert comm.allgather(x.view(torch.int32)).dtype == torch.int32
        part = comm.reduce_scatter(again, "max")
        assert part.dtype == torch.float32 and (part == comm.size - 1 + turn).all()
        other = torch.full((3, 40, 2), -1.0)
        work = comm.irecv(other, peer, turn)
        comm.isend(again, peer, turn).wait()
        assert (work.wait() == peer + turn).all()
        assert (comm.broadcast(again, comm.size - 1) == comm.size - 1 + turn).all()
    pair = torch.complex(x, x + 1)
    for one in (pair, pair.conj(), pair, pair.conj()):
        if one.is_conj():
            with pytest.raises(TypeError, match="conj"):
                comm.allgather(one)
        else:
            assert torch.equal(comm.allgather(one)[comm.rank], pair)
