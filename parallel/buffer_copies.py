"""Let modules compute on copies of their buffers, and leave no trace on these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["BufferCopies"]


class BufferCopies:
    """Hold what buffers modules have, and copies of their values.

    Places count, not tensors: a forward may write to a buffer, put another tensor in its place, or
    make one where there was none. A tensor in several places has one copy.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        places = [module._buffers for module in dict.fromkeys(modules)]
        found = {b for place in places for b in place.values() if b is not None}
        copies: dict[Tensor | None, Tensor | None] = {b: b.clone() for b in found}
        self._rows = [(p, {name: copies.get(b) for name, b in p.items()}) for p in places]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules have the copies within this context, then what they have now."""
        now = [(place, place.copy()) for place, _ in self._rows]
        _put(self._rows)
        try:
            yield
        finally:
            _put(now)


def _put(rows: Iterable[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]]) -> None:
    for place, content in rows:
        place.clear()
        place.update(content)
