"""Choose an algorithm for a collective; the table is data."""

from __future__ import annotations

from .dtypes import DType
from .topology import Nodes

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


def choose(
    collective: str, nbytes: int, dtype: DType, reduces: bool, nodes: Nodes | None = None
) -> tuple[str, str]:
    """Return (algorithm, reason) for a flat buffer of nbytes bytes.

    nodes: which ranks share a node, where the group is on several.
    """
    if reduces and dtype.wide:
        return RAW_REDUCE, f"{dtype.name} travels at its own width and is rounded once"
    above = NESTED_ABOVE.get(collective, ANY)
    if nodes is not None and nodes.nested and nbytes > above:
        return NESTED, f"{nodes}: hierarchical above {above} bytes"
    limit, algorithm = next(row for row in CHOICES[collective] if nbytes <= row[0])
    bound = f"up to {limit} bytes" if limit != ANY else "for large buffers"
    return algorithm, f"default table: {algorithm} {bound}"
