"""The judge of the benchmarks: data that tells ranks and places apart, and counts what is wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from patterns import (
    EXPECTED,
    PARTS,
    TILE,
    count_wrong,
    fill,
    own_count,
    result_count,
    tile,
)

COUNTS = (1, 2, 3, TILE - 1, TILE, 2 * TILE + 5)


def filled(rank: int, size: int, count: int) -> np.ndarray:
    x = np.zeros(count, np.float32)
    fill(x, tile(rank, size, "sum", "float32"))
    return x


def carried_out(collective: str, rank: int, size: int, count: int) -> np.ndarray:
    """Do the collective by NumPy alone, from the definition, and return one rank's result."""
    inputs = [filled(r, size, own_count(collective, size, count)) for r in range(size)]
    part = slice(rank * (count // size), (rank + 1) * (count // size))
    match collective:
        case "allreduce" | "reduce":
            return np.sum(inputs, axis=0)
        case "broadcast":
            return inputs[0]
        case "allgather" | "gather":
            return np.concatenate(inputs)
        case "reduce_scatter":
            return np.sum(inputs, axis=0)[part]
        case "scatter":
            return inputs[0][part]
        case "alltoall":
            return np.concatenate([x[part] for x in inputs])
        case "sendrecv":
            return inputs[(rank - 1) % size]
        case _:
            return inputs[rank - 1]


@pytest.mark.parametrize("collective", EXPECTED)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_is_expected_is_what_the_definition_gives(collective: str, size: int) -> None:
    for base in COUNTS:
        count = base * size if collective in PARTS else base
        for rank in range(size):
            pieces = EXPECTED[collective](rank, size, count)
            if not pieces:
                continue
            result = carried_out(collective, rank, size, count)
            assert count_wrong(result, pieces, size, "sum", "float32") == 0
            assert result_count(collective, rank, size, count) in (0, result.size)
            result[-1] += 1
            assert count_wrong(result, pieces, size, "sum", "float32") == 1


@pytest.mark.parametrize("collective", ["allreduce", "allgather", "alltoall"])
def test_a_result_of_another_rank_a_shifted_one_and_a_short_one_are_wrong(collective: str) -> None:
    size, count = 3, 3 * TILE
    pieces = EXPECTED[collective](1, size, count)
    result = carried_out(collective, 1, size, count)
    # A whole tile on, every element is right again: no chunk is likely to be so far off.
    assert count_wrong(np.roll(result, 4096), pieces, size, "sum", "float32") > count // 2
    assert count_wrong(filled(1, size, count), pieces, size, "sum", "float32") > count // 2
    assert count_wrong(result[:-7], pieces, size, "sum", "float32") == 7
    assert count_wrong(np.append(result, 1), pieces, size, "sum", "float32") == 1


@pytest.mark.parametrize("op", ["sum", "min", "max"])
@pytest.mark.parametrize("dtype", ["float16", "int64", "bfloat16"])
def test_tiles_are_exact_in_every_type(op: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("torch")
    wide = tile(-1, 4, op, "float64")
    narrow = tile(-1, 4, op, dtype)
    if dtype == "bfloat16":
        narrow = (narrow.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(narrow.astype(np.float64), wide)
    assert len({tile(r, 4, op, dtype).tobytes() for r in range(4)}) == 4
