"""Train a model on as many ranks as mpirun starts: mpirun -n 4 python train.py --pipe 2

The ranks form a grid: --pipe stages of layers, times replicas of them, each with its share of every
batch.  However the work is split, a step trains on the same samples and comes to the same loss.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import ringfold
from ringfold.workloads import load
from ringfold.workloads.agree import check_equal, settle
from ringfold.workloads.losses import GlobalLosses
from ringfold.workloads.options import Grid, Options, UsageError, grid_of, parse

if TYPE_CHECKING:
    import torch

    from ringfold.workloads.dump import Dump
    from ringfold.workloads.engines import Engine
    from ringfold.workloads.keeper import Keeper
    from ringfold.workloads.workload import Data, Workload


@dataclass(frozen=True)
class Training:
    """Everything that is settled before the first step."""

    options: Options
    grid: Grid
    mesh: ringfold.Mesh
    workload: Workload
    data: Data
    engine: Engine
    whole: list[tuple[str, torch.nn.Parameter]]  # of the unsplit model
    num_steps: int
    optimizer: torch.optim.Optimizer
    losses: GlobalLosses
    keeper: Keeper
    dump: Dump | None
    first_step: int


def main() -> int:
    parsed = attempt(parse)
    try:
        comm = ringfold.Communicator()
    except ringfold.CommError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    with comm:
        try:
            options = settle(comm, parsed)
            check_equal(comm, repr(options), "the options of train.py")
            training = prepare(comm, options)
            run(comm, training)
        except (UsageError, ringfold.CheckpointError) as error:
            if comm.rank == 0:
                print(f"train.py: error: {error}", file=sys.stderr, flush=True)
            comm.barrier()  # the first rank that ends with a failure makes mpirun end the others
            return 2
        except ringfold.NotFinite as error:  # the same on every rank
            if comm.rank == 0:
                print(f"train.py: {error}", file=sys.stderr, flush=True)
            comm.barrier()
            return 1
    return 0


def attempt(parse: Callable[[], Options]) -> Callable[[], Options]:
    """Parse now, so that --help needs no MPI; the result, or its error, is for all ranks later."""
    try:
        options = parse()
    except UsageError as error:
        complaint = error

        def fail() -> Options:
            raise complaint

        return fail
    return lambda: options


def prepare(comm: ringfold.Communicator, options: Options) -> Training:
    """Check and build all there is to.  Collective.  UsageError on every rank alike."""
    grid = settle(comm, lambda: grid_of(options, comm.size))
    workload = settle(comm, lambda: loaded(options.workload))
    import torch

    from ringfold.workloads import devices, engines, report
    from ringfold.workloads.dump import Dump
    from ringfold.workloads.keeper import Keeper
    from ringfold.workloads.workload import Share

    if options.report is not None:
        path = options.report  # rank 0 writes it, and other hosts need not have the folder
        settle(comm, lambda: comm.rank == 0 and report.check_writable(path))
    if options.trace is not None:
        traced = options.trace
        settle(comm, lambda: comm.rank == 0 and report.check_writable(traced))

    device, told = devices.assign(comm, settle(comm, lambda: devices.gpus_for(options)))
    if told and comm.rank == 0:
        print(told)

    # Ranks share the cores: a thread for every core in each of them would only get in the way.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.node.size))

    # A sum may depend on the number of threads that share it.
    if options.reduction == "tree":
        torch.set_num_threads(1)

    # Every rank builds the whole model from the seed, then keeps its part of it: the weights at the
    # start do not depend on the grid.
    torch.manual_seed(options.seed)
    layers = settle(comm, lambda: engines.layers_of(workload, options))
    whole = list(torch.nn.Sequential(*layers).named_parameters())
    settle(comm, lambda: engines.check_stages(layers, grid.stages))
    mesh = ringfold.Mesh(comm, data=grid.data, pipe=grid.pipe)
    share = Share(options.batch_size, mesh.data.rank, mesh.data.size, options.seed)
    data = settle(comm, lambda: workload.data(share))
    check_equal(comm, data.fingerprint, "the data")
    num_steps = settle(comm, lambda: count_steps(options, data))
    engine = engines.make_engine(layers, workload, mesh, options, grid, data, device)
    # An optimizer refuses to have nothing to do, as on a stage of layers without parameters.
    parameters = [p for _, p in engine.named_parameters()] or [torch.nn.Parameter(torch.zeros(0))]
    optimizer = workload.optimizer(parameters, options.lr)
    losses = GlobalLosses(mesh.data)
    dump = settle(comm, lambda: Dump(options.dump, mesh, engine) if options.dump else None)
    keeper = Keeper(comm, options, data, engine, optimizer, losses)
    return Training(
        options,
        grid,
        mesh,
        workload,
        data,
        engine,
        whole,
        num_steps,
        optimizer,
        losses,
        keeper,
        dump,
        first_step=keeper.resume(),
    )


def loaded(name: str) -> Workload:
    """Import the workload and all that training needs, so that what is missing shows now."""
    try:
        import torch  # noqa: F401
        import tqdm  # noqa: F401

        return load(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}: pip install 'ringfold[train]' brings what is needed") from None


def count_steps(options: Options, data: Data) -> int:
    if not data.steps_per_epoch:
        raise UsageError(
            f"--batch-size {options.batch_size} is more than the samples of {options.workload}"
        )
    in_epochs = options.epochs * data.steps_per_epoch
    return in_epochs if options.steps is None else min(options.steps, in_epochs)


def run(comm: ringfold.Communicator, training: Training) -> None:
    """Train, evaluate, report.  Collective."""
    import numpy as np

    from ringfold.workloads.report import Report, weights_sha256, write

    options, grid, data, engine = training.options, training.grid, training.data, training.engine
    if comm.rank == 0:
        print(describe(training), *data.facts, sep="\n", flush=True)
        if training.first_step:
            print(f"going on after step {training.first_step}", flush=True)
    losses, seconds = traced(comm, training) if options.trace else fit(comm, training)
    checkpoints = training.keeper.finish()
    sums = data.evaluate(engine.predict)
    # The last stage alone sees outputs; where every stage does, each sample counts pipe times.
    metric = data.metric(comm.allreduce(sums))
    wire_bytes = int(comm.allreduce(np.array([engine.wire_bytes], np.int64))[0])
    digest = weights_sha256(training.mesh, training.whole, engine.named_parameters())
    if comm.rank == 0:
        steps = training.num_steps - training.first_step
        rate = steps * options.batch_size / seconds
        print(f"{steps} steps in {seconds:.1f} s, {rate:,.0f} samples/s")
        print(*(f"{name}: {value:.4f}" for name, value in metric.items()), sep="\n")
        if checkpoints is not None:
            print(
                f"{checkpoints.count} checkpoints: training stood still for "
                f"{checkpoints.stood_still_seconds:.2f} s, writing took "
                f"{checkpoints.writing_seconds:.2f} s"
            )
        if options.report is not None:
            write(
                options.report,
                Report(
                    workload=options.workload,
                    ranks=comm.size,
                    data=grid.data,
                    pipe=grid.pipe,
                    steps=training.num_steps,
                    seconds=seconds,
                    samples_per_second=rate,
                    losses=losses,
                    final_metric=metric,
                    weights_sha256=digest,
                    wire_bytes=wire_bytes,
                    resumed_at=training.first_step,
                    checkpoints=checkpoints,
                    dump=str(options.dump.absolute()) if options.dump else None,
                ),
            )


def traced(comm: ringfold.Communicator, training: Training) -> tuple[list[float], float]:
    """Fit, and write what every rank did when."""
    with ringfold.trace(comm, training.options.trace) as found:
        result = fit(comm, training)
    if comm.rank == 0:
        print(found, f"timeline: {training.options.trace}", sep="\n")
    return result


def describe(training: Training) -> str:
    options, grid = training.options, training.grid
    split = grid.pipe > 1 or options.reduction == "tree"
    layers = " + ".join(map(str, training.engine.layers_per_stage))
    pipe = f", {options.schedule}, {layers} layers, {grid.microbatches} micro-batches"
    return (
        f"{options.workload}: {grid.data * grid.pipe} ranks as data {grid.data} x pipe {grid.pipe}"
        f"{pipe if split else ''}; {training.num_steps} steps of {options.batch_size} samples"
    )


def fit(comm: ringfold.Communicator, training: Training) -> tuple[list[float], float]:
    """Return the loss of every step's global batch, and the seconds that all steps took."""
    from tqdm import tqdm

    from ringfold.workloads.keeper import batches_from

    options, engine, data = training.options, training.engine, training.data
    engine.begin_at(training.first_step)
    optimizer, losses, first = training.optimizer, training.losses, training.first_step
    bar = tqdm(
        total=training.num_steps * options.batch_size,
        initial=first * options.batch_size,
        disable=comm.rank != 0,
        unit=" samples",
        unit_scale=True,
        ncols=100,
    )
    comm.barrier()
    start = time.perf_counter()
    batches = islice(batches_from(data, first), max(training.num_steps - first, 0))
    with bar:
        for step, (x, y) in enumerate(batches, first):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * training.workload.decay(step / training.num_steps)
            optimizer.zero_grad()
            losses.add(engine.step(x, y))
            optimizer.step()
            if losses.known:
                bar.set_postfix_str(f"loss {losses.known[-1]:.4f}", refresh=False)
            bar.update(options.batch_size)
            training.keeper.after(step + 1, last=step + 1 == training.num_steps)
            if training.dump is not None:
                training.dump.after(step + 1)
        losses.flush()
    return losses.known, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
