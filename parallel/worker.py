"""Execute a plan on one stage: compute, and exchange with the stages beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .actions import Action, Kind
from .messages import Edge, HeaderWriter, Inbox, Outbox, Received, flatten, start_receive
from .random_keys import show_samples
from .stage import Stage
from .structure import Description, take_apart

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
        for position, action in enumerate(plan):
            self._receive_ahead(plan[position : position + 1 + _AHEAD])
            execute[action.kind](action.microbatch, batch)
        self._outbox.drain()

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

    def _take_input(self, microbatch: int, batch: Batch) -> tuple[Description, list[Tensor]]:
        if self._inbox is not None:
            received = self._inbox.take(microbatch)
            return received.description, received.wait()
        description, tensors = take_apart(batch.inputs[microbatch], "x")
        # The batch is data: a gradient for it would go nowhere.
        return description.without_gradients(), [tensor.detach() for tensor in tensors]

    def _send_on(self, microbatch: int, out: Description, outputs: Sequence[Tensor]) -> None:
        self._headers.write(microbatch, out)
        flat = flatten(outputs)
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
        if flat.numel():
            tag = self._before.payload_tag(microbatch, backward=True)
            self._outbox.post(flat, self._index - 1, tag)
