"""Gradients live in the memory that is reduced: nothing is copied that need not be."""

import pytest
import torch
from torch import nn

from ringfold import DataParallel, run_local
from ringfold.parallel.flight import LARGE_BYTES

LARGE = LARGE_BYTES // 4 + 3


class Vectors(nn.Module):
    """Parameters by name; the loss is sum(scale_of[name] * position * parameter)."""

    def __init__(self, **counts):
        super().__init__()
        for name, count in counts.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(count)))

    def forward(self, scale_of):
        return sum(
            (self.slope(name, scale) * getattr(self, name)).sum()
            for name, scale in scale_of.items()
        )

    def slope(self, name, scale):
        return scale * torch.linspace(1, 2, getattr(self, name).numel())


def places(model):
    return [p.grad.data_ptr() for p in model.module.parameters()]


@pytest.mark.parametrize("counts", [{"a": 5, "b": 7}, {"a": LARGE, "b": 3}])
@pytest.mark.parametrize(
    "wire", [None, lambda bucket, comm: comm.allreduce(bucket.flat, "mean", blocking=False)]
)
def test_kept_gradients_stay_where_they_are_reduced(counts, wire):
    def main(comm):
        model = DataParallel(Vectors(**counts), comm, wire=wire)
        seen = []
        for step in range(5):
            model.zero_grad(set_to_none=False)
            model(dict.fromkeys(counts, float(comm.rank + step))).backward()
            for name, parameter in model.named_parameters():
                expected = model.module.slope(name, step + (comm.size - 1) / 2)
                torch.testing.assert_close(parameter.grad, expected)
            seen.append(places(model))
        # Buckets follow the arrival after the first step; a large gradient moves in the second.
        assert seen[2] == seen[3] == seen[4]
        assert model.last_step.finite is None
        return True

    assert all(run_local(3, main))


def test_a_fresh_large_gradient_is_reduced_in_its_own_memory():
    def main(comm):
        module = Vectors(a=LARGE)
        model = DataParallel(module, comm)
        made = []
        module.a.register_post_accumulate_grad_hook(lambda p: made.append(p.grad.data_ptr()))
        for step in range(3):
            model.zero_grad()
            model({"a": float(comm.rank + step)}).backward()
            assert module.a.grad.data_ptr() == made[-1]
            torch.testing.assert_close(module.a.grad, module.slope("a", step + 0.5))

    run_local(2, main)


def test_large_gradients_that_some_ranks_lack_or_weigh_otherwise():
    def main(comm):
        module = Vectors(a=LARGE, b=LARGE)
        model = DataParallel(module, comm)
        model({"a": 3.0} if comm.rank else {"b": 6.0}).backward()
        torch.testing.assert_close(module.a.grad, module.slope("a", 1.5))
        torch.testing.assert_close(module.b.grad, module.slope("b", 3.0))
        assert sorted(model.last_step.partial) == ["a", "b"]
        for _ in range(2):
            model.zero_grad(set_to_none=False)
            with model.weighted(comm.rank * 1.0):
                loss = model({"a": 8.0, "b": 4.0}) * (1.0 if comm.rank else float("nan"))
                loss.backward()
            torch.testing.assert_close(module.a.grad, module.slope("a", 8.0))

    run_local(2, main)


def test_what_has_accumulated_is_part_of_the_next_reduction():
    def main(comm):
        module = Vectors(a=LARGE, b=4)
        model = DataParallel(module, comm)
        for _ in range(2):
            model(dict(a=comm.rank * 2.0, b=comm.rank * 2.0)).backward()
        # mean(0, 2) = 1; then the mean of 1 + 0 and 1 + 2
        for name in ("a", "b"):
            torch.testing.assert_close(getattr(module, name).grad, module.slope(name, 2.0))

    run_local(2, main)


def test_layouts_that_cannot_live_in_a_bucket_keep_their_own():
    """A parameter in channels-last order, a sparse gradient, one wanted for a second derivative."""

    def main(comm):
        conv = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
        module = nn.Module()
        module.conv, module.rows = conv, nn.Embedding(9, 2, sparse=True)
        module.forward = lambda x: (
            (module.conv * x).sum() + module.rows(torch.tensor([comm.rank])).sum()
        )
        model = DataParallel(module, comm)
        x = torch.arange(96.0).view(2, 3, 4, 4)
        for _ in range(2):
            model.zero_grad()
            model(x * (comm.rank + 1)).backward(create_graph=True)
            assert torch.equal(module.conv.grad, x * 1.5)
            assert module.conv.grad.is_contiguous(memory_format=torch.channels_last)
            assert module.rows.weight.grad.is_sparse
            dense = module.rows.weight.grad.to_dense()
            assert dense[:2].eq(0.5).all() and not dense[2:].any()

    run_local(2, main)


@pytest.mark.parametrize("given", ["swapped", "one for both", "one for both, then gone"])
def test_gradients_at_each_others_places_are_taken_as_they_are(given):
    """A gradient is a view of the bucket, so that an owner who moves it moves the view."""

    def main(comm):
        model = DataParallel(Vectors(a=5, b=5), comm)
        a, b = model.parameters()
        weight = {"a": 1.0, "b": 10.0}
        model({name: (comm.rank + 1) * scale for name, scale in weight.items()}).backward()
        a.grad, b.grad = b.grad, None if given.endswith("gone") else a.grad
        if given == "one for both":
            b.grad = a.grad
        with model.weighted(comm.rank + 1.0):
            model.reduce_gradients()
        mean = (comm.size + 1) / 2
        slope = model.module.slope("a", mean)
        torch.testing.assert_close(a.grad, 10 * slope)
        if given == "swapped":
            torch.testing.assert_close(b.grad, slope)
        elif given == "one for both":
            torch.testing.assert_close(b.grad, 10 * slope)
        else:
            assert b.grad is None
        assert a.grad.data_ptr() != (0 if b.grad is None else b.grad.data_ptr())

    run_local(2, main)
