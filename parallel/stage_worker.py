"""Execute the actions of one stage: compute, and exchange with the stages beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .actions import Action, Kind
from .batch import clone_tensors
from .gradient_messages import Returning, await_gradients, send_gradients
from .messages import Edge, HeaderWriter, Inbox, Outbox, flatten
from .replica_calls import ReplicaCalls
from .stage import Stage
from .stage_error import shown
from .structure import Description, put_together, take_apart

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from .random_keys import Samples

__all__ = ["Batch", "StageWorker"]


@dataclass
class Batch:
    """Hold one batch on its way through a stage, one entry per micro-batch.

    inputs: on the first stage.  targets: on the last stage.
    scales: what a micro-batch's loss is multiplied by before its gradient is taken.
    samples: where a micro-batch's rows are in the global batch, for random layers.
    judged: an evaluation is for the losses, and the outputs are let go.
    losses, outputs: filled on the last stage.
    """

    inputs: list[Any] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)
    judged: bool = False
    losses: dict[int, Tensor] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)


class StageWorker:
    """Run actions of one stage of `num_stages`, on rank `stage modulo channel.size`.

    channel, outbox: of the rank, shared by its stages.

    Attributes:
        lost: micro-batches whose input will not come, since a stage before has failed.
    """

    def __init__(
        self,
        stage: Stage,
        num_stages: int,
        channel: Communicator,
        outbox: Outbox,
        loss_fn: Callable[[Any, Any], Tensor] | None,
    ) -> None:
        index = stage.index
        self._stage = stage
        self._index = index
        self._channel = channel
        self._outbox = outbox
        self._loss_fn = loss_fn
        self._replica_calls = ReplicaCalls(stage, channel)
        self._is_last = index == num_stages - 1
        self._before = Edge(index - 1, num_stages)
        self._after = Edge(index, num_stages)
        self._source = (index - 1) % channel.size
        self._target = (index + 1) % channel.size
        self._headers = HeaderWriter(outbox, self._target, self._after)
        self._device = stage.device
        self._inbox = None
        if index > 0:
            self._inbox = Inbox(channel, self._source, self._before, device=self._device)
        self._gradients: dict[int, Returning] = {}
        self._came: dict[int, Description] = {}
        self._inputs: dict[int, list[Tensor]] = {}
        self.lost: set[int] = set()
        self._execute = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.INPUT: self._backward_input,
            Kind.WEIGHT: self._backward_weight,
        }

    def begin(self, num_microbatches: int) -> None:
        """Forget what a run before has left, and await the inputs of so many micro-batches."""
        self._stage.forget()
        self._gradients.clear()
        self._came.clear()
        self._inputs.clear()
        self.lost.clear()
        if self._inbox is not None:
            self._inbox.expect(num_microbatches)

    @property
    def num_in_flight(self) -> int:
        """Return the number of micro-batches whose activations are kept."""
        return self._stage.num_in_flight

    def execute(self, action: Action, batch: Batch) -> None:
        """Compute an action, and send what others wait for."""
        with self._replica_calls.noted(action.kind):
            self._execute[action.kind](action.microbatch, batch)

    def prefetch(self) -> None:
        """Begin to receive the inputs that have been announced."""
        if self._inbox is not None:
            self._inbox.prefetch()

    def receive_ahead(self, coming: Action) -> None:
        """Post the receive of what a coming action needs, so that it arrives meanwhile."""
        microbatch = coming.microbatch
        if self._is_last or coming.kind not in (Kind.BACKWARD, Kind.INPUT):
            return
        if self._stage.holds(microbatch) and microbatch not in self._gradients:
            self._gradients[microbatch] = await_gradients(
                self._channel,
                self._stage.expected_gradients(microbatch),
                self._target,
                self._after,
                microbatch,
                self._device,
            )

    def receive(self, microbatch: int) -> None:
        """Wait for the input of a micro-batch, or for the word that there is none."""
        if self._inbox is None:
            return
        received = self._inbox.take(microbatch)
        if received is None:
            self.lost.add(microbatch)
            return
        self._came[microbatch] = received.description
        self._inputs[microbatch] = received.wait()

    def go_hollow(self, action: Action) -> None:
        """Take and send the messages of an action that is not, or not wholly, executed.

        And take part in what its layers would call.
        """
        self._exchange_nothing(action)
        self._replica_calls.join(action.kind)

    def _exchange_nothing(self, action: Action) -> None:
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
                # Zeros, not none: the stages before go on with their part, norms included.
                specs = [spec for spec in came.tensors if spec.needs_grad]
                zeros = [
                    torch.zeros(s.shape, dtype=s.torch_dtype, device=self._device) for s in specs
                ]
                self._send_back(microbatch, zeros)
        self._stage.drop(microbatch)

    def given(self, microbatch: int, batch: Batch) -> str:
        """Say in words what an action of this micro-batch works on."""
        came = self._came.get(microbatch)
        if came is None:
            return "after it had handed its gradients back"
        source = "the batch" if self._inbox is None else f"stage {self._index - 1}"
        text = f"input from {source}: {shown(put_together(came.skeleton, came.tensors))}"
        if self._is_last and batch.targets:
            text += f", target: {shown(batch.targets[microbatch])}"
        return text

    def evaluate(self, action: Action, batch: Batch) -> None:
        """Run a forward that keeps nothing for a backward."""
        microbatch = action.microbatch
        description, tensors = self._take_input(microbatch, batch)
        with self._replica_calls.noted(Kind.FORWARD):
            output = self._stage.evaluate(description, tensors, batch.samples[microbatch])
        if not self._is_last:
            self._send_on(microbatch, *take_apart(output, f"output of stage {self._index}"))
            return
        if batch.judged:
            batch.losses[microbatch] = self._loss_of(output, batch.targets[microbatch]).clone()
            return
        if len(batch.outputs) < len(batch.samples) - 1:
            # It may be memory of its layer's own, that the next micro-batch is written to.
            output = clone_tensors(output, "output of the last stage")
        batch.outputs.append(output)

    def _take_input(self, microbatch: int, batch: Batch) -> tuple[Description, list[Tensor]]:
        if self._inbox is not None:
            return self._came[microbatch], self._inputs.pop(microbatch)
        description, tensors = take_apart(batch.inputs[microbatch], "x")
        # The batch is data: a gradient for it would go nowhere.
        self._came[microbatch] = description = description.without_gradients()
        return description, [tensor.detach() for tensor in tensors]

    def _send_on(self, microbatch: int, out: Description, outputs: Sequence[Tensor]) -> None:
        flat = flatten(_steady(outputs, out), self._device)
        self._headers.write(microbatch, out)
        if flat.numel():
            tag = self._after.payload_tag(microbatch, backward=False)
            self._outbox.post(flat, self._target, tag)

    def _forward(self, microbatch: int, batch: Batch) -> None:
        description, tensors = self._take_input(microbatch, batch)
        output, out, outputs = self._stage.forward(
            microbatch,
            description,
            tensors,
            batch.samples[microbatch],
            hands_on=not self._is_last,
        )
        if not self._is_last:
            self._stage.end_at_outputs(microbatch)
            self._send_on(microbatch, out, outputs)
            return
        loss = self._loss_of(output, batch.targets[microbatch])
        if not loss.requires_grad and self._stage.needs_gradients(description):
            raise TypeError(
                "the loss needs no gradient, although parameters do: is step called under "
                "torch.no_grad(), or does loss_fn detach?"
            )
        self._stage.begin_backward_at(microbatch, loss)
        batch.losses[microbatch] = loss.detach().clone()  # its owner may write to it meanwhile

    def _loss_of(self, output: Any, target: Any) -> Tensor:
        assert self._loss_fn is not None
        loss = self._loss_fn(output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"expected loss_fn to return a tensor of one element, got {shown(loss)}"
            )
        return loss

    def _backward(self, microbatch: int, batch: Batch) -> None:
        gradients = self._take_gradients(microbatch, batch)
        self._send_back(microbatch, self._stage.backward(microbatch, gradients))

    def _backward_input(self, microbatch: int, batch: Batch) -> None:
        gradients = self._take_gradients(microbatch, batch)
        self._send_back(microbatch, self._stage.backward_input(microbatch, gradients))

    def _backward_weight(self, microbatch: int, batch: Batch) -> None:
        self._stage.backward_weight(microbatch)

    def _take_gradients(self, microbatch: int, batch: Batch) -> Sequence[Tensor | None]:
        if self._is_last:
            scale = batch.scales[microbatch]
            return [torch.full_like(root, scale) for root in self._stage.roots(microbatch)]
        return self._gradients.pop(microbatch).wait()

    def _send_back(self, microbatch: int, gradients: Sequence[Tensor | None]) -> None:
        specs = [spec for spec in self._came[microbatch].tensors if spec.needs_grad]
        send_gradients(
            self._outbox, gradients, specs, self._source, self._before, microbatch, self._device
        )
        del self._came[microbatch]


def _steady(outputs: Sequence[Tensor], out: Description) -> Sequence[Tensor]:
    """Return what a stage hands on, in memory that nobody writes to while it is sent.

    Several tensors are copied together anyway. A single one may be a cache of its layer's, or part
    of one, that the next micro-batch is written to, unless autograd watches over it.
    """
    if len(outputs) != 1 or out.tensors[0].needs_grad:
        return outputs
    return [outputs[0].clone()]
