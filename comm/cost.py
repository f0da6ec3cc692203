"""Price a schedule on a cluster, in lockstep: a round takes as long as its slowest message.

The model is Hockney's: a message of m bytes takes latency + m * seconds_per_byte (R. Hockney, "The
communication challenge for MPP", 1994, section 2), extended by the time to add m bytes, and by
ranks of one node that share its network cards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .schedule import Chunks, Moves, Peers, Round, Schedule, moves, require_hashable
from .topology import Cluster, Link

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

    Raises: ValueError for an nbytes that is negative or beyond what is counted here, or an itemsize
    below 1; ScheduleError for rules that cannot be hashed, or evaluated at an array of ranks.
    """
    if nbytes < 0 or itemsize < 1:
        raise ValueError(f"expected nbytes >= 0 and itemsize >= 1, got {nbytes} and {itemsize}")
    if max(nbytes, itemsize) > _MOST_BYTES:
        raise ValueError(
            f"expected nbytes and itemsize of {_MOST_BYTES} at most, got {nbytes} and {itemsize}"
        )
    try:
        different = kinds(schedule, cluster)
    except TypeError:
        require_hashable(schedule)
        raise
    count = -(-nbytes // itemsize)
    chunk_bytes = -(-count // schedule.num_chunks) * itemsize
    seconds = 0.0
    rounds = 0
    sent = np.zeros(schedule.size)  # exact up to 2**53, where integers would go round
    for round, (index, repeat) in different.items():
        step = moves(round, schedule.size, schedule.num_chunks, index)
        message = np.minimum(step.length * chunk_bytes, nbytes)
        slowest = _seconds(step, message, round.reduce, cluster)
        seconds += repeat * slowest
        rounds += repeat * bool(message.any() or slowest > 0)
        sent[step.src] += float(repeat) * message
    return Price(seconds, rounds, int(sent.max(initial=0)), len(different))


def kinds(schedule: Schedule, cluster: Cluster) -> dict[Round, tuple[int, int]]:
    """Return (where it comes first, how often it comes) of one round for all that are alike."""
    chunks: dict[Chunks, Chunks] = {}
    peers: dict[Peers, Peers] = {}
    found: dict[Round, tuple[int, int]] = {}
    for index, round in enumerate(schedule.rounds):
        if round.chunks not in chunks:
            chunks[round.chunks] = round.chunks.alike()
        if round.peers not in peers:
            apart = cluster.ranks_per_node == 1
            peers[round.peers] = round.peers.alike() if apart else round.peers
        kind = Round(peers[round.peers], chunks[round.chunks], round.reduce)
        first, times = found.get(kind, (index, 0))
        found[kind] = first, times + 1
    return found


def _seconds(step: Moves, message: npt.NDArray[np.int64], reduce: bool, cluster: Cluster) -> float:
    """Return how long the slowest message of a round takes."""
    if not message.size:
        return 0.0
    added = message / cluster.reduce_bandwidth if reduce else 0.0
    return float((_travel(step, message, cluster) + added).max())


def _travel(
    step: Moves, message: npt.NDArray[np.int64], cluster: Cluster
) -> npt.NDArray[np.float64]:
    """Return each message's seconds on its link, cards shared by the messages that use them."""

    def over(link: Link, share: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
        return np.asarray(link.latency + message * share * link.seconds_per_byte, np.float64)

    src_node = step.src // cluster.ranks_per_node
    dst_node = step.dst // cluster.ranks_per_node
    leaves = src_node != dst_node
    intra = over(cluster.intra or cluster.inter, 1.0)
    if not leaves.any():
        return intra
    num_nodes = int(max(src_node.max(), dst_node.max())) + 1
    share = np.maximum(
        *(
            np.bincount(node[leaves], minlength=num_nodes)[node] / cluster.cards_per_node
            for node in (src_node, dst_node)
        )
    )
    seconds: npt.NDArray[np.float64] = np.where(
        leaves, over(cluster.inter, np.maximum(share, 1.0)), intra
    )
    return seconds
