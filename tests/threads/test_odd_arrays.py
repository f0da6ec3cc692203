"""Arrays as programs have them: not aligned, of derived classes."""

import array

import contract
import numpy as np
import pytest
import torch

from ringfold import Communicator, MismatchError, run_local
from ringfold.comm.algorithms import names


class Own(torch.Tensor):
    """As a script defines one, in its own module."""


@pytest.mark.parametrize("name", ["allreduce", "reduce", "broadcast", "reduce_scatter"])
def test_float16_that_is_not_aligned_on_one_rank_alone(name: str) -> None:
    """That rank refused it when the others had begun: they waited until time was up."""

    def main(comm: Communicator) -> list[float]:
        x = np.ones(8, np.float16)
        if comm.rank == 0:
            x = np.zeros(17, np.uint8)[1:].view(np.float16)
        x[...] = comm.rank + 1
        return np.asarray(getattr(comm, name)(x), np.float64).tolist()

    summed = [3.0] * 8
    expected = {
        "allreduce": [summed, summed],
        "reduce": [summed, [2.0] * 8],
        "broadcast": [[1.0] * 8] * 2,
        "reduce_scatter": [summed[:4]] * 2,
    }
    assert run_local(2, main) == expected[name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("op", ["sum", "mean", "min", "max", "prod"])
def test_numbers_at_their_ends_raise_nothing_whatever_numpy_is_told(op: str, dtype: str) -> None:
    """A mean of halves was added by NumPy, which raises where it is told to, on one rank alone.

    inf - inf, and what is beyond the largest or below the smallest number, are results like others.
    """
    kind = getattr(torch, dtype)
    ends = torch.finfo(kind)

    def main(comm: Communicator) -> torch.Tensor:
        sign = -1.0 if comm.rank else 1.0
        own = [sign * np.inf, ends.max, ends.tiny, np.nan, -ends.max, ends.tiny / 2]
        found = []
        with np.errstate(all="raise"):
            for algorithm in names("allreduce"):
                x = torch.tensor(own, dtype=kind)
                comm.allreduce(x if dtype == "bfloat16" else x.numpy(), op, algorithm=algorithm)
                found.append(x)
        return torch.stack(found).double()

    for rows in run_local(2, main):
        assert rows[:, 0].isnan().all() if op in ("sum", "mean") else rows[:, 0].isinf().all()
        assert rows[:, 3].isnan().all()


def test_complex_numbers_are_added_by_their_parts() -> None:
    """Sums were refused, of strided views and of parts of an odd number of elements as well."""

    def main(comm: Communicator) -> None:
        for algorithm in names("reduce_scatter"):
            contract.check_reduce_scatter(comm, algorithm, np.complex64)
        table = np.zeros((5, 4), np.complex128)
        table[:, 1] = np.arange(5) + 1j * comm.rank
        comm.allreduce(table[:, 1], "mean")
        np.testing.assert_array_equal(table[:, 1], np.arange(5) + 1j)
        assert not table[:, [0, 2, 3]].any()
        lone = torch.tensor([complex(0, np.inf), 1 - 2j]).conj()
        found = comm.allreduce(lone.resolve_conj(), "mean")
        assert found.tolist() == [complex(0, -np.inf), 1 + 2j]
        with pytest.raises(TypeError, match=r"'prod' is not defined for complex128; .*sum, mean$"):
            comm.allreduce(table, "prod")

    run_local(3, main)


def test_uneven_rows_of_every_kind_and_those_that_do_not_fit() -> None:
    """Each rank finds out what is wrong with any rank's rows, and the group goes on."""

    def main(comm: Communicator) -> None:
        mine = torch.arange(3.0 * comm.rank, requires_grad=True).reshape(comm.rank, 3).bfloat16()
        every = comm.allgatherv(mine)
        assert every.dtype == torch.bfloat16 and not every.requires_grad
        assert every.tolist() == [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        letters = array.array("d", [comm.rank] * (comm.rank + 1))
        assert comm.allgatherv(letters).tolist() == [0, 1, 1, 2, 2, 2]
        strided = np.arange(12.0).reshape(4, 3).T[: comm.rank]
        assert comm.allgatherv(strided).tolist() == [[0, 3, 6, 9], [0, 3, 6, 9], [1, 4, 7, 10]]

        wrong = np.zeros((2, 5 if comm.rank == 1 else 4))
        for call in (comm.allgatherv, comm.gatherv, lambda x: comm.alltoallv(x, [2, 0, 0])):
            with pytest.raises(
                MismatchError, match=r"rank 0: float64 of shape \(n, 4\).*; rank 1: "
            ):
                call(wrong)
        with pytest.raises(MismatchError, match="rank 2: int8 of shape"):
            comm.allgatherv(np.zeros(1, np.int8 if comm.rank == 2 else np.int16))
        with pytest.raises(ValueError, match="expected an array with a first axis"):
            comm.allgatherv(np.array(1.0))
        for counts in ([1, 1], [3, -1, 0], [1, 1, 1]):
            with pytest.raises(ValueError, match=r"3 numbers of rows, a rank each, .* the 2 rows"):
                comm.alltoallv(np.zeros(2), counts)
        with pytest.raises(TypeError, match="counts: expected whole numbers, got"):
            comm.alltoallv(np.zeros(2), [1.0, 1.0, 0.0])  # type: ignore[list-item]
        assert comm.allreduce(np.ones(1))[0] == 3

    run_local(3, main)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_matrix_is_an_array_of_two_dimensions() -> None:
    def main(comm: Communicator) -> None:
        x = np.matrix(np.arange(10.0).reshape(2, 5) + 100 * comm.rank)
        rows = np.asarray(comm.alltoall(x))
        assert rows[:, 0].tolist() == [5.0 * comm.rank, 100 + 5.0 * comm.rank]
        assert comm.allgather(x).shape == (2, 2, 5)
        comm.allreduce(x, algorithm="ring")
        np.testing.assert_array_equal(x, 2 * np.arange(10.0).reshape(2, 5) + 100)

    run_local(2, main)


def test_results_for_a_class_derived_from_tensors_are_tensors() -> None:
    def main(comm: Communicator) -> None:
        x = (torch.arange(4.0) + comm.rank).reshape(2, 2).as_subclass(Own)
        for result in (
            comm.allgather(x),
            comm.reduce_scatter(x),
            comm.scatter(x if comm.rank == 1 else None, root=1),
        ):
            assert isinstance(result, torch.Tensor)
        assert result.tolist() == [2 * comm.rank + 1, 2 * comm.rank + 2]

    run_local(2, main)
