"""What is remembered of calls that come again: of the same memory, and only as it was seen."""

import gc
from dataclasses import dataclass, replace

import numpy as np
import pytest

from ringfold.comm.memo import _CAPACITY, Memo


@dataclass
class Tensor:
    """What of torch's tensors tells one from another."""

    address: int = 4096
    shape: tuple[int, ...] = (6,)
    dtype: str = "float32"
    contiguous: bool = True
    is_cpu: bool = True
    negative: bool = False
    conjugate: bool = False

    itemsize = 4

    def data_ptr(self) -> int:
        return self.address

    def is_contiguous(self) -> bool:
        return self.contiguous

    def is_neg(self) -> bool:
        return self.negative

    def is_conj(self) -> bool:
        return self.conjugate


def test_an_array_is_known_as_it_was_seen() -> None:
    memo: Memo[str] = Memo()
    x = np.zeros(6, np.float32)
    memo.add(x, "allreduce", ("sum",), "how")

    def known() -> bool:
        return memo.recall(x, "allreduce", ("sum",)) is not None

    assert known() and memo.recall(x.copy(), "allreduce", ("sum",)) is None
    assert memo.recall(x, "allreduce", ("max",)) is memo.recall(x, "reduce", ("sum",)) is None
    assert memo.recall(x, "allreduce", (x,)) is None  # no op at all
    x.shape = (2, 3)
    assert not known()
    x.shape = 6
    x.setflags(write=False)
    assert not known()
    x.setflags(write=True)
    assert known()
    x.dtype = np.dtype(np.int32)  # type: ignore[misc]
    assert not known()


def test_an_array_that_is_gone_is_forgotten_as_another_may_have_its_identity() -> None:
    memo: Memo[str] = Memo()
    x = np.zeros(6)
    memo.add(x, "allgather", (), "how")
    memo.add(x, "barrier", (), "how")
    del x
    gc.collect()
    assert not memo._arrays


@pytest.mark.parametrize(
    "change",
    [
        {"address": 8192},
        {"shape": (2, 3)},
        {"dtype": "int32"},
        {"contiguous": False},
        {"is_cpu": False},
        {"negative": True},
        {"conjugate": True},
    ],
)
def test_a_tensor_is_known_by_its_memory_as_it_was_seen(change: dict[str, object]) -> None:
    memo: Memo[str] = Memo()
    memo.add(Tensor(), "allreduce", ("sum",), "how")
    assert memo.recall(Tensor(), "allreduce", ("sum",)) == "how"
    assert memo.recall(replace(Tensor(), **change), "allreduce", ("sum",)) is None  # type: ignore[arg-type]


def test_it_knows_so_much_and_nothing_any_more_when_it_is_told_to_forget() -> None:
    memo: Memo[int] = Memo()
    arrays = [np.zeros(2) for _ in range(2 * _CAPACITY)]
    for k, x in enumerate(arrays):
        memo.add(x, "allgather", (), k)
        memo.add(Tensor(64 * k), "allgather", (), k)
        assert memo.recall(x, "allgather", ()) == memo.recall(Tensor(64 * k), "allgather", ()) == k
        assert max(len(memo._arrays), len(memo._tensors)) <= _CAPACITY
    memo.forget()
    assert memo.recall(arrays[-1], "allgather", ()) is None
    assert memo.recall(Tensor(64 * k), "allgather", ()) is None
