"""The price of a schedule beside its measured time, on 2 to N ranks of this machine.

    mpirun -n 4 python benchmarks/model_error.py [--sizes 4,64KiB,1MiB] [--json FILE]

The cluster that prices is fitted in the same run, from what a round of an allgather around the ring
costs at several sizes, and from the kernel that adds; nothing is fitted to the rows it is compared
with. A call costs something besides its rounds (call_us), which the simulated time includes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from harness import measure, table, write_json
from options import add_sizes, plain_parser, read

import ringfold
from ringfold.comm.algorithms import build, names
from ringfold.comm.cost import price
from ringfold.comm.schedule import Schedule
from ringfold.comm.topology import Cluster, Link
from ringfold.kernels.reduce import combine
from ringfold.output import status_of

FIT = (4, 1 << 12, 1 << 16, 1 << 18, 1 << 20)
"""Bytes of the messages that the link is fitted to."""

TURNS = (1, 5)
"""An allgather goes around the ring so many times: the difference is what its rounds cost."""


@dataclass(frozen=True)
class Fitted:
    """What was measured: the cluster, and the seconds that a call takes besides its rounds."""

    cluster: Cluster
    call: float


def around(size: int, turns: int) -> Schedule:
    """Gather around the ring, and do it again: every round is an exchange with both neighbours."""
    once = build("allgather", "ring", size)
    return replace(once, rounds=once.rounds * turns)


def fit(comm: ringfold.Communicator, repeats: int) -> Fitted:
    """Measure rounds of several sizes, and one addition."""
    rounds = [len(around(comm.size, turns).rounds) for turns in TURNS]
    per_round, calls = [], []
    for nbytes in FIT:
        x = np.ones(nbytes // 4, np.float32)
        few, many = (
            measure(
                comm,
                comm.plan("allgather", x, algorithm=around(comm.size, turns)),
                repeats=repeats,
            ).median
            for turns in TURNS
        )
        per_round.append((many - few) / (rounds[1] - rounds[0]))
        calls.append(few - rounds[0] * per_round[-1])
    # Relative errors count alike, from the smallest message to the largest.
    seconds = np.maximum(per_round, 1e-7)
    design = np.stack([np.ones(len(FIT)), np.array(FIT, float)], axis=1)
    scaled = design / seconds[:, None]
    latency, per_byte = np.linalg.lstsq(scaled, np.ones(len(FIT)), rcond=None)[0]
    x, y = np.ones(1 << 18, np.float32), np.ones(1 << 18, np.float32)
    add = combine("sum", "float32")
    adding = measure(comm, lambda: add(x, y), repeats=repeats).median
    link = Link(max(float(latency), 0.0), 1 / max(float(per_byte), 1e-15))
    return Fitted(Cluster(link, reduce_bandwidth=x.nbytes / adding), max(calls[0], 0.0))


def compare(comm: ringfold.Communicator, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Price and measure every allreduce algorithm on the ranks of comm."""
    fitted = fit(comm, repeats)
    cluster = fitted.cluster
    rows = []
    for nbytes in sizes:
        x = np.empty(nbytes // 4, np.float32)
        for algorithm in names("allreduce"):
            step = comm.plan("allreduce", x, algorithm=algorithm)
            timing = measure(comm, step, prepare=lambda x=x: x.fill(comm.rank + 1), repeats=repeats)
            wrong = int((x != comm.size * (comm.size + 1) / 2).sum())
            schedule = build("allreduce", algorithm, comm.size)
            simulated = fitted.call + price(schedule, nbytes, cluster).seconds
            rows.append(
                {
                    "ranks": comm.size,
                    "nbytes": nbytes,
                    "algorithm": algorithm,
                    "simulated_us": simulated * 1e6,
                    "measured_us": timing.median * 1e6,
                    "p99_us": timing.p99 * 1e6,
                    "ratio": simulated / timing.median,
                    "wrong": wrong,
                    "call_us": fitted.call * 1e6,
                    "latency_us": cluster.inter.latency * 1e6,
                    "bandwidth_gbs": cluster.inter.bandwidth / 1e9,
                    "reduce_gbs": cluster.reduce_bandwidth / 1e9,
                }
            )
    return rows


COLUMNS = {
    "ranks": "d",
    "nbytes": "d",
    "algorithm": "s",
    "simulated_us": ".1f",
    "measured_us": ".1f",
    "p99_us": ".1f",
    "ratio": ".2f",
    "wrong": "d",
}


def main() -> int:
    """Run on 2, 3, ... ranks of the job; status 1 where a result was wrong."""
    parser = plain_parser(__doc__, repeats=20)
    add_sizes(parser, "--sizes", "4,64KiB,1MiB,16MiB", "bytes of the buffer")
    arguments = read(parser)
    rows: list[dict[str, Any]] = []
    with ringfold.Communicator() as world:
        for size in range(2, world.size + 1):
            group = world.split(0 if world.rank < size else None)
            if group is not None:
                rows += compare(group, arguments.sizes, arguments.repeats)
                group.close()
            world.barrier()
        rank = world.rank
    if rank == 0:
        print(table(rows, COLUMNS))
        ratios = np.array([row["ratio"] for row in rows])
        low, mid, high = np.percentile(ratios, [10, 50, 90]) if len(rows) else (1, 1, 1)
        print(f"\nsimulated / measured: median {mid:.2f}, 10 % {low:.2f}, 90 % {high:.2f}")
        if arguments.json:
            write_json(arguments.json, "model_error", rows)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(status_of("model_error.py", main))
