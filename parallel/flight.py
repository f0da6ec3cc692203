"""One bucket that is carried over the ranks, with flags that tell which gradients this rank has.

A carrier starts a bucket and gives a flight: advance its rounds until there is no more to wait for,
then `land` it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .buckets import Bucket
from .flatten import Flattened
from .hooks import Ended, Rounds, payload
from .transfer import Finite

if TYPE_CHECKING:
    from ..comm.work import Receipt

__all__ = ["Carrier", "Flight", "Load"]


@dataclass(frozen=True)
class Load:
    """What this rank puts into a bucket.

    names, parameters, gradients: of the bucket's members, a gradient None where there is none.
    share: this rank's part of a weighted mean, from 0 to 1; None for the reducer's own op.
    changed: whether something has changed here; None in a bucket that does not carry that.
    loss_scale: what the losses were multiplied by.
    """

    names: tuple[str, ...]
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    share: float | None
    changed: bool | None
    loss_scale: float

    @property
    def device(self) -> torch.device:
        """Return where the parameters lie; a bucket of none is the host's."""
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    @property
    def flags(self) -> list[bool]:
        """Return what travels beside the elements."""
        own = [gradient is not None for gradient in self.gradients]
        return own if self.changed is None else [*own, self.changed]


@dataclass(frozen=True)
class Flight:
    """One bucket under way.

    finite: whether what was packed here was finite, as `transfer.Finite` has it; None where not all
        of it was looked at.
    counts: by how many of `size` ranks each flag was set, once there is no more to wait for.
    """

    load: Load
    size: int
    flattened: Flattened | None
    finite: Finite
    rounds: Rounds | Ended
    counts: Callable[[], list[float]]

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        """Return the receipts of the collectives started so far."""
        return tuple(self.rounds.receipts)

    @property
    def nbytes(self) -> int:
        """Return the bytes that this rank has put into them, flags included."""
        return sum(payload(receipt, self.size) for receipt in self.receipts)

    def land(self, counts: Sequence[float]) -> None:
        """Make the result the gradients of the parameters that some rank has one of."""
        if self.flattened is not None:
            used = [count > 0 for count in counts[: len(self.load.names)]]
            self.flattened.unpack(used, self.load.parameters)


class Carrier(Protocol):
    """Start buckets. Collective: every rank starts equal buckets in equal order."""

    def start(self, bucket: Bucket, load: Load, *, last: bool) -> Flight:
        """Start a bucket; last: nothing else is left to do, so that this rank may wait here."""
        ...

    def forget(self) -> None:
        """Give the memory of the buckets back, since others are to come."""
