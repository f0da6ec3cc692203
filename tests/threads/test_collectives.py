"""Every algorithm on real arrays, ranks as threads."""

import contract
import numpy as np
import pytest
from contract import ALGORITHMS, CHECKS, NUMBERS
from own_schedules import check_own_schedules

from ringfold import run_local

SIZES = (1, 2, 3, 5, 8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_keeps_its_promise(name: str, size: int) -> None:
    collective, algorithm = name.split(":")
    run_local(size, lambda comm: CHECKS[collective](comm, algorithm))


@pytest.mark.parametrize("dtype", NUMBERS)
def test_every_type_is_reduced(dtype: str) -> None:
    run_local(3, lambda comm: contract.check_allreduce(comm, "ring", np.dtype(dtype)))
    run_local(3, lambda comm: contract.check_allreduce(comm, "pairwise", np.dtype(dtype)))


@pytest.mark.parametrize("size", SIZES)
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
def test_works_groups_and_plans(check: contract.Callable, size: int) -> None:
    run_local(size, check)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_whatever_is_proven_runs_right(size: int) -> None:
    run_local(size, lambda comm: check_own_schedules(comm, 30))
