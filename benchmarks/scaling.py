"""The workload text on every grid of data x pipe that the ranks allow, beside one process alone.

    mpirun -n 4 python benchmarks/scaling.py [--batch 32] [--json FILE] [--plot FILE]

The global batch stays the same: forward, backward and reduction of one batch, without the
optimizer's step.  Every grid has to come to the loss of the unsplit model; one whose replicas
cannot share the batch evenly is left out.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from harness import Contender, contest, table, verdict, write_json
from options import parser_of, read
from plots import plot_bars
from torch import nn
from training import Alone

import ringfold
from ringfold.output import status_of
from ringfold.parallel import PLANS
from ringfold.parallel.plan import whole_plan
from ringfold.parallel.plan_check import check_plan, num_stages_of
from ringfold.workloads import text
from ringfold.workloads.numbers import whole
from ringfold.workloads.options import UsageError
from ringfold.workloads.workload import Share


def grids(size: int, batch: int) -> list[tuple[int, int]]:
    """Return every (data, pipe) of so many ranks that the layers and the batch allow.

    Replicas with unequal shares would neither train on the whole batch nor weigh its rows alike.
    """
    layers = len(text.layers())
    splits = [(size // pipe, pipe) for pipe in range(1, min(size, layers) + 1) if size % pipe == 0]
    return [(data, pipe) for data, pipe in splits if batch % data == 0]


def fresh() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*text.layers())


def first_batch(batch: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one replica's part of the first global batch."""
    return next(text.Text(Share(batch, rank, size, 0)).batches(0))


def contender(
    comm: ringfold.Communicator, mesh: ringfold.Mesh, arguments: argparse.Namespace, right: float
) -> Contender:
    """Line up one grid."""
    data, pipe = mesh.shape
    x, y = first_batch(arguments.batch, mesh.data.rank, data)
    name = f"{data} x {pipe}"

    def wrong(loss: float) -> int:
        mean = float(comm.allreduce(torch.tensor([loss], dtype=torch.float64), "mean"))
        return int(abs(mean - right) > 1e-4 * abs(right))

    if pipe > 1:
        engine = ringfold.Pipeline(
            fresh(),
            mesh,
            loss_fn=text.loss,
            microbatches=arguments.microbatches,
            schedule=arguments.schedule,
        )
        run = lambda: float(engine.step(x, y))  # noqa: E731
        return Contender("ours", run, engine.zero_grad, wrong=wrong, algorithm=name)
    model = ringfold.DataParallel(fresh(), mesh.data)

    def step() -> float:
        loss = text.loss(model(x), y)
        loss.backward()
        return float(loss.detach())

    return Contender("ours", step, model.zero_grad, wrong=wrong, algorithm=name)


def compare(
    comm: ringfold.Communicator, alone: Alone, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run the contest of all grids."""
    model = fresh()
    x, y = first_batch(arguments.batch, 0, 1)
    right = float(text.loss(model(x), y).detach())

    def single() -> None:
        model.zero_grad()
        text.loss(model(x), y).backward()

    shapes = grids(comm.size, arguments.batch)
    meshes = [ringfold.Mesh(comm, data=data, pipe=pipe) for data, pipe in shapes]
    lined = [alone.contender(single)]
    lined += [contender(comm, mesh, arguments, right) for mesh in meshes]
    outcomes = contest(comm, lined, repeats=arguments.repeats, budget=arguments.budget)
    reference = outcomes[0].timing.median
    rows = []
    for outcome, (data, pipe) in zip(outcomes, [(1, 1), *shapes], strict=True):
        timing = outcome.timing
        rows.append(
            {
                "impl": outcome.contender.impl,
                "workload": "text",
                "grid": f"{data} x {pipe}",
                "data": data,
                "pipe": pipe,
                "ranks": comm.size,
                "batch": arguments.batch,
                "median_us": timing.median * 1e6,
                "p99_us": timing.p99 * 1e6,
                "tokens_per_second": y.numel() / timing.median,
                "speedup": reference / timing.median,
                "efficiency": reference / timing.median / (data * pipe),
                "wrong": outcome.wrong,
                "repeats": timing.repeats,
            }
        )
    for mesh in meshes:
        mesh.close()
    return rows


COLUMNS = {
    "impl": "s",
    "data": "d",
    "pipe": "d",
    "batch": "d",
    "median_us": ".0f",
    "p99_us": ".0f",
    "tokens_per_second": ".0f",
    "speedup": ".2f",
    "efficiency": ".2f",
    "wrong": "d",
}


def check_grids(options: argparse.Namespace, num_ranks: int) -> None:
    """Raise UsageError where no grid can be measured, or a plan refuses the micro-batches."""
    found = grids(num_ranks, options.batch)
    if not found:
        raise UsageError(
            f"--batch {options.batch}: no grid of {num_ranks} ranks shares that out evenly"
        )
    for _, pipe in found:
        if pipe > 1:
            check_schedule(options.schedule, pipe, options.microbatches)


def check_schedule(name: str, pipe: int, microbatches: int) -> None:
    """Raise UsageError where the plan refuses the micro-batches, or the layers are too few."""
    try:
        plan = whole_plan(PLANS[name], pipe, microbatches)
        check_plan(plan, microbatches)
    except ValueError as error:  # PlanError is one
        raise UsageError(f"--schedule {name}: {error}") from None
    stages, layers = num_stages_of(plan), len(text.layers())
    if stages > layers:
        raise UsageError(f"--schedule {name}: {layers} layers are too few for {stages} stages")


def main() -> int:
    """Run the benchmark; status 1 where a grid came to another loss."""
    parser = parser_of(__doc__, budget=20.0)
    parser.add_argument("--batch", type=whole(1), default=32, help="the global one, in samples")
    parser.add_argument("--microbatches", type=whole(1), default=8)
    parser.add_argument("--schedule", choices=list(PLANS), default="1f1b")
    arguments = read(parser, check_grids)
    torch.set_num_threads(1)
    with ringfold.Communicator() as comm:
        alone = Alone(comm)
        rows = compare(comm, alone, arguments)
        alone.close()
        rank, size = comm.rank, comm.size
    if rank == 0:
        print("measured; forward, backward and reduction of one batch, one thread a rank")
        print(table(rows, COLUMNS))
        if arguments.json:
            write_json(arguments.json, "scaling", rows)
        if arguments.plot:
            title = f"workload text, batch {arguments.batch}, on {size} ranks as data x pipe"
            label = "bytes of text a second"
            plot_bars(arguments.plot, rows, "grid", "tokens_per_second", label, title)
    return verdict(rows, speak=rank == 0)


if __name__ == "__main__":
    raise SystemExit(status_of("scaling.py", main))
