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
