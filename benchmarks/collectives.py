"""Collectives and messages, in the columns of nccl-tests, beside what else a user could take.

    mpirun -n 4 python benchmarks/collectives.py --collective allgather,send
        [--sizes 4,64KiB,1MiB] [--peers mpi,gloo] [--json FILE] [--plot FILE]

registered: an array of comm.empty, in one call.  plan: the same array, decided once.  ordinary: an
array of NumPy (of torch for bfloat16).  mpi, gloo: what they have.  limit: what memory allows, see
limit.py.  The time is that of the slowest rank, from the moment all ranks are lined up until the
data is there; every rank fills its buffer before each run, and the last result is checked.
A size is that of the whole buffer, as nccl-tests has it: of all ranks' parts together.
`send` is one-way, from even ranks to odd ones; `sendrecv` sends to the next rank and receives from
the one before, all at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
from harness import Contender, contest, rates, table, verdict, write_json
from limit import triad
from options import names, parser_of, read
from patterns import (
    EXPECTED,
    PARTS,
    REDUCING,
    count_wrong,
    fill,
    own_count,
    result_count,
    storage,
    tile,
)
from peers import Buffers, gloo, gloo_run, mpi_run, partners
from plots import plot_sizes

import ringfold
from ringfold.output import status_of

DTYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int64")
LIMIT_FROM = 1 << 16
"""Bytes below which a pass over memory is no limit to anything."""


def ours(
    comm: ringfold.Communicator, collective: str, buffers: Buffers, op: str
) -> Callable[..., Any]:
    """Return the operation as a function that takes `blocking`."""
    x, result = buffers.x, buffers.result
    rows = x.reshape(comm.size, -1) if collective in ("scatter", "alltoall") else x
    to, come = partners(comm.rank, comm.size)

    def send() -> Any:
        if to is not None:
            comm.send(x, to)
        if come is not None:
            comm.recv(x, come)
        return x

    def sendrecv() -> Any:
        return comm.sendrecv(x, (comm.rank + 1) % comm.size, result, (comm.rank - 1) % comm.size)

    calls: Mapping[str, Callable[..., Any]] = {
        "allreduce": partial(comm.allreduce, x, op),
        "reduce": partial(comm.reduce, x, 0, op),
        "broadcast": partial(comm.broadcast, x, 0),
        "allgather": partial(comm.allgather, x),
        "reduce_scatter": partial(comm.reduce_scatter, x, op),
        "gather": partial(comm.gather, x, 0),
        "scatter": partial(comm.scatter, rows, 0),
        "alltoall": partial(comm.alltoall, rows),
        "send": send,
        "sendrecv": sendrecv,
    }
    return calls[collective]


def planned(
    comm: ringfold.Communicator, collective: str, x: Any, op: str
) -> Callable[[], Any] | None:
    """Return the operation as a plan; None for messages, which have none."""
    if collective in ("send", "sendrecv"):
        return None
    rows = x.reshape(comm.size, -1) if collective in ("scatter", "alltoall") else x
    how = {"op": op} if collective in REDUCING else {}
    return comm.plan(collective, rows, **how)


class Case:
    """One collective, size and type on the ranks of comm: buffers, how they are filled, checked."""

    def __init__(
        self, comm: ringfold.Communicator, collective: str, nbytes: int, dtype: str, op: str
    ) -> None:
        itemsize = tile(0, comm.size, op, dtype).itemsize
        step = comm.size if collective in PARTS else 1
        self.comm, self.collective, self.dtype, self.op = comm, collective, dtype, op
        self.count = max(nbytes // itemsize // step, 1) * step
        self.nbytes = self.count * itemsize
        self.pieces = EXPECTED[collective](comm.rank, comm.size, self.count)

    def ordinary(self) -> Buffers:
        counts = self._counts()
        if self.dtype == "bfloat16":
            import torch

            return Buffers(*(torch.empty(count, dtype=torch.bfloat16) for count in counts))
        return Buffers(*(np.empty(count, self.dtype) for count in counts))

    def registered(self) -> Buffers:
        dtype: Any = self.dtype
        if dtype == "bfloat16":
            import torch

            dtype = torch.bfloat16
        return Buffers(*(self.comm.empty(count, dtype) for count in self._counts()))

    def contender(
        self, impl: str, buffers: Buffers, run: Callable[[], Any], *, own: bool, **about: str
    ) -> Contender:
        """own: the result is what run returns; else it is in the buffers."""
        mine = tile(self.comm.rank, self.comm.size, self.op, self.dtype)
        target = storage(buffers.x)
        placed = buffers.result if result_count(*self._place()) else buffers.x

        def wrong(result: Any) -> int:
            found = result if own else placed
            if not self.pieces or found is None:
                return sum(piece.count for piece in self.pieces)
            flat = storage(found)
            return count_wrong(flat, self.pieces, self.comm.size, self.op, self.dtype)

        return Contender(impl, run, partial(fill, target, mine), wrong=wrong, **about)

    def _place(self) -> tuple[str, int, int, int]:
        return self.collective, self.comm.rank, self.comm.size, self.count

    def _counts(self) -> tuple[int, int]:
        return own_count(self.collective, self.comm.size, self.count), result_count(*self._place())


def contenders(case: Case, mpi: Any, peers: Sequence[str]) -> list[Contender]:
    """Line up everybody who can do it."""
    comm, collective, op = case.comm, case.collective, case.op
    ordinary, registered = case.ordinary(), case.registered()
    lined = []
    for impl, buffers in (("registered", registered), ("ordinary", ordinary)):
        run = ours(comm, collective, buffers, op)
        fill(storage(buffers.x), tile(comm.rank, comm.size, op, case.dtype))
        about = receipt_of(collective, run)
        lined.append(case.contender(impl, buffers, run, own=True, **about))
        if impl == "registered" and (plan := planned(comm, collective, buffers.x, op)):
            lined.append(case.contender("plan", buffers, plan, own=True, **about))
    if "mpi" in peers and (run := mpi_run(mpi, collective, ordinary, op)):
        lined.append(case.contender("mpi", ordinary, run, own=False))
    if "gloo" in peers:
        run = gloo_run(comm, collective, ordinary, op)
        lined.append(case.contender("gloo", ordinary, run, own=False))
    if collective == "allreduce" and case.dtype == "float32" and case.nbytes >= LIMIT_FROM:
        run, wrong = triad(ordinary.x)
        ones = partial(ordinary.x.fill, 1)
        about = {"algorithm": "triad", "transport": "memory"}
        lined.append(Contender("limit", run, ones, wrong=wrong, **about))
    return lined


def receipt_of(collective: str, run: Callable[..., Any]) -> dict[str, str]:
    """Run it once and tell what was decided."""
    if collective in ("send", "sendrecv"):
        run()
        return {"algorithm": "direct"}
    work = run(blocking=False)
    work.wait()
    return {"algorithm": work.receipt.algorithm, "transport": work.receipt.transport}


def rows_of(case: Case, lined: Sequence[Contender], repeats: int, budget: float) -> list[Any]:
    """Run the contest and lay its outcome out, a row for each contender."""
    rows = []
    for outcome in contest(case.comm, lined, repeats=repeats, budget=budget):
        timing, contender = outcome.timing, outcome.contender
        algbw, busbw = rates(case.collective, case.nbytes, case.comm.size, timing.median)
        rows.append(
            {
                "impl": contender.impl,
                "collective": case.collective,
                "dtype": case.dtype,
                "op": case.op if case.collective in REDUCING else "-",
                "nbytes": case.nbytes,
                "count": case.count,
                "ranks": case.comm.size,
                "algorithm": contender.algorithm,
                "transport": contender.transport,
                "median_us": timing.median * 1e6,
                "p99_us": timing.p99 * 1e6,
                "algbw_gbs": algbw,
                "busbw_gbs": busbw,
                "wrong": outcome.wrong,
                "repeats": timing.repeats,
            }
        )
    return rows


COLUMNS = {
    "nbytes": "d",
    "count": "d",
    "dtype": "s",
    "op": "s",
    "ranks": "d",
    "impl": "s",
    "algorithm": "s",
    "transport": "s",
    "median_us": ".1f",
    "p99_us": ".1f",
    "algbw_gbs": ".3f",
    "busbw_gbs": ".3f",
    "wrong": "d",
}


def parse(benchmark: str) -> argparse.Namespace:
    sizes = "4,64,1KiB,4KiB,16KiB,64KiB,256KiB,1MiB,4MiB,16MiB,64MiB"
    parser = parser_of(__doc__, sizes=sizes, peers=True)
    if benchmark == "collectives":
        parser.set_defaults(sizes="4,64KiB,1MiB,16MiB", budget=0.5)
        parser.add_argument(
            "--collective",
            type=names(EXPECTED),
            default=[name for name in EXPECTED if name != "allreduce"],
            help=f"names, with commas between: {', '.join(EXPECTED)} (default: all others)",
        )
    parser.add_argument(
        "--dtype",
        type=names(DTYPES),
        default=["float32"],
        help=f"of {', '.join(DTYPES)}; with commas",
    )
    parser.add_argument("--op", default="sum", choices=("sum", "min", "max"))
    arguments = read(parser)
    arguments.collectives = arguments.collective if benchmark == "collectives" else [benchmark]
    arguments.dtypes = arguments.dtype
    return arguments


def main(benchmark: str = "collectives") -> int:
    """Run the benchmark; status 1 where a result was wrong."""
    arguments = parse(benchmark)
    rows: list[dict[str, Any]] = []
    with ringfold.Communicator() as comm:
        mpi = None
        if "mpi" in arguments.peers:
            from mpi4py import MPI

            mpi = MPI.COMM_WORLD.Dup()
        with gloo(comm) if "gloo" in arguments.peers else nullcontext():
            for collective in arguments.collectives:
                if comm.size == 1 and collective in ("send", "sendrecv"):
                    continue  # nobody to send to
                before = len(rows)
                for dtype in arguments.dtypes:
                    for nbytes in arguments.sizes:
                        case = Case(comm, collective, nbytes, dtype, arguments.op)
                        lined = contenders(case, mpi, arguments.peers)
                        rows += rows_of(case, lined, arguments.repeats, arguments.budget)
                if comm.rank == 0:
                    print(f"{collective}, {comm.size} ranks, measured, time of the slowest rank")
                    print(table(rows[before:], COLUMNS), flush=True)
        if mpi is not None:
            mpi.Free()
        rank = comm.rank
    if rank == 0:
        if arguments.json:
            write_json(arguments.json, benchmark, rows)
        if arguments.plot:
            plot_sizes(arguments.plot, rows)
    return verdict(rows, speak=rank == 0)


if __name__ == "__main__":
    raise SystemExit(status_of("collectives.py", main))
