"""Tell what a forward draws next, and what it has drawn when torch.utils.checkpoint repeats it.

A checkpoint runs a part of a forward again within a backward. That a backward is running is all
that tells a repetition from the first run, and only a `context_fn` tells which part is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Draws", "Samples"]


@dataclass(frozen=True, slots=True)
class Samples:
    """Say which samples are going through: rows [first, first + rows) of a step's global batch."""

    step: int
    first: int
    rows: int


@dataclass(slots=True)
class Draws:
    """Count what one random layer draws in one forward.

    calls: so far.
    since: the number of autograd's next node when the forward began; 0 where whoever runs the
        backward has made sure that these draws belong to its graph.
    knows_place: whether `calls` stands where a checkpoint began, as its `context_fn` has noted.
    """

    samples: Samples
    calls: int = 0
    since: int = 0
    knows_place: bool = False

    @classmethod
    def begin(cls, samples: Samples) -> Draws:
        """Return those of a forward that begins now."""
        return cls(samples, since=torch._C._autograd._get_sequence_nr())

    def next_call(self, layer: str) -> int:
        """Return the number of the call that runs; a repeated call has the number it had before.

        RuntimeError where it cannot be known which call is repeated.
        """
        if torch._C._current_graph_task_id() == -1 or self.knows_place:
            self.calls += 1
            return self.calls - 1
        node = torch._C._current_autograd_node()
        if self.calls == 0 or (node is not None and node._sequence_nr() < self.since):
            raise RuntimeError(
                f"dropout {layer!r} is called within the backward of another forward than that of "
                "its samples, as by torch.utils.checkpoint: run each backward before show_samples "
                f"tells of the next samples, or {_REMEDY}"
            )
        if self.calls > 1:
            raise RuntimeError(
                f"dropout {layer!r} has been called {self.calls} times in a forward, and is called "
                "again within the backward, as by torch.utils.checkpoint, which does not say which "
                f"of them it repeats: take a Dropout of its own for every place, or {_REMEDY}"
            )
        return 0


_REMEDY = (
    "checkpoint with use_reentrant=False and context_fn=ringfold.parallel.same_masks(module), the "
    "module that holds it"
)
