"""The command line: judge algorithms, compare runs, measure links, look at what a run needs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

from . import __version__, units
from .builders import ALL_ROOTS, Misuse, find_builder
from .comm.cost import kinds, price
from .comm.errors import ScheduleError
from .comm.evaluation import draw, members_of
from .comm.schedule import Schedule
from .comm.text_file import prepare_file, write_whole
from .comm.topology import Cluster, Link, Nodes
from .comm.verify import verify
from .output import status_of
from .workloads.numbers import path

REFUSED, MISUSED = 1, 2
"""Exit status: the algorithm is wrong, or runs differ; the command is wrong."""

MOST_PROVEN = 64
"""Of so many ranks a user's schedule is proven before its price is told; of more it takes long."""

LONG_SECONDS, RANK_SECONDS = 5.0, 20e-9
"""A price that takes longer is announced; a round takes so long for every rank."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    return status_of("ringfold", partial(_run, argv))


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
    except (Misuse, ValueError) as error:
        print(f"ringfold: {error}", file=sys.stderr)
        return MISUSED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ringfold", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ringfold {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    algorithm = argparse.ArgumentParser(add_help=False)
    algorithm.add_argument(
        "algorithm",
        help="FILE.py:FUNCTION, a function of size, and of root and nodes if it takes them, that "
        "returns a Schedule; or a built-in one as COLLECTIVE:NAME, such as allreduce:ring",
    )

    proof = commands.add_parser(
        "verify", parents=[algorithm], help="prove an algorithm for many numbers of ranks"
    )
    proof.add_argument("--sizes", default="2-64", help="numbers of ranks: 2-64 (default), 1,2,5-8")
    proof.add_argument("--draw", action="store_true", help="write every round of every size out")
    proof.set_defaults(run=_verify)

    cost = commands.add_parser(
        "simulate", parents=[algorithm], help="price an algorithm on a cluster"
    )
    for option, default, what in (
        ("--ranks", 8, "how many there are"),
        ("--nbytes", "64MiB", "the whole buffer, of an alltoall one rank's: 4, 64KiB, 1GiB"),
        ("--itemsize", 4, "bytes of an element"),
        ("--latency", "5us", "of a message between nodes"),
        ("--bandwidth", "25GB/s", "of a network card"),
        ("--ranks-per-node", 1, "ranks that share a node"),
        ("--cards-per-node", 1, "network cards that they share"),
    ):
        cost.add_argument(
            option, type=type(default), default=default, help=f"{what} (default: %(default)s)"
        )
    cost.add_argument(
        "--map-by",
        choices=("slot", "node"),
        default="slot",
        help="which ranks share a node, as mpirun places them: neighbours (slot, the default), or "
        "round robin (node)",
    )
    cost.add_argument("--intra-latency", help="within a node (default: as between nodes)")
    cost.add_argument("--intra-bandwidth", help="within a node (default: as between nodes)")
    cost.add_argument("--reduce-bandwidth", help="bytes a second that a rank adds (default: free)")
    cost.set_defaults(run=_simulate)

    runs = commands.add_parser("compare", help="find where two runs of train.py part")
    runs.add_argument(
        "first", type=path, metavar="A", help="report of train.py; with --dump, weights too"
    )
    runs.add_argument("second", type=path, metavar="B")
    runs.add_argument("--rtol", type=float, default=0.0, help="relative difference to allow")
    runs.set_defaults(run=_compare)

    tuning = commands.add_parser(
        "tune",
        help="measure the links (start it with mpirun); later runs choose algorithms by them",
    )
    tuning.add_argument(
        "--out",
        type=path,
        help="file to write, in a folder that is made if need be (default: where runs look for it)",
    )
    tuning.set_defaults(run=_tune)

    health = commands.add_parser(
        "doctor", help="look at everything a run needs, alone or under mpirun, and try it"
    )
    health.set_defaults(run=_doctor)
    return parser


def _verify(arguments: argparse.Namespace) -> int:
    builder = find_builder(arguments.algorithm)
    sizes = units.read_sizes(arguments.sizes)
    start = time.perf_counter()
    refused = proven = 0
    rooted = False
    for size in sizes:
        for root in builder.roots_of(size):
            try:
                schedule = builder.make(size, root)
                if arguments.draw:
                    print(f"size {size}, root {schedule.root}:\n{draw(schedule)}")
                verify(schedule)
            except ScheduleError as error:
                refused += 1
                print(f"refused: size {size}{f', root {root}' if builder.roots else ''}: {error}")
                break
            proven += 1
            rooted = rooted or schedule.collective.rooted
    seconds = time.perf_counter() - start
    if refused:
        print(f"{arguments.algorithm}: refused for {refused} of {len(sizes)} sizes")
        return REFUSED
    note = ""
    if rooted and not builder.roots:
        note = "; for one root alone, as the function takes no `root`"
    elif builder.roots and max(sizes) > ALL_ROOTS:
        note = f"; for {ALL_ROOTS} roots each above {ALL_ROOTS} ranks"
    print(
        f"{arguments.algorithm}: proven for {len(sizes)} sizes "
        f"({proven} schedules, {min(sizes)} to {max(sizes)} ranks) in {seconds:.2f} s{note}"
    )
    return 0


def _simulate(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.ranks <= units.MOST_RANKS:
        raise Misuse(
            f"--ranks must be 1 or more, {units.MOST_RANKS} at the most, got {arguments.ranks}"
        )
    nodes = Nodes.blocks(arguments.ranks, arguments.ranks_per_node)
    if arguments.map_by == "node":
        nodes = Nodes.labelled([rank % len(nodes.members) for rank in range(nodes.size)])
    cluster = Cluster(
        Link(units.read_seconds(arguments.latency), units.read_rate(arguments.bandwidth)),
        Link(
            units.read_seconds(arguments.intra_latency or arguments.latency),
            units.read_rate(arguments.intra_bandwidth or arguments.bandwidth),
        ),
        cards_per_node=arguments.cards_per_node,
        reduce_bandwidth=(
            units.read_rate(arguments.reduce_bandwidth)
            if arguments.reduce_bandwidth
            else float("inf")
        ),
        nodes=nodes,
    )
    nbytes = units.read_nbytes(arguments.nbytes)
    start = time.perf_counter()
    try:
        builder = find_builder(arguments.algorithm, nodes)
        schedule = builder.make(arguments.ranks, 0)
        if schedule.collective.name == "barrier":
            nbytes = 0  # tokens alone travel, whatever a buffer would be
        _warn_of_a_long_wait(schedule, cluster)
        buffers = schedule.size if schedule.collective.name == "alltoall" else 1
        cost = price(schedule, nbytes * buffers, cluster, arguments.itemsize)
        took = time.perf_counter() - start
        if builder.own and schedule.size <= MOST_PROVEN:
            verify(schedule)
    except ScheduleError as error:
        print(f"refused: size {arguments.ranks}: {error}")
        return REFUSED
    algbw = nbytes / cost.seconds if cost.seconds else 0.0
    factor = units.bus_factor(schedule.collective.name, schedule.size)
    for name, value in (
        ("algorithm", arguments.algorithm),
        ("ranks", str(schedule.size)),
        ("buffer", units.show_nbytes(nbytes)),
        ("rounds", str(cost.rounds)),
        ("bytes sent per rank, at most", str(cost.bytes_sent)),
        ("time (simulated)", units.show_seconds(cost.seconds)),
        ("algbw (simulated)", f"{algbw / 1e9:.4g} GB/s"),
        ("busbw (simulated)", f"{algbw * factor / 1e9:.4g} GB/s"),
        ("priced in", f"{took:.2f} s, {cost.priced} different rounds"),
    ):
        print(f"{name + ':':<30} {value}")
    if builder.own and schedule.size > MOST_PROVEN:
        print(f"not proven, above {MOST_PROVEN} ranks: the price believes what its rules say")
    return 0


def _warn_of_a_long_wait(schedule: Schedule, cluster: Cluster) -> None:
    """Say so where most rounds differ, and each is evaluated at very many ranks."""
    if len(schedule.rounds) * schedule.size * RANK_SECONDS < LONG_SECONDS:
        return
    different = kinds(schedule, cluster)
    evaluated = sum(len(members_of(round.peers, schedule.size)) for round in different)
    seconds = evaluated * RANK_SECONDS
    if seconds >= LONG_SECONDS:
        print(
            f"ringfold: {len(different)} of {len(schedule.rounds)} rounds differ and are priced "
            f"one by one, which takes about {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import Unreadable, compare

    try:
        found = compare(arguments.first, arguments.second, arguments.rtol)
    except Unreadable as error:
        raise Misuse(str(error)) from None
    print(*([str(one) for one in found] or ["no difference"]), sep="\n")
    return REFUSED if found else 0


def _tune(arguments: argparse.Namespace) -> int:
    from .comm.communicator import Communicator
    from .comm.settings import Settings
    from .comm.texts import first_text
    from .comm.tune import measure

    file = arguments.out or Settings.read().tuning
    if file is None:
        raise Misuse("there is no HOME to write to: name a file by --out")
    with Communicator() as comm:
        if comm.size == 1:
            raise Misuse("one rank has no links to measure; try: mpirun -n 4 ringfold tune")
        refused = prepare_file(file) if comm.rank == 0 else ""
        if told := first_text(comm, refused):
            raise Misuse(f"{told}; name a file by --out")
        tuning = measure(comm)
        if comm.rank == 0:
            for name, link in (("within a node", tuning.intra), ("between nodes", tuning.inter)):
                if link is not None:
                    print(
                        f"{name} ({link.ranks} ranks, measured): "
                        f"latency {units.show_seconds(link.latency)}, "
                        f"{link.bandwidth / 1e9:.3g} GB/s, adds {link.reduce_bandwidth / 1e9:.3g} "
                        f"GB/s; the model misses by {100 * link.error:.0f} % (median)"
                    )
            try:
                write_whole(file, tuning.text())
            except OSError as error:
                print(f"ringfold: {file} cannot be written: {error.strerror}", file=sys.stderr)
                return REFUSED
            print(f"written to {file}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import examine

    return examine()
