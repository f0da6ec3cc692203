"""Groups that are made and closed where ranks have given up, or were interrupted, before."""

import time

import numpy as np
import pytest

from ringfold import CommTimeout, Communicator, MismatchError, Settings
from ringfold.comm import job
from ringfold.comm.work import Work

SHORT = Settings(timeout=1.0, watch=False)


def check(group):
    total = group.allreduce(np.array([group.rank + 1.0]))
    assert total.item() == group.size * (group.size + 1) / 2


def test_a_rank_that_gave_up_splitting_comes_again(comm):
    with Communicator(settings=SHORT) as group:
        if group.rank:
            time.sleep(1.4)
        elif group.size > 1:
            with pytest.raises(CommTimeout, match="in split"):
                group.split(0)
        with group.split(0) as made:
            check(made)
        with group.split(0, -group.rank) as made:
            check(made)
        comm.barrier()


def test_ranks_that_called_something_else_split_a_fresh_group(comm):
    if comm.size == 1:
        return
    with Communicator(settings=Settings(timeout=30, watch=False)) as group:
        with pytest.raises(MismatchError, match="rank 0: split"):
            group.split(0) if group.rank == 0 else group.allreduce(np.ones(3))
        with group.split(0) as made:
            check(made)


def test_a_rank_that_gave_up_opening_comes_again(comm, monkeypatch):
    monkeypatch.setattr(job, "PATIENCE", 1.0)
    if comm.rank:
        time.sleep(1.4)
    elif comm.size > 1:
        with pytest.raises(CommTimeout, match="open a communicator"):
            Communicator(settings=SHORT)
    monkeypatch.setattr(job, "PATIENCE", 30.0)
    with Communicator(settings=Settings(timeout=30, watch=False)) as opened:
        check(opened)


def test_an_interrupted_close_is_gone_on_with(comm, monkeypatch, capfd):
    group = Communicator(settings=Settings(timeout=5, watch=False))
    wait = Work.wait

    def interrupted(work, timeout=None):
        if work.receipt.operation == "close":
            monkeypatch.setattr(Work, "wait", wait)
            raise KeyboardInterrupt
        return wait(work, timeout)

    if comm.rank == 0 and comm.size > 1:
        monkeypatch.setattr(Work, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            group.close()
    group.close()
    assert "without the others" not in capfd.readouterr().err
