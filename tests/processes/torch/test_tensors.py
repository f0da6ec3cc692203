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
        assert comm._memo.at(x, "max") is not None
        assert comm._memo.at(x, "sum") is None
    assert comm._memo.at(x.numpy(), "max") is None
