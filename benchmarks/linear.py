"""Steps per second of the smallest training there is: one linear layer, 32 rows over all ranks.

    mpirun -n 2 python benchmarks/linear.py [--steps 50] [--peers gloo] [--json FILE] [--plot FILE]

The batch of 32 rows of the workload `linear` is split over the ranks; a gradient has 11 numbers, so
that what is measured is what a reduction costs besides its data.  alone: one process with the whole
batch while the others sleep.  no_sync: all ranks at once, without any reduction.  limit: the same,
and then one planned allreduce of 11 numbers.  ours: ringfold.DataParallel.  ddp: torch's, on gloo.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
from harness import Contender, contest, table, verdict, write_json
from options import parser_of, read_peers, read_sizes
from peers import gloo
from plots import plot_bars
from torch import nn
from training import Alone, Trainer, differing, limited, repeated, unsynchronised, wrapped

import ringfold
from ringfold.workloads.linear import NUM_COLUMNS, Linear
from ringfold.workloads.workload import Share

BATCH = 32
NUM_BATCHES = 1000


def stepper(trainer: Trainer, rank: int, size: int, take: Any = Trainer.step) -> Any:
    """Return a function that does take(trainer, x, y) with this rank's rows of the next batch."""
    data = Linear(Share(BATCH, rank, size, 0), num_rows=BATCH * NUM_BATCHES)
    batches = cycle(list(data.batches(0)))
    return lambda: take(trainer, *next(batches))


def compare(comm: ringfold.Communicator, alone: Alone, arguments: Any) -> list[dict[str, Any]]:
    """Run the contest, windows of --steps steps each."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(NUM_COLUMNS, 1)

    def window(trainer: Trainer, rank: int, size: int) -> Any:
        return repeated(stepper(trainer, rank, size), arguments.steps)

    loss = nn.functional.mse_loss
    free = Trainer(ringfold.DataParallel(fresh(), comm), loss)
    step = stepper(free, comm.rank, comm.size, unsynchronised)
    lined = [
        alone.contender(window(Trainer(fresh(), loss), 0, 1)),
        Contender("no_sync", repeated(step, arguments.steps)),
        Contender("limit", repeated(limited(step, comm, free), arguments.steps)),
        *(
            Contender(
                name,
                window(trainer, comm.rank, comm.size),
                wrong=lambda _, trainer=trainer: differing(comm, trainer.model),  # type: ignore[misc]
            )
            for name, trainer in wrapped(
                fresh, comm, arguments.sizes, lambda model: Trainer(model, loss)
            )
        ),
    ]
    if "gloo" in arguments.peers:
        ddp = Trainer(nn.parallel.DistributedDataParallel(fresh()), loss)
        lined.append(
            Contender(
                "ddp",
                window(ddp, comm.rank, comm.size),
                wrong=lambda _: differing(comm, ddp.model),
            )
        )
    rows = []
    for outcome in contest(comm, lined, repeats=arguments.repeats, budget=arguments.budget):
        median = outcome.timing.median / arguments.steps
        rows.append(
            {
                "impl": outcome.contender.impl,
                "workload": "linear",
                "batch": BATCH,
                "ranks": comm.size,
                "steps": arguments.steps,
                "median_us": median * 1e6,
                "p99_us": outcome.timing.p99 / arguments.steps * 1e6,
                "steps_per_second": 1 / median,
                "wrong": outcome.wrong,
                "repeats": outcome.timing.repeats,
            }
        )
    return rows


COLUMNS = {
    "workload": "s",
    "batch": "d",
    "ranks": "d",
    "impl": "s",
    "median_us": ".1f",
    "p99_us": ".1f",
    "steps_per_second": ".0f",
    "wrong": "d",
}


def main() -> int:
    """Run the benchmark; status 1 where replicas have come to differ."""
    parser = parser_of(__doc__, sizes="", of="bytes of a bucket", peers=True, budget=10.0)
    parser.add_argument("--steps", type=int, default=50, help="in a repetition")
    arguments = parser.parse_args()
    arguments.peers = read_peers(parser, arguments.peers)
    arguments.sizes = read_sizes(parser, arguments.sizes)
    torch.set_num_threads(1)
    with ringfold.Communicator() as comm:
        alone = Alone(comm)
        with gloo(comm) if "gloo" in arguments.peers else nullcontext():
            rows = compare(comm, alone, arguments)
        alone.close()
        rank, size = comm.rank, comm.size
    if rank == 0:
        print("measured; a step is forward, backward and SGD, one thread a rank")
        print(table(rows, COLUMNS))
        if arguments.json:
            write_json(arguments.json, "linear", rows)
        if arguments.plot:
            title = f"nn.Linear(10, 1), a batch of {BATCH} over {size} ranks"
            plot_bars(arguments.plot, rows, "workload", "steps_per_second", "steps a second", title)
    return verdict(rows, speak=rank == 0)


if __name__ == "__main__":
    raise SystemExit(main())
