"""The options of train.py, and what must hold between them; no torch, no MPI."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..parallel.plan import PLANS, PlanFunction, plan_function, whole_plan
from ..parallel.plan_check import PlanError, check_plan, num_stages_of
from ..parallel.plan_text import parse_plan

__all__ = [
    "Grid",
    "Options",
    "UsageError",
    "check_membership",
    "grid_of",
    "grid_of_some",
    "needs_stages",
    "plan_of",
    "written_plan",
]

TREE_MICROBATCHES = 8


class UsageError(ValueError):
    """Say which option is wrong; train.py ends with status 2 on every rank."""


@dataclass(frozen=True)
class Options:
    """Hold the command line; None where the default depends on the ranks or the workload."""

    workload: str
    data: int | None
    pipe: int
    schedule: str
    stages_per_rank: int | None
    recompute: bool
    microbatches: int | None
    epochs: int
    steps: int | None
    batch_size: int
    lr: float
    seed: int
    bucket_mb: float
    wire: str | None
    reduction: str
    balance: str
    dropout: float
    report: Path | None
    dump: Path | None
    trace: Path | None
    check_finite: bool
    checkpoint: Path | None
    every: int
    keep: int
    resume: bool
    device: str
    elastic: str | None
    membership: tuple[tuple[int, int], ...]

    @property
    def uneven(self) -> bool:
        """Tell whether data ranks may have unequal shares of a batch."""
        return self.elastic is not None or bool(self.membership)


@dataclass(frozen=True)
class Grid:
    """Say how ranks and global batch are split: data x pipe ranks, micro-batches per step.

    stages: of layers, over the pipe ranks.
    """

    data: int
    pipe: int
    microbatches: int
    stages: int = 1


def grid_of(options: Options, num_ranks: int) -> Grid:
    """Split num_ranks ranks and the global batch as the options say, or raise UsageError."""
    grid = _grid_of(options, num_ranks)
    in_tree = options.reduction == "tree"
    try:
        function = plan_of(options)
        if grid.pipe == 1 and not in_tree and not needs_stages(options):
            return grid
        microbatches = grid.microbatches // grid.data if in_tree else grid.microbatches
        plan = whole_plan(function, grid.pipe, microbatches)
        check_plan(plan, microbatches)
    except PlanError as error:
        raise UsageError(f"--schedule {options.schedule}: {error}") from None
    except ValueError as error:
        raise UsageError(f"--stages-per-rank: {error}") from None
    return replace(grid, stages=num_stages_of(plan))


def needs_stages(options: Options) -> bool:
    """Tell whether a single rank, too, is to train as a pipeline."""
    several = options.stages_per_rank is not None and options.stages_per_rank > 1
    return several or options.recompute


def grid_of_some(options: Options, num_ranks: int) -> Grid:
    """Split what is left of a run's ranks: as many as fit the pipe and the batch, the first ones.

    The pipe keeps its stages as long as there are ranks for them; the others are spare.
    """
    pipe = min(options.pipe, num_ranks)
    data = min(num_ranks // pipe, options.batch_size)
    if options.reduction == "tree":
        microbatches = options.microbatches or TREE_MICROBATCHES
        data = _largest_divisor(microbatches, at_most=data)
    return grid_of(replace(options, data=data, pipe=pipe), data * pipe)


def check_membership(options: Options, num_ranks: int) -> None:
    """Raise UsageError unless --membership lets ranks that there are leave once, and not all."""
    leaving = [rank for rank, _ in options.membership]
    for rank in leaving:
        if rank >= num_ranks:
            raise UsageError(
                f"--membership: there is no rank {rank}, this job has ranks 0 to {num_ranks - 1}"
            )
        if leaving.count(rank) > 1:
            raise UsageError(f"--membership: rank {rank} can leave only once")
    if len(leaving) == num_ranks:
        raise UsageError(f"--membership: all {num_ranks} ranks leave, and nobody ends the run")


def _grid_of(options: Options, num_ranks: int) -> Grid:
    pipe = options.pipe
    if options.data is None and num_ranks % pipe:
        raise UsageError(f"--pipe {pipe} does not divide the {num_ranks} ranks of this job")
    data = num_ranks // pipe if options.data is None else options.data
    if data * pipe != num_ranks:
        raise UsageError(
            f"--data {data} times --pipe {pipe} makes {data * pipe} ranks, but this job has"
            f" {num_ranks}: start it by mpirun -n {data * pipe}, or change the split"
        )
    if options.batch_size < data or (options.batch_size % data and not options.uneven):
        raise UsageError(
            f"--batch-size {options.batch_size}, the global batch, is not divisible by the {data}"
            " data ranks"
        )
    if options.reduction == "tree":
        return Grid(data, pipe, _microbatches_of_all(options, data))
    share = options.batch_size // data
    microbatches = options.microbatches
    if microbatches is None:
        microbatches = _largest_divisor(share, at_most=2 * pipe) if pipe > 1 else 1
    if share % microbatches and not options.uneven:
        raise UsageError(
            f"--microbatches {microbatches} does not divide the {share} samples that each data rank"
            f" holds of a global batch of {options.batch_size}"
        )
    return Grid(data, pipe, microbatches)


def _microbatches_of_all(options: Options, data: int) -> int:
    """Return the micro-batches of the global batch, which must not depend on the grid."""
    microbatches = options.microbatches or TREE_MICROBATCHES
    if options.batch_size % microbatches or microbatches % data:
        raise UsageError(
            f"--reduction tree: the {microbatches} micro-batches of a global batch must divide its"
            f" {options.batch_size} samples, and be divisible by the {data} data ranks"
        )
    return microbatches


def _largest_divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, min(number, at_most) + 1) if number % d == 0)


def plan_of(options: Options) -> PlanFunction:
    """Return the plan that the options name, or that is written in the file they name."""
    named = options.schedule in PLANS
    return plan_function(
        options.schedule if named else written_plan(options.schedule), options.stages_per_rank
    )


def written_plan(path: str) -> PlanFunction:
    """Return the plan that is written in a file; ValueError for what is none."""
    return parse_plan(Path(path).read_text())
