"""What a scatter's root tells before its rows: library, element type and shape of a row."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

from .buffer import Buffer
from .dtypes import DTYPES, DType
from .errors import CommError

NBYTES = 512
"""All ranks know the length, whatever the shape."""


def write(words: npt.NDArray[np.uint8], buffer: Buffer) -> None:
    """Describe a row of a buffer in NBYTES zeros.

    Raises: CommError for a shape of more axes than fit.
    """
    text = json.dumps([buffer.family, buffer.dtype.name, buffer.shape[1:]]).encode()
    if len(text) > words.size:
        raise CommError(f"a shape of {len(buffer.shape)} axes does not fit the scatter header")
    words[: len(text)] = np.frombuffer(text, np.uint8)


def read(words: npt.NDArray[np.uint8]) -> tuple[str, DType, tuple[int, ...]]:
    """Return the library, element type and shape of a row."""
    family, dtype, shape = json.loads(words.tobytes().rstrip(b"\0"))
    return family, DTYPES[dtype], tuple(shape)
