"""The options that benchmarks take, all looked at before anything is measured.

What is wrong is said once, in one line, and every rank ends with status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

from peers import PEERS, importable

import ringfold
from ringfold.comm.text_file import prepare_file
from ringfold.units import read_nbytes
from ringfold.workloads.agree import settle
from ringfold.workloads.numbers import path, positive, whole
from ringfold.workloads.options import UsageError
from ringfold.workloads.parsing import Parser, attempt

Check = Callable[[argparse.Namespace, int], object]
"""Raises UsageError where options do not go together, or with so many ranks."""


def plain_parser(description: str | None, *, repeats: int | None = None) -> Parser:
    """Return a parser with --json, and with --repeats where they have a default."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats is not None:
        parser.add_argument(
            "--repeats", type=whole(1), default=repeats, help="at most (default: %(default)s)"
        )
    told = "the results, in a folder that is made if need be"
    parser.add_argument("--json", type=path, metavar="FILE", help=told)
    return parser


def parser_of(
    description: str | None,
    *,
    sizes: str | None = None,
    of: str = "bytes",
    peers: bool = False,
    budget: float = 2.0,
    repeats: int = 100,
) -> Parser:
    """Return a parser; sizes: the default of --sizes, None without that option; of: their sense."""
    parser = plain_parser(description, repeats=repeats)
    if sizes is not None:
        add_sizes(parser, "--sizes", sizes, of)
    if peers:
        parser.add_argument(
            "--peers",
            type=_peers,
            default=importable(),
            help="of mpi,gloo (default: all that import); '' for none",
        )
    parser.add_argument(
        "--budget", type=positive, default=budget, help="seconds for the repetitions of a contest"
    )
    parser.add_argument("--plot", type=path, metavar="FILE", help="a picture, as PNG, likewise")
    return parser


def add_sizes(parser: Parser, name: str, default: str, of: str) -> None:
    """Add an option of numbers of bytes; where there is no default, none stand for it."""
    told = f"{of}: 4,64KiB,1MiB (default: {default or 'its own'})"
    parser.add_argument(name, type=_sizes, default=default or [], help=told)


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what reads some of these names, with commas between."""

    def convert(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                expected = ", ".join(known)
                raise argparse.ArgumentTypeError(f"unknown {name!r}, expected: {expected}")
        return found

    return convert


def read(parser: Parser, check: Check = lambda options, num_ranks: None) -> argparse.Namespace:
    """Read the command line on every rank; end all where one refuses it.  Collective."""
    parsed, _ = attempt(parser.parse_args)  # before MPI starts: --help needs none
    with ringfold.Communicator() as comm:
        refused = ""

        def decide() -> argparse.Namespace:
            options = parsed()
            check(options, comm.size)
            if comm.rank == 0:  # who writes
                _check_files(options)
            return options

        try:
            return settle(comm, decide)
        except UsageError as error:
            refused = str(error)
            if comm.rank == 0:
                _say(parser, refused)
    raise SystemExit(2)


def read_alone(parser: Parser) -> argparse.Namespace:
    """Read the command line of a process that is no rank."""
    try:
        options = parser.parse_args()
        _check_files(options)
    except UsageError as error:
        _say(parser, str(error))
        raise SystemExit(2) from None
    return options


def _say(parser: Parser, refused: str) -> None:
    print(f"{parser.prog}: error: {refused}", file=sys.stderr, flush=True)


def _check_files(options: argparse.Namespace) -> None:
    for name in ("json", "plot"):
        file = getattr(options, name, None)
        if file is not None and (refused := prepare_file(file)):
            raise UsageError(f"--{name}: {refused}")


def _peers(text: str) -> list[str]:
    found = importable()
    chosen = names(PEERS)(text) if text else []
    for name in chosen:
        if name not in found:
            raise argparse.ArgumentTypeError(f"{name} needs {PEERS[name]}, which is not installed")
    return chosen


def _sizes(text: str) -> list[int]:
    try:
        found = [read_nbytes(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 B or more, got {text!r}")
    return found
