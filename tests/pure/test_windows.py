"""Windows put together are the collective itself, whatever their size."""

import numpy as np
import pytest

from ringfold.comm.chunks import bounds
from ringfold.comm.windows import Window, elementwise, exchanged, gathered, scattered

SIZES = (1, 2, 3, 5)
COUNTS = (0, 1, 2, 3, 7, 30)
MOST = (1, 2, 5, 1000)


def passed(window: Window, mine: np.ndarray) -> np.ndarray:
    part = np.full(window.count, -1)
    for start, at, count in window.into:
        part[start : start + count] = mine[at : at + count]
    return part


def taken(window: Window, part: np.ndarray, result: np.ndarray) -> None:
    assert window.result == part.size if window.out else window.result == 0
    for start, at, count in window.out:
        assert (result[at : at + count] == -1).all()
        result[at : at + count] = part[start : start + count]


def data(size: int, count: int) -> list[np.ndarray]:
    return [np.arange(count) + 1000 * (rank + 1) for rank in range(size)]


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("count", COUNTS)
def test_elementwise(count: int, most: int) -> None:
    mine, result = data(1, count)[0], np.full(count, -1)
    windows = elementwise(count, most, sends=True, takes=True)
    for window in windows:
        assert window.count <= most
        taken(window, passed(window, mine), result)
    assert (result == mine).all() and len(windows) >= 1
    silent = elementwise(count, most, sends=False, takes=False)
    assert [w.shape for w in silent] == [w.shape for w in windows]
    assert not any(w.into or w.out for w in silent)


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", SIZES)
def test_gathered(size: int, count: int, most: int) -> None:
    rows, result = data(size, count), np.full(size * count, -1)
    for window in gathered(count, size, most, takes=True):
        taken(window, np.concatenate([passed(window, row) for row in rows]), result)
    assert (result == np.concatenate(rows)).all()


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("row", COUNTS)
@pytest.mark.parametrize("size", SIZES)
def test_exchanged(size: int, row: int, most: int) -> None:
    mine = data(size, row * size)
    for rank in range(size):
        result = np.full(size * row, -1)
        for window in exchanged(row, size, most):
            parts = [passed(window, one).reshape(window.shape) for one in mine]
            taken(window, np.stack([part[rank] for part in parts]).ravel(), result)
        wanted = [one.reshape(size, row)[rank] for one in mine]
        assert (result == np.concatenate(wanted)).all()


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", SIZES)
def test_scattered(size: int, count: int, most: int) -> None:
    mine = data(size, count)
    for rank in range(size):
        low, high = bounds(count, size, rank)
        result = np.full(high - low, -1)
        for window in scattered(count, size, rank, most):
            total = sum(passed(window, one) for one in mine)
            assert (total > 0).all()
            first, last = bounds(window.count, size, rank)
            taken(window, total[first:last], result)
        assert (result == sum(mine)[low:high]).all()
