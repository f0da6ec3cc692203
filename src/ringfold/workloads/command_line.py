"""The command line of train.py, read into its options; no torch, no MPI."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from os.path import isfile

from ..parallel.plan import PLANS
from . import WORKLOADS
from .numbers import path, positive, whole
from .options import TREE_MICROBATCHES, Options, UsageError, written_plan
from .parsing import Parser

__all__ = ["parse"]

WIRE_DTYPES = ("fp32", "bf16", "fp16")
SCHEDULE = "1f1b"
BALANCES = ("parameters", "time", "memory")
LARGEST = 3.4e38  # of float32


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
    check_effect(found)
    files = [file.absolute() for file in (found.trace, found.report) if file is not None]
    if len(files) > len(set(files)):
        raise UsageError(f"--trace and --report name one file, {found.report}")
    defaults = WORKLOADS[found.workload]
    return Options(
        workload=found.workload,
        data=found.data,
        pipe=1 if found.pipe is None else found.pipe,
        schedule=found.schedule or SCHEDULE,
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
        balance=found.balance or BALANCES[0],
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


def check_effect(found: argparse.Namespace) -> None:
    """Raise UsageError for options of a pipe where there is none."""
    stages = found.recompute or (found.stages_per_rank or 1) > 1
    # Adding in a tree, or with dropout keyed by sample, replicas are pipelines of one stage.
    if found.pipe is not None or stages or found.reduction == "tree" or found.dropout:
        return
    for name in ("microbatches", "schedule", "balance"):
        if (value := getattr(found, name)) is not None:
            raise UsageError(f"--{name} {value} has no effect without --pipe P")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
        "--data", type=whole(1), metavar="D", help="data ranks (default: ranks / pipe)"
    )
    split.add_argument("--pipe", type=whole(1), metavar="P", help="stages of layers (default: 1)")
    split.add_argument(
        "--schedule",
        type=_schedule,
        metavar="PLAN",
        help=f"of the pipe: {', '.join(PLANS)}, or a file with a plan (default: {SCHEDULE})",
    )
    split.add_argument(
        "--stages-per-rank",
        type=whole(1),
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
        type=whole(1),
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
        choices=BALANCES,
        help="what is to be equal over the stages; time and memory are measured on a micro-batch"
        f" (default: {BALANCES[0]})",
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
        type=whole(1),
        help=f"passes over the data (default: {_by_workload('epochs')})",
    )
    train.add_argument(
        "--steps",
        type=whole(1),
        help="so many steps at the most, over which the learning rate falls to its end",
    )
    train.add_argument(
        "--batch-size",
        type=whole(1),
        metavar="B",
        help="samples of the global batch, shared out over the data ranks (default: "
        f"{_by_workload('batch_size')})",
    )
    train.add_argument(
        "--lr",
        type=_rate,
        help=f"learning rate (default: {_by_workload('lr')})",
    )
    train.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=0,
        help="of weights and order of samples (default: 0)",
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
        type=_mebibytes,
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
        "--checkpoint", type=path, metavar="DIR", help="write checkpoints into this folder"
    )
    store.add_argument(
        "--every",
        type=whole(1),
        metavar="N",
        help="after every N steps, and the last (default: 100)",
    )
    store.add_argument(
        "--keep", type=whole(1), metavar="K", help="keep the newest K of them (default: 3)"
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
    parser.add_argument(
        "--report",
        type=path,
        metavar="FILE",
        help="write a JSON report, into a folder that is there",
    )
    parser.add_argument(
        "--trace",
        type=path,
        metavar="FILE",
        help="write a timeline of all ranks, for ui.perfetto.dev, and print what time went to",
    )
    parser.add_argument(
        "--dump",
        type=path,
        metavar="DIR",
        help="write the weights after every step, for `ringfold compare`",
    )
    return parser


def _schedule(text: str) -> str:
    if text not in PLANS and not isfile(text):
        known = ", ".join(sorted(PLANS))
        raise argparse.ArgumentTypeError(f"expected a file, or one of: {known}; got {text!r}")
    try:
        if text not in PLANS:
            written_plan(text)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return text


def _by_workload(setting: str) -> str:
    return ", ".join(f"{name} {getattr(found, setting)}" for name, found in WORKLOADS.items())


def _rate(text: str) -> float:
    if (number := positive(text)) > LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number that float32 holds, got {text}")
    return number


def _mebibytes(text: str) -> float:
    number = positive(text)
    if number * 2**20 < 1:
        raise argparse.ArgumentTypeError(f"expected a byte, {2**-20:.1e} MiB, or more, got {text}")
    return number


def _probability(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"expected 0 or more, and less than 1, got {text}")
    return number


def _departures(text: str) -> tuple[tuple[int, int], ...]:
    number = whole(0)
    found = []
    for pair in text.split(","):
        rank, colon, step = pair.partition(":")
        if not colon:
            raise argparse.ArgumentTypeError(f"expected RANK:STEP,..., got {text!r}")
        found.append((number(rank), number(step)))
    return tuple(found)


def _wire(text: str) -> str:
    name, _, argument = text.partition(":")
    readers: dict[str, tuple[Callable[[str], object], str]] = {
        "powersgd": (whole(1), "RANK, such as powersgd:4"),
        "topk": (_ratio, "RATIO, such as topk:0.01"),
    }
    if name in readers:
        read, told = readers[name]
        if not argument:
            raise argparse.ArgumentTypeError(f"expected {name}:{told}, got {text!r}")
        read(argument)
    elif text not in WIRE_DTYPES:
        known = ", ".join((*WIRE_DTYPES, "powersgd:RANK", "topk:RATIO"))
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {text!r}")
    return text


def _ratio(text: str) -> float:
    if (number := positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"expected a ratio of at most 1, got {text}")
    return number
