"""Open what collectives on GPU memory over several nodes need, where the ranks allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .device import Device, DeviceArray, Like
from .device_nesting import Nested
from .ipc_trial import give_up, open_ipc
from .nested_node import NestedNode
from .scratch import DevicePlace, Scratch

if TYPE_CHECKING:
    from .communicator import Communicator
    from .device_ways import DeviceWays


def open_nested(
    group: Communicator,
    array: DeviceArray,
    device: Device,
    alike: Callable[[Communicator, Like], DeviceWays],
) -> Nested | None:
    """Open ipc in the nodes of a group, and lanes between them; collective over the group.

    alike: return the ways of another group's device memory, given what makes their results.

    Returns: None where there is one node, where nodes hold one rank or unequally many, or where
    the ranks of a node cannot open each other's memory.
    """
    node = group.node
    if node.size == group.size:
        return None
    widths = group.allgather(np.array([node.size], np.int64))
    if widths.min() < 2 or widths.min() != widths.max():
        return None
    ipc = open_ipc(node, device)[0]
    able = np.array([ipc is not None and device.arithmetic is not None], np.uint8)
    if not group.allreduce(able, "min")[0]:
        if ipc is not None:
            give_up(node, ipc)
        return None
    assert ipc is not None
    lane = group.split(node.rank, group.rank)
    scratch, stream = Scratch(device), ipc.stream

    def lent(device: Device, array: DeviceArray, shape: tuple[int, ...]) -> DevicePlace:
        return scratch.array(shape, array.dtype, stream)

    ways = alike(lane, lent)
    # Prepared, not run: it opens the lane's own way, which is collective, and tells what it is.
    way = ways.broadcast(array.owner).receipt.transport
    return Nested(group, NestedNode(group, ipc, lane, device, scratch), lane, ways, device, way)
