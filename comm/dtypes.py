"""The one table of element types: storage, size, allowed operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

OPS = ("sum", "mean", "min", "max", "prod")
_INTEGER_OPS = ("sum", "min", "max", "prod")
_COMPLEX_OPS = ("sum", "mean")


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


def _table() -> dict[str, DType]:
    rows = [
        DType("float16", np.dtype(np.float16), OPS, wide=True),
        DType("bfloat16", np.dtype(np.uint16), OPS, wide=True),
        DType("float32", np.dtype(np.float32), OPS),
        DType("float64", np.dtype(np.float64), OPS),
        DType("bool", np.dtype(np.bool_), ("min", "max")),
        DType("complex64", np.dtype(np.complex64), _COMPLEX_OPS),
        DType("complex128", np.dtype(np.complex128), _COMPLEX_OPS),
    ]
    for sign in ("int", "uint"):
        for bits in (8, 16, 32, 64):
            name = f"{sign}{bits}"
            rows.append(DType(name, np.dtype(name), _INTEGER_OPS))
    return {row.name: row for row in rows}


DTYPES = _table()


def dtype_named(name: str) -> DType:
    """Return the row of the table.

    Raises: TypeError that lists the names there are.
    """
    found = DTYPES.get(name)
    if found is None:
        raise TypeError(f"dtype {name} is not supported; there is: {', '.join(DTYPES)}")
    return found
