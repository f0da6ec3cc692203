"""What MPI's failures are called here, whoever made the call."""

from __future__ import annotations

from typing import Any

from ..errors import CommError, MismatchError, PeerLost


def wrong_size(peer: int, got: int, wanted: int) -> MismatchError:
    """Return the error for a message of another length."""
    return MismatchError(f"rank {peer} sends {got} bytes where {wanted} were expected")


def refused(mpi: Any, code: int, peer: int, wanted: int | None) -> CommError:
    """Return the error for an MPI error code on a message with `peer`.

    wanted: the bytes expected from it; None for a message to it.
    """
    # An mpi4py or an MPI without failure mitigation has no such classes.
    lost = [getattr(mpi, name, None) for name in ("ERR_PROC_FAILED", "ERR_REVOKED")]
    if mpi.Get_error_class(code) in lost:
        return PeerLost(f"message with rank {peer}: {mpi.Get_error_string(code)}")
    if wanted is not None and mpi.Get_error_class(code) == mpi.ERR_TRUNCATE:
        return MismatchError(f"rank {peer} sends more than the {wanted} bytes expected")
    return CommError(f"MPI failed on a message with rank {peer}: {mpi.Get_error_string(code)}")
