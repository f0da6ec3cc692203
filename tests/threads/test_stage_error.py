"""What fails in one stage is told on every rank, and nobody waits for what will not come."""

import pytest
import torch
from torch import nn

from ringfold import CommError, Mesh, Pipeline, Settings, StageError, run_local
from ringfold.parallel.plan import PLANS

ONE_STAGE_A_RANK = [name for name in PLANS if name != "interleaved"]


class Spoiled(torch.autograd.Function):
    """Fail in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("cannot go back")


class Fails(nn.Module):
    """Fail once: in the forward of a call, or in its backward."""

    def __init__(self, call=2, *, error=None):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.call, self.error = call, error

    def forward(self, x):
        self.call -= 1
        if self.call == -1 and self.error is not None:
            raise self.error
        return Spoiled.apply(x * self.w) if self.call == -1 else x * self.w


def mean_square(output, target):
    return (output if target is None else output - target).square().mean()


def attempts(size, make, *, num_data=1, target=None, raises=StageError, **options):
    """Return what two steps and an evaluation came to on every rank: an error's text, or None."""

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=size // num_data)
        engine = Pipeline(
            make(mesh.data.rank), mesh, loss_fn=mean_square, microbatches=4, **options
        )
        x = torch.arange(40.0).view(8, 5)
        found = []
        for run in (lambda: engine.step(x, target), lambda: engine.step(x, target)):
            engine.zero_grad()
            try:
                run()
                found.append(None)
            except raises as error:
                found.append(str(error))
        try:
            engine.forward(x)
            found.append(None)
        except raises as error:
            found.append(str(error))
        return found

    return run_local(size, main)


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("schedule", ONE_STAGE_A_RANK)
def test_an_output_that_does_not_fit_names_stages_microbatch_shapes_and_dtypes(schedule, reduction):
    def layers(_):
        return [nn.Linear(5, 3), nn.Linear(4, 2)]

    options = {"schedule": schedule, "reduction": reduction}
    for found in attempts(2, layers, **options):
        for text in found:
            assert text.startswith("rank 1 of 2: stage 1 failed in the forward of micro-batch 0: ")
            assert "(2x3 and 4x2)" in text
            assert "input from stage 0: float32 (2, 3)" in text


def test_dtypes_that_do_not_fit():
    layers = [nn.Linear(5, 3), nn.Linear(3, 2).double()]
    for found in attempts(2, lambda _: layers):
        assert "input from stage 0: float32 (2, 3), target: None" in found[0]
        assert "dtype" in found[0].lower()


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("schedule", ONE_STAGE_A_RANK)
@pytest.mark.parametrize("error", [ValueError("no third\nadvice"), None])
def test_a_failure_of_one_replica_reaches_all_ranks_and_the_next_step_runs(
    schedule, reduction, error
):
    # With a tree each replica has two of the four micro-batches.
    call = 2 if reduction == "bucket" else 1

    def layers(replica):
        middle = Fails(call, error=error) if replica == 1 else Fails(100)
        return [nn.Linear(5, 3), middle, nn.Linear(3, 1)]

    results = attempts(6, layers, num_data=2, schedule=schedule, reduction=reduction)
    assert all(found == results[0] for found in results)
    text, *later = results[0]
    assert later == [None, None]
    what = "backward" if error is None else "forward"
    assert text.startswith(f"rank 4 of 6: stage 1 failed in the {what}")
    assert f"of micro-batch {call}: ValueError: " in text and "advice" not in text
    assert "input from stage 0: float32 (" in text


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("error", [ValueError("no third"), None])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_rank_of_several_stages_goes_hollow_on_all(failing, error, reduction):
    def layers(_):
        made = [nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)]
        made[failing] = Fails(1, error=error)
        return made

    options = {"schedule": "interleaved", "reduction": reduction}
    for text, *later in attempts(2, layers, **options):
        what = "backward" if error is None else "forward"
        assert text.startswith(
            f"rank {failing % 2} of 2: stage {failing} failed in the {what} of micro-batch 1: "
        )
        assert later == [None, None]


def test_the_cause_is_on_the_rank_where_it_happened():
    complaint = ValueError("mine")

    def main(comm):
        layers = [nn.Linear(5, 3), Fails(0, error=complaint)]
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=mean_square)
        with pytest.raises(StageError) as caught:
            engine.step(torch.ones(2, 5))
        return caught.value.__cause__

    assert run_local(2, main) == [None, complaint]


def test_a_loss_on_a_target_that_does_not_fit_shows_it():
    def layers(_):
        return [nn.Linear(5, 3), nn.Linear(3, 2)]

    for found in attempts(2, layers, target=torch.ones(8, 7, dtype=torch.float64)):
        assert "input from stage 0: float32 (2, 3), target: float64 (2, 7)" in found[0]
        assert found[2] is None


def test_a_failure_of_the_world_is_raised_as_it_is():
    layers = [nn.Linear(5, 3), Fails(0, error=CommError("the link is down"))]
    with pytest.raises(CommError, match="the link is down"):
        attempts(2, lambda _: layers)


@pytest.mark.parametrize("training", [True, False])
def test_after_an_interrupt_nothing_of_it_is_taken_for_the_next_run(training):
    """Messages of the one before were in the way, and ranks waited until time was up."""

    def main(comm):
        layers = [Fails(2, error=KeyboardInterrupt()), Fails(1, error=KeyboardInterrupt())]
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=mean_square, microbatches=4)
        run = engine.step if training else engine.forward
        with pytest.raises(KeyboardInterrupt):
            run(torch.arange(8.0))
        with pytest.raises(CommError, match="was broken off by KeyboardInterrupt, with messages"):
            run(torch.ones(8))

    run_local(2, main, settings=Settings.read(timeout=2))


def test_nested_inputs_are_shown():
    class Pair(nn.Module):
        def forward(self, x):
            return {"h": x, "rest": (x > 0, None, [3])}

    class Bad(nn.Module):
        def forward(self, value):
            return value["missing"]

    ((text, *_), _) = attempts(2, lambda _: [Pair(), Bad()])
    shown = "{'h': float32 (2, 5), 'rest': (bool (2, 5), None, [3])}"
    assert f"KeyError: 'missing'; input from stage 0: {shown}" in text


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("error", [ValueError("no third"), None])
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_failure_on_a_rank_of_several_stages(failing, error, reduction):
    """The rank's other stage has messages to take and to send as well."""
    # A stage of a replica has two of the tree's four micro-batches.
    call = 2 if reduction == "bucket" else 1

    def layers(replica):
        module = Fails(call if replica == 0 else 100, error=error)
        return [module if stage == failing else nn.Linear(5, 5) for stage in range(4)]

    options = {"schedule": "interleaved", "stages_per_rank": 2, "reduction": reduction}
    results = attempts(4, layers, num_data=2, **options)
    assert all(found == results[0] for found in results)
    text, *later = results[0]
    assert later == [None, None]
    what = "backward" if error is None else "forward"
    assert text.startswith(f"rank {failing % 2} of 4: stage {failing} failed in the {what}")
