"""Steps per second of the smallest training there is: one linear layer, 32 rows over all ranks.

    mpirun -n 2 python benchmarks/linear.py [--steps 50] [--peers gloo] [--json FILE] [--plot FILE]

The batch of 32 rows of the workload `linear`, or of as many of these as the ranks share evenly, is
split over the ranks; a gradient has 11 numbers, so that what is measured is what a reduction costs
besides its data.  alone: one process with the whole
batch while the others sleep.  no_sync: all ranks at once, without any reduction.  limit: the same,
and then one planned allreduce of 11 numbers.  ours: ringfold.DataParallel.  ddp: torch's, on gloo.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
from harness import Contender, contest, table, verdict, write_json
from options import parser_of, read
from peers import gloo
from plots import plot_bars
from torch import nn
from training import Alone, Trainer, differing, limited, repeated, unsynchronised, wrapped

import ringfold
from ringfold.output import status_of
from ringfold.workloads.linear import NUM_COLUMNS, Linear
from ringfold.workloads.numbers import whole
from ringfold.workloads.options import UsageError
from ringfold.workloads.workload import Share

BATCH = 32
NUM_BATCHES = 1000


def batch_of(size: int) -> int:
    """Return the rows of a batch that so many ranks share evenly."""
    return BATCH - BATCH % size


def stepper(trainer: Trainer, share: Share, take: Any = Trainer.step) -> Any:
    """Return a function that does take(trainer, x, y) with a share of the next batch."""
    data = Linear(share, num_rows=share.batch_size * NUM_BATCHES)
    batches = cycle(list(data.batches(0)))
    return lambda: take(trainer, *next(batches))


def compare(comm: ringfold.Communicator, alone: Alone, arguments: Any) -> list[dict[str, Any]]:
    """Run the contest, windows of --steps steps each."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(NUM_COLUMNS, 1)

    batch = batch_of(comm.size)
    mine, whole = Share(batch, comm.rank, comm.size, 0), Share(batch, 0, 1, 0)

    def window(trainer: Trainer, share: Share = mine) -> Any:
        return repeated(stepper(trainer, share), arguments.steps)

    loss = nn.functional.mse_loss
    free = Trainer(ringfold.DataParallel(fresh(), comm), loss)
    step = stepper(free, mine, unsynchronised)
    lined = [
        alone.contender(window(Trainer(fresh(), loss), whole)),
        Contender("no_sync", repeated(step, arguments.steps)),
        Contender("limit", repeated(limited(step, comm, free), arguments.steps)),
        *(
            Contender(
                name,
                window(trainer),
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
                window(ddp),
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
                "batch": batch,
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


def check_ranks(options: Any, num_ranks: int) -> None:
    """Raise UsageError where a rank would have no row."""
    if num_ranks > BATCH:
        raise UsageError(f"{BATCH} rows are shared out over {BATCH} ranks at most, not {num_ranks}")


def main() -> int:
    """Run the benchmark; status 1 where replicas have come to differ."""
    parser = parser_of(__doc__, sizes="", of="bytes of a bucket", peers=True, budget=10.0)
    parser.add_argument("--steps", type=whole(1), default=50, help="in a repetition")
    arguments = read(parser, check_ranks)
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
            title = f"nn.Linear(10, 1), a batch of {batch_of(size)} over {size} ranks"
            plot_bars(arguments.plot, rows, "workload", "steps_per_second", "steps a second", title)
    return verdict(rows, speak=rank == 0)


if __name__ == "__main__":
    raise SystemExit(status_of("linear.py", main))
