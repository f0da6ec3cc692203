"""Allreduce between two hosts beside what their link carries one way, and MPI's own.

python tools/hosts --ranks-per-host 2 -- python benchmarks/hosts.py [--sizes 1MiB,16MiB]
    [--segments 256KiB,512KiB] [--repeats 10] [--json FILE]

The limit is a single message from the first rank of one host to the first of the other. `share` is
busbw, as nccl-tests defines it, over that rate; hosts of several ranks can pass 1, since a card
then carries each byte once for all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from harness import Contender, Outcome, contest, rates, table, verdict, write_json
from options import add_sizes, plain_parser, read

import ringfold
from ringfold import units
from ringfold.output import status_of

COLUMNS = {
    "impl": "",
    "algorithm": "",
    "segment": "",
    "nbytes": "d",
    "ranks": "d",
    "nodes": "d",
    "median_us": ".0f",
    "p99_us": ".0f",
    "algbw_gbs": ".4f",
    "busbw_gbs": ".4f",
    "share": ".3f",
    "wrong": "d",
}


class Case:
    """One size: the buffers of this rank, and what they hold before and after an allreduce."""

    def __init__(self, comm: ringfold.Communicator, nbytes: int) -> None:
        self.comm = comm
        count = max(nbytes // 4, 1)
        pattern = np.arange(count) % 61
        self.mine = (pattern + comm.rank).astype(np.float32)
        others = comm.size * (comm.size - 1) // 2
        self.right = (pattern * comm.size + others).astype(np.float32)
        self.x = np.empty_like(self.mine)

    def fill(self) -> None:
        """Put this rank's data back."""
        self.x[:] = self.mine

    def wrong(self, _: object) -> int:
        """Count the elements that are no sum of all ranks'."""
        return int(np.count_nonzero(self.x != self.right))

    def contender(self, impl: str, run: Callable[[], Any], **names: str) -> Contender:
        """Enter an allreduce of x."""
        return Contender(impl, run, self.fill, wrong=self.wrong, **names)


def leaders(comm: ringfold.Communicator) -> list[int]:
    """Return the lowest rank of every node."""
    lowest = comm.node.broadcast(np.array([comm.rank]))
    return sorted(set(comm.allgather(lowest).ravel().tolist()))


def one_way(mpi: Any, case: Case, ends: list[int]) -> Contender:
    """Send x from one host to the other in a single message: the limit."""

    def run() -> None:
        if mpi.rank == ends[0]:
            mpi.Send(case.x, ends[1])
        elif mpi.rank == ends[1]:
            mpi.Recv(case.x, ends[0])

    return Contender("limit", run, case.fill, algorithm="one message", transport="mpi")


def two_way(mpi: Any, case: Case, ends: list[int]) -> Contender:
    """Exchange x between the hosts in one message each way."""
    came = np.empty_like(case.x)

    def run() -> None:
        if mpi.rank in ends:
            peer = ends[1 - ends.index(mpi.rank)]
            mpi.Sendrecv(case.x, peer, recvbuf=came, source=peer)

    return Contender("limit", run, case.fill, algorithm="one each way", transport="mpi")


def ours(comm: ringfold.Communicator, case: Case, algorithm: str | None, segment: int) -> Contender:
    """Enter ringfold's allreduce; None for the algorithm that it takes by itself."""
    work = comm.allreduce(case.x, algorithm=algorithm, blocking=False)
    work.wait()
    return case.contender(
        "ordinary",
        lambda: comm.allreduce(case.x, algorithm=algorithm),
        algorithm=work.receipt.algorithm + ("" if algorithm else " (chosen)"),
        transport=units.show_nbytes(segment),
    )


def rows(
    outcomes: list[Outcome], comm: ringfold.Communicator, nodes: int, nbytes: int
) -> Iterator[Mapping[str, Any]]:
    """Put every outcome beside the one-way rate of its own run."""
    limit = nbytes / outcomes[0].timing.median / 1e9
    for outcome in outcomes:
        contender, timing = outcome.contender, outcome.timing
        algbw, busbw = rates("allreduce", nbytes, comm.size, timing.median)
        if contender.impl == "limit":
            busbw = algbw
        yield {
            "impl": contender.impl,
            "collective": "allreduce",
            "dtype": "float32",
            "op": "sum",
            "algorithm": contender.algorithm,
            "segment": contender.transport if contender.impl == "ordinary" else "-",
            "nbytes": nbytes,
            "ranks": comm.size,
            "nodes": nodes,
            "median_us": timing.median * 1e6,
            "p99_us": timing.p99 * 1e6,
            "algbw_gbs": algbw,
            "busbw_gbs": busbw,
            "share": busbw / limit,
            "wrong": outcome.wrong,
        }


def main() -> int:
    """Run the benchmark on all ranks; rank 0 reports."""
    parser = plain_parser(__doc__, repeats=10)
    add_sizes(parser, "--sizes", "1MiB,16MiB", "bytes of the buffer")
    add_sizes(parser, "--segments", "", "sizes to try")
    options = read(parser)
    from mpi4py import MPI

    mpi = MPI.COMM_WORLD
    found: list[Mapping[str, Any]] = []
    with ExitStack() as stack:
        settings = ringfold.Settings.read()
        comms = [
            stack.enter_context(
                ringfold.Communicator(mpi, settings=replace(settings, segment_bytes=segment))
            )
            for segment in options.segments or [settings.segment_bytes]
        ]
        comm, ends = comms[0], leaders(comms[0])
        if len(ends) < 2:
            if comm.rank == 0:
                told = f"expected two hosts, all {comm.size} ranks share one; see tools/hosts"
                print(f"{parser.prog}: error: {told}", file=sys.stderr, flush=True)
            return 2
        for nbytes in options.sizes:
            case = Case(comm, nbytes)
            contenders = [one_way(mpi, case, ends), two_way(mpi, case, ends)]
            for each in comms:
                segment = each._settings.segment_bytes
                names = [None, "ring", *(["hierarchical"] if comm.size > len(ends) else [])]
                contenders += [ours(each, case, name, segment) for name in names]
            contenders.append(
                case.contender(
                    "mpi",
                    lambda case=case: mpi.Allreduce(MPI.IN_PLACE, case.x),  # type: ignore[misc]
                )
            )
            outcomes = contest(comm, contenders, repeats=options.repeats, warmup=1)
            found += rows(outcomes, comm, len(ends), case.x.nbytes)
        if comm.rank == 0:
            print(table(found, COLUMNS), flush=True)
            if options.json:
                write_json(options.json, "hosts", found)
        return verdict(found, speak=comm.rank == 0)


if __name__ == "__main__":
    raise SystemExit(status_of("hosts.py", main))
