"""What layers call on other replicas, so that a stage that computes no more still takes part.

Where layers meet, as in synchronised batch norms, a replica that has failed would leave the others
waiting. All replicas make the same calls in the same order, and a stage mostly the same for every
micro-batch: so what its forward or backward has called once is noted, and called again with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .actions import Kind

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from .stage import Stage

__all__ = ["Call", "ReplicaCalls", "meet", "note"]

Move = Callable[[Tensor, "Communicator"], Tensor]


@dataclass(frozen=True)
class Call:
    """A collective, and what a rank brings to it."""

    move: Move
    comm: Communicator
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def take_part(self) -> None:
        """Bring zeros; of no use to this rank."""
        self.move(torch.zeros(self.shape, dtype=self.dtype, device=self.device), self.comm)


def meet(x: Tensor, comm: Communicator, move: Move) -> Tensor:
    """Make a call, which is noted while somebody notes what layers call."""
    result = move(x, comm)
    note(Call(move, comm, tuple(x.shape), x.dtype, x.device))
    return result


def note(call: Call) -> None:
    """Note a call that was made, while somebody notes what layers call."""
    if call.comm.noted is not None:
        call.comm.noted.append(call)


class ReplicaCalls:
    """What the actions of one stage call, by their kinds.

    channel: any group of the rank.
    """

    def __init__(self, stage: Stage, channel: Communicator) -> None:
        self._stage, self._channel = stage, channel
        self._layers: list[Any] = [m for m in stage.module.modules() if _may_meet(m)]
        self._known: dict[tuple[Kind, bool, tuple[bool, ...]], Sequence[Call]] = {}
        self._done = 0

    @contextmanager
    def noted(self, kind: Kind) -> Iterator[None]:
        """Note what an action calls; `join` goes on from there where it raises."""
        calls: list[Call] = []
        self._channel.noted = calls
        try:
            yield
        except BaseException:
            self._done = len(calls)
            raise
        else:
            self._known[self._key(kind)] = calls
        finally:
            self._channel.noted = None

    def join(self, kind: Kind) -> None:
        """Make the calls that are left of an action that is not executed, or only in part."""
        done, self._done = self._done, 0
        calls = self._known.get(self._key(kind))
        for call in (self._supposed(kind) if calls is None else calls)[done:]:
            call.take_part()

    def _key(self, kind: Kind) -> tuple[Kind, bool, tuple[bool, ...]]:
        meeting = tuple(layer.meets_replicas for layer in self._layers)
        return kind, torch.is_grad_enabled(), meeting  # without gradients there is no loss

    def _supposed(self, kind: Kind) -> Sequence[Call]:
        """Return what an action should call, for a kind of action that has not been noted yet.

        It is assumed to call each layer once, in the order in which they are registered.
        """
        stage = self._stage
        forward: list[Call] = []
        backward: list[Call] = []
        # Where nothing before a layer is trained, backward does not come to it.
        reached = stage.index > 0
        module: Any
        for module in stage.module.modules():
            if _may_meet(module) and module.meets_replicas:
                there, back = module.calls(stage.device)
                forward.append(there)
                backward[:0] = [back] if reached else []
            reached |= any(p.requires_grad for p in module.parameters(recurse=False))
        if kind is Kind.FORWARD:
            return forward
        again = forward if stage.recompute and kind is not Kind.WEIGHT else []
        # Of a split backward the first stage, which hands nothing back, does all with the weights.
        idle = Kind.INPUT if stage.index == 0 else Kind.WEIGHT
        return again if kind is idle else again + backward


def _may_meet(module: Any) -> bool:
    return hasattr(module, "meets_replicas")
