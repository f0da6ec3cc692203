"""Price a schedule on a cluster, in lockstep: a round takes as long as its slowest message.

The model is Hockney's: a message of m bytes takes latency + m * seconds_per_byte (R. Hockney, "The
communication challenge for MPP", 1994, section 2), extended by the time to add m bytes, and by
ranks of one node that share its network cards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .claims import require_kinds
from .evaluation import Moves, moves
from .schedule import Chunks, Peers, Round, Schedule, require_hashable
from .topology import Cluster, Integers, Link

_MOST_BYTES = 1 << 60
"""Of a buffer: what a message has is counted in 64 bits."""


@dataclass(frozen=True)
class Price:
    """The simulated cost of a schedule.

    seconds: lockstep makespan.  rounds: rounds in which anything moves.
    bytes_sent: what the rank that sends most sends in all.
    priced: rounds that had to be evaluated; like rounds are priced once.
    """

    seconds: float
    rounds: int
    bytes_sent: int
    priced: int


def price(schedule: Schedule, nbytes: int, cluster: Cluster, itemsize: int = 4) -> Price:
    """Price one run of a schedule over a buffer of nbytes bytes.

    nbytes is the whole flat buffer that the schedule cuts into chunks (for allgather the gathered
    one, for alltoall all rows of all ranks). A chunk is priced at its largest size,
    ceil(count / num_chunks) elements of itemsize bytes.

    Raises: ValueError for an nbytes that is negative or beyond what is counted here, an itemsize
    below 1, or nodes that hold another number of ranks; ScheduleError for rules that cannot be
    hashed, or evaluated at an array of ranks.
    """
    chunk_bytes = _chunk_bytes(schedule, nbytes, itemsize)
    seconds = 0.0
    rounds = different = 0
    sent = np.zeros(schedule.size)  # exact up to 2**53, where integers would go round
    for step in _steps(schedule, cluster):
        message = np.minimum(step.length * chunk_bytes, nbytes)
        slowest = float(_travel(step, message, cluster).max(initial=0.0))
        seconds += step.times * slowest
        rounds += step.times * bool(message.any() or slowest > 0)
        sent[step.src] += float(step.times) * message
        different += 1
    return Price(seconds, rounds, int(sent.max(initial=0)), different)


def seconds_of(schedule: Schedule, sizes: Sequence[int], cluster: Cluster) -> list[float]:
    """Return the seconds that price() tells for each of several nbytes, of items of 4 bytes.

    The rules are evaluated once, and like messages of a round are looked at once.
    """
    nbytes = np.array(sizes, np.int64)[:, None]
    chunk_bytes = np.array([_chunk_bytes(schedule, one, 4) for one in sizes], np.int64)[:, None]
    seconds = np.zeros(len(sizes))
    for step in _steps(schedule, cluster):
        kind = step.length * (schedule.size + 1) + step.sharing
        at = np.unique(kind, return_index=True)[1]
        few = replace(step, length=step.length[at], sharing=step.sharing[at])
        message = np.minimum(few.length * chunk_bytes, nbytes)
        seconds += step.times * _travel(few, message, cluster).max(axis=1, initial=0.0)
    found: list[float] = seconds.tolist()
    return found


def _chunk_bytes(schedule: Schedule, nbytes: int, itemsize: int) -> int:
    if nbytes < 0 or itemsize < 1:
        raise ValueError(f"expected nbytes >= 0 and itemsize >= 1, got {nbytes} and {itemsize}")
    if max(nbytes, itemsize) > _MOST_BYTES:
        raise ValueError(
            f"expected nbytes and itemsize of {_MOST_BYTES} at most, got {nbytes} and {itemsize}"
        )
    count = -(-nbytes // itemsize)
    return -(-count // schedule.num_chunks) * itemsize


@dataclass(frozen=True)
class _Step:
    """The messages of a round, without what depends on the bytes of the buffer.

    length: chunks of each.  sharing: how many messages leave its sender's node or enter its
    receiver's, the larger of both; 0 for one within a node.  times: how often the round comes.
    """

    src: Integers
    length: Integers
    sharing: Integers
    reduce: bool
    times: int


def _steps(schedule: Schedule, cluster: Cluster) -> Iterator[_Step]:
    """Evaluate one round for all that are alike."""
    if cluster.nodes is not None and cluster.nodes.size != schedule.size:
        raise ValueError(
            f"the nodes hold {cluster.nodes.size} ranks, the schedule is for {schedule.size}"
        )
    for round, (index, times) in kinds(schedule, cluster).items():
        step = moves(round, schedule.size, schedule.num_chunks, index)
        yield _Step(step.src, step.length, _sharing(step, cluster), round.reduce, times)


def kinds(schedule: Schedule, cluster: Cluster) -> dict[Round, tuple[int, int]]:
    """Return (where it comes first, how often it comes) of one round for all that are alike.

    Raises: ScheduleError for rules, and what they call alike, that are none or cannot be hashed.
    """
    try:
        return _kinds(schedule, cluster)
    except Exception:
        require_hashable(schedule)
        require_kinds(schedule)
        raise


def _kinds(schedule: Schedule, cluster: Cluster) -> dict[Round, tuple[int, int]]:
    chunks: dict[Chunks, Chunks] = {}
    peers: dict[Peers, Peers] = {}
    found: dict[Round, tuple[int, int]] = {}
    for index, round in enumerate(schedule.rounds):
        if round.chunks not in chunks:
            chunks[round.chunks] = round.chunks.alike()
        if round.peers not in peers:
            peers[round.peers] = round.peers.alike() if cluster.apart else round.peers
        kind = Round(peers[round.peers], chunks[round.chunks], round.reduce)
        first, times = found.get(kind, (index, 0))
        found[kind] = first, times + 1
    return found


def _sharing(step: Moves, cluster: Cluster) -> Integers:
    src_node, dst_node = (cluster.node_of(ranks) for ranks in (step.src, step.dst))
    leaves = src_node != dst_node
    if not leaves.any():
        return np.zeros(len(leaves), np.int64)
    num_nodes = int(max(src_node.max(), dst_node.max())) + 1
    out, into = (
        np.bincount(node[leaves], minlength=num_nodes)[node] for node in (src_node, dst_node)
    )
    return np.where(leaves, np.maximum(out, into), 0)


def _travel(step: _Step, message: Integers, cluster: Cluster) -> npt.NDArray[np.float64]:
    """Return each message's seconds on its link, cards shared by the messages that use them.

    message: the bytes of each, along the last axis.
    """

    def over(link: Link, share: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
        return np.asarray(link.latency + message * share * link.seconds_per_byte, np.float64)

    seconds = over(cluster.intra or cluster.inter, 1.0)
    if step.sharing.any():
        share = np.maximum(step.sharing / cluster.cards_per_node, 1.0)
        seconds = np.where(step.sharing, over(cluster.inter, share), seconds)
    return seconds + message / cluster.reduce_bandwidth if step.reduce else seconds
