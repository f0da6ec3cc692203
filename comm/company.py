"""The processes of a job on this node, as they are known before MPI has started."""

from __future__ import annotations

import os
from pathlib import Path

from .deaths import Process
from .settings import Seat

_PROC = Path("/proc")


def company(seat: Seat) -> dict[int, Process]:
    """Return the processes that the launcher has started beside this rank's, by rank.

    Of a rank's processes, which inherit what the launcher has told it, the oldest counts.
    """
    found: dict[int, Process] = {}
    for entry in _PROC.iterdir():
        other = _seat_at(entry) if entry.name.isdigit() else None
        if other is None or other.job != seat.job or other.rank == seat.rank:
            continue
        process = Process.of(int(entry.name))
        known = found.get(other.rank)
        if process is not None and (known is None or _age(process) < _age(known)):
            found[other.rank] = process
    return found


def sees_launcher(seat: Seat, proc: Path = _PROC) -> bool:
    """Tell whether this rank sees the process that has started it, and so the other ranks'.

    In a container for each rank, with process numbers of its own, it sees none of them.
    """
    pid = os.getpid()
    while pid := _parent(proc / str(pid)):
        above = _seat_at(proc / str(pid))
        if above is None or above.job != seat.job:  # else what wraps this rank, such as a shell
            return True
    return False


def _parent(entry: Path) -> int:
    """Return the number of a process's parent; 0 where there is none, or nothing is seen."""
    try:
        return int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _age(process: Process) -> tuple[int, int]:
    return process.started, process.pid


def _seat_at(entry: Path) -> Seat | None:
    """Return where a process sits; None for one of no job, of somebody else, or that has ended."""
    try:
        pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return Seat.read({name: value for name, _, value in (pair.partition("=") for pair in pairs)})
