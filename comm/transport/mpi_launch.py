"""Whether MPI and the launcher, as far as its words tell, mean the same job."""

from __future__ import annotations

import os
from typing import Any

from ..errors import CommError
from ..settings import holder, started_together


def library_of(mpi: Any) -> str:
    """Return the name and version of mpi4py's MPI library."""
    first: str = mpi.Get_library_version().split("\n")[0]
    return first.strip("\0 ")


def short(library: str) -> str:
    """Return the name and version of `library_of` to be read: MPICH sets its own in columns."""
    return " ".join(library.partition(", package")[0].split())


def require_own_place() -> None:
    """Raise CommError, before MPI starts, in a process that a rank of the job has started.

    With the rank's environment MPI takes it for the rank: Open MPI then sends what is for one to
    the other, and either hangs or crashes.
    """
    found = holder()
    if found is None:
        return
    process, rank = found
    raise CommError(
        f"process {os.getpid()} was started by rank {rank}, process {process}, and MPI would take "
        "it for that rank, and break both; let it be a job of its own: start it with "
        "env=ringfold.comm.settings.beside_the_job(), the environment without what the launcher "
        "has told the rank"
    )


def require_whole_world(mpi: Any) -> None:
    """Raise CommError where each process that the launcher has started is a job of its own.

    An MPI library that does not hear the launcher of another takes each for one started by hand:
    all would do the same, each of them as rank 0 of 1.
    """
    told = started_together()
    if not told or mpi.COMM_WORLD.Get_size() > 1:
        return
    said = ", ".join(f"{name}={count}" for name, count in told.items())
    alone = " ".join(f"-u {name}" for name in told)
    raise CommError(
        f"the launcher has started {max(told.values())} processes ({said}), but each is alone for "
        f"{short(library_of(mpi))}, whose launcher it is not; start with the "
        "mpirun of the MPI library that mpi4py uses, or let srun speak to it (--mpi=pmix for Open "
        f"MPI, --mpi=pmi2 for MPICH); where each is meant to run by itself, with env {alone}"
    )
