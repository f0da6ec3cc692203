"""A gradient that is not finite is named on every rank before another rank has added it."""

import math

import pytest
import torch
from torch import nn

import ringfold
from ringfold import Communicator, NotFinite, run_local
from ringfold.parallel.finite import all_finite


class Spoiler(torch.autograd.Function):
    """Pass values on; multiply the gradient by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Layer(nn.Module):
    """A linear layer whose gradients are spoiled in one call; counts its calls."""

    def __init__(self, width: int, spoiled_call: int | None, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        with torch.no_grad():  # ranks as threads share torch's generator
            self.linear.weight.copy_(torch.linspace(-1, 1, width * width).view(width, width))
            self.linear.bias.copy_(torch.linspace(0, 1, width))
        self.call, self.spoiled_call, self.factor = 0, spoiled_call, factor

    def forward(self, x):
        factor = self.factor if self.call == self.spoiled_call else 1.0
        self.call += 1
        return Spoiler.apply(self.linear(x), factor)


def layers(rank: int, spoiled: tuple[int, int, int] | None, factor: float, width: int):
    """Return three layers; spoiled: (rank, layer, call)."""
    found = [Layer(width, None, factor) for _ in range(3)]
    if spoiled is not None and rank == spoiled[0]:
        found[spoiled[1]].spoiled_call = spoiled[2]
    return found


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("size", "width"), [(1, 3), (2, 3), (3, 3), (2, 520)])
def test_replicas_name_rank_parameter_step_and_microbatch(size, width, factor) -> None:
    culprit, bad_step, bad_microbatch, microbatches = size - 1, 1, 1, 3

    def main(comm: Communicator):
        spoiled = (culprit, 1, bad_step * microbatches + bad_microbatch)
        inner = nn.Sequential(*layers(comm.rank, spoiled, factor, width))
        model = ringfold.DataParallel(inner, comm, check_finite=True, bucket_bytes=200)
        before = [p.detach().clone() for p in model.parameters()]
        for step in range(3):
            model.zero_grad()
            try:
                for _ in range(microbatches - 1):
                    with model.no_sync():
                        model(torch.ones(2, width)).sum().backward()
                model(torch.ones(2, width)).sum().backward()
            except NotFinite as error:
                others = [p.grad for p in model.parameters() if p.grad is not None]
                assert comm.rank == culprit or all_finite(others)
                assert all(map(torch.equal, before, model.parameters()))
                return step, str(error), error
        return None

    results = run_local(size, main)
    assert len({text for _, text, _ in results}) == 1
    for step, text, error in results:
        assert step == error.step == bad_step
        assert (error.rank, error.microbatch) == (culprit, bad_microbatch)
        # Backward reaches the spoiled layer before those that it spoils.
        assert error.parameter == "1.linear.bias"
        assert isinstance(error, FloatingPointError)
        assert f"step {bad_step}, micro-batch {bad_microbatch}, rank {culprit}" in text


@pytest.mark.parametrize("size", [2, 3])
def test_the_last_microbatch_is_stopped_before_its_bucket_leaves(size) -> None:
    def main(comm: Communicator):
        inner = nn.Sequential(*layers(comm.rank, (0, 2, 0), math.inf, 4))
        model = ringfold.DataParallel(inner, comm, check_finite=True)
        with pytest.raises(NotFinite) as caught:
            model(torch.ones(2, 4)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert comm.rank == 0 or all_finite(grads)
        model.zero_grad()
        model(torch.ones(2, 4)).sum().backward()  # and it goes on
        return caught.value.microbatch, [p.grad.clone() for p in model.parameters()]

    results = run_local(size, main)
    assert all(microbatch == 0 for microbatch, _ in results)
    for _, gradients in results:
        assert all(map(torch.equal, gradients, results[0][1]))
        assert all_finite(gradients)


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("out of memory")


def fail_halfway(model: nn.Module, x: torch.Tensor, factor: float) -> None:
    """Run a backward that reaches the second of two layers only."""
    first, second = model.module
    with pytest.raises(RuntimeError, match="out of memory"):
        (second(Fail.apply(first(x))).sum() * factor).backward()
    model.zero_grad()


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("size", [1, 2])
def test_a_failed_backward_does_not_end_the_looking(size) -> None:
    """The micro-batches after it were not looked at."""

    def main(comm: Communicator):
        model = ringfold.DataParallel(two_layers(), comm, check_finite=True)
        x = torch.ones(1, 2)
        with model.no_sync():
            fail_halfway(model, x, 1.0)
            (model(x) * math.nan).sum().backward()
        model.zero_grad()
        with pytest.raises(NotFinite) as caught:
            model(x).sum().backward()
        return caught.value.step, caught.value.microbatch

    assert run_local(size, main) == [(0, 0)] * size


def test_what_a_failed_backward_has_found_is_forgotten() -> None:
    """A healthy step raised what the one before it had found in its first bucket."""

    def main(comm: Communicator):
        model = ringfold.DataParallel(two_layers(), comm, check_finite=True, bucket_bytes=1)
        x = torch.full((1, 2), comm.rank + 1.0)
        fail_halfway(model, x, math.nan)
        model(x).sum().backward()
        return model.module[1].bias.grad.tolist()

    assert run_local(2, main) == [[1.0, 1.0]] * 2


class Refusing(nn.Module):
    """Raise in one call."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.calls, self.call = 0, call

    def forward(self, x):
        self.calls += 1
        if self.calls - 1 == self.call:
            raise RuntimeError("out of memory")
        return x.clone()


@pytest.mark.parametrize(("data", "pipe"), [(1, 2), (2, 1)])
def test_what_a_step_that_a_stage_failed_has_found_is_forgotten(data, pipe) -> None:
    def main(comm: Communicator) -> None:
        engine = ringfold.Pipeline(
            [*layers(comm.rank, (1, 1, 0), math.nan, 4), Refusing(1)],
            ringfold.Mesh(comm, data=data, pipe=pipe),
            loss_fn=nn.functional.mse_loss,
            microbatches=2,
            schedule="1f1b",
            check_finite=True,
        )
        x, y = torch.ones(4, 4), torch.zeros(4, 4)
        with pytest.raises(ringfold.StageError, match="out of memory"):
            engine.step(x, y)
        engine.zero_grad()
        assert math.isfinite(engine.step(x, y))

    run_local(2, main)


@pytest.mark.parametrize("wire", [None, "bf16", "powersgd:1"])
def test_finite_gradients_are_what_they_are_without_the_check(wire) -> None:
    def main(comm: Communicator):
        found = []
        for check in (False, True):
            inner = nn.Sequential(*layers(comm.rank, None, 1.0, 5))
            model = ringfold.DataParallel(inner, comm, wire=wire, check_finite=check)
            for step in range(2):
                model.zero_grad()
                model(torch.full((2, 5), comm.rank + 1.0 + step)).sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        return all(map(torch.equal, *found))

    assert all(run_local(2, main))


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize(("data", "pipe"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("microbatch", [0, 1])
def test_stages_name_the_microbatch(data, pipe, microbatch, reduction) -> None:
    size, per_replica = data * pipe, 2

    def main(comm: Communicator):
        mesh = ringfold.Mesh(comm, data=data, pipe=pipe)
        spoiled = (size - 1, 2, per_replica + microbatch)
        engine = ringfold.Pipeline(
            layers(comm.rank, spoiled, math.nan, 4),
            mesh,
            loss_fn=nn.functional.mse_loss,
            microbatches=per_replica * (data if reduction == "tree" else 1),
            reduction=reduction,
            check_finite=True,
        )
        for step in range(3):
            engine.zero_grad()
            try:
                engine.step(torch.ones(4, 4), torch.zeros(4, 4))
            except NotFinite as error:
                return step, str(error), error
        return None

    results = run_local(size, main)
    assert len({text for _, text, _ in results}) == 1
    step, _, error = results[0]
    assert step == error.step == 1
    assert error.microbatch == microbatch
    assert error.rank == size - 1
    assert error.parameter.startswith("2.linear.")


def test_all_finite_sees_every_kind_of_tensor() -> None:
    nothing = torch.zeros(0)
    large = torch.full((3,), 3e38)
    sparse = torch.sparse_coo_tensor([[1, 1]], [math.inf, 1.0], (4,))
    assert all_finite([]) and all_finite([nothing, large, torch.ones(2, dtype=torch.bfloat16)])
    assert not all_finite([large, sparse])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for bad in (math.nan, math.inf, -math.inf):
            values = torch.ones(1000, dtype=dtype)
            values[777] = bad
            assert not all_finite([large, values]), (dtype, bad)
            assert not all_finite([values.view(10, 100).t()])
    assert not all_finite([torch.tensor([complex(0, math.nan)])])
