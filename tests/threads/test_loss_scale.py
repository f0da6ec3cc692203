"""One factor for all ranks: what overflows on one is skipped on all; else nothing changes."""

from pathlib import Path

import pytest
import torch
from torch import nn

import ringfold
from ringfold import Communicator, LossScaler, run_local
from ringfold.parallel.powersgd import PowerSGD
from ringfold.parallel.topk import TopK


def layer(width: int = 4) -> nn.Linear:
    made = nn.Linear(width, width)
    with torch.no_grad():
        made.weight.copy_(torch.linspace(-1, 1, width * width).view(width, width))
        made.bias.zero_()
    return made


def weights(parameters) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_scaled_training_is_training(size: int, sharded: bool) -> None:
    def main(comm: Communicator):
        found = []
        for scaled in (False, True):
            model = ringfold.DataParallel(layer(), comm)
            optimizer = (
                ringfold.ShardedOptimizer(model.named_parameters(), comm, torch.optim.Adam, lr=0.1)
                if sharded
                else torch.optim.Adam(model.parameters(), lr=0.1)
            )
            scaler = LossScaler(comm, interval=2)
            for step in range(4):
                optimizer.zero_grad()
                loss = model(torch.full((2, 4), comm.rank + step + 1.0)).square().sum()
                if scaled:
                    scaler.scale(loss).backward()
                    scaler.unscale_(optimizer)
                else:
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                assert scaler.step(optimizer) if scaled else optimizer.step() is None
            found.append(weights(model.parameters()))
        assert scaler.factor == 2.0**18 and scaler.skipped == 0
        # Powers of two are exact: not a bit differs.
        return all(map(torch.equal, *found))

    assert all(run_local(size, main))


@pytest.mark.parametrize("reduce", [False, True])
def test_an_overflow_on_one_rank_is_skipped_by_all(reduce: bool) -> None:
    def main(comm: Communicator):
        inner = layer()
        for p in inner.parameters():
            comm.broadcast(p.detach())
        optimizer = ringfold.ShardedOptimizer(
            inner.named_parameters(), comm, torch.optim.SGD, reduce=reduce, lr=0.1
        )
        scaler = LossScaler(comm, 1024.0, interval=3)
        history = []
        for step in range(6):
            before = weights(inner.parameters())
            optimizer.zero_grad()
            scaler.scale(inner(torch.ones(1, 4)).sum()).backward()
            if step == 2 and comm.rank == comm.size - 1:
                inner.weight.grad[0, 0] = float("inf")
            taken = scaler.step(optimizer)
            same = all(map(torch.equal, before, inner.parameters()))
            assert taken != same
            history.append((taken, scaler.factor))
        assert scaler.skipped == 1
        return history

    expected = [
        (True, 1024.0),
        (True, 1024.0),
        (False, 512.0),
        (True, 512.0),
        (True, 512.0),
        (True, 1024.0),
    ]
    assert run_local(3, main) == [expected] * 3


def test_a_scaler_of_one_stage_is_refused() -> None:
    """Stages skipped steps apart, and divided by other factors than the losses were given."""

    def main(comm: Communicator) -> None:
        mesh = ringfold.Mesh(comm, data=1, pipe=2)
        loss_fn = nn.functional.mse_loss
        with pytest.raises(ValueError, match="over 1 ranks, without rank 1, which would skip"):
            ringfold.Pipeline(
                [layer(), layer()], mesh, loss_fn=loss_fn, loss_scaler=LossScaler(mesh.data)
            )
        ringfold.Pipeline(
            [layer(), layer()], mesh, loss_fn=loss_fn, loss_scaler=LossScaler(mesh.pipe)
        )

    run_local(2, main)


@pytest.mark.parametrize(("data", "pipe"), [(1, 2), (2, 1), (2, 2)])
def test_stages_scale_and_skip_together(data: int, pipe: int) -> None:
    def main(comm: Communicator):
        mesh = ringfold.Mesh(comm, data=data, pipe=pipe)
        found = []
        for scaled in (False, True):
            scaler = LossScaler(comm, 4096.0)
            engine = ringfold.Pipeline(
                [layer(), nn.Tanh(), layer()],
                mesh,
                loss_fn=nn.functional.mse_loss,
                microbatches=2,
                loss_scaler=scaler if scaled else None,
            )
            optimizer = torch.optim.SGD(engine.parameters(), lr=0.5)
            losses = []
            for step in range(3):
                optimizer.zero_grad()
                losses.append(engine.step(torch.ones(4, 4), torch.zeros(4, 4)).item())
                if scaled:
                    if step == 1 and comm.rank == 0:
                        next(engine.parameters()).grad.fill_(float("nan"))
                    scaler.unscale_(optimizer)
                engine.clip_grad_norm_(1.0)
                if not scaled and step == 1:
                    continue  # the scaled run skips this one
                taken = scaler.step(optimizer) if scaled else optimizer.step() is None
                assert taken == (step != 1 or not scaled)
            found.append((losses, weights(engine.parameters())))
            engine.close()
        assert scaler.factor == 2048.0
        return found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))

    assert all(run_local(data * pipe, main))


def test_the_state_is_in_checkpoints(tmp_path: Path) -> None:
    def main(comm: Communicator):
        scaler = LossScaler(comm, 64.0)
        inner = layer()
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        inner.weight.grad = torch.full((4, 4), float("nan"))
        assert not scaler.step(optimizer)
        ringfold.save(tmp_path, {"scaler": scaler.state_dict()}, comm)
        other = LossScaler(comm)
        other.load_state_dict(ringfold.load(tmp_path, {"scaler": None}, comm).values["scaler"])
        return other.state_dict()

    assert run_local(2, main) == [{"factor": 32.0, "good": 0, "skipped": 1}] * 2


def test_bounds_hold_and_bad_settings_are_refused() -> None:
    def main(comm: Communicator) -> None:
        scaler = LossScaler(comm, 2.0, least=1.0, most=4.0, interval=1)
        inner = layer()
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.0)
        factors = []
        for bad in (True, True, True, False, False, False):
            inner.weight.grad = torch.full((4, 4), float("inf") if bad else 1.0)
            scaler.step(optimizer)
            factors.append(scaler.factor)
        assert factors == [1.0, 1.0, 1.0, 2.0, 4.0, 4.0]
        for settings in ({"factor": 0.0}, {"growth": 0.5}, {"backoff": 1.0}, {"interval": 0}):
            with pytest.raises(ValueError, match="expected"):
                LossScaler(comm, **settings)
        for settings in ({"factor": 3.0}, {"growth": 1.5}, {"backoff": 0.3}, {"most": 1e6}):
            with pytest.raises(ValueError, match="expected a power of two for"):
                LossScaler(comm, **settings)

    run_local(1, main)


def two_weights(comm: Communicator, **settings):
    """Return two weights of one, an optimizer of rate 1 for each, and a scaler."""
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in parameters]
    return parameters, optimizers, LossScaler(comm, 1024.0, **settings)


@pytest.mark.parametrize("first", [False, True])
def test_two_optimizers_divide_by_the_factor_of_their_losses(first: bool) -> None:
    """Whether both are unscaled first or each in its step, and whatever their steps do to it."""

    def main(comm: Communicator):
        (a, b), optimizers, scaler = two_weights(comm, interval=2)
        history = []
        for step in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            scaler.scale((a + b).sum() / 4).backward()
            if step == 1 and comm.rank == comm.size - 1:
                a.grad.fill_(float("nan"))
            if first:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
            taken = [scaler.step(optimizer) for optimizer in optimizers]
            history.append((*taken, a.item(), b.item(), scaler.factor))
        return history

    expected = [
        (True, True, 0.75, 0.75, 1024.0),
        (False, True, 0.75, 0.5, 512.0),
        (True, True, 0.5, 0.25, 512.0),
        (True, True, 0.25, 0.0, 1024.0),
    ]
    for size in (1, 2):
        assert run_local(size, main) == [expected] * size


def test_both_overflow_and_the_factor_is_halved_once() -> None:
    def main(comm: Communicator):
        (a, b), optimizers, scaler = two_weights(comm)
        scaler.scale((a + b).sum() * float("inf")).backward()
        assert [scaler.step(optimizer) for optimizer in optimizers] == [False, False]
        return scaler.factor, scaler.skipped

    assert run_local(2, main) == [(512.0, 2)] * 2


def test_a_step_that_is_given_up_leaves_no_mark() -> None:
    """Neither where the gradients are dropped, nor where they are zeroed and update() is called."""

    def main(comm: Communicator):
        found = []
        for to_none in (True, False):
            (a, _), (optimizer, _), scaler = two_weights(comm)
            for step in range(2):
                optimizer.zero_grad(set_to_none=to_none)
                scaler.scale(a.sum() / 4).backward()
                scaler.unscale_(optimizer)
                if step == 1:
                    scaler.step(optimizer)
                elif not to_none:
                    scaler.update()
            found.append(a.item())
        return found

    assert run_local(1, main) == [[0.75, 0.75]]


def test_a_second_unscale_is_refused() -> None:
    def main(comm: Communicator) -> float:
        (a, _), (optimizer, other), scaler = two_weights(comm)
        scaler.scale(a.sum() / 4).backward()
        scaler.unscale_(optimizer)
        scaler.unscale_(other)
        with pytest.raises(RuntimeError, match=r"this SGD are unscaled already.* update\(\)"):
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        return a.item()

    assert run_local(2, main) == [0.75] * 2


class Given(nn.Module):
    """A weight whose gradient is what the forward is called with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6, 6, dtype=dtype))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.w.float() * gradient).sum()


def planted(rank: int, step: int) -> torch.Tensor:
    # Of few bits, so that a scaled one is exact in half precision, too.
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(1, 64, (6, 6), generator=generator) / 16.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("make", [lambda: TopK(0.1), lambda: PowerSGD(1, start_step=0)])
@pytest.mark.parametrize("staged", [False, True])
def test_errors_follow_the_factor(make, dtype: torch.dtype, staged: bool, tmp_path: Path) -> None:
    """Steps and errors together are all gradients, whatever became of the factor in between."""
    steps, stop, size = 12, 7, 2

    class Trained:
        def __init__(self, comm: Communicator) -> None:
            self.hook = make()
            self.scaler = LossScaler(comm, 64.0, interval=3, growth=4.0)
            self.engine = (
                ringfold.Pipeline(
                    [Given(dtype)],
                    ringfold.Mesh(comm, data=size, pipe=1),
                    loss_fn=lambda output, target: output,
                    microbatches=1,
                    wire_dtype=self.hook,
                    loss_scaler=self.scaler,
                )
                if staged
                else ringfold.DataParallel(
                    Given(dtype), comm, wire=self.hook, loss_scaler=self.scaler
                )
            )
            self.state = {"model": self.engine, "scaler": self.scaler}

        def run(self, rank: int, first: int, last: int) -> torch.Tensor:
            total = torch.zeros(6, 6)
            optimizer = torch.optim.SGD(self.engine.parameters(), lr=0.0)
            for step in range(first, last):
                optimizer.zero_grad()
                if staged:
                    self.engine.step(planted(rank, step)[None], torch.zeros(1))
                else:
                    self.scaler.scale(self.engine(planted(rank, step))).backward()
                (parameter,) = self.engine.parameters()
                total += parameter.grad.float() / self.scaler.factor
                if step == 4:  # by hand, as one may
                    self.scaler.factor /= 128
                else:
                    assert self.scaler.step(optimizer)
            return total

    def main(comm: Communicator):
        trained = Trained(comm)
        total = trained.run(comm.rank, 0, stop)
        ringfold.save(tmp_path, trained.state, comm, step=stop)
        resumed = Trained(comm)
        ringfold.load(tmp_path, resumed.state, comm)
        total += resumed.run(comm.rank, stop, steps)
        (name,) = (name for name, _ in resumed.engine.named_parameters())
        left = resumed.hook.error(name).reshape(6, 6).clone()
        comm.allreduce(left, op="mean")
        return total + left, left.abs().max().item()

    given = sum(planted(rank, step) for rank in range(size) for step in range(steps)) / size
    for found, left in run_local(size, main):
        assert left > 1
        torch.testing.assert_close(found, given, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("make", [lambda: TopK(0.1), lambda: PowerSGD(1, start_step=0)])
def test_errors_that_overflow_lower_the_factor_and_are_not_lost(make) -> None:
    """What waits grows to several gradients, which fit with another factor only."""

    def main(comm: Communicator):
        hook = make()
        scaler = LossScaler(comm, 2.0**14)
        model = ringfold.DataParallel(Given(torch.float16), comm, wire=hook, loss_scaler=scaler)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        block = torch.full((2, 2), 2.0 + comm.rank)
        gradient = torch.block_diag(block, block + 0.25, block - 0.25)
        total, taken = torch.zeros(6, 6), 0
        for _ in range(16):
            optimizer.zero_grad()
            scaler.scale(model(gradient)).backward()
            if scaler.step(optimizer):
                taken += 1
                total += model.module.w.grad.float()  # unscaled by the step
        left = hook.error("w").reshape(6, 6).clone()
        comm.allreduce(left, op="mean")
        return total + left, taken, scaler.factor

    block = torch.full((2, 2), 2.5)
    mean = torch.block_diag(block, block + 0.25, block - 0.25)
    for found, taken, factor in run_local(2, main):
        assert 8 <= taken < 16 and factor == 2.0 ** (14 - (16 - taken))
        torch.testing.assert_close(found, taken * mean, rtol=1e-3, atol=1e-2)


def test_a_wire_that_keeps_errors_has_to_know_the_scaler() -> None:
    def main(comm: Communicator) -> None:
        scaler, other = LossScaler(comm), LossScaler(comm)
        plain = ringfold.DataParallel(layer(), comm, wire="bf16")
        model = ringfold.DataParallel(layer(), comm, wire="topk:0.5", loss_scaler=other)
        for engine, right in ((plain, scaler), (model, other)):
            optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
            right.scale(engine(torch.ones(1, 4)).sum()).backward()
            assert right.step(optimizer)
        before = weights(model.parameters())
        scaler.scale(model(torch.ones(1, 4)).sum()).backward()
        with pytest.raises(ValueError, match=r"this SGD, .*DataParallel\(\.\.\., loss_scaler="):
            scaler.step(optimizer)
        assert all(map(torch.equal, before, model.parameters()))
        with pytest.raises(ValueError, match=r"loss_scaler none on rank 0; loss_scaler given on"):
            ringfold.DataParallel(layer(), comm, loss_scaler=scaler if comm.rank else None)

    run_local(2, main)


def test_torchs_own_scaler_is_refused_where_it_cannot_see_the_mean() -> None:
    """It looked at one rank's gradients, before `step` averages them: the rank with an infinity
    skipped alone, and from then on one rank's step k was averaged with the other's step k + 1."""

    def main(comm: Communicator) -> list[torch.Tensor]:
        model = layer()
        named = model.named_parameters()
        optimizer = ringfold.ShardedOptimizer(named, comm, torch.optim.SGD, lr=0.1, reduce=True)
        for unscales in (False, True):
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            x = torch.full((2, 4), float("inf") if comm.rank else 1.0)
            scaler.scale(model(x).square().sum()).backward()
            if unscales:
                scaler.unscale_(optimizer)
            with pytest.raises(TypeError, match="LossScaler"):
                scaler.step(optimizer)
            optimizer.zero_grad()
        before = weights(model.parameters())
        model(torch.ones(2, 4)).square().sum().backward()
        torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
        assert not torch.equal(before[0], model.weight)
        return weights(model.parameters())

    one, other = run_local(2, main)
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("sharded", [False, True])
def test_torchs_own_scaler_decides_alike_where_gradients_are_the_mean(sharded: bool) -> None:
    def main(comm: Communicator) -> tuple[float, list[torch.Tensor]]:
        model = ringfold.DataParallel(layer(), comm)
        optimizer = (
            ringfold.ShardedOptimizer(model.named_parameters(), comm, torch.optim.SGD, lr=0.1)
            if sharded
            else torch.optim.SGD(model.parameters(), lr=0.1)
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.full((2, 4), float("inf") if comm.rank == step == 1 else 1.0)
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        return scaler.get_scale(), weights(model.parameters())

    (scale, one), (other_scale, other) = run_local(2, main)
    assert scale == other_scale == 2.0
    assert all(map(torch.equal, one, other)) and one[0].isfinite().all()
