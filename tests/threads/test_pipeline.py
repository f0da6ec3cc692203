"""Pipeline training equals the single-process run, on every grid and with every plan."""

import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
from little_layers import Call, Times, grad, mean_output, sum_output
from torch import nn

from ringfold import Mesh, Pipeline, run_local
from ringfold.parallel.plan import PLANS
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
