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
from typing import TYPE_CHECKING, Any

import numpy as np

import ringfold
from ringfold.workloads import load
from ringfold.workloads.agree import check_equal, settle
from ringfold.workloads.command_line import parse
from ringfold.workloads.history import History
from ringfold.workloads.losses import GlobalLosses
from ringfold.workloads.options import Grid, Options, UsageError, grid_of, grid_of_some
from ringfold.workloads.worlds import Left, Planned, open_world

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ringfold.workloads.dump import Dump
    from ringfold.workloads.engines import Engine
    from ringfold.workloads.keeper import Keeper
    from ringfold.workloads.report import Report
    from ringfold.workloads.workload import Data, Workload
    from ringfold.workloads.worlds import World


@dataclass
class Training:
    """What one set of ranks trains with, and how far it has come.

    Without a crew this rank is a spare: it waits until another rank dies.
    origin: what this was made of, until a step has counted. Where a rank dies before, that is dealt
        out again: what the dead one had been given of it would be lost else, and ranks that had not
        all got as far would bring unlike things.
    """

    options: Options
    grid: Grid
    history: History
    crew: Crew | None
    first_step: int = 0
    done: int = 0
    origin: Training | None = None


@dataclass(frozen=True)
class Crew:
    """All that a rank needs to train; `team` is the ranks that do."""

    team: ringfold.Communicator
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


def main() -> int:
    parsed, options = attempt(parse)
    try:
        world = open_world(options)
    except ringfold.CommError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    try:
        training = join(world, parsed()) if world.joined else begin(world, parsed)
        run(world, training)
    except (UsageError, ringfold.CheckpointError) as error:
        if world.comm.rank == 0:
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        world.comm.barrier()  # the first rank that ends with a failure makes mpirun end the others
        status = 2
    except ringfold.NotFinite as error:  # the same on every rank
        if world.comm.rank == 0:
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        world.comm.barrier()
        status = 1
    except Left as left:
        print(left, flush=True)
        return 0
    else:
        status = 0
    world.close()
    return status


def attempt(parse: Callable[[], Options]) -> tuple[Callable[[], Options], Options | None]:
    """Parse now, so that --help needs no MPI; the result, or its error, is for all ranks later."""
    try:
        options = parse()
    except UsageError as error:
        complaint = error

        def fail() -> Options:
            raise complaint

        return fail, None
    return lambda: options, options


def begin(world: World, parsed: Callable[[], Options]) -> Training:
    """Check and build all there is to.  Collective.  UsageError on every rank alike."""
    comm = world.comm
    options = settle(comm, parsed)
    check_equal(comm, repr(options), "the options of train.py")
    grid = settle(comm, lambda: grid_of(options, comm.size))
    settle(comm, lambda: loaded(options.workload))
    from ringfold.workloads import report

    if options.report is not None:
        path = options.report  # rank 0 writes it, and other hosts need not have the folder
        settle(comm, lambda: comm.rank == 0 and report.check_writable(path))
    if options.trace is not None:
        timeline = options.trace
        settle(comm, lambda: comm.rank == 0 and report.check_writable(timeline))
    crew = muster(comm, options, grid, again=False)
    first = crew.keeper.resume()
    return Training(options, grid, History.begin(comm), crew, first, first)


def muster(comm: ringfold.Communicator, options: Options, grid: Grid, again: bool) -> Crew:
    """Build what the ranks of `comm`, all of them, train with.  Collective.

    again: the run is under way, and will bring its state.
    """
    import torch

    from ringfold.workloads import devices, engines
    from ringfold.workloads.dump import Dump
    from ringfold.workloads.keeper import Keeper
    from ringfold.workloads.workload import Share

    workload = settle(comm, lambda: loaded(options.workload))
    device, told = devices.assign(comm, settle(comm, lambda: devices.gpus_for(options)))
    if told and comm.rank == 0:
        print(told)
    # Ranks share the cores: a thread for every core in each of them would only get in the way.
    # Later on they keep their threads: a sum may depend on the number of threads that share it.
    if "OMP_NUM_THREADS" not in os.environ and not again:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // comm.node.size))
    if options.reduction == "tree":
        torch.set_num_threads(1)

    # Every rank builds the whole model from the seed, then keeps its part of it: the weights at the
    # start do not depend on the grid.
    streams = torch.get_rng_state()
    torch.manual_seed(options.seed)
    layers = settle(comm, lambda: engines.layers_of(workload, options))
    if again:
        torch.set_rng_state(streams)
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
    # What a rank has not told the others yet would be lost with it.
    losses = GlobalLosses(mesh.data, every=1) if options.uneven else GlobalLosses(mesh.data)
    folder = options.dump
    dump = settle(comm, lambda: Dump(folder, mesh, engine, again) if folder else None)
    keeper = Keeper(comm, options, data, engine, optimizer, losses)
    return Crew(
        comm, mesh, workload, data, engine, whole, num_steps, optimizer, losses, keeper, dump
    )


def go_on(world: World, before: Training) -> Training:
    """Go on after PeerLost with the ranks that there are then.  Collective."""
    since = time.perf_counter()
    if before.crew is not None:
        before.crew.keeper.let_go(all_live=isinstance(world, Planned))
        before.crew.engine.go_back()
    if before.origin is not None:
        before = before.origin
    while True:
        loss = world.recover(before.done)
        before.history.lose(loss, before.done, since, planned=isinstance(world, Planned))
        try:
            return assemble(world, before, loss.joined)
        except ringfold.PeerLost:
            continue  # one more has died


def join(world: World, options: Options) -> Training:
    """Come into a run that is under way.  Collective with `go_on` of the others."""
    grid = grid_of_some(options, world.comm.size)
    return assemble(world, Training(options, grid, History(), None, done=-1), world.newcomers)


def assemble(world: World, before: Training, joined: int) -> Training:
    """Split the run anew over the ranks that there are, and bring its state to them.  Collective.

    CheckpointError on all ranks where what a dead rank held is nowhere else.
    """
    import torch

    from ringfold.parallel.checkpoint.handover import hand_over

    comm, options, old, history = world.comm, before.options, before.crew, before.history
    grid = settle(comm, lambda: grid_of_some(options, comm.size))
    busy = grid.data * grid.pipe
    done = int(comm.allgather(np.array([before.done])).max())
    history.share(comm, done, joined)
    if comm.rank == 0:
        news = "; ".join(history.news())
        print(f"{news}: going on as data {grid.data} x pipe {grid.pipe}", file=sys.stderr)
    team = comm if busy == comm.size else comm.split(0 if comm.rank < busy else None, comm.rank)
    new: dict[str, Any] = {}
    crew = None
    if team is not None:
        crew = muster(team, options, grid, again=True)
        new = {"model": crew.engine.state, "optimizer": crew.optimizer, "losses": None}
    held: dict[str, Any] = {}
    if old is not None:
        losses = torch.tensor(old.losses.known[:done], dtype=torch.float64)
        held = {"model": old.engine.state, "optimizer": old.optimizer, "losses": losses}
    try:
        values = hand_over(comm, held, new)
    except ringfold.CheckpointError as error:
        done = fall_back(comm, crew, error)
        history.fell_back(done)
    else:
        if crew is not None:
            crew.losses.known[:] = values["losses"].tolist()
    if crew is not None:
        crew.engine.begin_at(done)
        if old is not None:
            crew.keeper.follow(old.keeper)
            crew.engine.wire_bytes = old.engine.wire_bytes
    return Training(options, grid, history, crew, before.first_step, done, origin=before)


def fall_back(
    comm: ringfold.Communicator, crew: Crew | None, error: ringfold.CheckpointError
) -> int:
    """Return the step of the newest checkpoint, after loading it.  Collective.

    CheckpointError on all ranks where there is none.
    """
    from ringfold.parallel.checkpoint.agreement import agree

    step = -1
    complaint = ""
    if crew is not None:
        try:
            step = crew.keeper.reload()
        except ringfold.CheckpointError as lacking:
            complaint = f"{error}; {lacking}"
    agree(comm, complaint, "going on without a rank")
    return int(comm.allgather(np.array([step])).max())


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


def run(world: World, training: Training) -> None:
    """Train, evaluate, report, whatever becomes of other ranks.  Collective."""
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
            break
        except ringfold.PeerLost:
            if not world.survives:
                raise
            training = go_on(world, training)


def tell(training: Training, found: Report) -> None:
    """Print what a run came to, and write its report."""
    from ringfold.workloads.report import write

    print(*summary(training, found), sep="\n", flush=True)
    if training.options.report is not None:
        write(training.options.report, found)


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
    """Fit, and write what every rank did when."""
    with ringfold.trace(crew.team, path) as found:
        fit(world, training, crew)
    if crew.team.rank == 0:
        print(found, f"timeline: {path}", sep="\n")


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
        disable=crew.team.rank != 0,
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
    sys.exit(main())
