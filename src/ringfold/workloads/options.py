"""The options of train.py, and what must hold between them; no torch, no MPI."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from ..parallel.plan import PLANS, PlanFunction, plan_function, whole_plan
from ..parallel.plan_check import PlanError, check_plan, num_stages_of
from ..parallel.plan_text import parse_plan
from . import WORKLOADS

__all__ = [
    "Grid",
    "Options",
    "UsageError",
    "grid_of",
    "grid_of_some",
    "needs_stages",
    "parse",
    "plan_of",
]

WIRE_DTYPES = ("fp32", "bf16", "fp16")
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


class _Parser(argparse.ArgumentParser):
    """Raise instead of exiting: under mpirun every rank parses, and one is to print."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line; UsageError for what is wrong whatever the number of ranks."""
    found = _parser().parse_args(arguments)
    if found.wire is not None and found.wire_dtype is not None:
        raise UsageError("--wire and --wire-dtype say the same: give one of them")
    if found.checkpoint is None:
        given = [f"--{name}" for name in ("every", "keep", "resume") if getattr(found, name)]
        if given:
            raise UsageError(f"{given[0]} needs --checkpoint DIR")
    if found.reduction == "tree" and (found.wire or found.wire_dtype):
        raise UsageError("--reduction tree adds gradients as they are: leave --wire out")
    if found.elastic is not None and found.membership:
        raise UsageError("--elastic follows what happens, --membership what is planned: take one")
    if found.trace is not None and (found.elastic is not None or found.membership):
        raise UsageError("--trace is of ranks that stay: leave out --elastic and --membership")
    defaults = WORKLOADS[found.workload]
    return Options(
        workload=found.workload,
        data=found.data,
        pipe=found.pipe,
        schedule=found.schedule,
        stages_per_rank=found.stages_per_rank,
        recompute=found.recompute,
        microbatches=found.microbatches,
        epochs=defaults.epochs if found.epochs is None else found.epochs,
        steps=found.steps,
        batch_size=defaults.batch_size if found.batch_size is None else found.batch_size,
        lr=defaults.lr if found.lr is None else found.lr,
        seed=found.seed,
        bucket_mb=found.bucket_mb,
        wire=found.wire_dtype if found.wire is None else found.wire,
        reduction=found.reduction,
        balance=found.balance,
        dropout=found.dropout,
        report=found.report,
        dump=found.dump,
        trace=found.trace,
        check_finite=found.check_finite,
        checkpoint=found.checkpoint,
        every=100 if found.every is None else found.every,
        keep=3 if found.keep is None else found.keep,
        resume=found.resume,
        device=found.device,
        elastic=found.elastic,
        membership=found.membership,
    )


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description="Train a model on the ranks that mpirun starts, split by data, layers or both.",
        epilog="One process alone trains too, without mpirun.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workload",
        choices=list(WORKLOADS),
        default="digits",
        help="; ".join(f"{name}: {found.summary}" for name, found in WORKLOADS.items())
        + " (default: digits)",
    )
    split = parser.add_argument_group("how the work is split")
    split.add_argument(
        "--data", type=_whole(1), metavar="D", help="data ranks (default: ranks / pipe)"
    )
    split.add_argument(
        "--pipe", type=_whole(1), default=1, metavar="P", help="stages of layers (default: 1)"
    )
    split.add_argument(
        "--schedule",
        type=_schedule,
        default="1f1b",
        metavar="PLAN",
        help=f"of the pipe: {', '.join(PLANS)}, or a file with a plan (default: 1f1b)",
    )
    split.add_argument(
        "--stages-per-rank",
        type=_whole(1),
        metavar="V",
        help="stages on each rank of the pipe, of the plan interleaved (default: 2 of it)",
    )
    split.add_argument(
        "--recompute",
        action="store_true",
        help="keep the inputs of stages alone, and compute the rest again for the backward",
    )
    split.add_argument(
        "--microbatches",
        type=_whole(1),
        metavar="M",
        help="parts of a data rank's batch that follow each other through the pipe (default: about"
        " 2 x P)",
    )
    split.add_argument(
        "--reduction",
        choices=("bucket", "tree"),
        default="bucket",
        help="tree: weights that are the same to the last bit for every grid; --microbatches are"
        f" those of the global batch then (default: {TREE_MICROBATCHES})",
    )
    split.add_argument(
        "--balance",
        choices=("parameters", "time", "memory"),
        default="parameters",
        help="what is to be equal over the stages; time and memory are measured on a micro-batch"
        " (default: parameters)",
    )
    train = parser.add_argument_group("training")
    train.add_argument(
        "--dropout",
        type=_probability,
        default=0.0,
        metavar="P",
        help="share of elements dropped, in the workload text (default: 0)",
    )
    train.add_argument(
        "--epochs",
        type=_whole(1),
        help="passes over the data (default: "
        + ", ".join(f"{name} {found.epochs}" for name, found in WORKLOADS.items())
        + ")",
    )
    train.add_argument("--steps", type=_whole(1), help="stop after so many steps at the latest")
    train.add_argument(
        "--batch-size",
        type=_whole(1),
        metavar="B",
        help="samples of the global batch, shared out over the data ranks (default: "
        + ", ".join(f"{name} {found.batch_size}" for name, found in WORKLOADS.items())
        + ")",
    )
    train.add_argument(
        "--lr",
        type=_positive,
        help="learning rate (default: "
        + ", ".join(f"{name} {found.lr}" for name, found in WORKLOADS.items())
        + ")",
    )
    train.add_argument(
        "--seed", type=_whole(0), default=0, help="of weights and order of samples (default: 0)"
    )
    train.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to train; auto: on GPUs where every rank has one and the run can use it, the"
        " ranks of a node going round its GPUs (default: auto)",
    )
    wire = parser.add_argument_group("communication")
    wire.add_argument(
        "--bucket-mb",
        type=_positive,
        default=4.0,
        metavar="MB",
        help="MiB of gradients that are reduced at once (default: 4)",
    )
    wire.add_argument(
        "--wire-dtype",
        choices=WIRE_DTYPES,
        help="type of gradients on the way (default: their own)",
    )
    wire.add_argument(
        "--wire",
        type=_wire,
        metavar="FORMAT",
        help="how gradients travel: a type as above, powersgd:RANK or topk:RATIO",
    )
    train.add_argument(
        "--check-finite",
        action="store_true",
        help="end at the first gradient that is infinite or NaN, and say whose it is",
    )
    store = parser.add_argument_group("checkpoints")
    store.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="write checkpoints into this folder"
    )
    store.add_argument(
        "--every",
        type=_whole(1),
        metavar="N",
        help="after every N steps, and the last (default: 100)",
    )
    store.add_argument(
        "--keep", type=_whole(1), metavar="K", help="keep the newest K of them (default: 3)"
    )
    store.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoint in DIR, on any number of ranks; from the start"
        " if there is none",
    )
    living = parser.add_argument_group("ranks that die")
    living.add_argument(
        "--elastic",
        nargs="?",
        const="shrink",
        choices=("shrink", "grow"),
        help="go on without ranks that die; grow: start others in their place. Under mpirun"
        " --with-ft ulfm, of Open MPI 5 or newer",
    )
    living.add_argument(
        "--membership",
        type=_departures,
        default=(),
        metavar="RANK:STEP,...",
        help="let ranks leave before these steps, to compare an elastic run with",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a JSON report")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a timeline of all ranks, for ui.perfetto.dev, and print what time went to",
    )
    parser.add_argument(
        "--dump",
        type=Path,
        metavar="DIR",
        help="write the weights after every step, for `ringfold compare`",
    )
    return parser


def plan_of(options: Options) -> PlanFunction:
    """Return the plan that the options name, or that is written in the file they name."""
    named = options.schedule in PLANS
    return plan_function(
        options.schedule if named else _written(options.schedule), options.stages_per_rank
    )


def _written(path: str) -> PlanFunction:
    return parse_plan(Path(path).read_text())


def _schedule(text: str) -> str:
    if text not in PLANS and not Path(text).is_file():
        known = ", ".join(sorted(PLANS))
        raise argparse.ArgumentTypeError(f"expected a file, or one of: {known}; got {text!r}")
    try:
        if text not in PLANS:
            _written(text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return text


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {number}")
        return number

    return convert


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return number


def _probability(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"expected a probability below 1, got {text}")
    return number


def _departures(text: str) -> tuple[tuple[int, int], ...]:
    whole = _whole(0)
    found = []
    for pair in text.split(","):
        rank, colon, step = pair.partition(":")
        if not colon:
            raise argparse.ArgumentTypeError(f"expected RANK:STEP,..., got {text!r}")
        found.append((whole(rank), whole(step)))
    return tuple(found)


def _wire(text: str) -> str:
    name, _, argument = text.partition(":")
    readers: dict[str, Callable[[str], object]] = {"powersgd": _whole(1), "topk": _ratio}
    if name in readers:
        readers[name](argument)
    elif text not in WIRE_DTYPES:
        known = ", ".join((*WIRE_DTYPES, "powersgd:RANK", "topk:RATIO"))
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {text!r}")
    return text


def _ratio(text: str) -> float:
    if (number := _positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"expected a ratio of at most 1, got {text}")
    return number
