"""Measure this machine's links, and keep what was found for later runs.

Algorithms are timed over messages, and the three numbers of the model in `cost` are fitted to the
times: latency and bandwidth of a link, and the speed at which a rank adds. `select` then prices
every algorithm with them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.say import say
from .algorithms import build
from .cost import price
from .topology import Cluster, Link, Nodes

if TYPE_CHECKING:
    from .communicator import Communicator

VERSION = 1
ALGORITHMS = ("ring", "recursive_doubling", "halving_doubling")
NBYTES = (8, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 23)

_DAMAGED = (KeyError, TypeError, AttributeError, ValueError, RecursionError, OverflowError)

_FREE = float("inf")
_FASTEST = 1e12
"""Bytes a second where a fit finds no cost at all."""


@dataclass(frozen=True)
class Machine:
    """What a table must have been measured on to be of use: processor, cores, library."""

    processor: str
    cores: int
    library: str

    @classmethod
    def here(cls, library: str) -> Machine:
        """Describe the machine this process runs on."""
        return cls(_processor(), os.cpu_count() or 1, library)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


@dataclass(frozen=True)
class Fitted:
    """A link as it was measured over some ranks.

    latency: seconds.  bandwidth, reduce_bandwidth: bytes a second.
    error: median of |simulated / measured - 1| over the samples.
    """

    ranks: int
    latency: float
    bandwidth: float
    reduce_bandwidth: float
    error: float


@dataclass(frozen=True)
class Tuning:
    """What `ringfold tune` found: the links within a node and between nodes, None where none is."""

    machine: Machine
    intra: Fitted | None
    inter: Fitted | None
    date: str

    def cluster(self, nodes: Nodes | None) -> Cluster | None:
        """Return the cluster to price a group against; None where its links were not measured.

        nodes: None for a group on one node.
        """
        link = self.intra if nodes is None else self.inter
        if link is None:
            return None
        within = None if self.intra is None else _link(self.intra)
        cluster = Cluster(_link(link), within, reduce_bandwidth=link.reduce_bandwidth, nodes=nodes)
        return cluster if within is not None or cluster.apart else None

    def text(self) -> str:
        """Return the table as JSON."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"


def _link(found: Fitted) -> Link:
    return Link(found.latency, found.bandwidth)


def parse(text: str, library: str) -> Tuning:
    """Read a table back.

    Raises: ValueError that says what is wrong with it, or that it is another machine's.
    """
    try:
        found = json.loads(text)
        if found.pop("version") != VERSION:
            raise ValueError(f"expected version {VERSION}")
        links = {
            name: None if found[name] is None else _checked(Fitted(**found[name]))
            for name in ("intra", "inter")
        }
        tuning = Tuning(Machine(**found["machine"]), **links, date=str(found["date"]))
    except _DAMAGED as error:
        raise ValueError(f"it is damaged ({error})") from None
    here = Machine.here(library)
    if tuning.machine != here:
        raise ValueError(f"it is from another machine: {tuning.machine}, this is {here}")
    return tuning


def _checked(link: Fitted) -> Fitted:
    if not all(map(math.isfinite, (link.latency, link.bandwidth, link.reduce_bandwidth))):
        raise ValueError(f"expected finite numbers, got {link}")
    Cluster(_link(link), reduce_bandwidth=link.reduce_bandwidth)
    return link


def measure(comm: Communicator, repeats: int = 9) -> Tuning:
    """Measure the links of a communicator's ranks; collective, a few seconds."""
    library = comm.library
    intra = fit(comm.node, repeats) if comm.node.size > 1 else None
    inter = None
    if comm.node.size < comm.size:
        # One rank a node, with its card alone: `price` shares it. The others wait for the table.
        across = comm.split(0 if comm.node.rank == 0 else None)
        if across is not None:
            with across:
                inter = fit(across, repeats)
    # Every rank returns what rank 0 saw.
    tuning = Tuning(Machine.here(library), intra, inter, time.strftime("%Y-%m-%d"))
    return parse(share_text(comm, tuning.text()), library)


def load(comm: Communicator, path: Path | None, library: str) -> Tuning | None:
    """Return rank 0's table of measurements, so that all ranks choose alike; collective.

    None where there is no such file. One that cannot be used is ignored, and rank 0 says why.
    """
    text = ""
    try:
        if comm.rank == 0 and path is not None and path.is_file():
            text = path.read_text(errors="replace")
    except OSError as error:  # such as a folder that this user may not enter
        _say_ignored(path, error)
    text = share_text(comm, text)
    try:
        return parse(text, library) if text else None
    except ValueError as error:
        if comm.rank == 0:
            _say_ignored(path, error)
        return None


def _say_ignored(path: Path | None, error: Exception) -> None:
    say(f"{path} is ignored: {error}")


def share_text(comm: Communicator, text: str) -> str:
    """Return rank 0's text on every rank; collective."""
    data = np.frombuffer(text.encode(), np.uint8)
    length = comm.broadcast(np.array([data.size]))
    buffer = data.copy() if comm.rank == 0 else np.empty(int(length[0]), np.uint8)
    return bytes(comm.broadcast(buffer)).decode()


def fit(comm: Communicator, repeats: int) -> Fitted:
    """Time algorithms on a group and fit the model to the medians of the slowest rank."""
    features, times = [], []
    for nbytes in NBYTES:
        for name in ALGORITHMS:
            features.append(costs(name, comm.size, nbytes))
            times.append(_time(comm, name, nbytes, repeats))
    weights = np.array(features) / np.array(times)[:, None]
    found = _nonnegative(weights, np.ones(len(times)))
    error = float(np.median(np.abs(weights @ found - 1)))
    latency, per_byte, per_added = found
    return Fitted(
        comm.size,
        float(latency),
        1 / max(float(per_byte), 1 / _FASTEST),
        1 / max(float(per_added), 1 / _FASTEST),
        error,
    )


def costs(algorithm: str, size: int, nbytes: int) -> tuple[float, float, float]:
    """Return the rounds, and the bytes sent and added one after the other, of an allreduce."""
    schedule = build("allreduce", algorithm, size)
    one = (
        Cluster(Link(1.0, _FREE)),
        Cluster(Link(0.0, 1.0)),
        Cluster(Link(0.0, _FREE), reduce_bandwidth=1.0),
    )
    rounds, sent, added = (price(schedule, nbytes, cluster).seconds for cluster in one)
    return rounds, sent, added


def _time(comm: Communicator, algorithm: str, nbytes: int, repeats: int) -> float:
    x = np.zeros(nbytes // 4, np.float32)
    times = []
    for _ in range(repeats + 1):
        comm.barrier()
        start = time.perf_counter()
        comm.allreduce(x, algorithm=algorithm)
        times.append(time.perf_counter() - start)
    slowest = comm.allreduce(np.array([statistics.median(times[1:])]), op="max")
    return float(slowest[0])


def _nonnegative(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Solve least squares with no negative unknown: try every choice of those that are not 0.

    Three unknowns make seven choices; the best one that is not negative is the solution.
    """
    unknowns = a.shape[1]
    best, least = np.zeros(unknowns), np.inf
    for choice in range(1, 1 << unknowns):
        chosen = [k for k in range(unknowns) if choice >> k & 1]
        part = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
        if (part < 0).any():
            continue
        solution = np.zeros(unknowns)
        solution[chosen] = part
        rest = float(np.square(a @ solution - b).sum())
        if rest < least:
            best, least = solution, rest
    return best
