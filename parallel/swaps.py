"""Notice that torch has swapped tensors with others.

`torch.utils.swap_tensors` gives a tensor object another's tensor and attributes, as loading and
moving a module do where `torch.__future__.set_swap_module_params_on_conversion` says so, or where a
parameter is of a tensor subclass. The object stays and still lists its hooks, but autograd calls
them for the tensor that it had before.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter, is_

from torch import Tensor

__all__ = ["Swaps"]

_attributes = attrgetter("__dict__")


class Swaps:
    """Remember which tensor each object in `tensors` has.

    It is known by the dict of its attributes, which is swapped with it. A reference to the tensor
    itself, even a weak one, would forbid the swap.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self._known = self._now()

    def found(self) -> list[int]:
        """Return the indices of those with another tensor since the last call; 30 ns for each."""
        before, now = self._known, self._now()
        if all(map(is_, before, now)):
            return []
        self._known = now
        return [i for i, (old, new) in enumerate(zip(before, now, strict=True)) if old is not new]

    def _now(self) -> list[object]:
        return list(map(_attributes, self.tensors))
