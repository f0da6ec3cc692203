"""Data-parallel training equals the single-process run, whatever the ranks, buckets and wire."""

import copy
import threading

import numpy as np
import pytest
import torch
from scalars import SIZES, Scalars, data, grad, network
from torch import nn
from torch.utils.checkpoint import checkpoint

from ringfold import DataParallel, run_local
from ringfold.parallel.buckets import LIMITS

LOCK = threading.Lock()  # torch's seed is one for all threads


def train(module, model, x, y, steps=5, after=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        after()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
def test_training_equals_one_process(size, bucket_bytes):
    x, y = data()
    expected_losses, expected = train(module := network(0), module, x, y)

    def main(comm):
        with LOCK:
            module = network(comm.rank)
        model = DataParallel(module, comm, bucket_bytes=bucket_bytes)
        part = slice(comm.rank * 24 // size, (comm.rank + 1) * 24 // size)
        losses, weights = train(module, model, x[part], y[part])
        return comm.allreduce(np.array(losses), op="mean"), weights

    results = run_local(size, main)
    for losses, weights in results:
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
            assert torch.equal(value, results[0][1][name])


@pytest.mark.parametrize("size", (2, 3))
def test_buckets_start_while_backward_goes_on(size):
    def main(comm):
        started = []
        module = network(0)
        model = DataParallel(module, comm, bucket_bytes=1)
        module[0].weight.register_hook(lambda _: started.append(len(in_flight)))
        in_flight = []
        channel = model._channel
        allreduce = channel.allreduce

        def counted(*args, **options):
            in_flight.append(args)
            return allreduce(*args, **options)

        channel.allreduce = counted
        for _ in range(2):
            in_flight.clear()
            model(data()[0]).sum().backward()
        return started, model.last_step.reductions, len(in_flight)

    for started, reductions, calls in run_local(size, main):
        # The three later parameters are under way before the first layer's gradient exists.
        assert min(started) >= 3
        assert len(started) == 2
        assert reductions == calls == 5


@pytest.mark.parametrize("before_training", [False, True])
@pytest.mark.parametrize("train_mode", [False, True])
def test_pr19_evaluation_on_one_rank(before_training, train_mode):
    """The wrapper's forward broadcast its buffers, even with gradients off."""

    def main(comm):
        module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
        model = DataParallel(module, comm)
        x = data()[0][comm.rank :: 2]

        def step():
            model.train()
            module.zero_grad()
            model(x).pow(2).mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad

        if not before_training:
            step()
        if comm.rank == 0:
            model.train(train_mode)
            with torch.no_grad():
                model(x), model(x)
        comm.barrier()
        step()
        return list(model.state_dict().values())

    zero, one = run_local(2, main)
    assert all(torch.equal(a, b) for a, b in zip(zero, one, strict=True))


@pytest.mark.parametrize("wire", [None, "topk:1.0"])
def test_a_complex_gradient_behind_an_odd_number_of_elements(wire):
    """No complex element may begin at an odd place of a bucket."""

    def main(comm):
        module = nn.Module()
        module.odd = nn.Parameter(torch.ones(3))
        module.waves = nn.Parameter(torch.tensor([[1 + 2j, 3 - 1j]]))
        module.last = nn.Parameter(torch.ones(3))
        model = DataParallel(module, comm, wire=wire)
        factor = torch.tensor([1 - 1j, 2 + 3j]) * (comm.rank + 1)
        for step, users in enumerate(((0, 1), (0, 1), (1,))):
            model.zero_grad()
            uses = (module.waves * factor.conj()).real.sum() if comm.rank in users else 0
            (module.odd.sum() + uses + module.last.sum()).backward()
            mean = (1.5, 1.5, 1.0)[step]
            assert module.waves.grad.tolist() == [[mean * (1 - 1j), mean * (2 + 3j)]]
            assert grad(module.odd) == grad(module.last) == [1.0] * 3

    run_local(2, main)


@pytest.mark.parametrize("size", (2, 3))
def test_parameter_used_twice_and_two_forwards_for_one_backward(size):
    def main(comm):
        module = Scalars(w=2)
        model = DataParallel(module, comm)
        first = model(lambda m: m.w * m.w)
        second = model(lambda m: m.w * (comm.rank + 1))
        (first + second).backward()
        return grad(module.w), model.last_step.reductions

    assert run_local(size, main) == [(4 + (size + 1) / 2, 1)] * size


@pytest.mark.parametrize("wire", [None, "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", (2, 3, 4))
def test_wire_dtype_rounds_once_per_rank(wire, size):
    kept = {None: 24, "fp32": 24, "bf16": 8, "fp16": 11}[wire]

    def main(comm):
        module = nn.Linear(33, 1, bias=False)
        model = DataParallel(module, comm, wire_dtype=wire)
        x = torch.linspace(1, 2, 33) + comm.rank
        model(x).sum().backward()
        return module.weight.grad[0], model.last_step.nbytes

    expected = torch.linspace(1, 2, 33) + (size - 1) / 2
    results = run_local(size, main)
    for found, nbytes in results:
        assert torch.equal(found, results[0][0])
        torch.testing.assert_close(found, expected, rtol=2.0 ** (1 - kept), atol=0)
        assert nbytes == (33 + 1 + 1) * (2 if kept < 24 else 4)


def test_wire_keeps_what_it_can_express():
    """A mean, not a sum that overflows: two ranks' 40000 add up to more than fp16's 65504."""

    def main(comm):
        module = Scalars(w=1)
        model = DataParallel(module, comm, wire_dtype="fp16")
        model(lambda m: m.w * 40000.0).backward()
        return grad(module.w), model.last_step.finite

    assert run_local(2, main) == [(40000.0, True)] * 2


def test_overflow_of_the_wire_is_recorded():
    def main(comm):
        module = Scalars(w=1)
        model = DataParallel(module, comm, wire_dtype="fp16")
        model(lambda m: m.w * (1e6 if comm.rank == 1 else 1.0)).backward()
        return grad(module.w), model.last_step.finite

    assert run_local(2, main) == [(float("inf"), True), (float("inf"), False)]


def test_unknown_wire():
    def main(comm):
        with pytest.raises(ValueError, match=r"unknown wire dtype 'int3'.*fp32, bf16, fp16"):
            DataParallel(Scalars(w=1), comm, wire_dtype="int3")

    run_local(1, main)


def test_goes_on_after_a_backward_that_failed_on_all_ranks():
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of memory")

    def main(comm):
        module = Scalars(a=1, b=1)
        model = DataParallel(module, comm, bucket_bytes=1)
        with pytest.raises(RuntimeError, match="out of memory"):
            # b's gradient is in before the failure, and its bucket under way.
            model(lambda m: Fail.apply(m.a * 2) + m.b * 3).backward()
        module.zero_grad()
        model(lambda m: m.a * (1 + comm.rank) + m.b * 3).backward()
        return grad(module.a), grad(module.b), model.last_step.reductions

    assert run_local(2, main) == [(1.5, 3.0, 2)] * 2


def test_arrival_order_of_the_first_step_lays_out_the_next():
    """Layers registered in the order of use are reduced as they come, not as they are listed."""

    def main(comm):
        module = Scalars(last=1, first=2)  # backward reaches `last` before `first`
        model = DataParallel(module, comm, bucket_bytes=1)
        overlapped = []
        for _ in range(2):
            model(lambda m: (m.first * 2).exp() * m.last).backward()
            overlapped.append(model.last_step.overlapped)
        return overlapped, model._reducer.plan.bucketing.buckets[0].indices

    for overlapped, first in run_local(2, main):
        assert overlapped == [1, 1]  # a small last bucket waits for the end of backward
        assert first == (0,)


def test_bucket_size_is_chosen_after_two_steps_and_equal_on_all_ranks():
    def main(comm):
        module = nn.Sequential(*(nn.Linear(200, 200) for _ in range(4)))
        model = DataParallel(module, comm, bucket_bytes="auto")
        seen, gradients = [], []
        for _ in range(4):
            model.zero_grad()
            model(torch.full((2, 200), 1.0 + comm.rank)).sum().backward()
            seen.append((model._reducer.plan.bucket_bytes, model._reducer.plan.bucketing.buckets))
            gradients.append([p.grad.clone() for p in model.parameters()])
        for later in gradients[1:]:
            for first, other in zip(gradients[0], later, strict=True):
                torch.testing.assert_close(first, other)
        return seen

    results = run_local(3, main)
    assert results[0] == results[1] == results[2]
    sizes = [size for size, _ in results[0]]
    assert sizes[0] == 4 << 20 and sizes[1] in LIMITS and sizes[1:] == [sizes[1]] * 3


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_by_the_global_norm_is_that_of_one_process(set_to_none, norm_type):
    """Reduced gradients are equal everywhere, so torch's own function clips alike on every rank."""
    x, y = data()

    def step(module, model, x, y):
        model.zero_grad(set_to_none=set_to_none)
        nn.functional.mse_loss(model(x), y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type)
        return norm.item(), [p.grad for p in module.parameters()]

    whole = network(0)
    step(whole, whole, x, y)
    expected_norm, expected = step(whole, whole, x, y)

    def main(comm):
        with LOCK:
            module = network(0)
        model = DataParallel(module, comm)
        part = slice(comm.rank * 8, comm.rank * 8 + 8)
        step(module, model, x[part], y[part])
        return step(module, model, x[part], y[part])

    for norm, gradients in run_local(3, main):
        assert norm == pytest.approx(expected_norm, rel=1e-5) and norm > 0.1
        for found, value in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers(reentrant):
    """Re-entrant checkpoints run a backward within the backward."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    inputs = [torch.full((2, 3), k + 1.0) for k in range(2)]
    for x in inputs:
        (whole(x).sum() / 2).backward()

    class Recomputing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = copy.deepcopy(whole)
            self.layers.zero_grad()

        def forward(self, x):
            x = x.requires_grad_()
            hidden = checkpoint(self.layers[0], x, use_reentrant=reentrant)
            return checkpoint(self.layers[1:], hidden, use_reentrant=reentrant)

    def main(comm):
        model = DataParallel(Recomputing(), comm, bucket_bytes=1)
        for _ in range(3):
            model.zero_grad()
            model(inputs[comm.rank].clone()).sum().backward()
        return [p.grad for p in model.parameters()]

    for found in run_local(2, main):
        for gradient, parameter in zip(found, whole.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def test_flags_follow_the_gradients_from_pass_to_pass():
    """What the last pass has left behind the elements is sent again only where it is right."""

    def main(comm):
        module = Scalars(first=2, last=3)
        model = DataParallel(module, comm)
        seen = []
        for users in ((0, 1), (0, 1), (0,), (), (0, 1)):  # ranks that use `last`
            module.zero_grad()
            uses = comm.rank in users
            model(lambda m, uses=uses: m.first * (m.last if uses else 1)).backward()
            seen.append((module.last.grad is None, model.last_step.partial))
        return seen

    all_use, one, none = (False, ()), (False, ("last",)), (True, ())
    assert run_local(2, main) == [[all_use, all_use, one, none, all_use]] * 2


def test_the_last_small_bucket_tells_the_same_in_every_pass():
    """From the second pass on a plan reduces it: receipts, bytes and the result stay."""

    def main(comm):
        module = Scalars(first=2, last=3)
        model = DataParallel(module, comm)
        seen = []
        for _ in range(3):
            module.zero_grad()
            model(lambda m: m.first * m.last * (comm.rank + 1)).backward()
            record = model.last_step
            seen.append((record.receipts, record.bucket_nbytes, module.first.grad.item()))
        return seen

    for first, second, third in run_local(2, main):
        assert first == second == third
        assert first[2] == 3 * 1.5
