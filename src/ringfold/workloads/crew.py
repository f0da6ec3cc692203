"""What the ranks that train are made of: model, data, engine, optimizer, and what keeps them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..comm.settings import names_threads
from . import load
from .agree import check_equal, settle
from .losses import GlobalLosses
from .options import Grid, Options, UsageError

if TYPE_CHECKING:
    import torch

    from ..comm.communicator import Communicator
    from ..parallel.mesh import Mesh
    from .dump import Dump
    from .engines import Engine
    from .keeper import Keeper
    from .workload import Data, Workload


@dataclass(frozen=True)
class Crew:
    """All that a rank needs to train; `team` is the ranks that do."""

    team: Communicator
    mesh: Mesh
    workload: Workload
    data: Data
    engine: Engine
    whole: list[tuple[str, torch.nn.Parameter]]  # of the unsplit model
    num_steps: int
    optimizer: torch.optim.Optimizer
    losses: GlobalLosses
    keeper: Keeper
    dump: Dump | None


def muster(comm: Communicator, options: Options, grid: Grid, again: bool) -> Crew:
    """Build what the ranks of `comm`, all of them, train with.  Collective.

    again: the run is under way, and will bring its state.
    """
    import torch

    from ..parallel.mesh import Mesh
    from . import devices, engines
    from .dump import Dump
    from .keeper import Keeper
    from .workload import Share

    workload = settle(comm, lambda: loaded(options.workload))
    device, told = devices.assign(comm, settle(comm, lambda: devices.gpus_for(options)))
    if told and comm.rank == 0:
        print(told)
    # Ranks share the cores: a thread for every core in each of them would only get in the way.
    # Later on they keep their threads: a sum may depend on the number of threads that share it.
    if not names_threads() and not again:
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
    mesh = Mesh(comm, data=grid.data, pipe=grid.pipe)
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
