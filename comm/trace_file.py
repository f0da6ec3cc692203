"""All ranks' timelines on one clock, as a file for Perfetto and Chrome, and as a table."""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .clock import Offset, between
from .intervals import Intervals, common, length, union, without
from .notices import MESSAGES
from .texts import few
from .timeline import COMPUTE, PACK, STEP, WAIT, Timeline

if TYPE_CHECKING:
    from .communicator import Communicator

SCALE = 1e-3
"""Microseconds, the unit of trace events, in a nanosecond."""


def wire_bytes(operation: str, nbytes: float, size: int) -> float:
    """Return the bytes that a rank sends, averaged over the ranks, if nothing is sent twice.

    Of a scatter the bytes that the root sends. nbytes: of this rank's x. The lower bounds of
    bandwidth of Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations
    in MPICH, 2005, section 4.
    """
    return _WIRE[operation](nbytes, size)


_WIRE: dict[str, Callable[[float, int], float]] = {
    "allreduce": lambda n, p: 2 * n * (p - 1) / p,
    "reduce": lambda n, p: n * (p - 1) / p,
    "broadcast": lambda n, p: n * (p - 1) / p,
    "reduce_scatter": lambda n, p: n * (p - 1) / p,
    "allgather": lambda n, p: n * (p - 1),
    "gather": lambda n, p: n * (p - 1) / p,
    "scatter": lambda n, p: n * (p - 1) / p,
    "alltoall": lambda n, p: n * (p - 1) / p,
    "barrier": lambda n, p: 0,
    "split": lambda n, p: 0,
    "close": lambda n, p: 0,
    "send": lambda n, p: n,
    "recv": lambda n, p: 0,
}


@dataclass(frozen=True)
class RankTrace:
    """One rank's timeline on rank 0's clock, in microseconds, as it travels and is kept.

    spans: (category, name, start, end).
    operations: (operation, label, detail, start, end, wire bytes, group, sequence, group's size).
    """

    rank: int
    host: str
    start: float
    end: float
    error: float
    lost: int
    spans: list[tuple[str, str, float, float]]
    operations: list[tuple[str, str, str, float, float, float, str, int, int]]

    def of(self, category: str) -> Intervals:
        """Return the moments of a category."""
        return union((start, end) for kind, _, start, end in self.spans if kind == category)


def on_one_clock(rank: int, timeline: Timeline, first: Offset, last: Offset) -> RankTrace:
    """Return a rank's timeline as of rank 0's clock."""

    def at(moment: int) -> float:
        return (moment - between(first, last, moment)) * SCALE

    return RankTrace(
        rank,
        socket.gethostname(),
        at(timeline.start),
        at(timeline.end),
        max(first.error, last.error) * SCALE,
        timeline.lost,
        [(s.category, s.name, at(s.start), at(s.end)) for s in timeline.spans],
        [
            (
                entry.signature.operation,
                operation.label,
                str(entry),
                at(entry.start),
                at(entry.end),
                wire_bytes(entry.signature.operation, entry.nbytes, entry.size),
                entry.group,
                entry.sequence,
                entry.size,
            )
            for operation in timeline.operations
            for entry in (operation.entry,)
        ],
    )


def gather(comm: Communicator, mine: RankTrace) -> list[RankTrace]:
    """Return the traces of all ranks, at rank 0; nothing elsewhere. Collective."""
    text = np.frombuffer(json.dumps(asdict(mine)).encode(), np.uint8)
    sizes = comm.allgather(np.array([text.size])).ravel().tolist()
    if comm.rank:
        comm.send(text, 0)
        return []
    texts = [text] + [comm.recv(np.zeros(sizes[r], np.uint8), r) for r in range(1, comm.size)]
    return [RankTrace(**json.loads(each.tobytes())) for each in texts]


def events(traces: Sequence[RankTrace]) -> list[dict[str, Any]]:
    """Return trace events: a process per rank, its program as one thread, messages as others."""
    begin = min(trace.start for trace in traces)
    found: list[dict[str, Any]] = []
    for trace in traces:
        named = {"process_name": f"rank {trace.rank} ({trace.host})", "thread_name": "program"}
        found += [
            {"ph": "M", "name": what, "pid": trace.rank, "tid": 0, "args": {"name": text}}
            for what, text in named.items()
        ]
        for category, name, start, end in trace.spans:
            found.append(_event(trace.rank, 0, category, name, start - begin, end - start, {}))
        lanes: list[float] = []  # when each is free again
        for name, label, detail, start, end, wire, *_ in sorted(
            trace.operations, key=lambda one: one[3]
        ):
            lane = next((k for k, free in enumerate(lanes) if free <= start), len(lanes))
            if lane == len(lanes):
                lanes.append(0.0)
                shown = {"name": f"communication {lane}" if lane else "communication"}
                found.append(
                    {
                        "ph": "M",
                        "name": "thread_name",
                        "pid": trace.rank,
                        "tid": lane + 1,
                        "args": shown,
                    }
                )
            lanes[lane] = end
            arguments = {"call": detail, "wire_bytes": round(wire)}
            shown_name = f"{label}: {name}" if label else name
            found.append(
                _event(
                    trace.rank,
                    lane + 1,
                    "communication",
                    shown_name,
                    start - begin,
                    end - start,
                    arguments,
                )
            )
    return found


def _event(
    pid: int, tid: int, category: str, name: str, start: float, duration: float, arguments: Any
) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "cat": category,
        "name": name,
        "ts": round(start, 3),
        "dur": round(duration, 3),
        "args": arguments,
    }


@dataclass(frozen=True)
class RankSummary:
    """What a rank's time went to, in microseconds.

    compute: without what it packed and waited for.
    communication: moments with an operation under way, receives aside; hidden: those of them in
    which the rank computed or packed; exposed: the others.
    wire_bytes: sent, by formula.  busbw: bytes a second while communicating.
    bubble: the share of the steps of a pipeline in which the stage computed nothing; None without.
    last: how many collectives of several ranks this one came to last; behind: after the one before
    it, on the mean of those.
    lost: operations that were not recorded, so that all but compute and wait may be too little.
    """

    rank: int
    seconds: float
    compute: float
    pack: float
    wait: float
    communication: float
    hidden: float
    exposed: float
    wire_bytes: float
    busbw: float
    bubble: float | None
    last: int
    behind: float
    lost: int


def summarize(traces: Sequence[RankTrace]) -> list[RankSummary]:
    """Return the summary of every rank."""
    late = _late(traces)
    return [_summary(trace, late[trace.rank]) for trace in traces]


def _summary(trace: RankTrace, late: list[float]) -> RankSummary:
    waiting, packing = trace.of(WAIT), trace.of(PACK)
    busy = without(trace.of(COMPUTE), waiting)
    # A receive is posted long before anything comes: what counts is the wait for it.
    under_way = union(
        (start, end) for name, _, _, start, end, *_ in trace.operations if name != "recv"
    )
    hidden = length(common(under_way, union([*busy, *without(packing, waiting)])))
    total = length(under_way)
    wire = sum(operation[5] for operation in trace.operations)
    steps = trace.of(STEP)
    working = length(common(busy, steps))
    return RankSummary(
        trace.rank,
        trace.end - trace.start,
        length(without(busy, packing)),
        length(without(packing, waiting)),
        length(waiting),
        total,
        hidden,
        total - hidden,
        wire,
        wire / total * 1e6 if total else 0.0,
        1 - working / length(steps) if steps else None,
        len(late),
        sum(late) / len(late) if late else 0.0,
        trace.lost,
    )


def _late(traces: Sequence[RankTrace]) -> dict[int, list[float]]:
    """Return by rank, for each call that it came to last, how long after the one before it came."""
    starts: dict[tuple[str, int], list[tuple[float, int, int]]] = defaultdict(list)
    for trace in traces:
        for operation in trace.operations:
            name, _, _, start, _, _, group, sequence, size = operation
            if name not in MESSAGES and size > 1:
                starts[group, sequence].append((start, trace.rank, size))
    late: dict[int, list[float]] = defaultdict(list)
    for came in starts.values():
        came.sort()
        # Groups of one split share a name: only a call that is seen whole tells who came last.
        if len(came) == came[0][2]:
            late[came[-1][1]].append(came[-1][0] - came[-2][0])
    return late


def table(rows: Sequence[RankSummary]) -> str:
    """Return the summary as text, times in milliseconds; below it what it lacks, if anything."""
    head = (
        "rank",
        "total ms",
        "compute",
        "pack",
        "wait",
        "comm",
        "hidden",
        "exposed",
        "sent MB",
        "GB/s",
        "bubble",
        "last",
        "by ms",
    )
    lines = [head] + [
        (
            str(row.rank),
            *(
                f"{value / 1e3:.1f}"
                for value in (
                    row.seconds,
                    row.compute,
                    row.pack,
                    row.wait,
                    row.communication,
                    row.hidden,
                    row.exposed,
                )
            ),
            f"{row.wire_bytes / 1e6:.2f}",
            f"{row.busbw / 1e9:.3f}",
            "-" if row.bubble is None else f"{row.bubble:.1%}",
            str(row.last),
            f"{row.behind / 1e3:.2f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    lost = few([f"rank {row.rank} {row.lost}" for row in rows if row.lost])
    if lost:
        shown.append(f"operations that are not in here, as they were not recorded: {lost}")
    return "\n".join(shown)


def document(traces: Sequence[RankTrace]) -> str:
    """Return the file: trace events, and the summary beside them."""
    rows = summarize(traces)
    return json.dumps(
        {
            "traceEvents": events(traces),
            "displayTimeUnit": "ms",
            "otherData": {
                "summary": [asdict(row) for row in rows],
                "clock_error_us": max(trace.error for trace in traces),
                "lost_operations": sum(trace.lost for trace in traces),
            },
        }
    )
