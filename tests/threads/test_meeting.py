"""A replica that fails beside layers that meet the others' takes part until the step has ended."""

import pytest
import torch
from torch import nn

from ringfold import Mesh, MismatchError, Pipeline, Settings, StageError, run_local
from ringfold.parallel import autograd, convert_sync_batchnorm


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("bad sample")


class Fails(nn.Module):
    """Fail when it is told to, in the forwards or backwards after so many micro-batches."""

    def __init__(self, spared=1):
        super().__init__()
        self.how, self.calls, self.spared = None, 0, spared

    def forward(self, x):
        self.calls += 1
        how = self.how if self.calls > self.spared else None
        if how == "forward":
            raise ValueError("bad sample")
        return Spoiled.apply(x) if how == "backward" else x


class Scaled(nn.Module):
    """A layer of a user's own, which meets the other replicas in forward and backward."""

    def __init__(self, comm):
        super().__init__()
        self.comm = comm

    def forward(self, x):
        return x / (1 + autograd.allreduce(x.square().mean(0), self.comm))


def square(output, _):
    return output.square().mean()


def layers():
    """Two stages of three layers with norms between them, all of other widths."""
    return [
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        Fails(),
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)),
        nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)),
        Fails(),
        nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)),
    ]


def steps(mesh, made, failing, how, **options):
    """Return what each step comes to: a loss, or the text of an error.

    failing: the number of the layer that fails in each step, in the last replica; None for none.
    """
    for layer in made:
        convert_sync_batchnorm(layer, mesh.data)
    engine = Pipeline(made, mesh, loss_fn=square, microbatches=4, **options)
    found = []
    for which in failing:
        engine.zero_grad()
        for place, layer in enumerate(made):
            if isinstance(layer, Fails):
                fails = place == which and mesh.data.rank == mesh.data.size - 1
                layer.calls, layer.how = 0, how if fails else None
        rows = torch.arange(24.0).view(8, 3).sin() + mesh.data.rank
        try:
            found.append(float(engine.step(rows)))
        except StageError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [
        ("naive", False),
        ("gpipe", False),
        ("1f1b", False),
        ("1f1b", True),
        ("zero-bubble", False),
        ("zero-bubble", True),
    ],
)
def test_a_failure_beside_synchronised_norms_is_told_and_the_next_step_runs(
    schedule, recompute, how
):
    """The other replicas waited in a norm for the one that had failed, and the engine was dead."""
    options = {"schedule": schedule, "recompute": recompute, "boundaries": [3]}
    # In the first step no rank knows yet what its stage calls.
    rounds = [(1, None, 4, None), (4, None, 1, None)]

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=2)
        return [steps(mesh, layers(), failing, how, **options) for failing in rounds]

    first, *others = run_local(4, main)
    assert all(other == first for other in others)
    for failing, found in zip(rounds, first, strict=True):
        for which, result in zip(failing, found, strict=True):
            if which is None:
                assert isinstance(result, float)
                continue
            stage = which // 3
            # A forward that runs again does so in a backward.
            where = "" if recompute else how
            assert result.startswith(f"rank {2 + stage} of 4: stage {stage} failed in the {where}")
            assert "ValueError: bad sample" in result and "more)" not in result


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
def test_a_rank_of_several_stages_takes_part_for_all(reduction):
    options = {"schedule": "interleaved", "stages_per_rank": 2, "reduction": reduction}

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=1)
        return steps(mesh, layers(), (None, 4, None), "forward", boundaries=[3], **options)

    one, two = run_local(2, main)
    assert one == two and one[1].startswith("rank 1 of 2: stage 1 failed in the forward")


def test_an_evaluation_that_fails_on_one_replica_leaves_the_others_theirs():
    """Norms in training mode meet in an evaluation as well: the other replica waited."""

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=2)
        made = layers()
        for layer in made:
            convert_sync_batchnorm(layer, mesh.data)
        engine = Pipeline(made, mesh, loss_fn=square, boundaries=[3], microbatches=4)
        found = []
        for how in (None, "forward", None):
            made[1].calls, made[1].how = 0, how if mesh.data.rank == 0 else None
            try:
                found.append(tuple(engine.forward(torch.arange(24.0).view(8, 3).sin()).shape))
            except StageError as error:
                found.append("bad sample" in str(error))
        return found

    fails, goes_on = [(8, 2), True, (8, 2)], [(8, 2)] * 3
    assert run_local(4, main) == [fails, fails, goes_on, goes_on]


def own_layers(mesh, spared):
    return [nn.Linear(3, 4), Fails(spared), Scaled(mesh.data.split(0)), nn.Linear(4, 2)]


def test_a_layer_of_ones_own_that_meets_replicas_is_stood_in_for():
    """What a stage has called before, it calls with zeros where it has failed."""

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=1)
        return steps(mesh, own_layers(mesh, 1), (None, 1, None), "forward")

    one, two = run_local(2, main)
    assert one == two and "bad sample" in one[1] and isinstance(one[2], float)


def test_where_ranks_part_the_failure_that_came_before_is_named():
    """The error was of calls that differ, and what had gone wrong before was nowhere in it.

    Nobody knows yet what such a layer calls, in the first micro-batch of all.
    """

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=1)
        with pytest.raises(MismatchError) as caught:
            steps(mesh, own_layers(mesh, 0), (1,), "forward")
        return str(caught.value), repr(caught.value.__cause__)

    (_, quiet), (text, cause) = run_local(2, main, settings=Settings.read(timeout=20))
    assert text.startswith("stage 0 failed in the forward of micro-batch 0: ValueError: bad sample")
    assert "; then " in text and cause == "ValueError('bad sample')" and quiet == "None"
