"""Pipeline training equals the single-process run, on every grid and with every plan."""

import re
import threading
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from little_layers import Call, Times
from torch import nn

from ringfold import LossScaler, Mesh, Pipeline, StageError, run_local
from ringfold.parallel.actions import parse_actions
from ringfold.parallel.plan import PLANS, PlanError
from ringfold.parallel.plan_text import parse_plan
from ringfold.parallel.sync_batchnorm import convert_sync_batchnorm

ONE_STAGE_A_RANK = [name for name in PLANS if name != "interleaved"]
GRIDS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1)]
LOCK = threading.Lock()  # torch's seed is one for all threads
ROWS = 24


def network(seed=0):
    with LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                first=nn.Linear(5, 7),
                act=nn.Tanh(),
                hidden=nn.Linear(7, 7, bias=False),
                norm=nn.LayerNorm(7),
                # In place, on what another stage may have sent.
                relu=nn.ReLU(inplace=True),
                more=nn.Linear(7, 7),
                smooth=nn.GELU(),
                last=nn.Linear(7, 2),
            )
        )


def data(rows=ROWS):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 2, generator=generator)


def part(tensor, mesh, rows=None):
    rows = len(tensor) if rows is None else rows
    index, size = mesh.data.rank, mesh.data.size
    return tensor[index * rows // size : (index + 1) * rows // size]


def alone(steps=4):
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = data()
        loss = nn.functional.mse_loss(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, module


def full_state(results):
    return {name: value for _, state, *_ in results for name, value in state.items()}


@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize(("num_data", "num_pipe"), GRIDS)
@pytest.mark.parametrize("microbatches", [1, 3, 5])
def test_training_equals_one_process(num_data, num_pipe, schedule, microbatches):
    expected_losses, module = alone()
    x, y = data()

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=num_pipe)
        engine = Pipeline(
            network(comm.rank // num_pipe),  # replicas start different, and are made equal
            mesh,
            loss_fn=nn.functional.mse_loss,
            microbatches=microbatches,
            schedule=schedule,
        )
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(4):
            engine.zero_grad()
            losses.append(engine.step(part(x, mesh), part(y, mesh)).item())
            optimizer.step()
        return losses, engine.state_dict(), engine.forward(x)

    results = run_local(num_data * num_pipe, main)
    for losses, _, output in results:
        assert losses == results[0][0]
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        torch.testing.assert_close(output, module(x).detach(), rtol=1e-5, atol=1e-6)
    state = full_state(results)
    assert state.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
    for rank, (_, held, _) in enumerate(results):
        for name, value in held.items():
            assert torch.equal(value, results[rank % num_pipe][1][name])


def test_plans_agree_to_the_last_bit():
    def main(comm, schedule):
        engine = Pipeline(
            network(), Mesh(comm, pipe=3), loss_fn=nn.functional.mse_loss, schedule=schedule
        )
        engine.step(*data())
        return {name: p.grad for name, p in engine.named_parameters()}

    runs = []
    for schedule in PLANS:
        parts = run_local(3, lambda comm, s=schedule: main(comm, s))
        runs.append({name: grad for part in parts for name, grad in part.items()})
    for other in runs[1:]:
        assert other.keys() == runs[0].keys()
        assert all(torch.equal(runs[0][name], grad) for name, grad in other.items())


@pytest.mark.parametrize("schedule", PLANS)
def test_activations_in_flight_are_the_plans(schedule):
    def main(comm):
        engine = Pipeline(
            network(),
            Mesh(comm, pipe=3),
            loss_fn=nn.functional.mse_loss,
            schedule=schedule,
            microbatches=6,
        )
        engine.step(*data())
        return engine.last_step.peak_in_flight

    expected = {
        "naive": [1, 1, 1],
        "gpipe": [6, 6, 6],
        "1f1b": [3, 2, 1],
        "interleaved": [8, 6, 4],
        "zero-bubble": [3, 3, 3],
    }
    assert run_local(3, main) == expected[schedule]


def mean_output(output, _):
    return output.mean()


def sum_output(output, _):
    return output.sum()


def grad(engine):
    return {name: p.grad.tolist() for name, p in engine.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("schedule", ONE_STAGE_A_RANK)
def test_pr22_last_microbatch_smaller(schedule):
    """The mean of the micro-batches' means counted rows of the short one more."""

    def main(comm):
        shapes = []
        watch = Call(lambda x: shapes.append(x.shape[0]) or x)
        layers = [Times(2), nn.Sequential(watch, Times(3))]
        engine = Pipeline(
            layers, Mesh(comm, pipe=2), loss_fn=mean_output, microbatches=3, schedule=schedule
        )
        found = []
        for rows in (8, 2, 8):
            engine.zero_grad()
            shapes.clear()
            x = torch.arange(1.0, rows + 1)
            loss = engine.step(x if comm.rank == 0 else None)
            found.append((loss.item(), grad(engine), list(shapes)))
        return found

    first, last = run_local(2, main)
    assert [step[0] for step in first] == [step[0] for step in last] == [27.0, 9.0, 27.0]
    assert [step[1] for step in first] == [{"0.w": 13.5}, {"0.w": 4.5}, {"0.w": 13.5}]
    assert [step[1] for step in last] == [{"1.1.w": 9.0}, {"1.1.w": 3.0}, {"1.1.w": 9.0}]
    assert [step[2] for step in last] == [[3, 3, 2], [1, 1], [3, 3, 2]]


@pytest.mark.parametrize(
    ("rows", "none"), [((7, 1), False), ((8, 0), False), ((0, 3), False), ((8, 0), True)]
)
@pytest.mark.parametrize("pipe", [1, 2])
def test_unequal_replicas_count_by_their_rows(rows, none, pipe):
    x = torch.arange(1.0, sum(rows) + 1)

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=pipe)
        engine = Pipeline([Times(2), Times(3)], mesh, loss_fn=mean_output, microbatches=2)
        mine = x[: rows[0]] if mesh.data.rank == 0 else x[rows[0] :]
        if len(mine) == 0 and none:  # as NoneIfEmpty collates
            mine = None
        return engine.step(mine).item(), grad(engine)

    mean = x.mean().item()
    for loss, grads in run_local(2 * pipe, main):
        assert loss == pytest.approx(6 * mean)
        for name, value in grads.items():
            assert value == pytest.approx({"0.w": 3 * mean, "1.w": 2 * mean}[name])


def test_steps_accumulate_as_backward_does():
    """A second reduction must not multiply what the first has left."""

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=1)
        engine = Pipeline([Times(1)], mesh, loss_fn=mean_output, microbatches=2)
        for _ in range(2):
            engine.step(torch.tensor([1.0, 3.0]) + 4 * comm.rank)
        return grad(engine)

    assert run_local(2, main) == [{"0.w": 8.0}] * 2


def masked_sum(h, mask, idx, table):
    return torch.where(mask, h * table[idx], torch.zeros(())).sum()


class Table(nn.Module):
    """The second stage of the report: picks by index, where the mask says so."""

    def __init__(self, seen):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([10.0, 100.0]))
        self.seen = seen

    def forward(self, value):
        h, mask, idx, nothing = value.values() if isinstance(value, dict) else value
        self.seen.append((type(value), mask.dtype, idx.dtype, nothing))
        return masked_sum(h, mask, idx, self.table)


@pytest.mark.parametrize("kind", [tuple, list, dict])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_pr23_bool_mask_integers_and_none_between_stages(kind, microbatches):
    """Masks were cast to half, third outputs dropped, and integers asked for gradients."""

    def main(comm):
        mask = torch.tensor([True, False, True, True])
        idx = torch.tensor([0, 1, 1, 0])
        first = Times(2)

        def hand_on(rows):
            values = (rows["h"], rows["mask"], rows["idx"], None)
            return dict(zip("abcd", values, strict=True)) if kind is dict else kind(values)

        seen = []
        layers = [
            Call(lambda rows: {**rows, "h": first(rows["h"])}),
            Call(hand_on),
            Table(seen),
        ]
        layers[0].first = first
        engine = Pipeline(
            layers,
            Mesh(comm, pipe=2),
            loss_fn=sum_output,
            loss_reduction="sum",
            microbatches=microbatches,
            boundaries=[2],
        )
        x = {"h": torch.tensor([1.0, 2.0, 3.0, 4.0]), "mask": mask, "idx": idx}
        return engine.step(x).item(), grad(engine), seen

    (loss, w, _), (same, table, seen) = run_local(2, main)
    assert loss == same == 700.0
    assert w == {"0.first.w": 350.0}
    assert table == {"2.table": [10.0, 6.0]}
    assert seen == [(kind, torch.bool, torch.int64, None)] * microbatches


def test_unsupported_values_are_refused_by_name():
    def main(comm):
        layers = [Call(lambda x: (x, {"extra": [object()]})), Call(lambda pair: pair[0])]
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=sum_output)
        engine.step(torch.ones(2))

    with pytest.raises(StageError, match=r"output of stage 0\[1\]\['extra'\]\[0\]: a object"):
        run_local(2, main)


@pytest.mark.parametrize("num_data", [1, 2])
def test_pr24_stage_without_parameters(num_data):
    """Optimizers refused an empty list; such a stage stayed out of the norm's reduction."""

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=3)
        engine = Pipeline(
            [Times(2), nn.ReLU(), Times(2)], mesh, loss_fn=sum_output, loss_reduction="sum"
        )
        engine.load_state_dict({"0.w": torch.tensor(2.0), "2.w": torch.tensor(3.0)})
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
        x = torch.tensor([-1.0, 2.0]) if mesh.data.rank == 0 else torch.empty(0)
        loss = engine.step(x).item()
        norm = engine.clip_grad_norm_(1e6).item()
        grads = grad(engine)
        optimizer.step()
        state = engine.state_dict()
        engine.load_state_dict(state)
        assert optimizer.state_dict()["state"] == {}
        return loss, norm, grads, state.keys()

    results = run_local(3 * num_data, main)
    assert [r[0] for r in results] == [12.0] * len(results)
    assert [r[1] for r in results] == [pytest.approx(52**0.5)] * len(results)
    assert [r[2] for r in results] == [{"0.w": 6.0}, {}, {"2.w": 4.0}] * num_data
    assert [set(r[3]) for r in results] == [{"0.w"}, set(), {"2.w"}] * num_data


@pytest.mark.parametrize("num_data", [1, 2])
@pytest.mark.parametrize(
    ("norm_type", "limit", "norm", "after"),
    [
        (2.0, 1.0, 5.0, (0.6, 0.8)),
        (float("inf"), 1.0, 4.0, (0.75, 1.0)),
        (2.0, 100.0, 5.0, (3.0, 4.0)),
        (1.0, 3.5, 7.0, (1.5, 2.0)),
    ],
)
def test_pr26_clipping_by_the_norm_over_all_stages(num_data, norm_type, limit, norm, after):
    """Each stage scaled by its own norm, so the update was not the unsplit model's."""

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=2)
        engine = Pipeline([Times(1), Times(1)], mesh, loss_fn=mean_output)
        (parameter,) = engine.parameters()
        parameter.grad = torch.tensor(3.0 + engine.stage)
        found = engine.clip_grad_norm_(limit, norm_type)
        return found.item(), parameter.grad.item()

    for rank, (found, gradient) in enumerate(run_local(2 * num_data, main)):
        assert found == norm
        exact = limit == 100
        assert gradient == (after[rank % 2] if exact else pytest.approx(after[rank % 2], rel=1e-6))


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("rows", [[[1, 4, 4, 2]], [[3], [3]], [[3]]])
def test_clipping_takes_sparse_gradients(rows, norm_type):
    """One rank raised, and the others waited for it."""

    def stages(sparse):
        generator = torch.Generator().manual_seed(2)
        made = [nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)]
        for parameter in nn.ModuleList(made).parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return made

    x = torch.tensor(rows)
    whole = nn.Sequential(*stages(sparse=False))
    whole(x).sum().backward()
    norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.5, norm_type)

    def main(comm):
        engine = Pipeline(
            stages(sparse=True),
            Mesh(comm, pipe=2),
            loss_fn=sum_output,
            loss_reduction="sum",
            microbatches=2,
        )
        engine.step(x)
        assert engine.clip_grad_norm_(0.5, norm_type).item() == pytest.approx(norm.item())
        for name, parameter in engine.named_parameters():
            gradient = parameter.grad
            assert gradient.is_sparse == (name == "0.weight")
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            torch.testing.assert_close(dense, whole.get_parameter(name).grad)

    run_local(2, main)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_shows_a_nan_on_every_rank(norm_type):
    def main(comm):
        engine = Pipeline([Times(1), Times(1)], Mesh(comm, pipe=2), loss_fn=mean_output)
        (parameter,) = engine.parameters()
        parameter.grad = torch.tensor(float("nan") if comm.rank == 0 else 4.0)
        return engine.clip_grad_norm_(1.0, norm_type).isnan().item()

    assert run_local(2, main) == [True, True]


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_where_a_gradient_has_no_elements(norm_type):
    """One stage raised, as nothing has no greatest element, and left the other in the allreduce.

    Such is a parameter of 0 elements, and a sparse gradient where all tokens are padding.
    """

    def main(comm):
        padded = nn.Embedding(5, 3, padding_idx=0, sparse=True)
        ends = nn.Linear(3, 2)
        ends.register_parameter("none", nn.Parameter(torch.zeros(0)))
        engine = Pipeline([padded, ends], Mesh(comm, pipe=2), loss_fn=sum_output, microbatches=1)
        engine.step(torch.zeros(4, dtype=torch.long))
        own = dict(engine.named_parameters())
        if comm.rank == 1:
            own["1.none"].grad = torch.zeros(0)
            own["1.weight"].grad.zero_()
            own["1.bias"].grad.copy_(torch.tensor([0.0, 4.0]))
        else:
            assert own["0.weight"].grad._nnz() == 0
        return engine.clip_grad_norm_(1.0, norm_type).item()

    assert run_local(2, main) == [4.0, 4.0]


@pytest.mark.parametrize("norm_type", [2.0, 64.0, 5e-4])
def test_a_norm_beyond_a_float_is_infinite_on_every_rank(norm_type):
    """Python raises where a power overflows: on the stage whose norm is that great, alone."""
    great = 1e200 if norm_type == 2 else 1e5

    def main(comm):
        engine = Pipeline([Times(1), Times(1)], Mesh(comm, pipe=2), loss_fn=mean_output)
        (parameter,) = engine.parameters()
        parameter.data = parameter.data.double()
        parameter.grad = torch.tensor(1.0 if comm.rank else great, dtype=torch.float64)
        norm = engine.clip_grad_norm_(1.0, norm_type).item()
        return norm, parameter.grad.item()

    assert run_local(2, main) == [(float("inf"), 0.0)] * 2


def test_pr08_buffers_in_flight_are_not_overwritten():
    """A stage that ran ahead reused the memory of what it was still sending."""

    def main(comm):
        seen = []

        def slow(x):
            time.sleep(0.05)
            seen.append(sorted(set(x.flatten().tolist())))
            return x

        layers = [Times(1), nn.Sequential(Call(slow), Times(1))]
        engine = Pipeline(
            layers, Mesh(comm, pipe=2), loss_fn=mean_output, microbatches=4, schedule="gpipe"
        )
        x = torch.arange(1.0, 5.0).view(4, 1).expand(4, 50_000)
        engine.step(x)
        return seen

    assert run_local(2, main)[1] == [[1.0], [2.0], [3.0], [4.0]]


class Cache(nn.Module):
    """Hand on memory of its own, which the next micro-batch is written to."""

    def __init__(self):
        super().__init__()
        self.memory = torch.zeros(1, 50_000)

    def forward(self, x):
        return self.memory.copy_(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_may_hand_on_its_own_memory(training):
    """The next stage saw what later micro-batches had written there."""

    def main(comm):
        seen = []

        def slow(x):
            time.sleep(0.01)
            seen.append(sorted(set(x.flatten().tolist())))
            return x

        layers = [Cache(), nn.Sequential(Call(slow), Times(1))]
        mesh = Mesh(comm, pipe=2)
        engine = Pipeline(layers, mesh, loss_fn=mean_output, microbatches=4, schedule="gpipe")
        x = torch.arange(1.0, 5.0).view(4, 1).expand(4, 50_000)
        engine.step(x) if training else engine.forward(x)
        return seen

    assert run_local(2, main)[1] == [[1.0], [2.0], [3.0], [4.0]]


@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("last", [lambda x: x, lambda x: {"x": x, "none": None}])
def test_the_last_layer_may_hand_on_its_own_memory(pipe, last):
    """All micro-batches had what the last one had written there."""

    def main(comm):
        layers = [Cache(), nn.Sequential(Cache(), Call(last))]
        engine = Pipeline(layers, Mesh(comm, pipe=pipe), microbatches=3)
        found = engine.forward(torch.arange(1.0, 4.0).view(3, 1).expand(3, 50_000))
        return (found["x"] if isinstance(found, dict) else found)[:, 0].tolist()

    assert run_local(pipe, main) == [[1.0, 2.0, 3.0]] * pipe


def test_shapes_change_from_step_to_step_and_between_microbatches():
    def main(comm):
        pool = Call(lambda x: x[:, : int(x[0, 0].detach())])  # as wide as the data say
        engine = Pipeline(
            [Times(1), pool, Times(2)],
            Mesh(comm, pipe=3),
            loss_fn=sum_output,
            loss_reduction="sum",
            microbatches=2,
        )
        losses = []
        for width in (4, 2, 3):
            x = torch.ones(2, 5)
            x[0] = width
            losses.append(engine.step(x).item())
        return losses

    for losses in run_local(3, main):
        assert losses == [2.0 * (w * w + 1) for w in (4, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_dtypes_and_layouts_between_stages(dtype):
    def main(comm):
        turn = Call(lambda x: (x.t().conj(), x[:, :1].expand(-1, 4)))
        join = Call(lambda pair: pair[0].t().abs().float() + pair[1].abs().float())
        layers = [Times(2).to(dtype), turn, join]
        engine = Pipeline(
            layers, Mesh(comm, pipe=2), loss_fn=sum_output, boundaries=[2], microbatches=1
        )
        x = torch.arange(1.0, 9.0).view(2, 4).to(dtype)
        loss = engine.step(x).item()
        return loss, grad(engine)

    (loss, grads), (same, _) = run_local(2, main)
    assert loss == same == 2 * (36 + 4 * (1 + 5))
    assert grads == {"0.w": 60}


def test_the_last_output_may_be_what_the_loss_takes():
    def main(comm):
        spread = Call(lambda x: torch.distributions.Normal(x, 1.0))
        engine = Pipeline(
            [Times(2), Times(3), spread],
            Mesh(comm, pipe=2),
            loss_fn=lambda found, _: -found.log_prob(torch.zeros(())).sum(),
            loss_reduction="sum",
        )
        engine.step(torch.tensor([1.0, 3.0]))
        with pytest.raises(StageError, match="output of the last stage: a Normal cannot be"):
            engine.forward(torch.ones(2))
        return grad(engine)

    # Of -log p = x^2 / 2 + ..., of which x = 6 a.
    assert run_local(2, main) == [{"0.w": 180.0}, {"1.w": 120.0}]


def test_output_that_needs_no_gradient_gets_none_back():
    """With the first stage frozen there is nothing to send back, and nobody may wait for it."""

    def main(comm):
        layers = [Times(2), Times(3)]
        layers[0].w.requires_grad_(False)
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=mean_output, microbatches=2)
        # As with LoRA: optimizers refuse an empty list, and here one stage has nothing to train.
        trained = [p for p in engine.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        loss = engine.step(torch.tensor([1.0, 3.0])).item()
        gradients = grad(engine)
        optimizer.step()
        return loss, gradients, sum(p.sum().item() for p in engine.parameters())

    assert run_local(2, main) == [(12.0, {}, 2.0), (12.0, {"1.w": 4.0}, 1.0)]


def test_received_value_that_is_not_used():
    def main(comm):
        layers = [Times(2), Call(lambda x: (x, x * 5)), Call(lambda pair: pair[0]), Times(3)]
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=mean_output, boundaries=[2])
        return engine.step(torch.tensor([1.0, 3.0])).item(), grad(engine)

    assert run_local(2, main) == [(12.0, {"0.w": 6.0}), (12.0, {"3.w": 4.0})]


def test_replicas_share_buffers_and_evaluate_apart():
    def main(comm):
        mesh = Mesh(comm, data=2, pipe=2)
        layers = [nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)]
        engine = Pipeline(layers, mesh, loss_fn=nn.functional.mse_loss, microbatches=2)
        x, y = data()
        engine.step(part(x, mesh), part(y, mesh))
        engine.eval()
        # Of one replica alone, while the other does something else.
        output = engine.forward(x) if mesh.data.rank == 0 else None
        return engine.state_dict(), output

    results = run_local(4, main)
    for stage in (0, 1):
        zero, one = results[stage][0], results[stage + 2][0]
        assert all(torch.equal(zero[name], one[name]) for name in zero)
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].shape == (ROWS, 2)


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
def test_buffers_come_from_a_replica_with_rows(reduction):
    """Those of replica 0 overwrote what the step had left in the others'."""

    def main(comm):
        mesh = Mesh(comm, data=2)
        layers = [nn.BatchNorm1d(1, momentum=1.0), Times(1)]
        engine = Pipeline(layers, mesh, loss_fn=mean_output, microbatches=1, reduction=reduction)
        x = torch.tensor([[2.0], [4.0]])
        engine.step(x if mesh.data.rank else x[:0])
        return layers[0].running_mean.item()

    assert run_local(2, main) == [3.0, 3.0]


@pytest.mark.parametrize(("rows", "fits"), [((4, 4), True), ((3, 2), True), ((3, 1), False)])
@pytest.mark.parametrize("pipe", [1, 2])
def test_layers_that_meet_other_replicas_do_so_equally_often(rows, fits, pipe):
    """Replicas with unequal numbers of micro-batches waited for each other's statistics."""

    def main(comm):
        with Mesh(comm, data=2, pipe=pipe) as mesh:
            layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
            engine = Pipeline(
                convert_sync_batchnorm(layers, mesh.data),
                mesh,
                loss_fn=nn.functional.mse_loss,
                microbatches=2,
            )
            count = rows[mesh.data.rank]
            batch = torch.arange(2.0 * count).view(count, 2) + mesh.data.rank, torch.ones(count, 1)
            if fits:
                engine.step(*batch)
            else:
                with pytest.raises(ValueError, match=r"3, 1\] rows have \[2, 1\] micro-batches"):
                    engine.step(*batch)
                engine.eval()
            assert engine.step(*batch) > 0
            engine.close()

    run_local(2 * pipe, main)


def test_nested_outputs_are_joined_on_every_rank():
    def main(comm):
        split = Call(lambda x: {"twice": x * 2, "both": (x, None, x > 2, "name")})
        engine = Pipeline([Times(1), split], Mesh(comm, pipe=2), microbatches=3)
        with pytest.raises(ValueError, match="without loss_fn"):
            engine.step(torch.ones(2))
        return engine.forward(torch.arange(4.0) if comm.rank == 0 else None)

    for output in run_local(2, main):
        assert output["twice"].tolist() == [0, 2, 4, 6]
        assert not output["twice"].requires_grad
        assert output["both"][2].tolist() == [False, False, False, True]
        assert (output["both"][1], output["both"][3]) == (None, "name")


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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_counts_on_the_last_stage(rank):
    """The first stage refused to train, and the last one waited for it."""

    def main(comm):
        loss_fn = mean_output if comm.rank == rank else None
        engine = Pipeline([Times(1), Times(2)], Mesh(comm, pipe=2), loss_fn=loss_fn)
        if rank == 0:
            with pytest.raises(ValueError, match="without loss_fn on its last stage"):
                engine.step(torch.ones(2))
            return 2.0
        return engine.step(torch.ones(2)).item()

    assert run_local(2, main) == [2.0, 2.0]


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


def test_state_of_the_unsplit_model_loads_by_name():
    whole = network(5)

    def main(comm):
        engine = Pipeline(network(0), Mesh(comm, pipe=3), loss_fn=mean_output)
        engine.load_state_dict(whole.state_dict())
        with pytest.raises(ValueError, match=r"in no stage of this model: lost\.weight"):
            engine.load_state_dict({**whole.state_dict(), "lost.weight": torch.ones(1)})
        return None, engine.state_dict()

    state = full_state(run_local(3, main))
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in state.items())


def test_reduction_over_replicas_is_one_per_bucket():
    def main(comm):
        mesh = Mesh(comm, data=2, pipe=2)
        engine = Pipeline(network(), mesh, loss_fn=nn.functional.mse_loss, bucket_bytes=1 << 20)
        engine.step(*data())
        engine.close()
        mesh.close()
        return engine.last_step.reduction.reductions

    assert run_local(4, main) == [1] * 4


def test_wire_dtype_of_the_reduction():
    def main(comm):
        mesh = Mesh(comm, data=2, pipe=1)
        engine = Pipeline([Times(1)], mesh, loss_fn=mean_output, wire_dtype="bf16")
        engine.step(torch.tensor([1.0 + 2**-12, 1.0]))
        return grad(engine)

    assert run_local(2, main) == [{"0.w": 1.0}] * 2


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2)])
def test_a_mean_over_the_tokens_that_a_mask_leaves(grid):
    """As docs/pipeline.md has it; replicas have unequal numbers, a micro-batch has none."""
    x, _ = data(8)
    y = torch.tensor([0, 1, -100, -100, 1, -100, 0, 0])
    whole = network()
    expected = nn.functional.cross_entropy(whole(x), y)
    expected.backward()

    def main(comm):
        mesh = Mesh(comm, data=grid[0], pipe=grid[1])
        mine, tokens = part(y, mesh), 0

        def loss_fn(output, target):
            return nn.functional.cross_entropy(output, target, reduction="sum") / tokens

        engine = Pipeline(
            network(), mesh, loss_fn=loss_fn, loss_reduction="sum", microbatches=8 // grid[0] // 2
        )
        tokens = int(mesh.data.allreduce(np.array([(mine != -100).sum()]))[0])
        loss = engine.step(part(x, mesh), mine).item()
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        return grad(engine)

    reference = dict(whole.named_parameters())
    for gradients in run_local(grid[0] * grid[1], main):
        for name, value in gradients.items():
            right = reference[name].grad
            torch.testing.assert_close(torch.tensor(value), right, rtol=1e-5, atol=1e-7)
