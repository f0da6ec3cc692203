"""What a wrapper does in the backwards of its rank: begin to reduce, and end, beside others."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..comm.errors import NotFinite
from .backward_end import BackwardEnd
from .finite import FiniteCheck
from .reducer import START_BYTES, Reducer
from .replicas import broadcast_tensors
from .roster import Roster

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from .loss_scale import LossScaler

__all__ = ["GradientSync", "Mode"]


@dataclass
class Mode:
    """How a wrapper's next backward is reduced; what counts is what stands here when it runs.

    source: the rank that sends its buffers to all at the end, if `buffers`.
    synchronize: whether it is reduced at all.
    weight: of this rank in the mean; None where all count alike.
    """

    source: int
    buffers: bool
    synchronize: bool = True
    weight: float | None = None


class GradientSync:
    """Reduce what the backwards of one rank leave in a module's gradients.

    roster: of the module; None with one rank, where there is nothing to reduce.
    users: of groups that the wrappers of this rank reduce over, in the order in which all ranks
        have made them.
    """

    def __init__(
        self,
        module: nn.Module,
        channel: Communicator,
        reducer: Reducer,
        mode: Mode,
        *,
        roster: Roster | None,
        finite: FiniteCheck | None,
        users: MutableMapping[object, Any],
    ) -> None:
        self._module, self._channel = module, channel
        self._reducer, self._mode = reducer, mode
        self._roster, self._finite = roster, finite
        self._looking: BackwardEnd | None = None
        self._ending: BackwardEnd | None = None
        self._users = users
        users[object()] = self
        if channel.size > 1 or finite is not None:
            # The hooks must not keep this alive, nor work for one that is gone.
            own = weakref.ref(self)
            reducer.attach(lambda index: _forward_to(own(), index))

    def forward(self) -> None:
        """Take notice of a forward."""
        if torch._C._current_graph_task_id() == -1:  # else it is computed again, in a backward
            self._abandon()
        if self._roster is not None and torch.is_grad_enabled():
            self._roster.check()

    def reduce_without_backward(self) -> None:
        """Take part in the reduction of a backward that this rank does not run; collective."""
        if self._reducer.single:
            return
        self._abandon()
        self._reducer.begin(self._mode.weight)
        self._reduce()

    def unaware_of(self, scaler: LossScaler) -> Sequence[nn.Parameter]:
        """Return the parameters whose errors would stay in the units of a factor that changes."""
        return self._reducer.unaware_of(scaler)

    def ready(self, index: int) -> None:
        """Take the gradient of a parameter, which a backward has completed."""
        reducer = self._reducer
        if reducer.single or not self._mode.synchronize:
            if self._finite is not None and not (self._looking and self._looking.waits):
                self._looking = BackwardEnd(self._look)
            return
        if self._ending is None or not self._ending.waits:
            self._abandon()  # of a backward that has failed
            reducer.begin(self._mode.weight)
            self._ending = BackwardEnd(self._end_of_backward)
        reducer.mark(index, nested=self._ending.nested)

    def _abandon(self) -> None:
        """Give up what a backward that has failed has begun."""
        if self._ending is not None:
            self._ending.cancel()
        if self._looking is not None:
            self._looking.cancel()
        self._ending, self._looking = None, None
        if self._reducer.active:
            self._reducer.abandon()

    def _look(self) -> None:
        """Look at what a backward has left here that is not reduced yet, or never is."""
        self._looking = None
        if self._finite is None:
            return
        self._finite.look_at(self._module)
        self._finite.microbatch += 1
        if self._mode.synchronize:
            self._finite.agree()

    def _end_of_backward(self) -> None:
        """Reduce what a backward has left, of all wrappers in it, in one order on all ranks.

        Autograd may have reached them in different orders, and each waits for all ranks.
        """
        refused: Exception | None = None
        for other in list(self._users.values()):
            if other is self or (other._ending is not None and other._ending.waits):
                try:
                    other._reduce()
                except (NotFinite, ValueError) as error:  # on all ranks, which go on with the next
                    refused = refused or error
        if refused is not None:
            raise refused

    def _reduce(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        self._reducer.flush()
        self._reducer.finish()
        if self._finite is not None:
            self._finite.agree()
        assert self._roster is not None
        if self._mode.buffers and (buffers := self._roster.buffers()):
            # As `data`, which autograd takes no notice of: torch's own layers follow their running
            # statistics so, and another backward may run through what has kept these.
            data = [buffer.data for buffer in buffers]
            broadcast_tensors(self._channel, data, self._mode.source, START_BYTES)


def _forward_to(sync: GradientSync | None, index: int) -> None:
    if sync is not None:
        sync.ready(index)
