"""Run a forward a second time as it was the first time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .buffer_copies import BufferCopies
from .generators import GeneratorStates
from .random_keys import show_samples
from .structure import Description

if TYPE_CHECKING:
    from .random_keys import Samples, Shown

__all__ = ["Replay"]


class Replay:
    """Hold what a forward of `module` depends on, from just before it runs.

    That is its input, the samples that keyed layers were shown, the states of torch's generators,
    and the buffers, such as running statistics, of which copies are kept.

    before: an earlier one that is still held, to share the copies of unchanged buffers with.
    """

    def __init__(
        self,
        module: nn.Module,
        description: Description,
        tensors: list[Tensor],
        samples: Samples,
        before: Replay | None = None,
    ) -> None:
        self.description = description
        self.tensors = tensors
        self._module = module
        self._samples = samples
        self._generators = self._states()
        held = None if before is None else before._buffers
        self._buffers: BufferCopies = BufferCopies(module.modules(), held)

    def look(self) -> None:
        """Take notice of what the forward has changed, once it has run."""
        self._buffers.look()

    @contextmanager
    def again(self) -> Iterator[Shown]:
        """Let a forward within this context be the same, and leave no trace on state.

        Yields what keyed layers are shown for it. Buffers change on copies, so that running
        statistics count a micro-batch once.
        """
        generators = self._states()
        shown = show_samples(self._module, self._samples)
        self._generators.restore()
        try:
            with self._buffers.in_place():
                yield shown
        finally:
            generators.restore()

    def _states(self) -> GeneratorStates:
        return GeneratorStates((*self.tensors, *self._module.parameters()))
