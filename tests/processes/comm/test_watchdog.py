"""What ranks may do to each other to learn where they are."""

import gc
import os
import subprocess

import pytest
from contract import reopened

from ringfold import Communicator
from ringfold.comm.watchdog import _catches, _publish


def test_a_second_communicator_leaves_the_signal_to_the_first(comm: Communicator) -> None:
    """A rank whose handler was gone died of its peer's question."""
    if comm.size == 1:
        pytest.skip("one rank asks nobody")
    with reopened(comm) as other:
        other.barrier()
    comm.barrier()
    assert _catches(os.getpid())
    assert comm._job.watchdog is not None
    told = comm._job.watchdog.force((comm.rank + 1) % comm.size)
    comm.barrier()
    assert told is not None and "its stacks: " in told, told


def test_what_the_watchdog_does_all_the_time_leaves_nothing_to_the_collector() -> None:
    """24 KB a second in a program that has switched the collector off."""
    _publish()
    gc.disable()
    try:
        # The least of several: what a peer asks meanwhile, as of the test before, leaves some.
        assert min(_left_by(20) for _ in range(5)) < 20
    finally:
        gc.enable()


def _left_by(times: int) -> int:
    gc.collect()
    for _ in range(times):
        _publish()
    return gc.collect()


def test_a_process_without_a_handler_is_known_as_such() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not _catches(child.pid)
    finally:
        child.kill()
        child.wait()
