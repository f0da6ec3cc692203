"""Find the C functions and handles of the MPI library that mpi4py loaded, for compiled code.

Nothing here depends on which library it is: mpi4py tells how large its handles are and where they
lie, 8-byte pointers in Open MPI, 4-byte integers in MPICH and Intel MPI.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

from .base import Calls
from .mpi_errors import refused, wrong_size

_INTEGERS = {4: ctypes.c_int32, 8: ctypes.c_int64}


def find_calls(mpi: Any, comm: Any) -> Calls | None:
    """Return what compiled code needs to send over `comm`; None where it cannot be found.

    mpi: mpi4py's module, whose own library gives the symbols: it may have been loaded without
    showing them to the rest of the process.
    """
    try:
        library = ctypes.CDLL(mpi.__file__)
        return Calls(
            isend=_address(library.MPI_Isend),
            irecv=_address(library.MPI_Irecv),
            test=_address(library.MPI_Test),
            get_count=_address(library.MPI_Get_count),
            pause=_address(ctypes.CDLL(None).sched_yield),
            comm=handle_value(mpi, comm),
            byte=handle_value(mpi, mpi.BYTE),
            status_bytes=mpi._sizeof(mpi.Status),
            wrong_size=wrong_size,
            refused=partial(refused, mpi),
        )
    except (AttributeError, OSError, KeyError):
        return None


def _address(function: Any) -> int:
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value
    return value


def handle_value(mpi: Any, handle: Any) -> int:
    """Return an MPI handle as the sign-extended integer that it is passed as."""
    kind = _INTEGERS[mpi._sizeof(type(handle))]
    return kind.from_address(mpi._addressof(handle)).value
