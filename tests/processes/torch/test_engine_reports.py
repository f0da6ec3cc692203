"""PR-14 to PR-26 over MPI, with the reports' own numbers; ranks beyond a recipe's stand aside."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from little_layers import Call, Table, Times
from little_layers import grad as grads
from scalars import Scalars, grad
from torch import nn

from ringfold import DataParallel, Mesh, Pipeline, StageError
from ringfold.parallel import broadcast_optimizer
from ringfold.parallel.plan import PLANS

ONE_STAGE_A_RANK = [name for name in PLANS if name != "interleaved"]


@contextmanager
def first(comm, count) -> Iterator:
    """The communicator of the first ranks; None on the others. Skips where there are too few."""
    if comm.size < count:
        pytest.skip(f"needs {count} ranks")
    group = comm.split(0 if comm.rank < count else None)
    yield group
    if group is not None:
        group.close()


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_pr14_a_gradient_on_some_ranks_only(comm, bucket_bytes):
    with first(comm, 2) as two:
        if two is None:
            return
        module = Scalars(a=1, b=1)
        model = DataParallel(module, two, bucket_bytes=bucket_bytes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = [lambda m: 2 * m.a, lambda m: 4 * m.a + 6 * m.b]
        model(losses[two.rank]).backward()
        assert (grad(module.a), grad(module.b)) == (3.0, 3.0)
        report = model.gradient_report()
        assert report.partial == {"b": (1,)} and model.last_step.partial == ("b",)
        assert str(report) == "b: gradient on rank 1 of 2, zeros for the others"
        optimizer.step()
        assert module.a.item() == module.b.item() == pytest.approx(0.7, abs=1e-6)
        optimizer.zero_grad()
        losses = [lambda m: 8 * m.b, lambda m: 2 * m.a]
        model(losses[two.rank]).backward()
        assert (grad(module.a), grad(module.b)) == (1.0, 4.0)


@pytest.mark.parametrize("kind", ["around both", "around backward", "by flag"])
def test_pr15_only_the_last_micro_step_synchronises(comm, kind):
    with first(comm, 2) as two:
        if two is None:
            return
        module = Scalars(w=1)
        model = DataParallel(module, two)
        *early, last = [(1, 2, 3), (10, 20, 30)][two.rank]
        for x in early:
            if kind == "around both":
                with model.no_sync():
                    model(lambda m, x=x: m.w * x).backward()
                continue
            loss = model(lambda m, x=x: m.w * x)
            if kind == "around backward":
                with model.no_sync():
                    loss.backward()
            else:
                model.synchronize = False
                loss.backward()
        # The switch is read when backward runs: flipped after the forward, it counts.
        loss = model(lambda m: m.w * last)
        model.synchronize = True
        loss.backward()
        assert (grad(module.w), model.last_step.reductions) == (33.0, 1)


def test_pr16_unequal_numbers_of_samples(comm):
    with first(comm, 2) as two:
        if two is None:
            return
        module = Scalars(w=1)
        model = DataParallel(module, two)

        def reduced(samples, weight):
            model.zero_grad()
            with model.weighted(weight):
                model(lambda m: (m.w * samples).mean()).backward()
            return grad(module.w)

        mine = torch.tensor([[1.0, 2.0, 3.0], [10.0]][two.rank])
        assert reduced(mine, len(mine)) == 4.0
        valid = mine if two.rank == 0 else mine[:0]  # its mean is NaN
        assert reduced(valid, len(valid)) == 2.0
        assert reduced(valid, 0) == 0.0
        model.zero_grad()
        model(lambda m: (m.w * mine).mean()).backward()
        assert grad(module.w) == 6.0


@pytest.mark.parametrize(
    ("options", "expected", "empty"),
    [
        ({}, [-2, -5, -10], [-1, -3, -8]),
        ({"average": "all"}, [-2, -5, -7.5], [-0.5, -1.5, -4]),
        ({"at_end": "stop"}, [-2, -5], []),
    ],
)
def test_pr17_unequal_numbers_of_batches(comm, options, expected, empty):
    with first(comm, 2) as two:
        if two is None:
            return
        for batches, values in ((((1, 2, 5), (3, 4)), expected), (((1, 2, 5), ()), empty)):
            module = Scalars(w=0)
            model = DataParallel(module, two)
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            seen = []
            for x in model.join(batches[two.rank], **options):
                optimizer.zero_grad()
                if x is None:
                    model.reduce_gradients()
                else:
                    model(lambda m, x=x: m.w * x).backward()
                optimizer.step()
                seen.append(module.w.item())
            assert seen == values
            model.check_replicas()


def test_pr18_layers_frozen_and_unfrozen_while_training(comm):
    with first(comm, 2) as two:
        if two is None:
            return
        module = Scalars(a=1, b=1)
        module.b.requires_grad_(False)
        model = DataParallel(module, two)

        def step(xb):
            model.zero_grad()
            model(lambda m: m.a * (1, 3)[two.rank] + m.b * xb[two.rank]).backward()
            return grad(module.a), grad(module.b)

        assert step((2, 6)) == (2.0, None)
        module.b.requires_grad_(True)
        assert step((2, 6)) == (2.0, 4.0)
        module.a.requires_grad_(False)
        assert step((1, 5)) == (None, 3.0)
        if two.rank == 1:
            module.a.requires_grad_(True)
        with pytest.raises(ValueError, match=r"requires_grad.* a frozen on rank 0; a trainable on"):
            step((1, 5))


@pytest.mark.parametrize("train_mode", [False, True])
def test_pr19_evaluation_on_one_rank_only(comm, train_mode):
    with first(comm, 2) as two:
        if two is None:
            return
        torch.manual_seed(0)
        model = DataParallel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), two)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(two.rank))
        for _ in range(2):
            if two.rank == 0:  # also before the first training step
                model.train(train_mode)
                with torch.no_grad():
                    for _ in range(2):
                        model(x)
                model.train()
            two.barrier()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        model.check_replicas()


def test_pr20_deepcopy_and_pickle_of_the_wrapper(comm):
    with first(comm, 2) as two:
        if two is None:
            return
        layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(layer.weight)
        model = DataParallel(layer, two)
        x = torch.tensor([[(1.0, 3.0)[two.rank]]])
        model(x).sum().backward()
        assert (grad(layer.weight), model.last_step.reductions) == ([[2.0]], 1)
        model.zero_grad()
        twin = copy.deepcopy(model)
        if two.rank == 1:
            twin(x).sum().backward()  # alone: it must not wait for anybody
            twin.zero_grad()
        model(x).sum().backward()
        assert (grad(layer.weight), model.last_step.reductions) == ([[2.0]], 1)
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        assert (grad(twin.module.weight), twin.module.weight.item()) == (None, 1.0)
        assert pickle.loads(pickle.dumps(model)).module.weight.item() == 0.0


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_pr21_optimizer_state_of_rank_0_after_a_resume(comm, kind):
    with first(comm, 2) as two:
        if two is None:
            return
        module = Scalars(a=1, b=2, frozen=3)
        module.frozen.requires_grad_(False)

        def step(optimizer):
            for parameter in (module.a, module.b):
                parameter.grad = torch.tensor(2.0)
            optimizer.step()

        lrs = (0.05, 0.005) if two.rank == 0 else (0.1, 0.1)
        groups = [
            {"params": [module.a], "lr": lrs[0]},
            {"params": [module.b, module.frozen], "lr": lrs[1]},
        ]
        make = torch.optim.Adam if kind == "adam" else torch.optim.SGD
        optimizer = make(groups)
        if two.rank == 0:
            for _ in range(3):
                step(optimizer)
        for parameter in module.parameters():
            two.broadcast(parameter.detach(), root=0)
        broadcast_optimizer(optimizer, two)
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.005]
        assert all(type(group["lr"]) is float for group in optimizer.param_groups)
        if kind == "adam":
            state = optimizer.state[module.a]
            assert torch.is_tensor(state["step"]) and state["step"].item() == 3
            assert state["exp_avg"].item() == pytest.approx(0.542, rel=1e-6)
            assert state["exp_avg_sq"].item() == pytest.approx(0.011988004, rel=1e-6)
            assert module.frozen not in optimizer.state
        step(optimizer)
        for tensor in (*module.parameters(), *(optimizer.state[module.a].values())):
            if torch.is_tensor(tensor):
                rows = two.allgather(tensor.detach())
                assert (rows == rows[0]).all()


def pipe_of(group, layers, data=1, **options):
    mesh = Mesh(group, data=data, pipe=group.size // data)
    options = {"loss_fn": lambda out, _: out.sum(), "loss_reduction": "sum", **options}
    return Pipeline(layers, mesh, **options)


@pytest.mark.parametrize("schedule", ONE_STAGE_A_RANK)
def test_pr22_last_microbatch_smaller(comm, schedule):
    with first(comm, 2) as two:
        if two is None:
            return
        shapes = []
        watch = Call(lambda x: shapes.append(len(x)) or x)
        engine = pipe_of(
            two,
            [Times(2), nn.Sequential(watch, Times(3))],
            loss_fn=lambda out, _: out.mean(),
            loss_reduction="mean",
            microbatches=3,
            schedule=schedule,
        )
        whole, short = (27.0, 13.5, 9.0, [3, 3, 2]), (9.0, 4.5, 3.0, [1, 1])
        for rows, (loss, first_grad, last_grad, parts) in ((8, whole), (2, short), (8, whole)):
            engine.zero_grad()
            shapes.clear()
            x = torch.arange(1.0, rows + 1)
            assert engine.step(x if two.rank == 0 else None).item() == loss
            expected = {"0.w": first_grad} if two.rank == 0 else {"1.1.w": last_grad}
            assert grads(engine) == expected
            assert shapes == ([] if two.rank == 0 else parts)
        assert engine.forward(torch.arange(1.0, 9.0)).tolist() == [6.0 * k for k in range(1, 9)]


class Start(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.w, self.kind = nn.Parameter(torch.tensor(2.0)), kind

    def forward(self, rows):
        values = (self.w * rows["x"], rows["mask"], rows["idx"], None)
        return dict(zip("habn", values, strict=True)) if self.kind is dict else values


@pytest.mark.parametrize("kind", [tuple, dict])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_pr23_stage_hands_on_bool_mask_integers_and_none(comm, kind, microbatches):
    with first(comm, 2) as two:
        if two is None:
            return
        seen = []
        engine = pipe_of(two, [Start(kind), Table(seen)], microbatches=microbatches)
        x = {
            "x": torch.tensor([1.0, 2.0, 3.0, 4.0]),
            "mask": torch.tensor([True, False, True, True]),
            "idx": torch.tensor([0, 1, 1, 0]),
        }
        assert engine.step(x).item() == 700.0
        assert grads(engine) == ({"0.w": 350.0} if two.rank == 0 else {"1.table": [10.0, 6.0]})
        expected = [(kind, torch.bool, torch.int64, None)] * microbatches
        assert seen == ([] if two.rank == 0 else expected)


def test_pr24_stage_without_parameters(comm):
    with first(comm, 3) as three:
        if three is None:
            return
        engine = pipe_of(three, [Times(2), nn.ReLU(), Times(3)])
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
        assert engine.step(torch.tensor([-1.0, 2.0])).item() == 12.0
        assert engine.clip_grad_norm_(1e6).item() == pytest.approx(52**0.5)
        expected = [{"0.w": 6.0}, {}, {"2.w": 4.0}][three.rank]
        assert grads(engine) == expected
        optimizer.step()
        state = engine.state_dict()
        assert set(state) == set(expected) and optimizer.state_dict()["state"] == {}
        before = {name: value.clone() for name, value in state.items()}
        engine.load_state_dict(state)
        assert engine.state_dict() == before
        with pytest.raises(ValueError, match="stage 2 of 3 is left without layers"):
            pipe_of(three, [Times(2), nn.ReLU()])


@pytest.mark.parametrize("num_data", [1, 2])
@pytest.mark.parametrize(
    ("norm_type", "limit", "norm", "after"),
    [
        (2.0, 1.0, 5.0, (0.6, 0.8)),
        (float("inf"), 1.0, 4.0, (0.75, 1.0)),
        (2.0, 100.0, 5.0, (3.0, 4.0)),
    ],
)
def test_pr26_clipping_by_the_norm_over_all_stages(comm, num_data, norm_type, limit, norm, after):
    with first(comm, 2 * num_data) as group:
        if group is None:
            return
        engine = pipe_of(group, [Times(1), Times(1)], data=num_data)
        (parameter,) = engine.parameters()
        parameter.grad = torch.tensor(3.0 + engine.stage)
        assert engine.clip_grad_norm_(limit, norm_type).item() == norm
        expected = after[engine.stage]
        assert parameter.grad.item() == (
            expected if limit == 100 else pytest.approx(expected, rel=1e-6)
        )


@pytest.mark.parametrize("engine", ["replicas", "stages"])
@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda odd: nn.Linear(2, 3 if odd else 2), r"weight \(2, 2\) float32 .*\(3, 2\) float32"),
        (lambda odd: nn.Linear(2, 2).to(torch.float64 if odd else torch.float32), "float64"),
        (lambda odd: nn.Linear(2, 2, bias=not odd), r"bias \(2,\) float32 on rank"),
        (lambda odd: nn.BatchNorm1d(2, track_running_stats=not odd), "running_mean|num_batches"),
    ],
)
def test_unequal_replicas_are_refused_by_the_first_difference_and_the_ranks(
    comm, engine, make, shown
):
    if comm.size == 1:
        pytest.skip("needs 2 ranks")
    odd = comm.rank == comm.size - 1
    with pytest.raises(ValueError, match=shown) as caught:
        if engine == "replicas":
            DataParallel(make(odd), comm)
        else:
            pipe_of(comm, [make(odd) for _ in range(comm.size)])
    assert f"on rank {comm.size - 1}" in str(caught.value)
    others = "rank 0" if comm.size == 2 else f"ranks {', '.join(map(str, range(comm.size - 1)))}"
    assert others in str(caught.value)


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("schedule", ONE_STAGE_A_RANK)
def test_a_misfit_between_stages_is_an_error_on_every_rank(comm, schedule, reduction):
    if comm.size == 1:
        pytest.skip("needs 2 ranks")
    mesh = Mesh(comm, pipe=2 if comm.size % 2 == 0 else comm.size)
    # Beyond any eager limit: a message that nobody takes would hang its sender.
    layers = [nn.Linear(5, 70_000), *(nn.ReLU() for _ in range(mesh.pipe.size - 2))]
    engine = Pipeline(
        [*layers, nn.Linear(60_000, 1)],
        mesh,
        loss_fn=lambda out, _: out.mean(),
        microbatches=4,
        schedule=schedule,
        reduction=reduction,
    )
    last = mesh.pipe.size - 1
    for _ in range(2):
        with pytest.raises(StageError) as caught:
            engine.step(torch.ones(8, 5))
        text = str(caught.value)
        assert f"stage {last} failed in the forward of micro-batch 0" in text
        assert f"input from stage {last - 1}: float32 (" in text and ", 70000)" in text
    engine.close()


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("num_data, pipe", [(1, 2), (1, 3), (2, 2)])
def test_pr25_weights_tied_between_the_first_and_the_last_stage(comm, num_data, pipe, reduction):
    """Each stage stepped on its own gradient, and the copies drifted apart."""
    with first(comm, num_data * pipe) as group:
        if group is None:
            return
        mesh = Mesh(group, data=num_data, pipe=pipe)
        one, last = Times(3 if group.rank == 0 else 5), Times(7)
        last.w = one.w
        layers = [one, *(nn.Identity() for _ in range(pipe - 2)), last]
        engine = Pipeline(
            layers,
            mesh,
            loss_fn=lambda y, _: y.mean(),
            microbatches=num_data,
            boundaries=tuple(range(1, pipe)),
            reduction=reduction,
        )
        parameters = [parameter for _, parameter in engine.named_parameters()]
        optimizer = torch.optim.SGD(parameters or [nn.Parameter(torch.zeros(0))], lr=0.1)
        loss = engine.step(torch.tensor([2.0 + 2 * mesh.data.rank]))
        due = 12.0 if num_data == 1 else 18.0
        assert loss == (18.0 if num_data == 1 else 27.0)
        assert [parameter.grad.item() for parameter in parameters] == [due] * len(parameters)
        assert engine.clip_grad_norm_(1e6) == due
        optimizer.step()
        assert len(parameters) == (mesh.pipe.rank in (0, pipe - 1))
        value = parameters[0].item() if parameters else 3 - 0.1 * due
        assert value == pytest.approx(3 - 0.1 * due, rel=1e-6)
        held = group.allgather(torch.tensor([value if parameters else float("nan")])).ravel()
        assert len({float(one) for one in held if one == one}) == 1
