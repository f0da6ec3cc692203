"""Choose an algorithm for a collective; the table is data."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from .algorithms import BY_NODE, build, names
from .collective import COLLECTIVES
from .cost import seconds_of
from .dtypes import DType
from .topology import Cluster, Nodes

if TYPE_CHECKING:
    from .tune import Tuning

KiB = 1 << 10
ANY = 1 << 62

CHOICES: dict[str, tuple[tuple[int, str], ...]] = {
    "allreduce": ((16 * KiB, "recursive_doubling"), (256 * KiB, "halving_doubling"), (ANY, "ring")),
    "reduce_scatter": ((64 * KiB, "recursive_halving"), (ANY, "ring")),
    "allgather": ((64 * KiB, "recursive_doubling"), (ANY, "ring")),
    "broadcast": ((256 * KiB, "tree"), (ANY, "ring")),
    "reduce": ((256 * KiB, "tree"), (ANY, "ring")),
    "gather": ((64 * KiB, "tree"), (ANY, "pairwise")),
    "scatter": ((64 * KiB, "tree"), (ANY, "pairwise")),
    "alltoall": ((ANY, "pairwise"),),
    "barrier": ((ANY, "dissemination"),),
}
"""collective -> (largest bytes of the flat buffer, algorithm), in rising order of bytes."""

RAW_REDUCE = "pairwise"
"""For half-width sums: raw contributions travel at half width and are rounded once."""


NESTED = "hierarchical"
NESTED_ABOVE: dict[str, int] = {
    "allreduce": 16 * KiB,
    "broadcast": 256 * KiB,
    "reduce": 256 * KiB,
}
"""collective -> bytes from which its ranks spare the network cards that they share."""


MOST_PRICED = 1024
"""Ranks up to which every algorithm is built to be priced."""


SIZES = tuple(1 << exponent for exponent in range(31))
"""Bytes of the buffers that are priced; the last one stands for all above."""


@lru_cache(maxsize=64)
def priced(collective: str, size: int, cluster: Cluster) -> tuple[tuple[int, str], ...]:
    """Return rows as in CHOICES: which algorithm is simulated to be the fastest up to which size.

    cluster: with the nodes of the group where it is on several.
    """
    nodes = cluster.nodes
    candidates = [
        name
        for name in names(collective)
        if name not in BY_NODE or (nodes is not None and nodes.nested)
    ]
    if len(candidates) == 1:
        return ((ANY, candidates[0]),)
    seconds = {
        name: seconds_of(build(collective, name, size, 0, nodes), SIZES, cluster)
        for name in candidates
    }
    rows: list[tuple[int, str]] = []
    for at, nbytes in enumerate(SIZES):
        cheapest = min(candidates, key=lambda name: seconds[name][at])
        if rows and rows[-1][1] == cheapest:
            rows.pop()
        rows.append((nbytes, cheapest))
    return (*rows[:-1], (ANY, rows[-1][1]))


def choose(
    collective: str,
    nbytes: int,
    dtype: DType,
    nodes: Nodes | None = None,
    size: int = 0,
    tuning: Tuning | None = None,
) -> tuple[str, str]:
    """Return (algorithm, reason) for a flat buffer of nbytes bytes.

    nodes: which ranks share a node, where the group is on several.
    tuning: what was measured on this machine, where it was; for a group of `size` ranks.
    """
    if COLLECTIVES[collective].reduces and dtype.wide:
        return RAW_REDUCE, f"{dtype.name} travels at its own width and is rounded once"
    cluster = tuning.cluster(nodes) if tuning and 1 < size <= MOST_PRICED else None
    if tuning and cluster:
        limit, algorithm = next(
            row for row in priced(collective, size, cluster) if nbytes <= row[0]
        )
        return algorithm, f"tuned on {tuning.date}: {algorithm} {_bound(limit)}"
    above = NESTED_ABOVE.get(collective, ANY)
    if nodes is not None and nodes.nested and nbytes > above:
        return NESTED, f"{nodes}: hierarchical above {above} bytes"
    limit, algorithm = next(row for row in CHOICES[collective] if nbytes <= row[0])
    return algorithm, f"default table: {algorithm} {_bound(limit)}"


def _bound(limit: int) -> str:
    return f"up to {limit} bytes" if limit != ANY else "for large buffers"
