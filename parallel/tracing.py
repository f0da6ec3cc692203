"""Trace all ranks of a communicator into one file; needs no torch."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..comm.clock import measure_offset
from ..comm.text_file import why_unwritable, write_whole
from ..comm.texts import first_text
from ..comm.timeline import COMPUTE, Timeline
from ..comm.trace_file import (
    RankSummary,
    RankTrace,
    document,
    gather,
    on_one_clock,
    summarize,
    table,
)
from .demands import require_comm

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["Trace", "trace"]


class Trace:
    """What a trace found; filled at rank 0 when it has ended.

    rows: what the time of every rank went to.
    """

    def __init__(self) -> None:
        self.rows: list[RankSummary] = []

    def __str__(self) -> str:
        """Return the table of all ranks."""
        return table(self.rows) if self.rows else "no trace on this rank"


@contextmanager
def trace(comm: Communicator, path: Path | str | None = None) -> Iterator[Trace]:
    """Record what all ranks do within, on one clock, and write it at the end.

        with ringfold.trace(comm, "trace.json") as found:
            train()
        if comm.rank == 0:
            print(found)

    path: of a file in the trace-event format of Chrome and Perfetto, which rank 0 writes; None for
    the table alone. Engines record forward, backward, packing and waiting, optimizers their steps;
    operations of every group of the rank are there in any case.

    Collective, at the beginning and at the end; where the program within raises, nothing is
    written. CommError where a trace is under way on this rank; OSError, on all ranks, where rank 0
    cannot write the file: before the program within begins, as far as that can be known then, else
    at the end, with the rows there.
    """
    require_comm(comm)
    # Where it is now, wherever the program within goes.
    file = None if path is None else Path(os.path.abspath(path))
    _require_none(comm, "" if file is None or comm.rank else why_unwritable(file))
    found = Trace()
    first = measure_offset(comm)
    timeline = comm.start_timeline()
    try:
        with _optimizers(timeline):
            yield found
    finally:
        comm.stop_timeline()
    traces = gather(comm, on_one_clock(comm.rank, timeline, first, measure_offset(comm)))
    found.rows = summarize(traces) if traces else []
    _require_none(comm, "" if file is None or comm.rank else _write(file, traces))


def _write(path: Path, traces: Sequence[RankTrace]) -> str:
    """Write the file; return why that could not be done, "" where it was."""
    try:
        write_whole(path, document(traces))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return ""


def _require_none(comm: Communicator, trouble: str) -> None:
    """Raise OSError on all ranks where one is in trouble with the file; collective."""
    if told := first_text(comm, trouble):
        raise OSError(f"rank 0 cannot write the trace: {told}")


@contextmanager
def _optimizers(timeline: Timeline) -> Iterator[None]:
    """Record the steps of all optimizers of this thread; without torch there are none."""
    try:
        from torch.optim import optimizer
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        yield
        return
    started: list[int] = []

    def before(*_: Any) -> None:
        if threading.get_ident() == timeline.thread:
            started.append(time.monotonic_ns())

    def after(*_: Any) -> None:
        if threading.get_ident() == timeline.thread and started:
            timeline.add(COMPUTE, "optimizer", started.pop())

    handles = (
        optimizer.register_optimizer_step_pre_hook(before),
        optimizer.register_optimizer_step_post_hook(after),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
