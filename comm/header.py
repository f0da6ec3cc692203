"""What ranks tell before rows that the others know nothing of, in bytes of a fixed length."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .buffer import Buffer
from .dtypes import DTYPES, DType
from .errors import CommError

Words = npt.NDArray[np.uint8]

NBYTES = 512
"""All ranks know the length, whatever the shape."""


def pack(*fields: object) -> Words:
    """Return fields as NBYTES bytes, which are not to be written to.

    Raises: CommError where they do not fit, as a shape of very many axes.
    """
    return np.frombuffer(_packed(fields), np.uint8)


@lru_cache(maxsize=1024)
def _packed(fields: tuple[object, ...]) -> bytes:
    text = json.dumps(fields).encode()
    if len(text) > NBYTES:
        raise CommError(f"a shape of too many axes: {text.decode():.80}... takes {len(text)} bytes")
    return text.ljust(NBYTES, b"\0")


def unpack(words: Words) -> list[Any]:
    """Return the fields of `pack`; a tuple among them has become a list."""
    return list(_unpacked(words.tobytes()))


@lru_cache(maxsize=1024)
def _unpacked(words: bytes) -> tuple[Any, ...]:
    return tuple(json.loads(words.rstrip(b"\0")))


def write(words: Words, buffer: Buffer) -> None:
    """Describe a row of a scatter's buffer: its library, element type and shape."""
    words[:] = pack(buffer.family, buffer.dtype.name, buffer.shape[1:])


def read(words: Words) -> tuple[str, DType, tuple[int, ...]]:
    """Return the library, element type and shape of a row."""
    family, dtype, shape = unpack(words)
    return family, DTYPES[dtype], tuple(shape)
