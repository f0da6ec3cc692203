"""Many tensors as addresses beside their places in one flat bucket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .storage import HALVES, STORAGE, Array, check_array, listed


class Packed(NamedTuple):
    """What a pass over a bucket learned on the way.

    `finite`: every element written is neither infinite nor NaN.  `square_norm`: the sum of squares,
    in float64, of the scaled or divided values before they were rounded to the dtype written.
    """

    finite: bool
    square_norm: float


# tensor dtype -> bucket dtypes; the same pairs pack and unpack.
PAIRS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "float32": ("float32", "float16", "bfloat16"),
        "float64": ("float64", "float32", "float16", "bfloat16"),
        **{half: (half, "float32") for half in HALVES},
    }
)


def _frozen(values: Any, what: str) -> npt.NDArray[np.int64]:
    column = np.array(values, dtype=np.int64, ndmin=1)
    if column.ndim != 1:
        raise ValueError(f"{what}: expected one dimension, got shape {column.shape}")
    column.flags.writeable = False
    return column


@dataclass(frozen=True, eq=False)
class PointerTable:
    """Where each tensor lies in host memory, and where it goes in a bucket.

    `addresses` are of contiguous memory (0 only for empty tensors), `counts` and `offsets` are in
    elements, `itemsize` in bytes.  `owners` keeps the memory alive as long as the table.  `extent`
    is the number of elements that a bucket must have.
    """

    addresses: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    itemsize: int
    writeable: bool = True
    owners: tuple[Any, ...] = field(default=(), repr=False)
    extent: int = field(init=False)

    def __post_init__(self) -> None:
        for name in ("addresses", "counts", "offsets"):
            object.__setattr__(self, name, _frozen(getattr(self, name), name))
        sizes = (self.addresses.size, self.counts.size, self.offsets.size)
        if len(set(sizes)) != 1:
            raise ValueError(
                "expected as many counts and offsets as addresses, "
                f"got {sizes[1]} and {sizes[2]} for {sizes[0]}"
            )
        for name in ("counts", "offsets"):
            column = getattr(self, name)
            if (column < 0).any():
                where = int(np.argmax(column < 0))
                raise ValueError(f"tensor {where}: {name} is {column[where]}, expected at least 0")
        null = (self.addresses == 0) & (self.counts > 0)
        if null.any():
            where = int(np.argmax(null))
            raise ValueError(f"tensor {where}: null address for {self.counts[where]} elements")
        self._check_overlap()
        ends = (self.offsets + self.counts)[self.counts > 0]
        object.__setattr__(self, "extent", int(ends.max(initial=0)))

    def _check_overlap(self) -> None:
        filled = np.flatnonzero(self.counts)
        order = filled[np.argsort(self.offsets[filled], kind="stable")]
        ends = self.offsets[order] + self.counts[order]
        overlapping = np.flatnonzero(self.offsets[order][1:] < ends[:-1])
        if overlapping.size:
            first, second = order[overlapping[0]], order[overlapping[0] + 1]
            raise ValueError(
                f"tensors {first} and {second} overlap in the bucket: "
                f"elements {self.offsets[first]} to {self.offsets[first] + self.counts[first]} and "
                f"{self.offsets[second]} to {self.offsets[second] + self.counts[second]}"
            )

    @classmethod
    def of(cls, arrays: Iterable[Array], offsets: Sequence[int] | None = None) -> PointerTable:
        """Describe NumPy arrays of one dtype, laid end to end unless `offsets` say where.

        bfloat16 tensors are arrays of their bits.  What is not C-contiguous is refused.
        """
        owners = tuple(arrays)
        for index, array in enumerate(owners):
            if not array.flags.c_contiguous:
                raise ValueError(
                    f"tensor {index} is not contiguous: "
                    f"shape {array.shape}, strides {array.strides}"
                )
            if not array.flags.aligned:
                raise ValueError(
                    f"tensor {index}: memory is not aligned to its dtype {array.dtype}"
                )
            if array.dtype != owners[0].dtype:
                raise TypeError(
                    f"tensor {index} is {array.dtype}; expected {owners[0].dtype}, as tensor 0"
                )
        counts = [array.size for array in owners]
        starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()][: len(counts)]
        return cls(
            addresses=np.array([array.ctypes.data for array in owners], np.int64),
            counts=np.array(counts, np.int64),
            offsets=np.array(starts if offsets is None else offsets, np.int64),
            itemsize=owners[0].itemsize if owners else 0,
            writeable=all(array.flags.writeable for array in owners if array.size),
            owners=owners,
        )


def check_dtypes(tensor_dtype: str, bucket_dtype: str) -> None:
    """Refuse a pair of dtypes outside PAIRS."""
    if bucket_dtype not in PAIRS.get(tensor_dtype, ()):
        allowed = listed(f"{name} ({listed(buckets)})" for name, buckets in PAIRS.items())
        raise TypeError(
            f"tensors of {tensor_dtype!r} with a bucket of {bucket_dtype!r}: expected one of the "
            f"tensor dtypes (and their bucket dtypes) {allowed}"
        )


def check_pair(table: PointerTable, tensor_dtype: str, bucket_dtype: str) -> None:
    """Refuse a pair of dtypes outside PAIRS, and a table of other elements."""
    check_dtypes(tensor_dtype, bucket_dtype)
    itemsize = STORAGE[tensor_dtype].itemsize
    if table.addresses.size and table.itemsize != itemsize:
        raise TypeError(
            f"the table's elements have {table.itemsize} bytes; {tensor_dtype} has {itemsize}"
        )


def check_transfer(
    table: PointerTable, tensor_dtype: str, bucket: Array, bucket_dtype: str, *, into_bucket: bool
) -> None:
    """Refuse a pair of dtypes, a bucket or a table that a transfer would misuse."""
    check_pair(table, tensor_dtype, bucket_dtype)
    check_array(bucket, bucket_dtype, "bucket", writes=into_bucket)
    if table.extent > bucket.size:
        raise ValueError(
            f"bucket of {bucket.size} elements is too small: the table reaches {table.extent}"
        )
    if not into_bucket and not table.writeable:
        raise ValueError("the table holds a read-only array and would be written")
