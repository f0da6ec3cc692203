"""What ranks tell each other of their rows, before any of these go anywhere."""

import numpy as np
import pytest

from ringfold import MismatchError
from ringfold.comm.header import pack
from ringfold.comm.uneven import _agreed

ROWS = ("float32", (2,), " in host memory")


@pytest.mark.parametrize(
    "other",
    [
        ("float16", (2,), " in host memory"),
        ("float32", (3,), " in host memory"),
        ("float32", (2,), " on a GPU"),
    ],
)
def test_rows_of_another_kind_are_the_same_error_everywhere(other: tuple[object, ...]) -> None:
    """Also where they lie: what is made for the one cannot take the other."""
    letters = np.stack([pack(1, True, *ROWS), pack(2, False, *ROWS)])
    assert _agreed("gatherv", letters) == [(1, True), (2, False)]
    letters = np.stack([pack(1, True, *ROWS), pack(2, False, *other)])
    with pytest.raises(MismatchError, match=rf"rows differ.*rank 1: {other[0]} .*{other[2]}"):
        _agreed("gatherv", letters)
