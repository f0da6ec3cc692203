"""Execute one rank's row of a plan, on the stages that the rank has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..comm.errors import CommError
from ..comm.timeline import COMPUTE, span
from .actions import Action, Kind
from .batch import join_rows
from .messages import Outbox
from .stage_error import Failure, shown
from .stage_worker import Batch, StageWorker

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from ..comm.communicator import Communicator
    from .finite import FiniteCheck
    from .reducer import Reducer
    from .stage import Stage
    from .tree_gradients import TreeGradients

__all__ = ["Worker"]

# How many actions ahead of its own a rank begins to receive.
_AHEAD = 2


class Worker:
    """Run actions of a rank's stages.

    channel: a communicator of the engine's own over the stages' ranks, since its tags must not meet
        the user's.
    reducer: begun before a stage's last backward, so that gradients are reduced over replicas while
        other stages still work; whoever runs the plan finishes it.
    tree: given every micro-batch's gradients by themselves, stage by stage; begun and finished by
        whoever runs the plan.
    finite: looks at a stage's gradients after each of its backwards; whoever runs the plan lets it
        agree.

    Attributes:
        failure: what made this rank go on hollow in the last run, as `stage_error` has it.
        peak_in_flight: the most micro-batches of the last run whose activations were kept at once.
        completing: the stages whose last backward runs or has run.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        num_stages: int,
        channel: Communicator,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        reducer: Reducer | None,
        tree: TreeGradients | None,
        finite: FiniteCheck | None,
    ) -> None:
        self._channel = channel
        self._outbox = Outbox(channel)
        self._stages = {
            stage.index: StageWorker(stage, num_stages, channel, self._outbox, loss_fn)
            for stage in stages
        }
        self._reducer = reducer
        self._tree = tree
        self._finite = finite
        self._modules = {stage.index: stage.module for stage in stages}
        self._last_stage = num_stages - 1
        self.failure: Failure | None = None
        self.peak_in_flight = 0
        self.completing: set[int] = set()
        self._broken: BaseException | None = None

    def require_whole(self) -> None:
        """Raise CommError after a run that was broken off, or where the channel is closed.

        What the former has left under way has the tags of the next run, and would be taken for
        that one's.
        """
        if self._broken is not None:
            raise CommError(
                f"a step or an evaluation of this pipeline was broken off by "
                f"{type(self._broken).__name__}, with messages under way: make the pipeline anew "
                "over a fresh group"
            ) from self._broken
        self._channel.require_open()

    @contextmanager
    def _to_the_end(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # Ctrl-C, or what a signal's handler raises, too
            self._break_off(error)
            raise

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Hold what ranks do together after a run, such as to learn of its failures."""
        try:
            yield
        except ValueError:  # on all ranks
            raise
        except BaseException as error:
            self._break_off(error)
            raise

    def _break_off(self, error: BaseException) -> None:
        """Let nothing run any more; let an error of the world name the failure it came after."""
        self._broken, failure = error, self.failure
        if failure is not None and isinstance(error, CommError):
            error.args = (f"{failure}; then {error}", *error.args[1:])
            error.__cause__ = failure.error

    def train(self, plan: Sequence[Action], batch: Batch) -> None:
        """Run forwards and backwards; returns when everything has been received and sent."""
        with self._to_the_end():
            self._train(plan, batch)

    def _train(self, plan: Sequence[Action], batch: Batch) -> None:
        last = {a.stage: a for a in plan if a.kind in (Kind.BACKWARD, Kind.WEIGHT)}
        self._begin(plan)
        for position, action in enumerate(plan):
            self._receive(plan, position)
            if last.get(action.stage) == action:
                self.completing.add(action.stage)
                if self._reducer is not None and not self._reducer.active:
                    self._reducer.begin()
            stage = self._stages[action.stage]
            if self._finite is not None:
                self._finite.microbatch = action.microbatch
                self._finite.place = self._last_stage - action.stage
            self._attempt(action, batch, stage.execute)
            if self._finite is not None and action.kind in (Kind.BACKWARD, Kind.WEIGHT):
                self._finite.look_at(self._modules[action.stage])
            self.peak_in_flight = max(
                self.peak_in_flight, sum(s.num_in_flight for s in self._stages.values())
            )
            if self._tree is not None and action.kind in (Kind.BACKWARD, Kind.WEIGHT):
                self._tree.take(action.microbatch, action.stage)
        if self._reducer is not None and self._reducer.active:
            self._reducer.flush()
        self._outbox.drain()

    def evaluate(self, num_microbatches: int, batch: Batch) -> None:
        """Run forwards that keep nothing for a backward."""
        with self._to_the_end(), torch.no_grad():
            self._evaluate(num_microbatches, batch)

    def _evaluate(self, num_microbatches: int, batch: Batch) -> None:
        plan = [Action(Kind.FORWARD, m, s) for s in self._stages for m in range(num_microbatches)]
        self._begin(plan)
        for position, action in enumerate(plan):
            self._receive(plan, position)
            stage = self._stages[action.stage]
            self._attempt(action, batch, stage.evaluate)
        self._outbox.drain()

    def join(self, batch: Batch, where: str) -> Any:
        """Return the outputs of an evaluation joined; None where that fails, as `failure` says."""
        try:
            return join_rows(batch.outputs, where)
        except (TypeError, ValueError, RuntimeError) as error:
            last = Action(Kind.FORWARD, len(batch.outputs) - 1, self._last_stage)
            self.failure = Failure(last, f"outputs: {shown(batch.outputs)}", error)
            return None

    def _begin(self, plan: Sequence[Action]) -> None:
        self.failure = None
        self.peak_in_flight = 0
        self.completing.clear()
        for index, stage in self._stages.items():
            stage.begin(sum(a.kind is Kind.FORWARD and a.stage == index for a in plan))

    def _receive(self, plan: Sequence[Action], position: int) -> None:
        """Take what this action needs, and begin to receive for the next ones."""
        action = plan[position]
        for stage in self._stages.values():
            stage.prefetch()
        for coming in plan[position : position + 1 + _AHEAD]:
            self._stages[coming.stage].receive_ahead(coming)
        if action.kind is Kind.FORWARD:
            self._stages[action.stage].receive(action.microbatch)

    def _attempt(self, action: Action, batch: Batch, run: Callable[[Action, Batch], None]) -> None:
        """Run an action; once one has failed on this rank, go on hollow."""
        stage = self._stages[action.stage]
        if self.failure is None and action.microbatch not in stage.lost:
            try:
                with span(
                    self._channel.timeline,
                    COMPUTE,
                    str(action) if len(self._stages) == 1 else action.placed,
                ):
                    run(action, batch)
            except CommError:
                raise
            except Exception as error:
                self.failure = Failure(action, stage.given(action.microbatch, batch), error)
            else:
                return
        stage.go_hollow(action)
