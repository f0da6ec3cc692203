"""What ranks tell before rows that the others know nothing of, in bytes of a fixed length."""

from __future__ import annotations

import json
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
    """Return fields as NBYTES bytes.

    Raises: CommError where they do not fit, as a shape of very many axes.
    """
    text = json.dumps(fields).encode()
    if len(text) > NBYTES:
        raise CommError(f"a shape of too many axes: {text.decode():.80}... takes {len(text)} bytes")
    words = np.zeros(NBYTES, np.uint8)
    words[: len(text)] = np.frombuffer(text, np.uint8)
    return words


def unpack(words: Words) -> list[Any]:
    """Return the fields of `pack`; a tuple among them has become a list."""
    fields: list[Any] = json.loads(words.tobytes().rstrip(b"\0"))
    return fields


def write(words: Words, buffer: Buffer) -> None:
    """Describe a row of a scatter's buffer: its library, element type and shape."""
    words[:] = pack(buffer.family, buffer.dtype.name, buffer.shape[1:])


def read(words: Words) -> tuple[str, DType, tuple[int, ...]]:
    """Return the library, element type and shape of a row."""
    family, dtype, shape = unpack(words)
    return family, DTYPES[dtype], tuple(shape)
