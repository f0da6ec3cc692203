"""What is chosen for whom."""

import pytest

from ringfold.comm.dtypes import DTYPES
from ringfold.comm.select import NESTED_ABOVE, choose
from ringfold.comm.topology import Nodes

F32 = DTYPES["float32"]


@pytest.mark.parametrize("collective", NESTED_ABOVE)
def test_several_nodes_of_several_ranks_nest_large_buffers(collective: str) -> None:
    nodes = Nodes.labelled([0, 1, 0, 1, 1])
    limit = NESTED_ABOVE[collective]
    algorithm, reason = choose(collective, limit + 1, F32, nodes)
    assert (algorithm, reason.partition(":")[0]) == ("hierarchical", "2 nodes of 2, 3")
    for small, known in ((limit, nodes), (limit + 1, None)):
        assert choose(collective, small, F32, known)[0] != "hierarchical"
    for flat in (Nodes.blocks(5, 1), Nodes.blocks(5, 5)):
        assert choose(collective, 1 << 30, F32, flat)[0] != "hierarchical"


def test_half_width_sums_stay_raw_on_any_nodes() -> None:
    assert choose("allreduce", 1 << 20, DTYPES["float16"], Nodes.blocks(4, 2))[0] == ("pairwise")
