"""Run one stage of a pipeline, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .structure import Description, TensorSpec, put_together, take_apart

__all__ = ["Stage"]


class _Entry(torch.autograd.Function):
    """Let received tensors enter this stage's graph, and keep the gradients that come out there.

    A leaf would do, but for two things: layers may change its outputs in place, as they may in the
    unsplit model, and its gradients are handed over without a copy.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, door: _Door) -> tuple[Tensor, ...]:
        ctx.door = door
        ctx.set_materialize_grads(False)
        return tuple(door.tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        ctx.door.gradients = list(gradients)
        return None, None


class _Door:
    """What came in for one micro-batch and needs gradients, and the gradients once they are in."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.anchor: Tensor | None = None
        self.specs = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self.gradients: list[Tensor | None] = [None] * len(self.tensors)

    def enter(self) -> list[Tensor]:
        """Return the tensors as members of a graph."""
        if not self.tensors:
            return []
        self.anchor = torch.empty(0, requires_grad=True)
        entered = _Entry.apply(self.anchor, self)  # type: ignore[no-untyped-call]
        self.tensors = []
        return list(entered)

    def leave(self) -> list[Tensor]:
        """Return one gradient for every tensor that came in; zeros where it was not used."""
        pairs = zip(self.gradients, self.specs, strict=True)
        return [torch.zeros(s, dtype=d) if g is None else g for g, (s, d) in pairs]


@dataclass
class _InFlight:
    """What a micro-batch leaves behind between its forward and its backward."""

    door: _Door
    roots: list[Tensor]
    specs: tuple[TensorSpec, ...]
    gradients: list[Tensor] | None = None


class Stage:
    """Hold the layers of one stage, and the activations of the micro-batches in flight."""

    def __init__(self, module: nn.Module, index: int) -> None:
        self.module = module
        self.index = index
        self.peak_in_flight = 0
        self._in_flight: dict[int, _InFlight] = {}

    def forward(
        self, microbatch: int, description: Description, tensors: Sequence[Tensor]
    ) -> tuple[Any, Description, list[Tensor]]:
        """Run the layers, keeping what backward needs; return the output, whole and taken apart.

        Gradients will be kept for the tensors of `description` that need one.
        """
        specs = description.tensors
        door = _Door([t for t, spec in zip(tensors, specs, strict=True) if spec.needs_grad])
        entered = iter(door.enter())
        inputs = [next(entered) if s.needs_grad else t for t, s in zip(tensors, specs, strict=True)]
        output = self.module(put_together(description.skeleton, inputs))
        out, outputs = take_apart(output, f"output of stage {self.index}")
        roots = [tensor for tensor in outputs if tensor.requires_grad]
        needed = tuple(spec for spec in out.tensors if spec.needs_grad)
        self._in_flight[microbatch] = _InFlight(door, roots, needed)
        self.peak_in_flight = max(self.peak_in_flight, len(self._in_flight))
        return output, out, outputs

    def evaluate(self, description: Description, tensors: Sequence[Tensor]) -> Any:
        """Run the layers and keep nothing."""
        return self.module(put_together(description.skeleton, tensors))

    def begin_backward_at(self, microbatch: int, root: Tensor) -> None:
        """Let backward begin at `root`, such as a loss, instead of at the stage's outputs."""
        self._in_flight[microbatch].roots = [root] if root.requires_grad else []

    def holds(self, microbatch: int) -> bool:
        """Tell whether a micro-batch is between its forward and its backward."""
        return microbatch in self._in_flight

    def roots(self, microbatch: int) -> list[Tensor]:
        """Return the tensors at which backward begins."""
        return self._in_flight[microbatch].roots

    def expected_gradients(self, microbatch: int) -> tuple[TensorSpec, ...]:
        """Describe the gradients that the next stage sends back."""
        return self._in_flight[microbatch].specs

    def backward(self, microbatch: int, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Accumulate the parameters' gradients and return those of the tensors that came in."""
        flight = self._in_flight.pop(microbatch)
        if flight.roots:
            torch.autograd.backward(flight.roots, list(gradients))
        return flight.door.leave()

    def backward_input(self, microbatch: int, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the tensors that came in; the graph is kept for the weights."""
        flight = self._in_flight[microbatch]
        flight.gradients = list(gradients)
        anchor = flight.door.anchor
        if flight.roots and anchor is not None:
            torch.autograd.backward(
                flight.roots, flight.gradients, retain_graph=True, inputs=[anchor]
            )
        return flight.door.leave()

    def backward_weight(self, microbatch: int) -> None:
        """Accumulate the parameters' gradients, after `backward_input`.

        Gradients between the layers are computed a second time, since torch drops them.
        """
        flight = self._in_flight.pop(microbatch)
        assert flight.gradients is not None
        inputs = [p for p in self.module.parameters() if p.requires_grad]
        if flight.roots and inputs:
            torch.autograd.backward(flight.roots, flight.gradients, inputs=inputs)

    def drop(self, microbatch: int) -> None:
        """Forget a micro-batch that is not to be computed any further."""
        self._in_flight.pop(microbatch, None)

    def forget(self) -> None:
        """Drop what a failed step has left in flight."""
        self._in_flight.clear()
        self.peak_in_flight = 0
