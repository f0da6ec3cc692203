"""Device memory, staged, over MPI and in the ranks' shared memory; the device is a fake."""

from typing import Any

import pytest
from staged_contract import CHECKS, run


@pytest.mark.parametrize("name", CHECKS)
def test_contract(comm: Any, name: str) -> None:
    run(comm, name)
