"""Run one stage of a pipeline, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .random_keys import Shown, show_again, show_samples
from .recompute import Replay
from .shared_weights import SharedWeights
from .split_backward import SplitBackward
from .structure import Description, TensorSpec, put_together, take_apart

if TYPE_CHECKING:
    from .random_keys import Samples
    from .ties import Tie

__all__ = ["Stage"]


class _Entry(torch.autograd.Function):
    """Let received tensors enter this stage's graph, and keep the gradients that come out there.

    A leaf would do, but for two things: layers may change its outputs in place, as they may in the
    unsplit model, and its gradients are handed over without a copy.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, door: _Door) -> tuple[Tensor, ...]:
        # Not the door, which knows this node: in a cycle, all would live until the collector runs.
        ctx.arrived = door.gradients
        ctx.set_materialize_grads(False)
        return tuple(door.tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        ctx.arrived[:] = gradients
        return None, None


class _Door:
    """What came in for one micro-batch and needs gradients, and the gradients once they are in.

    One for every tensor; None where it was not used.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.anchor: Tensor | None = None
        self.node: Any = None
        self.gradients: list[Tensor | None] = [None] * len(self.tensors)

    def enter(self) -> list[Tensor]:
        """Return the tensors as members of a graph."""
        if not self.tensors:
            return []
        self.anchor = torch.empty(0, device="cpu", requires_grad=True)
        entered = _Entry.apply(self.anchor, self)  # type: ignore[no-untyped-call]
        self.tensors = []
        # Noted now: layers may change an entered tensor in place, which gives it another node.
        self.node = entered[0].grad_fn
        return list(entered)


@dataclass
class _InFlight:
    """What a micro-batch leaves behind between its forward and its backward.

    shown: what random layers were shown, and have drawn.
    replay: how to make the graph again, and until then there is none.
    after: where the outputs entered the graph of the loss, which is then one of its own.
    """

    door: _Door
    shown: Shown
    roots: list[Tensor]
    specs: tuple[TensorSpec, ...]
    replay: Replay | None = None
    after: _Door | None = None
    split: SplitBackward | None = None
    rest: tuple[list[Tensor], list[Tensor]] | None = None


class Stage:
    """Hold the layers of one stage, and the activations of the micro-batches in flight.

    recompute: keep what comes in alone, and run the layers again before the backward.
    device: where what comes from other stages lies, and what goes to them.
    ties: of all layers of the model.  elsewhere: its parameters on other ranks, with their names.
    """

    def __init__(
        self,
        module: nn.Module,
        index: int,
        recompute: bool,
        device: torch.device,
        ties: Sequence[Tie],
        elsewhere: Mapping[nn.Parameter, str],
    ) -> None:
        self.module = module
        self._shared = SharedWeights(ties, set(module.parameters()), elsewhere)
        self.index = index
        self.recompute = recompute
        self.device = device
        self._in_flight: dict[int, _InFlight] = {}

    def forward(
        self,
        microbatch: int,
        description: Description,
        tensors: Sequence[Tensor],
        samples: Samples,
        *,
        hands_on: bool = True,
    ) -> tuple[Any, Description, list[Tensor]]:
        """Run the layers, keeping what backward needs; return the output, whole and taken apart.

        Gradients will be kept for the tensors of `description` that need one. samples: for random
        layers. hands_on: whether another stage gets the output; a loss may take what cannot be
        taken apart.
        """
        replay = None
        if self.recompute:
            held = (flight.replay for flight in reversed(self._in_flight.values()))
            before = next(filter(None, held), None)
            replay = Replay(self.module, description, list(tensors), samples, before)
            tensors = [tensor.clone() for tensor in tensors]  # layers may change them in place
        shown = show_samples(self.module, samples)
        output, door = self._run(description, tensors)
        if replay is not None:
            replay.look()
        if replay is None and not hands_on:
            self._in_flight[microbatch] = _InFlight(door, shown, [], ())
            return output, Description((), ()), []
        out, outputs = take_apart(output, f"output of stage {self.index}")
        roots = [tensor for tensor in outputs if tensor.requires_grad]
        needed = tuple(spec for spec in out.tensors if spec.needs_grad)
        flight = _InFlight(door, shown, roots, needed, replay)
        if replay is not None:
            outputs = [tensor.detach() for tensor in outputs]
            flight.door, flight.roots = _Door([]), []
            flight.after = _Door(
                [t for t, s in zip(outputs, out.tensors, strict=True) if s.needs_grad]
            )
            output = put_together(out.skeleton, _enter(flight.after, outputs, out.tensors))
        self._in_flight[microbatch] = flight
        return output, out, outputs

    def evaluate(
        self, description: Description, tensors: Sequence[Tensor], samples: Samples
    ) -> Any:
        """Run the layers and keep nothing."""
        show_samples(self.module, samples)
        return self.module(put_together(description.skeleton, tensors))

    def needs_gradients(self, description: Description) -> bool:
        """Tell whether a backward has something to do: for parameters, or for what came in."""
        came = any(spec.needs_grad for spec in description.tensors)
        return came or any(p.requires_grad for p in self.module.parameters())

    def begin_backward_at(self, microbatch: int, root: Tensor) -> None:
        """Let backward begin at `root`, such as a loss, instead of at the stage's outputs."""
        self._in_flight[microbatch].roots = [root] if root.requires_grad else []

    def end_at_outputs(self, microbatch: int) -> None:
        """Let backward begin at the stage's outputs, with gradients that others will send."""
        self._in_flight[microbatch].after = None

    @property
    def num_in_flight(self) -> int:
        """Return the number of micro-batches between their forward and their backward."""
        return len(self._in_flight)

    def holds(self, microbatch: int) -> bool:
        """Tell whether a micro-batch is between its forward and its backward."""
        return microbatch in self._in_flight

    def roots(self, microbatch: int) -> list[Tensor]:
        """Return the tensors at which backward begins, on the stage that has a loss."""
        return self._in_flight[microbatch].roots

    def expected_gradients(self, microbatch: int) -> tuple[TensorSpec, ...]:
        """Describe the gradients that the next stage sends back."""
        return self._in_flight[microbatch].specs

    def backward(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Accumulate the parameters' gradients and return those of the tensors that came in."""
        flight = self._in_flight.pop(microbatch)
        show_again(flight.shown)
        with self._shared.backward():
            roots, ends = self._graph(flight, gradients)
            if roots:
                torch.autograd.backward(roots, ends)
        return flight.door.gradients

    def backward_input(
        self, microbatch: int, gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return the gradients of the tensors that came in; what the weights need is kept."""
        flight = self._in_flight[microbatch]
        show_again(flight.shown)
        with self._shared.backward():
            roots, ends = self._graph(flight, gradients)
            if roots and flight.door.anchor is not None:
                flight.split = SplitBackward(roots, ends, flight.door.node, flight.door.anchor)
                flight.split.to_input()
            else:
                flight.rest = roots, ends
        return flight.door.gradients

    def backward_weight(self, microbatch: int) -> None:
        """Accumulate the parameters' gradients, after `backward_input`."""
        flight = self._in_flight.pop(microbatch)
        show_again(flight.shown)
        with self._shared.backward():
            if flight.split is not None:
                flight.split.to_weights()
            elif flight.rest is not None and flight.rest[0]:
                torch.autograd.backward(*flight.rest)

    def drop(self, microbatch: int) -> None:
        """Forget a micro-batch that is not to be computed any further."""
        self._in_flight.pop(microbatch, None)

    def forget(self) -> None:
        """Drop what a failed step has left in flight."""
        self._in_flight.clear()

    def _run(self, description: Description, tensors: Sequence[Tensor]) -> tuple[Any, _Door]:
        specs = description.tensors
        door = _Door([t for t, spec in zip(tensors, specs, strict=True) if spec.needs_grad])
        inputs = _enter(door, tensors, specs)
        return self.module(put_together(description.skeleton, inputs)), door

    def _graph(
        self, flight: _InFlight, gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return where backward begins in the graph of the layers, made again if need be."""
        replay, flight.replay = flight.replay, None
        roots = flight.roots
        if replay is not None:
            if flight.after is not None:
                if roots:
                    torch.autograd.backward(roots, gradients)
                gradients = flight.after.gradients
            with replay.again() as flight.shown:
                output, flight.door = self._run(replay.description, replay.tensors)
            _, outputs = take_apart(output, f"output of stage {self.index}")
            roots = [tensor for tensor in outputs if tensor.requires_grad]
        pairs = [(r, g) for r, g in zip(roots, gradients, strict=True) if g is not None]
        return [root for root, _ in pairs], [gradient for _, gradient in pairs]


def _enter(door: _Door, tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Return the tensors, with those that need a gradient as members of a graph."""
    entered = iter(door.enter())
    return [next(entered) if s.needs_grad else t for t, s in zip(tensors, specs, strict=True)]
