"""The element types that kernels know, each with its storage, size and allowed operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.operations import ALLOWED
from ..kernels.storage import FLOATS, HALVES, PARTS, STORAGE

OPS = ("sum", "mean", "min", "max", "prod")
_MEANS = (*HALVES, *FLOATS, *PARTS)


@dataclass(frozen=True)
class DType:
    """One element type.

    storage: the NumPy dtype that holds its bits (bfloat16 lives in uint16).
    ops: the reductions that it allows; a mean of integers would round, so there is none, and
    complex numbers have no order.
    wide: reductions add in float32 inside and round once at the end.
    """

    name: str
    storage: np.dtype[np.generic]
    ops: tuple[str, ...]
    wide: bool = False

    @property
    def on_devices(self) -> bool:
        """Tell whether GPUs have kernels that reduce it; what they lack is reduced on the host."""
        return self.storage.kind not in "bc"

    @property
    def itemsize(self) -> int:
        """Return the bytes of one element."""
        return int(self.storage.itemsize)

    def require(self, op: str) -> None:
        """Refuse a reduction that this type does not allow.

        Raises: ValueError for an unknown op; TypeError for one that does not fit the type, or that
        is no name.
        """
        if not isinstance(op, str):
            raise TypeError(f"op: expected one of {', '.join(OPS)}, got {type(op).__name__}")
        if op not in OPS:
            raise ValueError(f"unknown op {op!r}; there is: {', '.join(OPS)}")
        if op not in self.ops:
            raise TypeError(
                f"op {op!r} is not defined for {self.name}; allowed: {', '.join(self.ops)}"
            )


@dataclass(frozen=True)
class Typed:
    """Host elements of a type that NumPy may lack, as `buffer.wrap` takes them."""

    view: np.ndarray[Any, Any]
    dtype: DType


def _ops(name: str) -> tuple[str, ...]:
    return tuple(op for op in OPS if name in (_MEANS if op == "mean" else ALLOWED[op]))


DTYPES = {
    name: DType(name, storage, _ops(name), wide=name in HALVES) for name, storage in STORAGE.items()
}


def dtype_named(name: str) -> DType:
    """Return the row of the table.

    Raises: TypeError that lists the names there are.
    """
    found = DTYPES.get(name)
    if found is None:
        raise TypeError(f"dtype {name} is not supported; there is: {', '.join(DTYPES)}")
    return found
