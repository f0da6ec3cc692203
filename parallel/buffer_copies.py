"""Let modules compute on copies of their buffers, and leave no trace on these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["BufferCopies"]

LARGE_BYTES = 1 << 16
"""From here on to compare a buffer is worth the memory of a copy."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_Place = dict[str, Tensor | None]


@dataclass(eq=False, slots=True)
class _Copy:
    """What a buffer was; if several BufferCopies share it, none of them may change it."""

    tensor: Tensor
    shared: bool = False


class BufferCopies:
    """Hold what buffers modules have, and copies of their values.

    Places count, not tensors: a forward may write to a buffer, put another tensor in its place, or
    make one where there was none. A tensor in several places has one copy.

    before: copies that were made of the same modules. A large buffer that has the same bits again,
        as a table or a mask has, shares its copy with them. (Its version would not tell: torch does
        not count what is written to it by `.data`.)
    """

    def __init__(self, modules: Iterable[nn.Module], before: BufferCopies | None = None) -> None:
        places = [module._buffers for module in dict.fromkeys(modules)]
        old = {} if before is None else {id(place): row for place, row in before._rows}
        copies: dict[Tensor, _Copy] = {}
        taken: set[_Copy] = set()
        for place in places:
            for name, buffer in place.items():
                if buffer is None or buffer in copies:
                    continue
                copy = old.get(id(place), {}).get(name)
                # One copy for two tensors would make one of them.
                if copy is not None and copy not in taken and _same(buffer, copy.tensor):
                    copy.shared = True
                else:
                    copy = _Copy(buffer.clone())
                copies[buffer] = copy
                taken.add(copy)
        self._rows: list[tuple[_Place, Mapping[str, _Copy | None]]] = [
            (p, {name: None if b is None else copies[b] for name, b in p.items()}) for p in places
        ]
        self._changed: set[_Copy] = set()

    def look(self) -> None:
        """Note which buffers a forward has changed: a repetition `in_place` changes them again."""
        for place, row in self._rows:
            for name, copy in row.items():
                buffer = place.get(name)
                if copy is not None and (buffer is None or not _same(buffer, copy.tensor)):
                    self._changed.add(copy)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules have the copies within this context, then what they have now."""
        now = [(place, place.copy()) for place, _ in self._rows]
        own = {c: c.tensor.clone() for c in self._changed if c.shared}
        _put(
            (place, {n: None if c is None else own.get(c, c.tensor) for n, c in row.items()})
            for place, row in self._rows
        )
        try:
            yield
        finally:
            _put(now)


def _put(rows: Iterable[tuple[_Place, _Place]]) -> None:
    for place, content in rows:
        place.clear()
        place.update(content)


def _same(left: Tensor, right: Tensor) -> bool:
    """Tell whether two large tensors have the same bits.

    Small ones count as different, and so do those of a GPU, for which the host would have to wait.
    """
    size = left.element_size()
    if left.device.type != "cpu":
        return False
    if left.nbytes < LARGE_BYTES or left.layout != torch.strided or size not in _BITS:
        return False
    if left.is_complex() or left.is_quantized:
        return False
    facts = [(t.shape, t.stride(), t.dtype, t.device) for t in (left, right)]
    if facts[0] != facts[1]:
        return False
    # torch compares words of 8 bytes several times as fast as smaller ones.
    if all(map(_are_words, (left, right))):
        return torch.equal(*(t.detach().view(-1).view(torch.int64) for t in (left, right)))
    return torch.equal(left.detach().view(_BITS[size]), right.detach().view(_BITS[size]))


def _are_words(tensor: Tensor) -> bool:
    begin = tensor.storage_offset() * tensor.element_size()
    return tensor.is_contiguous() and not (begin % 8 or tensor.nbytes % 8)
