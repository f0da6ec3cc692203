"""The options that all benchmarks take."""

from __future__ import annotations

import argparse
from pathlib import Path

from peers import PEERS, importable

from ringfold.cli import units


def parser_of(
    description: str | None,
    *,
    sizes: str | None = None,
    of: str = "bytes",
    peers: bool = False,
    budget: float = 2.0,
) -> argparse.ArgumentParser:
    """Return a parser; sizes: the default of --sizes, None without that option; of: their sense."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if sizes is not None:
        parser.add_argument(
            "--sizes", default=sizes, help=f"{of}: 4,64KiB,1MiB (default: {sizes or 'its own'})"
        )
    if peers:
        parser.add_argument("--peers", help="of mpi,gloo (default: all that import); '' for none")
    parser.add_argument("--repeats", type=int, default=100, help="at most (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=budget, help="seconds for the repetitions of a contest"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, as PNG")
    return parser


def read_peers(parser: argparse.ArgumentParser, text: str | None) -> list[str]:
    """Check the names, and that what they need is installed."""
    found = importable()
    names = found if text is None else [name for name in text.split(",") if name]
    for name in names:
        if name not in PEERS:
            parser.error(f"--peers: unknown {name!r}, expected: {', '.join(PEERS)}")
        if name not in found:
            parser.error(f"--peers {name}: {PEERS[name]} is not installed")
    return names


def read_sizes(parser: argparse.ArgumentParser, text: str) -> list[int]:
    """Read numbers of bytes."""
    try:
        return [units.read_nbytes(part) for part in text.split(",") if part]
    except ValueError as error:
        parser.error(f"--sizes: {error}")
