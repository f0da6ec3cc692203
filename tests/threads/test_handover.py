"""A run's state goes from the ranks that have it to those that need it, and ranks leave by plan."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import ringfold
from ringfold import CheckpointError, Mesh, Pipeline, run_local
from ringfold.comm.elastic import Loss
from ringfold.parallel.checkpoint.handover import hand_over
from ringfold.workloads import training
from ringfold.workloads.command_line import parse
from ringfold.workloads.history import History
from ringfold.workloads.worlds import Left, Planned


def layers(seed):
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 2)]
    for parameter in nn.Sequential(*found).parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return found


def staged(comm, data, pipe, seed):
    mesh = Mesh(comm, data=data, pipe=pipe)
    return Pipeline(layers(seed), mesh, loss_fn=nn.functional.mse_loss, microbatches=2)


@pytest.mark.parametrize("gone", [(), (0,), (1,), (3,), (0, 3)])
def test_stages_are_taken_from_the_replicas_that_are_left(gone):
    def main(comm):
        old = None if comm.rank in gone else staged_held(comm)
        new = staged(comm, 4, 1, seed=2)
        before = comm.recent(256)
        values = hand_over(
            comm,
            {} if old is None else {"model": old, "n": torch.arange(3)},
            {"model": new, "n": None},
        )
        assert values["n"].tolist() == [0, 1, 2]
        # Ranks wait for this to go on after a death: it only moves, so that no kernel is compiled.
        assert {entry.signature.op for entry in comm.recent(256)[len(before) :]} == {""}
        return new.state_dict()

    def staged_held(comm):
        return held[comm.rank]

    held = run_local(4, lambda comm: staged(comm, 2, 2, seed=1))
    expected = nn.Sequential(*layers(1)).state_dict()
    for state in run_local(4, main):
        assert all(value.equal(expected[name]) for name, value in state.items())


@pytest.mark.parametrize("name", ["float8_e4m3fn", "uint16", "complex64", "bfloat16"])
def test_buffers_of_every_dtype_are_handed_over(name):
    values = torch.arange(6.0).reshape(2, 3).to(getattr(torch, name))

    def main(comm):
        old, new = nn.Linear(1, 1), nn.Linear(1, 1)
        for module, value in ((old, values), (new, torch.zeros_like(values))):
            module.register_buffer("table", value.clone())
            module.register_buffer("none", value[:0].clone())
        hand_over(comm, {} if comm.rank else {"m": old}, {"m": new})
        return new.table.view(torch.uint8).equal(values.view(torch.uint8))

    assert run_local(2, main) == [True, True]


def test_what_nobody_holds_is_named_on_all_ranks_and_nothing_is_changed():
    held = run_local(4, lambda comm: staged(comm, 2, 2, seed=1))

    def main(comm):
        new = staged(comm, 4, 1, seed=2)
        before = {name: value.clone() for name, value in new.state_dict().items()}
        # Ranks 1 and 3 hold the second stage.
        old = {} if comm.rank % 2 else {"model": held[comm.rank]}
        with pytest.raises(
            CheckpointError, match=r"model/\d\.\w+: the state that ranks hold has none"
        ):
            hand_over(comm, old, {"model": new})
        assert all(value.equal(before[name]) for name, value in new.state_dict().items())

    run_local(4, main)


@pytest.mark.parametrize("workers", [4, 2])
def test_ranks_leave_by_plan_and_those_without_work_wait_for_it(workers):
    """With two workers of four, the others are asked by `finished` alone."""

    def main(comm):
        world, step, sums, gone = Planned(comm, [(0, 2), (3, 5)]), 0, [], []
        while True:
            try:
                while world.comm.rank < workers and step < 7:
                    world.begin(step)
                    step += 1
                while not world.finished():
                    pass
                sums.append(int(world.comm.allreduce(np.array([1]))[0]))
                return gone, sums
            except ringfold.PeerLost:
                try:
                    loss = world.recover(step)
                except Left:
                    return "left"
                gone.append((loss.ranks, loss.size))
                step = int(world.comm.allreduce(np.array([step]), op="max")[0])

    found = run_local(4, main)
    assert found[0] == found[3] == "left"
    assert found[1] == found[2] == ([((0,), 3), ((2,), 2)], [2])


def test_one_that_joins_recovers_where_another_dies_meanwhile(monkeypatch):
    """It ended, and was told of as a rank that had died; that it had joined was never told.

    Rank 2 of three dies, and then rank 1, while the one that was started for rank 2 is joining.
    """

    def assemble(world, before):
        if world.left:  # one more has died, before anything was told
            raise ringfold.PeerLost("a rank has died")
        before.history.share(world.comm, 5)
        return before

    monkeypatch.setattr(training, "assemble", assemble)

    def main(comm):
        options, history = parse(["--elastic", "grow"]), History.begin(comm)
        losses = [Loss((2,), 3, 5, 0, 0.0, 1), Loss((1,), 3, 5, 0, 0.0, 1)]
        # As numbered in the end: one from the start, the first to join, and the second.
        left = losses[comm.rank :]
        world = SimpleNamespace(comm=comm, left=left, done=[])

        def recover(done):
            world.done.append(done)
            return left.pop(0)

        world.recover = recover
        if comm.rank:
            found = training.join(world, options)
        else:
            found = training.go_on(world, training.Training(options, None, history, None, done=5))
        found.history.went_on()
        assert all(event["seconds"] is not None for event in found.history.events)
        told = [(event["event"], event["rank"]) for event in found.history.events]
        return world.done, found.history.members, told

    told = [("died", 2), ("died", 1), ("joined", 3), ("joined", 4)]
    assert run_local(3, main) == [
        ([5, 5], [0, 3, 4], told),
        ([-1], [0, 3, 4], told),
        ([], [0, 3, 4], told),
    ]
