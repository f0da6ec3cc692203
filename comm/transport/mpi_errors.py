"""What MPI's failures are called here, whoever made the call."""

from __future__ import annotations

from typing import Any

from ..errors import CommError, MismatchError


def wrong_size(peer: int, got: int, wanted: int) -> MismatchError:
    """Return the error for a message of another length."""
    return MismatchError(f"rank {peer} sends {got} bytes where {wanted} were expected")


def refused(mpi: Any, code: int, peer: int, wanted: int | None) -> CommError:
    """Return the error for an MPI error code on a message with `peer`.

    wanted: the bytes expected from it; None for a message to it.
    """
    if wanted is not None and mpi.Get_error_class(code) == mpi.ERR_TRUNCATE:
        return MismatchError(f"rank {peer} sends more than the {wanted} bytes expected")
    return CommError(f"MPI failed on a message with rank {peer}: {mpi.Get_error_string(code)}")
