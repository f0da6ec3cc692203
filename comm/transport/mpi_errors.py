"""What MPI's failures are called here, whoever made the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CommError, MismatchError, PeerLost


def wrong_size(peer: int, got: int, wanted: int) -> MismatchError:
    """Return the error for a message of another length."""
    return MismatchError(f"rank {peer} sends {got} bytes where {wanted} were expected")


def refused(mpi: Any, code: int, peer: int, wanted: int | None) -> CommError:
    """Return the error for an MPI error code on a message with `peer`.

    wanted: the bytes expected from it; None for a message to it.
    """
    if _is_loss(mpi, code):
        return PeerLost(f"message with rank {peer}: {mpi.Get_error_string(code)}")
    if wanted is not None and mpi.Get_error_class(code) == mpi.ERR_TRUNCATE:
        return MismatchError(f"rank {peer} sends more than the {wanted} bytes expected")
    return CommError(f"MPI failed on a message with rank {peer}: {mpi.Get_error_string(code)}")


@contextmanager
def raising(mpi: Any, what: str, more: Callable[[], str] = str) -> Iterator[None]:
    """Turn an MPI failure within into PeerLost where a rank has died, else into CommError.

    more: says what else is to be known of a failure that is not the death of a rank.
    """
    try:
        yield
    except mpi.Exception as error:
        if _is_loss(mpi, error.Get_error_code()):
            raise PeerLost(f"{what}: {error}") from error
        raise CommError(f"{what}: {error}{more()}") from error


@contextmanager
def revoking(group: Any) -> Iterator[None]:
    """Let nobody wait in a group for this rank, where this one leaves a block by PeerLost.

    Of a death MPI tells who waits for the dead itself, and nobody who waits for one that has gone.
    """
    try:
        yield
    except PeerLost:
        group.Revoke()
        raise


def _is_loss(mpi: Any, code: int) -> bool:
    # An mpi4py or an MPI without failure mitigation has no such classes.
    names = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")
    return mpi.Get_error_class(code) in [getattr(mpi, name, None) for name in names]
