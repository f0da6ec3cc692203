"""What several ranks promise or refuse, one rank does, too: programs are debugged there first."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from ringfold import CommError, DataParallel, Mesh, NotFinite, Pipeline, run_local

NAN = float("nan")


class Pair(nn.Module):
    """Two parameters; forward is a function of the test."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))
        self.b = nn.Parameter(torch.tensor(1.0))

    def forward(self, function):
        return function(self)


def gradients(model):
    return [None if p.grad is None else p.grad.tolist() for p in model.parameters()]


def after_no_sync(model):
    with model.no_sync():
        model(lambda m: m.b * 3).backward()
    with model.weighted(0):
        model(lambda m: m.a * NAN).backward()


def after_a_backward(model):
    model(lambda m: m.a * 2).backward()
    with model.weighted(0):
        model(lambda m: m.b * NAN).backward()


def without_a_backward(model):
    model(lambda m: m.a * NAN).backward()
    with model.weighted(0):
        model.reduce_gradients()


def without_synchronising(model):
    with model.weighted(0), model.no_sync():
        model(lambda m: m.a * 2).backward()


def then_weighted(model):
    without_synchronising(model)
    with model.weighted(3):
        model(lambda m: m.a + m.b).backward()


def then_plain(model):
    without_synchronising(model)
    model(lambda m: m.a + m.b).backward()


def within_another(model):
    with model.weighted(0), model.weighted(2):
        model(lambda m: m.a * 2).backward()


def by_a_flag(model):
    model.synchronize = False
    with model.weighted(0):
        model(lambda m: m.a * 2).backward()
        model.synchronize = True
        model(lambda m: m.b * 2).backward()


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (after_no_sync, [0.0, 0.0]),
        (after_a_backward, [0.0, 0.0]),
        (without_a_backward, [0.0, None]),
        (without_synchronising, [2.0, None]),
        (then_weighted, [3.0, 1.0]),
        (then_plain, [3.0, 1.0]),
        (within_another, [2.0, None]),
        (by_a_flag, [0.0, 0.0]),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_weights_of_zero_leave_zeros(size, run, expected):
    """One rank went on with what it had, as with the NaN of a mean over no sample."""

    def main(comm):
        model = DataParallel(Pair(), comm)
        run(model)
        return gradients(model)

    assert run_local(size, main) == [expected] * size


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [(None, 0, 0.0), (0, None, 0.0), (1, 0, 0.0), (0, 1, 2.0)],
)
@pytest.mark.parametrize("size", [1, 2])
def test_of_two_wrappers_one_weighs_what_they_share(size, inner, outer, expected):
    def main(comm):
        pair = Pair()
        own, around = DataParallel(pair, comm), DataParallel(nn.ModuleList([pair]), comm)
        with ExitStack() as stack:
            for model, weight in ((own, inner), (around, outer)):
                if weight is not None:
                    stack.enter_context(model.weighted(weight))
            own(lambda m: m.a * 2).backward()
        return gradients(own)

    assert run_local(size, main) == [[expected, None]] * size


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_looked_at_is_told_whatever_its_weight(size):
    def main(comm):
        model = DataParallel(Pair(), comm, check_finite=True)
        with pytest.raises(NotFinite, match="the gradient of a"), model.weighted(0):
            model(lambda m: m.a * NAN).backward()
        model.zero_grad()
        with model.weighted(0):
            model(lambda m: m.a * 2).backward()
        return gradients(model)

    assert run_local(size, main) == [[0.0, None]] * size


def test_a_sparse_gradient_of_weight_zero_stays_sparse():
    def main(comm):
        model = DataParallel(nn.Embedding(4, 2, sparse=True), comm)
        with model.weighted(0):
            model(torch.tensor([0, 1])).sum().backward()
        return model.module.weight.grad

    (found,) = run_local(1, main)
    assert found.is_sparse and not found.to_dense().any()


@pytest.mark.parametrize("size", [1, 2])
def test_another_parameter_is_refused(size):
    """One rank trained it, or left it out, without a word."""

    def main(comm):
        module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        model = DataParallel(module, comm)
        engine = Pipeline(list(module), Mesh(comm, data=size), loss_fn=nn.functional.mse_loss)
        module[1].bias = nn.Parameter(torch.zeros(1))
        with pytest.raises(RuntimeError, match=r"1\.bias was added or replaced"):
            model(torch.ones(2, 1))
        with torch.no_grad():
            model(torch.ones(2, 1))
        with pytest.raises(RuntimeError, match=r"1\.bias was added or replaced"):
            engine.step(torch.ones(2, 1), torch.ones(2, 1))

    run_local(size, main)


@pytest.mark.parametrize("size", [1, 2])
def test_a_module_without_values_is_refused(size):
    def main(comm):
        for make in (
            lambda: DataParallel(nn.Linear(1, 1, device="meta"), comm),
            lambda: Pipeline([nn.Linear(1, 1, device="meta")], Mesh(comm, pipe=size)),
        ):
            with pytest.raises(ValueError, match=r"weight \(1, 1\) float32 is on the meta device"):
                make()

    run_local(size, main)


@pytest.mark.parametrize(
    "make", [lambda: torch.ones(1).expand(3), lambda: torch.eye(3).to_sparse()]
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_buffer_that_cannot_be_sent_is_refused(size, make):
    def main(comm):
        module = nn.Linear(1, 1)
        module.register_buffer("x", make())
        with pytest.raises(ValueError, match=r"^x \(3,"):
            DataParallel(module, comm)

    run_local(size, main)


@pytest.mark.parametrize("size", [1, 2])
def test_a_closed_pipeline_or_mesh_is_refused(size):
    """One rank went on with it, as nothing was sent."""

    def main(comm):
        mesh, x = Mesh(comm, pipe=size), torch.ones(2, 1)
        layers = [nn.Linear(1, 1) for _ in range(size)]
        engine = Pipeline(layers, mesh, loss_fn=nn.functional.mse_loss)
        engine.close()
        for call in (lambda: engine.step(x, x), lambda: engine.forward(x)):
            with pytest.raises(CommError, match="is closed"):
                call()
        mesh.close()
        with pytest.raises(CommError, match="is closed"), mesh:
            raise AssertionError("entered")

    run_local(size, main)
