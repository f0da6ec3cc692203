"""What it costs that nothing hangs or is added wrongly in silence: the checks of every collective.

    mpirun -n 2 python benchmarks/checks.py [--sizes 4,64KiB,1MiB] [--json FILE] [--plot FILE]

Each planned allreduce notes its start and its end in the ring of operations, and the ranks compare
what they call: in shared memory at a meeting that is there anyway, over MPI by tags that hold a
fingerprint. These parts are timed by themselves, on the records that the plan uses, and set beside
what the whole plan takes: there is no allreduce without them. RINGFOLD_SHARED=0 measures messages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import Contender, contest, table, verdict, write_json
from numba import types
from options import parser_of, read
from plots import plot_bars

import ringfold
from ringfold.comm.fingerprint import history_with, shares_of, tag_of
from ringfold.comm.meeting import Meeting
from ringfold.comm.trace import Ring
from ringfold.kernels import meeting as meetings
from ringfold.kernels.compiled import compile_kernel
from ringfold.kernels.message_words import Word
from ringfold.kernels.native import words_at
from ringfold.kernels.ring import note_end, note_start
from ringfold.output import status_of

LOOPS = 20_000
ROUNDS = 15


def meeting_checks() -> Callable[[int, int], int]:
    """Return the compiled (work record, repetitions) of what a meeting does for the checks."""
    words, start, end = words_at, meetings._note_start, meetings._note_end
    compare, on_board = meetings._compare, meetings._ON_BOARD
    work_words, board_words = meetings._WORK_WORDS, meetings._BOARD_WORDS

    def repeat_checks(record: Any, repetitions: Any) -> Any:
        work = words(record, work_words)
        board = words(work[on_board], board_words)
        verdicts = 0
        for _ in range(repetitions):
            start(work, board)
            verdicts += compare(work, board)
            end(work, board, 1)
        return verdicts

    return compile_kernel("repeat_checks", repeat_checks, types.int64, types.int64)


def message_checks(ring: Ring) -> Callable[[int], None]:
    """Return what does, so many times, what an operation over messages does for the checks."""

    def note(address: Any, repetitions: Any) -> Any:
        for sequence in range(repetitions):
            note_end(address, note_start(address, 1, sequence), 1)

    compiled_note = compile_kernel("note", note, types.int64, types.int64)
    words, shares = np.zeros(Word.WORDS, np.int64).data, shares_of(1 << 22)
    at = [int(word) for word in (Word.RING, Word.CALLED, Word.SEQUENCE)]

    def repeat(repetitions: int) -> None:
        history = 0
        for sequence in range(repetitions):
            history = history_with(history, 0x9E3779B9)
            tag_of(sequence, history, shares)
            words[at[0]], words[at[1]], words[at[2]] = ring.address, 1, sequence
        compiled_note(ring.address, repetitions)

    return repeat


def seconds_of(run: Callable[[int], object]) -> float:
    """Return the median time of one repetition."""
    spans = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run(LOOPS)
        spans.append((time.perf_counter() - start) / LOOPS)
    return float(np.median(spans))


def compare(comm: ringfold.Communicator, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a plan and its checks for every size; collective."""
    rows = []
    repeat = meeting_checks()
    for nbytes in arguments.sizes:
        x = comm.empty(nbytes // 4)
        plan = comm.plan("allreduce", x, "sum")
        (outcome,) = contest(
            comm,
            [Contender("checked", plan, prepare=lambda x=x: x.fill(comm.rank + 1))],
            repeats=arguments.repeats,
            warmup=8,
            budget=arguments.budget,
        )
        timing = outcome.timing
        wrong = int((x != sum(range(1, comm.size + 1))).sum())
        meeting = getattr(plan, "args", (None,))[0]
        if isinstance(meeting, Meeting):
            transport, address = "shared", meeting.address
            checks = seconds_of(lambda count, address=address: repeat(address, count))
        else:
            transport = "messages"
            checks = seconds_of(message_checks(Ring()))
        checks = float(comm.allreduce(np.array([checks]), "max")[0])
        rows.append(
            {
                "impl": "checked",
                "collective": "allreduce",
                "dtype": "float32",
                "op": "sum",
                "transport": transport,
                "nbytes": nbytes,
                "ranks": comm.size,
                "median_us": timing.median * 1e6,
                "p99_us": timing.p99 * 1e6,
                "checks_us": checks * 1e6,
                "share": checks / timing.median,
                "wrong": wrong,
            }
        )
    return rows


COLUMNS = {
    "transport": "s",
    "ranks": "d",
    "nbytes": "d",
    "median_us": ".2f",
    "p99_us": ".2f",
    "checks_us": ".3f",
    "share": ".4f",
    "wrong": "d",
}


def main() -> int:
    """Run the benchmark; status 1 where a sum was wrong."""
    parser = parser_of(__doc__, sizes="4,64KiB,1MiB,16MiB", of="bytes of the buffer", repeats=60)
    arguments = read(parser)
    with ringfold.Communicator() as comm:
        rows = compare(comm, arguments)
        rank = comm.rank
    if rank == 0:
        print("medians; checks: noting start and end, and comparing what ranks call")
        print(table(rows, COLUMNS))
        if arguments.json:
            write_json(arguments.json, "checks", rows)
        if arguments.plot:
            title = f"Checks of a planned allreduce on {rows[0]['ranks']} ranks"
            plot_bars(arguments.plot, rows, "nbytes", "checks_us", "us in each call", title)
    return verdict(rows, speak=rank == 0)


if __name__ == "__main__":
    raise SystemExit(status_of("checks.py", main))
