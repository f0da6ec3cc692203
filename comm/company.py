"""The processes of a job on this node, as they are known before MPI has started."""

from __future__ import annotations

from pathlib import Path

from .deaths import Process
from .settings import Seat


def company(seat: Seat) -> dict[int, Process]:
    """Return the processes that the launcher has started beside this rank's, by rank.

    Of a rank's processes, which inherit what the launcher has told it, the oldest counts.
    """
    found: dict[int, Process] = {}
    for entry in Path("/proc").iterdir():
        other = _seat_at(entry) if entry.name.isdigit() else None
        if other is None or other.job != seat.job or other.rank == seat.rank:
            continue
        process = Process.of(int(entry.name))
        known = found.get(other.rank)
        if process is not None and (known is None or _age(process) < _age(known)):
            found[other.rank] = process
    return found


def _age(process: Process) -> tuple[int, int]:
    return process.started, process.pid


def _seat_at(entry: Path) -> Seat | None:
    """Return where a process sits; None for one of no job, of somebody else, or that has ended."""
    try:
        pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return Seat.read({name: value for name, _, value in (pair.partition("=") for pair in pairs)})
