"""Notice that a module got other parameters than those that are synchronised."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn

__all__ = ["Roster"]


class Roster:
    """Remember which parameters a module has.

    A parameter that was added or replaced later would train on each rank by itself, without a
    word: nobody waits for its gradient.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known = {id(parameter) for parameter in module.parameters()}
        self._note()

    def check(self) -> None:
        """Raise RuntimeError naming what is new; a few microseconds where nothing is."""
        if self._look() == self._seen:
            return
        for name, parameter in self._module.named_parameters():
            if id(parameter) not in self._known:
                raise RuntimeError(
                    f"parameter {name} was added or replaced after the module was wrapped, and "
                    "would not be synchronised: wrap the module when it is complete"
                )
        self._note()  # fewer parameters, or layers without any

    def _note(self) -> None:
        layers = list(self._module.named_modules())
        self._rows = [row for _, layer in layers for row in (layer._parameters, layer._modules)]
        self._buffer_rows = [(prefix, layer._buffers) for prefix, layer in layers]
        self._seen = self._look()

    def buffers(self) -> list[Tensor]:
        """Return the module's buffers, as they are now, in the order of its layers."""
        rows = self._buffer_rows
        return [buffer for _, row in rows for buffer in row.values() if buffer is not None]

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        """Return the same with their names."""
        return [
            (f"{prefix}.{name}" if prefix else name, buffer)
            for prefix, row in self._buffer_rows
            for name, buffer in row.items()
            if buffer is not None
        ]

    def _look(self) -> list[int]:
        return list(map(id, chain.from_iterable(row.values() for row in self._rows)))
