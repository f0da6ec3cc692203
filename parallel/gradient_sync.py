"""What a wrapper does in the backwards of its rank: begin to reduce, and end, beside others."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..comm.errors import NotFinite
from .backward_end import BackwardEnd
from .bucket_plan import START_BYTES
from .buffer_layout import BufferLayout
from .finite import FiniteCheck
from .kinship import Kin, Mode
from .reducer import Reducer
from .replicas import broadcast_tensors
from .roster import Roster
from .weights import require_weight

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from .loss_scale import LossScaler

__all__ = ["GradientSync"]


class GradientSync(Kin):
    """Reduce what the backwards of one rank leave in a module's gradients.

    Those that share parameters reduce together, each parameter once.

    named: the module's parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        named: Sequence[tuple[str, nn.Parameter]],
        channel: Communicator,
        reducer: Reducer,
        mode: Mode,
        finite: FiniteCheck | None,
    ) -> None:
        super().__init__(named, channel.members, mode)
        self._module, self._channel = module, channel
        self._reducer, self._finite = reducer, finite
        self._roster = Roster(module)
        self._layout = BufferLayout(self._roster)
        self._checked = False
        self._looking: BackwardEnd | None = None
        self._ending: BackwardEnd | None = None
        self._ahead: list[GradientSync] = []
        self._done: list[tuple[int, int] | None] | None = None
        # In the order in which all ranks have made them.
        self._users: MutableMapping[object, GradientSync] = channel.users
        self.meet(list(self._users.values()))
        self._key = object()
        self._users[self._key] = self
        if channel.size > 1 or finite is not None:
            self._attach()

    def _attach(self) -> None:
        # The hooks must not keep this alive, nor work for one that is gone.
        own = weakref.ref(self)
        self._reducer.attach(lambda index: _forward_to(own(), index))

    def expect(self, weight: float) -> None:
        """Take notice of the weight of backwards to come.

        With one rank, ValueError for what is no weight. Several ranks tell each other their weights
        in the backward, and refuse a bad one together.
        """
        if not self._reducer.single:
            return
        require_weight(weight, 0)
        if weight == 0:  # as long as no weight is, backward runs without hooks
            self._attach()

    def forward(self) -> None:
        """Take notice of a forward."""
        if torch._C._current_graph_task_id() == -1:  # else it is computed again, in a backward
            self._abandon()
        if torch.is_grad_enabled():
            self._check()
            self._checked = True

    def detach(self) -> None:
        """Work no longer."""
        self._users.pop(self._key, None)
        self._reducer.detach()
        self.part()

    def reduce_without_backward(self) -> None:
        """Take part in the reduction of a backward that this rank does not run; collective."""
        if self._reducer.single:
            self._clear()
            return
        if self._done is not None and self._done == self._gradients():
            self._done = None  # by the same call of one that reduces together with this
            return
        family = self.family()
        if not any(p.requires_grad for one in family for _, p in one._named):
            return  # no rank's backward comes to any of them
        for one in family:
            one._begin(family)
        _reduce(family)
        for one in family:
            one._done = None if one is self else one._gradients()

    def _gradients(self) -> list[tuple[int, int] | None]:
        """Return what tells whether anybody has touched the gradients since."""
        gradients = [parameter.grad for _, parameter in self._named]
        return [None if g is None else (id(g), g._version) for g in gradients]

    def unaware_of(self, scaler: LossScaler) -> Sequence[nn.Parameter]:
        """Return the parameters whose errors would stay in the units of a factor that changes."""
        return self._reducer.unaware_of(scaler)

    def ready(self, index: int) -> None:
        """Take the gradient of a parameter, which a backward has completed."""
        reducer = self._reducer
        if reducer.single or not self._mode.synchronize:
            looks = self._finite is not None or self._weighs_nothing
            if looks and not (self._looking and self._looking.waits):
                self._looking = BackwardEnd(self._look)
            return
        if self._ending is None or not self._ending.waits:
            family = self.family()
            for one in family:  # so that all ranks get the weights of all, whichever they reach
                one._begin(family)
                one._ending = BackwardEnd(one._end_of_backward)
            assert self._ending is not None
        reducer.mark(index, nested=self._ending.reach())

    def _begin(self, family: Sequence[GradientSync]) -> None:
        self._abandon()  # what a backward that has failed has begun
        if not self._checked:  # as after a forward that is compiled
            self._check()
        self._checked = False
        self._ahead = self.ahead(family)
        self._done = None
        changed = self._mode.buffers and self._layout.changed
        self._reducer.begin(self._mode.weight, self.shared_with(self._ahead), changed=changed)

    def _check(self) -> None:
        """Take notice of other parameters, and of other tensors in them."""
        self._roster.check()
        self._reducer.follow_swaps()

    def _abandon(self) -> None:
        """Give up what a backward that has failed has begun."""
        if self._ending is not None:
            self._ending.cancel()
        if self._looking is not None:
            self._looking.cancel()
        self._ending, self._looking = None, None
        self._ahead = []
        if self._reducer.active:
            self._reducer.abandon()

    def _look(self) -> None:
        """Look at what a backward has left here that is not reduced yet, or never is."""
        self._looking = None
        if self._finite is not None:
            self._finite.look_at(self._module)
            self._finite.microbatch += 1
            if self._mode.synchronize:
                self._finite.agree()
        if self._reducer.single and self._weighs_nothing:
            self._clear()

    @property
    def _weighs_nothing(self) -> bool:
        """Tell whether this is reduced, and its weight 0."""
        return self._mode.synchronize and self._mode.weight == 0

    def _clear(self) -> None:
        """With one rank leave zeros where its weight is 0, as ranks do that all weigh 0."""
        family = self.family()
        for one in family:
            if one._mode.weight == 0:
                one._reducer.clear(one.shared_with(one.ahead(family)))

    def _end_of_backward(self) -> None:
        """Reduce the gradients of all wrappers in a backward, in one order on all ranks.

        Each reduction waits for all ranks, while autograd may reach the wrappers in another order
        on each. It may also miss, on some ranks, a wrapper that shares parameters with those it
        has reached: that one takes part all the same.
        """
        reached = [one for one in list(self._users.values()) if one is self or one._ends_with(self)]
        families = {tuple(one.family()) for one in reached}
        taking = []
        # Family by family, as `reduce_gradients` of each wrapper in turn does.
        for family in sorted(families, key=lambda family: family[0].age):
            for one in family:
                if not one._reducer.active:
                    one._begin(family)
                taking.append(one)
        _reduce(taking)

    def _ends_with(self, other: GradientSync) -> bool:
        """Tell whether this waits for the end of the backward that ends for another one."""
        mine, its = self._ending, other._ending
        return mine is not None and its is not None and mine.waits and mine.is_with(its)

    def _reduce(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        self._reducer.flush()
        self._reducer.finish()
        if self._finite is not None:
            self._finite.agree()
        ahead, self._ahead = self._ahead, []
        if self._mode.buffers:
            if self._reducer.told:
                self._layout.agree(self._channel)
            # As `data`, which autograd takes no notice of: torch's own layers follow their running
            # statistics so, and another backward may run through what has kept these.
            data = [buffer.data for buffer in self._buffers_but_for(ahead)]
            broadcast_tensors(self._channel, data, self._mode.source, START_BYTES)

    def _buffers_but_for(self, others: Sequence[GradientSync]) -> list[Tensor]:
        """Return the buffers that others do not send."""
        sent = {
            id(buffer)
            for other in others
            if other._mode.buffers
            for buffer in other._roster.buffers()
        }
        return [buffer for buffer in self._roster.buffers() if id(buffer) not in sent]


def _reduce(taking: Sequence[GradientSync]) -> None:
    """Let several reduce, one after the other."""
    refused: Exception | None = None
    for one in taking:
        try:
            one._reduce()
        except (NotFinite, ValueError) as error:  # on all ranks, which go on with the next
            refused = refused or error
    if refused is not None:
        raise refused


def _forward_to(sync: GradientSync | None, index: int) -> None:
    if sync is not None:
        sync.ready(index)
