"""Hand a training run's state over from the ranks that have it to those that need it.

As a checkpoint, keyed by full names, but over the communicator instead of a disk: from one (data,
pipe) grid to another, as after a rank has died, or to ranks that have come new.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...comm.texts import gather_texts
from ..sharded_optimizer import ShardedOptimizer
from ..tensors import flat_bytes
from .agreement import agree, together
from .files import DTYPES
from .fitting import wanted_by
from .manifest import HANDED_OVER, Entry, Manifest
from .restoring import restored
from .shares import captured_by, share_out, summary_of
from .state import Part, parts_of

if TYPE_CHECKING:
    from ...comm.communicator import Communicator

__all__ = ["hand_over"]

_WHAT = "state handed over"
_TYPES = {name: dtype for dtype, name in DTYPES.items()}


def hand_over(comm: Communicator, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Restore the objects of `new` from those of `old` on all ranks; return its plain values.

    old: what this rank still holds, as in `Checkpoints.save`; may be empty. What several ranks hold
        is the same on all of them, and is taken from one.
    new: what this rank needs, as in `Checkpoints.load`; may be empty.

    Collective. CheckpointError on every rank, before anything is changed, where no rank holds what
    one needs, and for a ShardedOptimizer, whose parts on a lost rank nobody else has.
    """
    sharded = [path for path, value in old.items() if isinstance(value, ShardedOptimizer)]
    captured, complaint, cause = captured_by({} if sharded else old, comm)
    if sharded:
        complaint = f"{sharded[0]}: a ShardedOptimizer's state is on no rank whole"
    agree(comm, complaint, _WHAT, cause)
    rows = [json.loads(row) for row in gather_texts(comm, summary_of(captured))]
    owners, values, _ = share_out(rows)
    kinds = {name: kind for row in rows for name, kind in row["tensors"].items()}
    entries = {n: Entry("", dtype, tuple(shape), "") for n, (_, dtype, shape) in kinds.items()}
    manifest = Manifest(HANDED_OVER, comm.size, {}, entries, values)

    def look() -> tuple[dict[str, Part], set[str]]:
        parts = parts_of(new, comm.rank, comm.size)
        return parts, set(wanted_by(parts, manifest))

    parts, wanted = together(comm, _WHAT, look)
    tensors = _send(comm, owners, captured.tensors, entries, wanted)
    return restored(comm, _WHAT, parts, manifest, tensors)


def _send(
    comm: Communicator,
    owners: Mapping[str, int],
    held: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    wanted: set[str],
) -> dict[str, Tensor]:
    """Bring every tensor that any rank wants from its owner; return those that this one wants."""
    names = sorted(owners)
    # Gathered, not reduced: no kernel is compiled while ranks wait to go on.
    flags = comm.allgather(np.array([name in wanted for name in names])).any(axis=0)
    found: dict[str, Tensor] = {}
    for name, flag in zip(names, flags.tolist(), strict=True):
        if not flag:
            continue
        entry, owner = entries[name], owners[name]
        if owner == comm.rank:
            tensor = held[name].detach().cpu().contiguous()
            # What is sent stays the old object's: the new one gets memory of its own.
            tensor = tensor.clone() if name in wanted else tensor
        else:
            tensor = torch.empty(entry.shape, dtype=_TYPES[entry.dtype], device="cpu")
        if tensor.numel():
            comm.broadcast(flat_bytes(tensor), root=owner)
        if name in wanted:
            found[name] = tensor
    return found
