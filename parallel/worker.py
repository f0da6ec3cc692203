"""Execute a plan on one stage: compute, and exchange with the stages beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comm.errors import CommError
from ..comm.timeline import COMPUTE, span
from .actions import Action, Kind
from .messages import Edge, HeaderWriter, Inbox, Outbox, Received, flatten, start_receive
from .random_keys import show_samples
from .stage import Stage
from .stage_error import Failure, shown
from .structure import Description, put_together, take_apart

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from .random_keys import Samples
    from .reducer import Reducer
    from .tree_gradients import TreeGradients

__all__ = ["Batch", "Worker"]

# How many actions ahead of its own a stage begins to receive.
_AHEAD = 2


@dataclass
class Batch:
    """Hold one batch on its way through a stage, one entry per micro-batch.

    inputs: on the first stage.  targets: on the last stage.
    scales: what a micro-batch's loss is multiplied by before its gradient is taken.
    samples: where a micro-batch's rows are in the global batch, for random layers.
    losses, outputs: filled on the last stage, by training and by evaluation.
    """

    inputs: list[Any] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)


class Worker:
    """Run actions of one stage.

    channel: a communicator of the engine's own over the stages, since its tags must not meet the
        user's.
    reducer: begun before the last backward, so that the stage's gradients are reduced over replicas
        while other stages still work; whoever runs the plan finishes it.
    tree: given every micro-batch's gradients by themselves; begun and finished by whoever runs the
        plan.

    Attributes:
        failure: what made this stage go on hollow in the last run, as `stage_error` has it.
    """

    def __init__(
        self,
        stage: Stage,
        channel: Communicator,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        reducer: Reducer | None,
        tree: TreeGradients | None = None,
    ) -> None:
        self._stage = stage
        self._index = stage.index
        self._channel = channel
        self._loss_fn = loss_fn
        self._reducer = reducer
        self._tree = tree
        self._is_last = stage.index == channel.size - 1
        self._before = Edge(stage.index - 1, channel.size)
        self._after = Edge(stage.index, channel.size)
        self._outbox = Outbox(channel)
        self._headers = HeaderWriter(self._outbox, stage.index + 1, self._after)
        self._inbox = Inbox(channel, stage.index - 1, self._before) if stage.index > 0 else None
        self._gradients: dict[int, Received] = {}
        self._came: dict[int, Description] = {}
        self._lost: set[int] = set()
        self._inputs: dict[int, list[Tensor]] = {}
        self.failure: Failure | None = None
        self._last_backward: Action | None = None

    def train(self, plan: Sequence[Action], batch: Batch) -> None:
        """Run forwards and backwards; returns when everything has been received and sent."""
        backwards = [action for action in plan if action.kind in (Kind.BACKWARD, Kind.WEIGHT)]
        self._last_backward = backwards[-1] if backwards else None
        self._stage.forget()
        self._gradients.clear()
        execute = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.INPUT: self._backward_input,
            Kind.WEIGHT: self._backward_weight,
        }
        self._run(plan, batch, execute)

    def evaluate(self, num_microbatches: int, batch: Batch) -> None:
        """Run forwards that keep nothing for a backward."""
        plan = tuple(Action(Kind.FORWARD, m, self._index) for m in range(num_microbatches))
        with torch.no_grad():
            self._run(plan, batch, {Kind.FORWARD: self._evaluate})

    def _run(
        self,
        plan: Sequence[Action],
        batch: Batch,
        execute: Mapping[Kind, Callable[[int, Batch], None]],
    ) -> None:
        if self._inbox is not None:
            self._inbox.expect(sum(action.kind is Kind.FORWARD for action in plan))
        self.failure = None
        self._came.clear()
        self._lost.clear()
        for position, action in enumerate(plan):
            self._receive_ahead(plan[position : position + 1 + _AHEAD])
            if action.kind is Kind.FORWARD:
                self._receive(action.microbatch)
            if self.failure is None and action.microbatch not in self._lost:
                try:
                    with span(self._channel.timeline, COMPUTE, str(action)):
                        execute[action.kind](action.microbatch, batch)
                except CommError:
                    raise
                except Exception as error:
                    given = self._given(action.microbatch, batch)
                    self.failure = Failure(action, given, error)
                else:
                    continue
            self._go_hollow(action)
        self._outbox.drain()

    def _go_hollow(self, action: Action) -> None:
        """Take and send the messages of an action that is not, or not wholly, executed."""
        microbatch = action.microbatch
        if action.kind is Kind.FORWARD:
            self._inputs.pop(microbatch, None)
            self._stage.drop(microbatch)
            if not self._is_last:
                self._headers.write_lost(microbatch)
            return
        if action.kind is not Kind.WEIGHT:
            if microbatch in self._gradients:
                self._gradients.pop(microbatch).wait()
            came = self._came.get(microbatch)
            if came is not None:
                specs = [spec for spec in came.tensors if spec.needs_grad]
                self._send_back(
                    microbatch, [torch.zeros(s.shape, dtype=s.torch_dtype) for s in specs]
                )
        self._stage.drop(microbatch)
        if action.kind is Kind.INPUT:
            return
        if self._tree is not None:
            self._tree.take(microbatch)
        if self._reducer is not None and action == self._last_backward:
            if not self._reducer.active:
                self._reducer.begin()
            self._reducer.flush()

    def _given(self, microbatch: int, batch: Batch) -> str:
        came = self._came.get(microbatch)
        if came is None:
            return "after it had handed its gradients back"
        source = "the batch" if self._inbox is None else f"stage {self._index - 1}"
        text = f"input from {source}: {shown(put_together(came.skeleton, came.tensors))}"
        if self._is_last and batch.targets:
            text += f", target: {shown(batch.targets[microbatch])}"
        return text

    def _receive_ahead(self, coming: Sequence[Action]) -> None:
        """Post the receives of this and the next actions, so that they arrive while it computes."""
        if self._inbox is not None:
            self._inbox.prefetch()
        if self._is_last:
            return
        for action in coming:
            microbatch = action.microbatch
            sent_back = action.kind in (Kind.BACKWARD, Kind.INPUT)
            wanted = sent_back and self._stage.holds(microbatch)
            if wanted and microbatch not in self._gradients:
                self._gradients[microbatch] = start_receive(
                    self._channel,
                    Description((), self._stage.expected_gradients(microbatch)),
                    self._index + 1,
                    self._after.payload_tag(microbatch, backward=True),
                )

    def _receive(self, microbatch: int) -> None:
        """Wait for the input of a micro-batch, or for the word that there is none."""
        if self._inbox is None:
            return
        received = self._inbox.take(microbatch)
        if received is None:
            self._lost.add(microbatch)
            return
        self._came[microbatch] = received.description
        self._inputs[microbatch] = received.wait()

    def _take_input(self, microbatch: int, batch: Batch) -> tuple[Description, list[Tensor]]:
        if self._inbox is not None:
            return self._came[microbatch], self._inputs.pop(microbatch)
        description, tensors = take_apart(batch.inputs[microbatch], "x")
        # The batch is data: a gradient for it would go nowhere.
        self._came[microbatch] = description = description.without_gradients()
        return description, [tensor.detach() for tensor in tensors]

    def _send_on(self, microbatch: int, out: Description, outputs: Sequence[Tensor]) -> None:
        flat = flatten(outputs)
        self._headers.write(microbatch, out)
        if flat.numel():
            tag = self._after.payload_tag(microbatch, backward=False)
            self._outbox.post(flat, self._index + 1, tag)

    def _forward(self, microbatch: int, batch: Batch) -> None:
        description, tensors = self._take_input(microbatch, batch)
        show_samples(self._stage.module, batch.samples[microbatch])
        output, out, outputs = self._stage.forward(microbatch, description, tensors)
        if not self._is_last:
            self._send_on(microbatch, out, outputs)
            return
        assert self._loss_fn is not None
        loss = self._loss_fn(output, batch.targets[microbatch])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"expected loss_fn to return a tensor of one element, got {loss!r}")
        self._stage.begin_backward_at(microbatch, loss)
        batch.losses[microbatch] = loss.item()

    def _evaluate(self, microbatch: int, batch: Batch) -> None:
        output = self._stage.evaluate(*self._take_input(microbatch, batch))
        if self._is_last:
            batch.outputs.append(output)
        else:
            where = f"output of stage {self._index}"
            self._send_on(microbatch, *take_apart(output, where))

    def _backward(self, microbatch: int, batch: Batch) -> None:
        with self._accumulating(Action(Kind.BACKWARD, microbatch, self._index)):
            gradients = self._take_gradients(microbatch, batch)
            self._send_back(microbatch, self._stage.backward(microbatch, gradients))

    def _backward_input(self, microbatch: int, batch: Batch) -> None:
        gradients = self._take_gradients(microbatch, batch)
        self._send_back(microbatch, self._stage.backward_input(microbatch, gradients))

    def _backward_weight(self, microbatch: int, batch: Batch) -> None:
        with self._accumulating(Action(Kind.WEIGHT, microbatch, self._index)):
            self._stage.backward_weight(microbatch)

    @contextmanager
    def _accumulating(self, action: Action) -> Iterator[None]:
        """Hand on what this action adds to the parameters' gradients."""
        completes = self._reducer if action == self._last_backward else None
        if completes is not None:
            completes.begin()
        yield
        if self._tree is not None:
            self._tree.take(action.microbatch)
        if completes is not None:
            completes.flush()

    def _take_gradients(self, microbatch: int, batch: Batch) -> list[Tensor]:
        if self._is_last:
            scale = batch.scales[microbatch]
            return [torch.full_like(root, scale) for root in self._stage.roots(microbatch)]
        return self._gradients.pop(microbatch).wait()

    def _send_back(self, microbatch: int, gradients: Sequence[Tensor]) -> None:
        flat = flatten(gradients)
        del self._came[microbatch]
        if flat.numel():
            tag = self._before.payload_tag(microbatch, backward=True)
            self._outbox.post(flat, self._index - 1, tag)
