"""Memory for copies of a state, which stays from one checkpoint to the next.

New memory costs more than copying into it: the kernel clears every page, one fault each. So all
copies lie in one piece that asks for large pages, and that the next snapshot takes again.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["Snapshot"]

_ALIGNMENT = 64
_HUGE = 1 << 21


class Snapshot:
    """Copies of tensors by name, in memory of their own."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._preparing: threading.Thread | None = None

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to get memory for copies of such tensors, in the background."""
        if self._memory is None and self._preparing is None:
            nbytes = _places(tensors)[1]
            self._preparing = threading.Thread(
                target=self._prepare, args=(nbytes,), name="ringfold-snapshot", daemon=True
            )
            self._preparing.start()

    def _prepare(self, nbytes: int) -> None:
        with suppress(OSError, MemoryError):  # `take` shows it again
            memory = _allocate(nbytes)
            # Without the interpreter lock, unlike a loop over the pages.
            torch.frombuffer(memory, dtype=torch.uint8).zero_()
            self._memory = memory

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return host copies; those of the call before are overwritten."""
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        places, end = _places(tensors)
        if self._memory is None or len(self._memory) < end:
            self._memory = _allocate(end)
        return {name: self._copy(tensor, places[name]) for name, tensor in tensors.items()}

    def _copy(self, tensor: Tensor, place: int) -> Tensor:
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        assert self._memory is not None
        flat = torch.frombuffer(
            self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=place
        )
        return flat.view(tensor.shape).copy_(tensor.detach())


def _places(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Return where each copy begins, and the bytes of all."""
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = end
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _allocate(nbytes: int) -> mmap.mmap:
    """Return private memory, in large pages where the system has them."""
    memory = mmap.mmap(
        -1, -(-max(nbytes, 1) // _HUGE) * _HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
