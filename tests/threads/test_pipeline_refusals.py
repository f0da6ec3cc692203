"""What a pipeline refuses, on every rank, before anything is sent."""

import re

import pytest
import torch
from little_layers import Call, Times, mean_output, sum_output
from torch import nn

from ringfold import LossScaler, Mesh, Pipeline, StageError, run_local
from ringfold.parallel.actions import parse_actions
from ringfold.parallel.plan import PlanError
from ringfold.parallel.plan_text import parse_plan


def test_unsupported_values_are_refused_by_name():
    def main(comm):
        layers = [Call(lambda x: (x, {"extra": [object()]})), Call(lambda pair: pair[0])]
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=sum_output)
        engine.step(torch.ones(2))

    with pytest.raises(StageError, match=r"output of stage 0\[1\]\['extra'\]\[0\]: a object"):
        run_local(2, main)


def engine_error(size, message, error=ValueError, layers=None, **options):
    def main(comm):
        with pytest.raises(error, match=message):
            made = [Times(1), Times(2)] if layers is None else layers(comm.rank)
            Pipeline(made, Mesh(comm, pipe=size), loss_fn=mean_output, **options)
        return True

    assert run_local(size, main) == [True] * size


def test_bad_settings_are_refused_on_every_rank():
    engine_error(3, "stage 2 of 3 is left without layers")
    engine_error(2, "stage 1 of 2 is left without layers", boundaries=[2])
    engine_error(2, "unknown pipeline schedule '2f2b'", schedule="2f2b")
    engine_error(2, "at least 1 micro-batch, got 0", microbatches=0)
    engine_error(
        2, "unknown loss_reduction 'max', expected one of: mean, sum", loss_reduction="max"
    )
    engine_error(2, "unknown wire dtype 'int8'", wire_dtype="int8")
    engine_error(2, "cannot be interpreted as an integer", TypeError, boundaries=[1.5])
    engine_error(2, "list of layers, got a Linear", TypeError, lambda _: nn.Linear(1, 1))
    engine_error(2, "layer 1: expected an nn.Module", TypeError, lambda _: [Times(1), abs])


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("check_finite", True, "check_finite False on rank 0; check_finite True on rank 1"),
        ("broadcast_buffers", False, "broadcast_buffers True on rank 0; "),
        ("bucket_bytes", 100, "bucket_bytes 4194304 on rank 0; bucket_bytes 100 on rank 1"),
        ("wire_dtype", "bf16", "wire_dtype None on rank 0; wire_dtype bf16 on rank 1"),
        ("loss_scaler", LossScaler, "loss_scaler none on rank 0; loss_scaler given on rank 1"),
        ("loss_fn", None, "loss_fn given on last stages on rank 0; loss_fn none on last stages"),
        ("wire_dtype", "int8", "on rank 1: unknown wire dtype 'int8'"),
        ("microbatches", 0, "on rank 1: expected at least 1 micro-batch, got 0"),
        ("schedule", "2f2b", "on rank 1: unknown pipeline schedule '2f2b'"),
        ("recompute", [3], "on rank 1: expected stages 0 to 0"),
    ],
)
def test_settings_of_one_rank_are_refused_on_every_rank(name, value, shown):
    """The others waited, or computed with other settings."""

    def main(comm):
        own = value(comm) if value is LossScaler else value
        options = {"loss_fn": mean_output} | ({name: own} if comm.rank else {})
        with pytest.raises(ValueError, match=re.escape(shown)):
            Pipeline([Times(1), Times(2)], Mesh(comm, data=2), **options)
        return True

    assert run_local(2, main) == [True] * 2


def test_layers_of_one_rank_are_refused_on_every_rank():
    def main(comm):
        layers = [Times(1), Times(2)] if comm.rank else Times(1)
        with pytest.raises((ValueError, TypeError), match="on rank 0: expected an nn"):
            Pipeline(layers, Mesh(comm, pipe=2), loss_fn=mean_output)
        return True

    assert run_local(2, main) == [True] * 2


def test_what_is_no_mesh_is_refused():
    with pytest.raises(
        TypeError, match=r"expected a Mesh, such as Mesh\(comm, pipe=2\), got a Com"
    ):
        run_local(1, lambda comm: Pipeline([Times(1)], comm))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def with_hook():
    made = nn.Sequential(Times(1), Times(2))
    made.register_forward_hook(lambda *_: None)
    return made


def with_parameter():
    made = nn.ModuleList([Times(1), Times(2)])
    made.scale = nn.Parameter(torch.ones(1))
    return made


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Residual(Times(1), Times(2)), "Residual of layers has its own forward"),
        (with_hook, "Sequential of layers has hooks"),
        (with_parameter, "ModuleList of layers has parameter scale"),
    ],
    ids=["forward", "hook", "parameter"],
)
def test_what_a_container_does_by_itself_is_refused(make, what):
    engine_error(2, what, TypeError, lambda _: make())


def test_layers_that_differ_between_ranks_are_refused_on_every_rank():
    def layers(rank):
        return [nn.Linear(2, 2), nn.Linear(2, 2 + rank % 2), nn.ReLU()]

    message = r"1\.weight \(2, 2\) float32 on ranks 0, 2; 1\.weight \(3, 2\) float32 on rank 1"
    engine_error(3, message, layers=layers)
    engine_error(
        2, "layers 0 on rank 0; layers 0 1 on rank 1", layers=lambda r: [Times(1)] * (r + 1)
    )


def test_a_buffer_shared_by_two_ranks_is_refused():
    def layers(_):
        first, last = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        last.running_var = first.running_var
        return [first, last]

    message = "0.running_var of stage 0 and 1.running_var of stage 1 are one and the same buffer"
    engine_error(2, message, layers=layers)


def test_a_plan_that_would_deadlock_is_refused_before_the_first_message():
    def upside_down(stage, num_stages, num_microbatches):
        order = range(num_microbatches)[:: 1 if stage == 0 else -1]
        words = [f"F{m}" for m in order] + [f"B{m}" for m in range(num_microbatches)]
        return parse_actions(" ".join(words), stage)

    def one_behind(stage, num_stages, num_microbatches):
        return parse_actions("B0 F0" if stage == 1 else "F0 B0", stage)

    engine_error(2, "stage 1 is stuck at B0", PlanError, schedule=one_behind, microbatches=1)

    # Another order of micro-batches on the receiving stage is unusual, and fine.
    def main(comm):
        engine = Pipeline(
            [Times(2), Times(3)],
            Mesh(comm, pipe=2),
            loss_fn=mean_output,
            microbatches=3,
            schedule=upside_down,
        )
        return engine.step(torch.arange(1.0, 9.0)).item()

    assert run_local(2, main) == [27.0, 27.0]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(3), torch.ones(4), "replica 0: x has 3 rows on the first stage, y has 4"),
        (None, torch.ones(4), "replica 0: x has 0 rows on the first stage, y has 4"),
        (None, None, "no rows: expected a tensor with rows as x on a first stage"),
        ((torch.ones(3), torch.ones(2)), None, r"equal numbers of rows, got \[3, 2\]"),
        (torch.ones(3), torch.tensor(1.0), "y: expected a tensor with rows"),
        (torch.ones(0), None, "the global batch has no rows"),
    ],
)
def test_unfit_batches_are_refused_on_every_rank_and_do_no_harm(x, y, message):
    def main(comm):
        engine = Pipeline([Times(2), Times(3)], Mesh(comm, pipe=2), loss_fn=mean_output)
        with pytest.raises(ValueError, match=message):
            engine.step(x, y)
        return engine.step(torch.arange(1.0, 9.0)).item()

    assert run_local(2, main) == [27.0, 27.0]


def test_unfit_batch_of_an_evaluation():
    def main(comm):
        engine = Pipeline([Times(2), Times(3)], Mesh(comm, pipe=2))
        with pytest.raises(ValueError, match="x: expected at least one row"):
            engine.forward(torch.ones(0))
        return engine.forward(torch.ones(1)).tolist()

    assert run_local(2, main) == [[6.0], [6.0]]


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (lambda out: out[:, None].expand(-1, 40), "float32 (3, 40);"),
        (lambda out: 0.5, "0.5;"),
        (lambda out: (out, None), "(float32 (3,), None);"),
    ],
)
def test_loss_must_be_one_element(loss, shown):
    """The error had the elements, up to the first end of a line."""

    def main(comm):
        engine = Pipeline([Times(2)], Mesh(comm), loss_fn=lambda out, _: loss(out), microbatches=1)
        engine.step(torch.ones(3))

    told = f"loss_fn to return a tensor of one element, got {shown}"
    with pytest.raises(StageError, match=re.escape(told)):
        run_local(1, main)


def test_a_loss_without_a_graph_is_told():
    def main(comm):
        mesh = Mesh(comm, pipe=2)
        engine = Pipeline([Times(2), Times(3)], mesh, loss_fn=mean_output, microbatches=2)
        with torch.no_grad(), pytest.raises(StageError, match=r"under torch\.no_grad\(\)"):
            engine.step(torch.ones(4))
        for parameter in engine.parameters():
            parameter.requires_grad_(False)
        return engine.step(torch.arange(4.0)).item()  # there is nothing to train, and that is fine

    assert run_local(2, main) == [9.0, 9.0]


def test_a_loss_with_parameters_of_its_own_is_refused_over_replicas():
    class Head(nn.Linear):
        def forward(self, output, _):
            return super().forward(output).mean()

    def main(comm):
        with pytest.raises(TypeError, match="loss_fn has parameters"):
            Pipeline([Times(2)], Mesh(comm), loss_fn=Head(4, 1))
        engine = Pipeline([Times(2)], Mesh(comm), loss_fn=Head(4, 1).requires_grad_(False))
        engine.step(torch.ones(2, 4))

    run_local(2, main)


@pytest.mark.parametrize("rows", [(4, 1), (4, 0)])
def test_a_plan_that_refuses_what_one_replica_has_is_refused_on_every_rank(rows):
    plan = parse_plan("stage 0: F0 F1 B0 B1\nstage 1: F0 B0 F1 B1\n")

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=2)
        options = {"microbatches": 2, "schedule": plan}
        engine = Pipeline([Times(2), Times(3)], mesh, loss_fn=mean_output, **options)
        with pytest.raises(PlanError) as caught:
            engine.step(torch.ones(rows[mesh.data.rank]))
        return str(caught.value), engine.step(torch.arange(1.0, 9.0)).item()

    assert len(set(run_local(4, main))) == 1


@pytest.mark.parametrize("output", ["a number", "other widths"])
def test_outputs_that_cannot_be_joined_are_told_on_every_rank(output):
    def ends(x):
        return x.mean() if output == "a number" else x.repeat(1, len(x))

    def main(comm):
        engine = Pipeline([Times(2), Call(ends)], Mesh(comm, pipe=2), microbatches=2)
        with pytest.raises(StageError, match="rank 1 of 2: stage 1 failed in the forward") as told:
            engine.forward(torch.ones(3, 1))
        return str(told.value), engine.forward(torch.ones(1, 1)).item()

    told, one = run_local(2, main)
    assert told == one and told[1] == 2.0  # a single micro-batch's output needs no joining
