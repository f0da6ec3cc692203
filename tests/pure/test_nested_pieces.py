"""Pieces of collectives that are nested over nodes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ringfold.comm.chunks import bounds
from ringfold.comm.nested_pieces import elementwise, scattered


@given(
    count=st.integers(1, 3000),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    width=st.integers(2, 6),
    most=st.integers(0, 4000),
)
def test_runs_of_elements_are_shared_out(count: int, itemsize: int, width: int, most: int) -> None:
    seen = np.zeros(count, int)
    for number, piece in enumerate(elementwise(count, itemsize, width, most)):
        assert piece.index == number
        assert 0 < piece.count <= max(1, most)
        assert piece.into == ((0, piece.start, piece.count),)
        shared = np.zeros(piece.count, int)
        assert len(piece.parts) == width
        for low, high in piece.parts:
            shared[low:high] += 1
        assert (shared == 1).all()
        seen[piece.start : piece.start + piece.count] += 1
    assert (seen == 1).all()


@given(
    count=st.integers(1, 500),
    nodes=st.integers(2, 4),
    width=st.integers(2, 4),
    most=st.integers(0, 600),
    seed=st.integers(0, 99),
)
def test_a_part_is_a_smaller_reduce_scatter(
    count: int, nodes: int, width: int, most: int, seed: int
) -> None:
    """What a lane's own reduce_scatter gives of a part is the next run of each rank's chunk."""
    size = nodes * width
    order = np.random.default_rng(seed).permutation(size)
    lanes = np.sort(order.reshape(width, nodes), axis=1).tolist()
    results = {rank: np.full(bounds(count, size, rank)[1], -1) for rank in range(size)}
    for piece in scattered(count, lanes, most):
        content = np.full(piece.count, -1)
        for at, start, length in piece.into:
            content[at : at + length] = np.arange(start, start + length)
        assert (content >= 0).all()
        assert piece.count <= max(size, most)
        assert [low for low, _ in piece.parts[1:]] == [high for _, high in piece.parts[:-1]]
        for lane, (low, high) in zip(lanes, piece.parts, strict=True):
            for number, rank in enumerate(lane):
                first, last = bounds(high - low, nodes, number)
                begin = bounds(count, size, rank)[0] + piece.start
                got = content[low + first : low + last]
                results[rank][begin : begin + got.size] = got
    for rank, found in results.items():
        low, high = bounds(count, size, rank)
        np.testing.assert_array_equal(found[low:high], np.arange(low, high))
