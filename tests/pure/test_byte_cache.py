"""What is kept of tables is bounded by bytes, and what is asked for again is not made again."""

import numpy as np

from ringfold.comm import fused
from ringfold.comm.byte_cache import ByteCache
from ringfold.comm.fused_rows import Shape


def test_the_oldest_go_where_there_is_too_much() -> None:
    made = []

    def make(nbytes: int) -> np.ndarray:
        made.append(nbytes)
        return np.zeros(nbytes, np.uint8)

    cache = ByteCache(make, 100)
    assert cache(40) is cache(40) and cache(50) is cache(50) and cache.nbytes == 90
    cache(30)  # 40 was made longest ago
    assert cache.nbytes == 80 and made == [40, 50, 30]
    cache(50)
    cache(40)
    assert made == [40, 50, 30, 40] and cache.nbytes == 70
    assert cache(1000) is cache(1000) and cache.nbytes == 1000
    cache(20)
    assert cache.nbytes == 20


def test_tables_of_many_long_buffers_are_not_all_kept() -> None:
    """512 programs were, each of half a megabyte for 64 MiB on 24 ranks, of 25 for 1 GiB on 64."""
    shapes = [Shape(1, 24, (64 << 20) // 4 + 1000 * k, 4) for k in range(50)]
    tables = [fused.lower("cma", "allreduce", shape) for shape in shapes]
    assert sum(table.nbytes for table in tables) > 20 << 20
    assert fused.lower.nbytes <= 16 << 20
    assert fused.lower("cma", "allreduce", shapes[-1]) is tables[-1]
