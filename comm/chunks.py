"""Split a flat buffer into chunks that differ by one element at most, and a message into pieces."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Index = TypeVar("Index", int, npt.NDArray[np.int64])


def begin(count: int, num_chunks: int, chunk: Any) -> Any:
    """Return the first element of `chunk`; `chunk` may be num_chunks, and may be an array.

    The first `count % num_chunks` chunks hold one element more than the others.
    """
    base, extra = divmod(count, num_chunks)
    if isinstance(chunk, np.ndarray):
        return chunk * base + np.minimum(chunk, extra)
    return chunk * base + min(chunk, extra)


def bounds(count: int, num_chunks: int, chunk: Index) -> tuple[Index, Index]:
    """Return (begin, end) of one chunk, or of an array of chunks, of `count` elements.

    Together the chunks cover 0..count without gap or overlap, in order, for every count >= 0
    and num_chunks >= 1; chunks beyond the elements are empty.
    """
    return begin(count, num_chunks, chunk), begin(count, num_chunks, chunk + 1)


def nested_begin(count: int, num_owners: int, num_chunks: int, chunk: int) -> int:
    """Return the first element of `chunk`, up to num_chunks, where chunks subdivide owners' parts.

    num_chunks is a multiple of num_owners; owner o holds chunks o*k .. (o+1)*k - 1, and their
    union is exactly `bounds(count, num_owners, o)`, whatever k is.
    """
    per_owner = num_chunks // num_owners
    owner, inner = divmod(chunk, per_owner)
    low = int(begin(count, num_owners, owner))
    if inner == 0:
        return low
    return low + int(begin(int(begin(count, num_owners, owner + 1)) - low, per_owner, inner))


def ranges(first: int, length: int, num_chunks: int) -> tuple[tuple[int, int], ...]:
    """Return the cyclic run of `length` chunks from `first` as at most two plain (low, high)."""
    if length == 0:
        return ()
    end = first + length
    if end <= num_chunks:
        return ((first, end),)
    return ((first, num_chunks), (0, end - num_chunks))


def pieces(nbytes: int, limit: int) -> list[tuple[int, int]]:
    """Return (low, high) of the pieces of a message: full ones of `limit` bytes, and a shorter one.

    The last one is always shorter, empty at need, so that the pieces of two lengths differ in one
    that both have: who expects another length never takes a part for the whole.
    """
    full = nbytes // limit
    return [(k * limit, (k + 1) * limit) for k in range(full)] + [(full * limit, nbytes)]
