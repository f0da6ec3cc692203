"""Start MPI, and end it, so that other threads of this process run meanwhile.

mpi4py starts MPI when it is imported, and keeps the interpreter lock all the time that the slowest
rank takes to come. What MPI does to the process's signals at its start is mended as well.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import functools
import itertools
import os
import signal
import sys
import weakref
from typing import Any, Protocol

from ..errors import CommError
from ..lookout import Lookout
from ..settings import Seat, fit_to_start_mpi, free_place, hold_place

_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)


@functools.cache
def process() -> int:
    """Return the process in which MPI was asked for first; its forks are no ranks."""
    return os.getpid()


def import_mpi(lookout: Lookout) -> Any:
    """Import mpi4py's MPI, and start MPI where nobody has; end it then when Python ends.

    lookout: sees to it that MPI starts, and ends.
    Raises: ImportError, RuntimeError without an MPI library; CommError with too old an mpi4py.
    """
    import mpi4py

    require_version(mpi4py.__version__)
    if "mpi4py.MPI" in sys.modules:
        return _module()
    rc: Any = mpi4py.rc
    if not rc.initialize:  # whoever has switched this off starts MPI
        return _module()
    rc.initialize = False
    try:
        mpi = _module()
    finally:
        rc.initialize = True
    if not mpi.Is_initialized():
        defaults = [number for number in _CRASHES if signal.getsignal(number) is signal.SIG_DFL]
        with lookout.starting(), fit_to_start_mpi():
            _start(mpi, rc.thread_level if rc.threads else "single", _errors(rc))
        _take_back(defaults)
        if rc.finalize is not False:
            atexit.register(_end, mpi, lookout, os.getpid())
    return mpi


def require_version(version: str) -> None:
    """Raise CommError for an mpi4py before 4: tests run on 4.1 and newer."""
    if int(version.partition(".")[0]) < 4:
        raise CommError(f"expected mpi4py 4.1 or newer, got {version}: pip install -U mpi4py")


def _module() -> Any:
    from mpi4py import MPI

    return MPI


def _errors(rc: Any) -> str:
    """Return the handler that mpi4py gives MPI's own communicators; "" leaves them theirs."""
    named = {"default": "", "abort": "ERRORS_ABORT", "fatal": "ERRORS_ARE_FATAL"}
    return named.get(rc.errors, "ERRORS_RETURN")


def _start(mpi: Any, level: str, errors: str) -> None:
    wanted = getattr(mpi, f"THREAD_{level.upper()}")
    failed = _library(mpi).MPI_Init_thread(
        None, None, ctypes.c_int(wanted), ctypes.byref(ctypes.c_int())
    )
    if failed:
        raise RuntimeError(f"MPI_Init_thread failed with code {failed}")
    for comm in (mpi.COMM_WORLD, mpi.COMM_SELF) if errors else ():
        comm.Set_errhandler(getattr(mpi, errors))


def _library(mpi: Any) -> ctypes.CDLL:
    """Return MPI's functions: ctypes lets the interpreter lock go, mpi4py's start and end keep it.

    Who looks after the other ranks meanwhile is a thread of Python's.
    """
    return ctypes.CDLL(mpi.__file__)


def _take_back(defaults: list[signal.Signals]) -> None:
    """Let a crash end the process, with Python's own word on where it was.

    Open MPI's handlers print C frames, for which they allocate: a crash within malloc, or beside
    another thread's, leaves the process waiting for a lock for ever.
    """
    # C's function, not Python's: that is for the main thread, and knows the default as it was.
    default = ctypes.CDLL(None).signal
    for number in defaults:
        default(int(number), None)
    if defaults and not faulthandler.is_enabled() and sys.stderr is not None:
        faulthandler.enable()


def _end(mpi: Any, lookout: Lookout, process: int) -> None:
    if os.getpid() == process and not mpi.Is_finalized():
        end_mpi(mpi, lookout)


def end_mpi(mpi: Any, lookout: Lookout) -> None:
    """Call MPI_Finalize, which waits for all ranks; lookout sees to it meanwhile.

    Raises: RuntimeError where it fails.
    """
    with lookout.ending():
        failed = _library(mpi).MPI_Finalize()
    if failed:
        raise RuntimeError(f"MPI_Finalize failed with code {failed}")


class Ended(Protocol):
    """What is to know when MPI ends."""

    def mpi_ends(self) -> None:
        """Have done with MPI, which still works."""
        ...


_TOLD: weakref.WeakValueDictionary[int, Ended] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def tell_of_end(mpi: Any, who: Ended) -> list[Ended]:
    """Let somebody know when MPI_Finalize begins, whoever calls it; return who is told, too.

    Who came last is told first, as it may use what was there before.
    """
    _listen(mpi)
    others = list(_TOLD.values())
    _TOLD[next(_NUMBERS)] = who
    return others


@functools.cache
def _listen(mpi: Any) -> None:
    # The first thing that MPI_Finalize does is to delete the attributes of MPI_COMM_SELF: MPI 4.1,
    # section 11.2.4, "Allowing User Functions at MPI Finalization".
    def ends(comm: Any, key: int, value: object) -> None:
        for who in reversed(list(_TOLD.values())):
            who.mpi_ends()
        free_place()

    if mpi.COMM_WORLD.Get_size() > 1:  # else nobody sends to who takes this place
        hold_place()
    mpi.COMM_SELF.Set_attr(mpi.Comm.Create_keyval(delete_fn=ends), None)


class Starting:
    """The job, as far as it is known before a transport is open."""

    def __init__(self, seat: Seat | None) -> None:
        self.rank = 0 if seat is None else seat.rank
        self.size = 1 if seat is None else seat.size

    def abort(self, status: int) -> None:
        """End every process of the job, if MPI has started; the launcher does it otherwise."""
        mpi: Any = sys.modules.get("mpi4py.MPI")
        if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.COMM_WORLD.Abort(status)
