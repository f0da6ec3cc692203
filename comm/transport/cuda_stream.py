"""Handles of CUDA's streams that keep the streams they name.

CuPy and Numba destroy a stream with the last reference to its object, and a handle is an integer.
A stream may be let go with work on it: cudaStreamDestroy returns at once, and its resources are
released when that has completed (CUDA Runtime API, Stream Management). Nothing more may be put
there, so who is going to keeps the handle.
"""

from __future__ import annotations

from typing import Any

from ..device import LEGACY_STREAM, DeviceArray, Stream


class StreamHandle(int):
    """A handle whose stream lives as long.  keeps: the stream's object."""

    keeps: Any


def kept(stream: Stream, keeps: Any) -> StreamHandle:
    """Return the handle of a stream, which keeps an object."""
    handle = StreamHandle(stream)
    handle.keeps = keeps
    return handle


def current(cupy: Any) -> Stream:
    """Return the handle of CuPy's current stream."""
    stream = cupy.cuda.get_current_stream()
    return kept(int(stream.ptr) or LEGACY_STREAM, stream)


def named(cupy: Any, array: DeviceArray) -> Stream:
    """Return the handle that an array names, of the current stream or of one that it has."""
    assert array.stream is not None
    if isinstance(array.stream, StreamHandle):
        return array.stream
    now = current(cupy)
    # Numba's arrays have the stream that they name, and live no longer than an operation on them.
    return now if now == array.stream else kept(array.stream, getattr(array.owner, "stream", None))
