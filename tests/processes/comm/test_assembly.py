"""Groups that are made and closed where ranks have given up, or were interrupted, before."""

import time

import numpy as np
import pytest

from ringfold import CommTimeout, Communicator, MismatchError, Settings
from ringfold.comm import job
from ringfold.comm.work import Work

PATIENT = Settings(timeout=30, watch=False)


def check(group):
    total = group.allreduce(np.array([group.rank + 1.0]))
    assert total.item() == group.size * (group.size + 1) / 2


def test_a_rank_that_gave_up_splitting_comes_again(comm):
    with Communicator(settings=PATIENT) as group:
        if group.size > 1 and group.rank == 0:
            group._progress.timeout = 0.3
            with pytest.raises(CommTimeout, match="in split"):
                group.split(0)
            group._progress.timeout = PATIENT.timeout
        comm.barrier()  # until then the others do not come
        with group.split(0) as made:
            check(made)
        with group.split(0, -group.rank) as made:
            check(made)


def test_ranks_that_called_something_else_split_a_fresh_group(comm):
    if comm.size == 1:
        return
    with Communicator(settings=PATIENT) as group:
        with pytest.raises(MismatchError, match="rank 0: split"):
            group.split(0) if group.rank == 0 else group.allreduce(np.ones(3))
        with group.split(0) as made:
            check(made)


def test_ranks_of_which_one_left_out_a_call_split_a_fresh_group(comm):
    """What they told each other of the call that one left out was taken for this one's."""
    with Communicator(settings=PATIENT) as group:
        if group.rank != 1 and group.size > 1:
            group._progress.timeout = 0.6
            with pytest.raises(CommTimeout, match="in allreduce"):
                group.allreduce(np.ones(1000))
            group._progress.timeout = PATIENT.timeout
        comm.barrier()
        if group.rank != 1:
            time.sleep(0.5)  # rank 1 asks meanwhile what the others have called
        with group.split(0) as made:
            check(made)
        if group.rank != 1:
            time.sleep(0.5)


def interrupt(patch, operation):
    """Let the next wait for an operation be interrupted."""
    wait = Work.wait

    def interrupted(work, timeout=None):
        if work.receipt.operation == operation:
            patch.setattr(Work, "wait", wait)
            raise KeyboardInterrupt
        return wait(work, timeout)

    patch.setattr(Work, "wait", interrupted)


def test_an_interrupted_split_is_gone_on_with(comm, monkeypatch):
    """What was left of it went on beside the next one, and both counted."""
    with Communicator(settings=PATIENT) as group:
        if comm.rank == 0 and comm.size > 1:
            interrupt(monkeypatch, "split")
            with pytest.raises(KeyboardInterrupt):
                group.split(0)
        comm.barrier()
        for _ in range(3):
            with group.split(0) as made:
                check(made)


def test_a_rank_that_gave_up_opening_comes_again(comm, monkeypatch):
    if comm.size > 1 and comm.rank == 0:
        with monkeypatch.context() as patch:
            patch.setattr(job, "PATIENCE", 0.3)
            with pytest.raises(CommTimeout, match="open a communicator"):
                Communicator(settings=Settings(timeout=0.3, watch=False))
    comm.barrier()  # until then the others do not come
    with Communicator(settings=PATIENT) as opened:
        check(opened)


def test_an_interrupted_close_is_gone_on_with(comm, monkeypatch, capfd):
    group = Communicator(settings=PATIENT)
    if comm.rank == 0 and comm.size > 1:
        interrupt(monkeypatch, "close")
        with pytest.raises(KeyboardInterrupt):
            group.close()
    group.close()
    assert "without the others" not in capfd.readouterr().err
