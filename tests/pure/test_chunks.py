import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfold.comm.chunks import bounds, nested_begin, pieces, ranges


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_chunks_cover_the_buffer_in_order_and_differ_by_one(count: int, num_chunks: int) -> None:
    begins, ends = bounds(count, num_chunks, np.arange(num_chunks))
    assert begins[0] == 0 and ends[-1] == count
    assert (begins[1:] == ends[:-1]).all()
    sizes = ends - begins
    assert sizes.max() - sizes.min() <= 1
    assert [part.size for part in np.array_split(np.empty(count), num_chunks)] == sizes.tolist()
    assert bounds(count, num_chunks, num_chunks - 1) == (begins[-1], ends[-1])


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 5))
def test_nested_chunks_join_to_the_owners_parts(count: int, owners: int, per_owner: int) -> None:
    num_chunks = owners * per_owner
    for owner in range(owners):
        low, high = bounds(count, owners, owner)
        begins = [
            nested_begin(count, owners, num_chunks, owner * per_owner + inner)
            for inner in range(per_owner)
        ]
        assert begins == (low + bounds(high - low, per_owner, np.arange(per_owner))[0]).tolist()
    assert nested_begin(count, owners, num_chunks, num_chunks) == count


@pytest.mark.parametrize(
    "first, length, expected",
    [(0, 0, ()), (2, 3, ((2, 5),)), (3, 4, ((3, 5), (0, 2))), (0, 5, ((0, 5),))],
)
def test_cyclic_runs(first: int, length: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert ranges(first, length, 5) == expected


def test_pieces_of_two_lengths_differ_in_one_that_both_have() -> None:
    split = {n: [high - low for low, high in pieces(n, 4)] for n in range(20)}
    for n, sizes in split.items():
        assert sum(sizes) == n and max(sizes) <= 4
        for other in split.values():
            assert sizes == other or any(a != b for a, b in zip(sizes, other, strict=False))
