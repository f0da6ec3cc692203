"""How far a run has come, and how it goes on when ranks die or join."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comm.errors import PeerLost
from .agree import settle
from .crew import Crew, muster
from .history import History
from .options import Grid, Options, grid_of_some
from .worlds import Planned

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..parallel.checkpoint.errors import CheckpointError
    from .worlds import World


@dataclass
class Training:
    """What one set of ranks trains with, and how far it has come.

    Without a crew this rank is a spare: it waits until another rank dies.
    origin: what this was made of, until a step has counted. Where a rank dies before, that is dealt
        out again: what the dead one had been given of it would be lost else, and ranks that had not
        all got as far would bring unlike things.
    unwritten: whether a file that was asked for could not be written, as has been said.
    """

    options: Options
    grid: Grid
    history: History
    crew: Crew | None
    first_step: int = 0
    done: int = 0
    origin: Training | None = None
    unwritten: bool = False


def team_of(comm: Communicator, grid: Grid) -> Communicator | None:
    """Return the ranks that train, as many as the grid has; None on those to spare.  Collective."""
    busy = grid.data * grid.pipe
    return comm if busy == comm.size else comm.split(0 if comm.rank < busy else None, comm.rank)


def go_on(world: World, before: Training) -> Training:
    """Go on after PeerLost with the ranks that there are then.  Collective."""
    since = time.perf_counter()
    if before.crew is not None:
        before.crew.keeper.let_go(all_live=isinstance(world, Planned))
        before.crew.engine.go_back()
    if before.origin is not None:
        before = before.origin
    recover(world, before, since)
    return assemble_at_last(world, before, since)


def join(world: World, options: Options) -> Training:
    """Come into a run that is under way.  Collective with `go_on` of the others."""
    since = time.perf_counter()
    grid = grid_of_some(options, world.comm.size)
    before = Training(options, grid, History(since), None, done=-1)
    return assemble_at_last(world, before, since)


def recover(world: World, before: Training, since: float) -> None:
    """Let go of ranks that have died, as was known `since` then.  Collective."""
    loss = world.recover(before.done)
    before.history.lose(loss, before.done, since, planned=isinstance(world, Planned))


def assemble_at_last(world: World, before: Training, since: float) -> Training:
    """Assemble, and recover and begin again where one more dies meanwhile.  Collective."""
    while True:
        try:
            return assemble(world, before)
        except PeerLost:
            recover(world, before, since)


def assemble(world: World, before: Training) -> Training:
    """Split the run anew over the ranks that there are, and bring its state to them.  Collective.

    CheckpointError on all ranks where what a dead rank held is nowhere else.
    """
    import torch

    from ..parallel.checkpoint.errors import CheckpointError
    from ..parallel.checkpoint.handover import hand_over

    comm, options, old, history = world.comm, before.options, before.crew, before.history
    grid = settle(comm, lambda: grid_of_some(options, comm.size))
    done = int(comm.allgather(np.array([before.done])).max())
    history.share(comm, done)
    if comm.rank == 0:
        news = "; ".join(history.news())
        print(f"{news}: going on as data {grid.data} x pipe {grid.pipe}", file=sys.stderr)
    team = team_of(comm, grid)
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
    except CheckpointError as error:
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


def fall_back(comm: Communicator, crew: Crew | None, error: CheckpointError) -> int:
    """Return the step of the newest checkpoint, after loading it.  Collective.

    CheckpointError on all ranks where there is none.
    """
    from ..parallel.checkpoint.agreement import agree
    from ..parallel.checkpoint.errors import CheckpointError

    step = -1
    complaint = ""
    if crew is not None:
        try:
            step = crew.keeper.reload()
        except CheckpointError as lacking:
            complaint = f"{error}; {lacking}"
    agree(comm, complaint, "going on without a rank")
    return int(comm.allgather(np.array([step])).max())
