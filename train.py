"""Train a model on as many ranks as mpirun starts: mpirun -n 4 python train.py --pipe 2

The ranks form a grid: --pipe stages of layers, times replicas of them, each with its share of every
batch.  However the work is split, a step trains on the same samples and comes to the same loss.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

import ringfold
from ringfold.output import status_of
from ringfold.workloads.agree import check_equal, settle
from ringfold.workloads.command_line import parse
from ringfold.workloads.crew import Crew, loaded, muster
from ringfold.workloads.history import History
from ringfold.workloads.losses import check_metric
from ringfold.workloads.options import (
    Options,
    UsageError,
    check_membership,
    grid_of,
    grid_of_some,
)
from ringfold.workloads.parsing import attempt
from ringfold.workloads.training import Training, go_on, join, team_of
from ringfold.workloads.worlds import NOT_BEGUN, Left, open_world

if TYPE_CHECKING:
    from pathlib import Path

    from ringfold.comm.communicator import Communicator
    from ringfold.workloads.options import Grid
    from ringfold.workloads.report import Report
    from ringfold.workloads.worlds import World


def main() -> int:
    parsed, options = attempt(parse)
    try:
        world = open_world(options)
    except ringfold.CommError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    try:
        training = join(world, parsed()) if world.joined else begin_with_the_living(world, parsed)
        status = run(world, training)
    except (UsageError, ringfold.CheckpointError) as error:
        if world.comm.rank == 0:
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        world.comm.barrier()  # the first rank that ends with a failure makes mpirun end the others
        status = 2
    except FloatingPointError as error:  # of gradients or the loss; the same on every rank
        if world.comm.rank == 0:
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        world.comm.barrier()
        status = 1
    except Left as left:
        print(left, flush=True)
        return 0
    world.close()
    return status


def begin_with_the_living(world: World, parsed: Callable[[], Options]) -> Training:
    """Begin, and begin anew where a rank dies before all have; see `begin`.  Collective."""
    fewer = world.newcomers > 0
    while True:
        try:
            training = begin(world, parsed, fewer)
            world.commit()
        except ringfold.PeerLost:
            if not world.survives:
                raise
        else:
            return training
        size, fewer = world.recover(NOT_BEGUN).size, True
        if world.comm.rank == 0:
            print(f"a rank has died before the first step: beginning on {size}", file=sys.stderr)


def begin(world: World, parsed: Callable[[], Options], fewer: bool) -> Training:
    """Check and build all there is to.  Collective.  UsageError on every rank alike.

    fewer: ranks have died, so that the options need not fit those that there are.
    """
    comm = world.comm
    options = settle(comm, parsed)
    check_equal(comm, repr(options), "the options of train.py")
    grid = settle(comm, lambda: (grid_of_some if fewer else grid_of)(options, comm.size))
    settle(comm, lambda: check_membership(options, comm.size))
    settle(comm, lambda: loaded(options.workload))
    from ringfold.workloads import report

    files = {"--report": options.report, "--trace": options.trace}
    # Rank 0 writes them, and other hosts need not have the folder.
    settle(comm, lambda: comm.rank == 0 and report.check_writable(files))
    team = team_of(comm, grid)
    crew, first = settle(comm, lambda: crew_and_step(team, options, grid))
    first = int(comm.allgather(np.array([first])).max())
    return Training(options, grid, History.begin(comm), crew, first, first)


def crew_and_step(
    team: Communicator | None, options: Options, grid: Grid
) -> tuple[Crew | None, int]:
    """Build what a rank of the team trains with, and return how many steps are done.  Collective.

    Nothing for a spare rank, which is in no team.
    """
    if team is None:
        return None, 0
    crew = muster(team, options, grid, again=False)
    first = crew.keeper.resume()
    if first > crew.num_steps:
        raise UsageError(
            f"--resume: the newest checkpoint in {options.checkpoint} is of step {first}, but this "
            f"run is to have {crew.num_steps} steps"
        )
    return crew, first


def run(world: World, training: Training) -> int:
    """Train, evaluate, report, whatever becomes of other ranks; return the status.  Collective."""
    if world.comm.rank == 0:
        print(describe(training), flush=True)
        if training.crew is not None:
            print(*training.crew.data.facts, sep="\n", flush=True)
        if training.first_step:
            print(f"going on after step {training.first_step}", flush=True)
    start = time.perf_counter()
    while True:
        try:
            if training.crew is not None:
                found = life(world, training, training.crew, start)
                if world.comm.rank == 0:  # before all agree to end: others do it if it dies here
                    tell(training, found)
            while not world.finished():
                pass
            return int(training.unwritten)
        except ringfold.PeerLost:
            if not world.survives:
                raise
            training = go_on(world, training)


def tell(training: Training, found: Report) -> None:
    """Print what a run came to, and write its report."""
    from ringfold.workloads.report import write

    print(*summary(training, found), sep="\n", flush=True)
    path = training.options.report
    if path is not None:
        try:
            write(path, found)
        except OSError as error:
            lack(training, f"cannot write the report: {path}: {error.strerror}")


def lack(training: Training, what: str) -> None:
    """Say what file the run will lack, which goes on without it and ends with a failure."""
    training.unwritten = True
    print(f"train.py: error: {what}", file=sys.stderr, flush=True)


def life(world: World, training: Training, crew: Crew, start: float) -> Report:
    """Train to the end with the ranks that there are, and return what to report.  Collective."""
    from ringfold.workloads.report import Report, weights_sha256

    options, grid, data, engine = training.options, training.grid, crew.data, crew.engine
    if options.trace is not None:
        traced(options.trace, world, training, crew)
    else:
        fit(world, training, crew)
    seconds = time.perf_counter() - start
    checkpoints = crew.keeper.finish()
    sums = data.evaluate(engine.predict)
    # The last stage alone sees outputs; where every stage does, each sample counts pipe times.
    metric = data.metric(crew.team.allreduce(sums))
    check_metric(metric)
    wire_bytes = int(crew.team.allreduce(np.array([engine.wire_bytes], np.int64))[0])
    digest = weights_sha256(crew.mesh, crew.whole, engine.named_parameters())
    training.history.went_on()
    steps = crew.num_steps - training.first_step
    return Report(
        workload=options.workload,
        ranks=world.comm.size,
        data=grid.data,
        pipe=grid.pipe,
        steps=crew.num_steps,
        seconds=seconds,
        samples_per_second=steps * options.batch_size / seconds,
        losses=crew.losses.known,
        final_metric=metric,
        weights_sha256=digest,
        wire_bytes=wire_bytes,
        resumed_at=training.first_step,
        checkpoints=checkpoints,
        dump=str(options.dump.absolute()) if options.dump else None,
        events=training.history.events,
    )


def summary(training: Training, found: Report) -> list[str]:
    """Return the lines that end a run."""
    steps = found.steps - found.resumed_at
    lines = [f"{steps} steps in {found.seconds:.1f} s, {found.samples_per_second:,.0f} samples/s"]
    lines += [f"{name}: {value:.4f}" for name, value in found.final_metric.items()]
    if found.checkpoints is not None:
        lines.append(
            f"{found.checkpoints.count} checkpoints: training stood still for "
            f"{found.checkpoints.stood_still_seconds:.2f} s, writing took "
            f"{found.checkpoints.writing_seconds:.2f} s"
        )
    return lines + training.history.lines()


def traced(path: Path, world: World, training: Training, crew: Crew) -> None:
    """Fit, and write what every rank did when; without that file the run goes on."""
    fitted, lacking = False, ""
    try:
        with ringfold.trace(crew.team, path) as found:
            fit(world, training, crew)
            fitted = True
    except OSError as error:
        if not fitted or isinstance(error, ringfold.CommError):
            raise
        lacking = str(error)
    if crew.team.rank == 0:
        print(found, flush=True)
        if lacking:
            lack(training, lacking)
        else:
            print(f"timeline: {path}")


def describe(training: Training) -> str:
    options, grid, crew = training.options, training.grid, training.crew
    split = grid.pipe > 1 or options.reduction == "tree"
    pipe = steps = ""
    if crew is not None:
        layers = " + ".join(map(str, crew.engine.layers_per_stage))
        pipe = f", {options.schedule}, {layers} layers, {grid.microbatches} micro-batches"
        steps = f"; {crew.num_steps} steps of {options.batch_size} samples"
    return (
        f"{options.workload}: {grid.data * grid.pipe} ranks as data {grid.data} x pipe {grid.pipe}"
        f"{pipe if split else ''}{steps}"
    )


def fit(world: World, training: Training, crew: Crew) -> None:
    """Train the steps that are left."""
    from tqdm import tqdm

    from ringfold.workloads.keeper import batches_from

    options, engine, first = training.options, crew.engine, training.done
    optimizer, losses = crew.optimizer, crew.losses
    engine.begin_at(first)
    bar = tqdm(
        total=crew.num_steps * options.batch_size,
        initial=first * options.batch_size,
        disable=crew.team.rank != 0 or sys.stderr is None,  # as a shell's 2>&- has it
        unit=" samples",
        unit_scale=True,
        ncols=100,
    )
    crew.team.barrier()
    batches = islice(batches_from(crew.data, first), max(crew.num_steps - first, 0))
    with bar:
        for step, (x, y) in enumerate(batches, first):
            world.begin(step)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * crew.workload.decay(step / crew.num_steps)
            optimizer.zero_grad()
            losses.add(engine.step(x, y))
            world.commit()
            engine.commit()
            training.origin = None
            optimizer.step()
            training.done = step + 1
            training.history.went_on()
            if losses.known:
                bar.set_postfix_str(f"loss {losses.known[-1]:.4f}", refresh=False)
            bar.update(options.batch_size)
            crew.keeper.after(step + 1, last=step + 1 == crew.num_steps)
            if crew.dump is not None:
                crew.dump.after(step + 1)
        losses.flush()
        if first < crew.num_steps or training.history.events:
            # A rank may have died while the last checkpoint was written.
            crew.keeper.after(crew.num_steps, last=True)


if __name__ == "__main__":
    sys.exit(status_of("train.py", main))
