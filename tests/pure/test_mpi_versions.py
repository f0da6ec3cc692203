"""Which mpi4py is taken, and how MPI libraries are called."""

import pytest

from ringfold.comm.errors import CommError
from ringfold.comm.transport.mpi_launch import short
from ringfold.comm.transport.mpi_start import require_version


def test_an_old_mpi4py_is_refused_by_name() -> None:
    """3.1 was taken, which no test has run on, where somebody had forced it in."""
    for version in ("4.0.0", "4.1.2", "10.0.0.dev0"):
        require_version(version)
    with pytest.raises(CommError, match=r"expected mpi4py 4\.1 or newer, got 3\.1\.4"):
        require_version("3.1.4")


def test_libraries_are_named_without_columns() -> None:
    """`ringfold doctor` showed the padding that MPICH has in its text."""
    assert short("MPICH Version:      5.0.2") == "MPICH Version: 5.0.2"
    assert short("Open MPI v5.0.11, package: Open MPI x, ident: 5") == "Open MPI v5.0.11"
