"""End a process of Open MPI 5 without MPI_Finalize, and still in good order."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

__all__ = ["die_at_end", "say_goodbye"]

_LIBRARY = "libpmix.so"


def say_goodbye() -> bool:
    """Tell the launcher that this process ends well; return whether there was a way.

    For a process that MPI_Comm_spawn has started, whose end mpirun takes for a failure otherwise.
    MPI_Finalize would wait for ranks that have died. What it tells the launcher is its call of
    PMIx_Finalize (PMIx standard 4.1, section 5.1.4), which waits for nobody.
    """
    path = _loaded(_LIBRARY)
    if path is None:
        return False
    ended: int = ctypes.CDLL(path).PMIx_Finalize(None, 0)
    return ended == 0


def die_at_end() -> None:
    """Let this process end by a signal, once Python has ended and whatever status it ends with.

    The launcher tells MPI of a process that a signal has ended, and of one that ends with 0, but
    not of one that ends with another status (PRRTE 3.0): others would wait for it for ever.
    """
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    libc = ctypes.CDLL(None)
    # What exit(3) calls first, as it was registered last; atexit(3) itself is no symbol of glibc's.
    getattr(libc, "__cxa_atexit")(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)


def _loaded(name: str) -> str | None:
    """Return the file of a library that this process has loaded already."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(name):
            return path
    return None
