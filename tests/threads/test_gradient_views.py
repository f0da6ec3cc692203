"""Gradients live in the memory that is reduced: nothing is copied that need not be."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from ringfold import DataParallel, run_local
from ringfold.parallel.carriers import LARGE_BYTES

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


@pytest.mark.parametrize("keep", [lambda g: g, lambda g: g.detach().view(-1)])
@pytest.mark.parametrize("wire", [None, "topk:1.0"])
def test_a_gradient_that_is_kept_elsewhere_stays_what_it_is(wire, keep):
    """Of two losses, say, whose gradients are compared: the second overwrote the first."""

    def main(comm):
        model = DataParallel(Vectors(a=5, b=LARGE, c=3), comm, wire=wire)
        kept, seen = [], []
        for step in range(8):
            model.zero_grad()
            # A rank that has no gradient of its own gets that of the others.
            names = "ac" if comm.rank == step % 2 else "abc"
            model(dict.fromkeys(names, float(step))).backward()
            for name, parameter in model.named_parameters():
                expected = model.module.slope(name, step / (2 if name == "b" else 1))
                torch.testing.assert_close(parameter.grad, expected)
                if step in (2, 3, 4) and comm.rank != 1:
                    kept.append((keep(parameter.grad), expected))
            a, _, c = places(model)
            seen.append((a, c))
        for gradient, expected in kept:
            torch.testing.assert_close(gradient, expected)
        # Memory of its own is taken for what is kept only.
        assert len(set(seen[2:])) == (1 if comm.rank == 1 else 4)
        assert seen[5] == seen[6] == seen[7]

    run_local(2, main)


def test_memory_alternates_where_the_last_gradient_is_kept():
    """As by the variable of a loop."""

    def main(comm):
        model = DataParallel(Vectors(a=5, b=7), comm)
        seen = []
        for step in range(6):
            model.zero_grad()
            model({"a": float(step), "b": 1.0}).backward()
            last = model.module.a.grad
            seen.append(last.data_ptr())
        return seen

    for seen in run_local(2, main):
        assert seen[2] == seen[4] != seen[3] == seen[5]


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


@pytest.mark.parametrize("bias", [True, False])
def test_fresh_weights_of_layers_are_reduced_in_their_own_memory(bias):
    def main(comm):
        module = nn.Sequential(*(nn.Linear(520, 520, bias) for _ in range(2)))
        model = DataParallel(module, comm, bucket_bytes=1)
        made = {}
        for index in range(2):
            module[index].weight.register_post_accumulate_grad_hook(
                lambda p, index=index: made.update({index: p.grad.data_ptr()})
            )
        for step in range(3):
            model.zero_grad()
            model(torch.full((3, 2, 520), comm.rank + 1.0)).sum().backward(retain_graph=step == 1)
            assert made == {i: module[i].weight.grad.data_ptr() for i in range(2)}

    run_local(2, main)


class Late(torch.autograd.Function):
    """Pass values on; the gradient times a factor, read after a while."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.05)
        return gradient * ctx.factor, None


class Added(nn.Module):
    """A position that is added through a view: autograd hands both summands one memory."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(1, LARGE))
        self.position = nn.Parameter(torch.zeros(LARGE))

    def forward(self, x, factor):
        return ((Late.apply(self.rows, factor) + self.position.unsqueeze(0)) * x).sum()


def test_memory_that_backward_still_reads_is_left_alone():
    """The rows' gradient was made of the ranks' mean that had come into the position's."""

    def main(comm):
        model = DataParallel(Added(), comm, bucket_bytes=1)
        x = torch.linspace(1, 2, LARGE)
        for step in range(2):
            model.zero_grad()
            model(x * (comm.rank + step), comm.rank + 1.0).backward()
            torch.testing.assert_close(model.module.position.grad, x * (step + 0.5))
            torch.testing.assert_close(model.module.rows.grad[0], x * (1.5 * step + 1))

    run_local(2, main)


def test_gradients_of_one_memory_are_reduced_apart():
    def main(comm):
        module = Vectors(a=LARGE, b=LARGE)
        module.forward = lambda x: (x * (module.a.view(-1) + module.b.view(-1))).sum()
        model = DataParallel(module, comm, bucket_bytes=1)
        for step in range(2):
            model.zero_grad()
            model(torch.full((LARGE,), comm.rank + step * 1.0)).backward()
            assert len(set(places(model))) == 2
            assert (module.a.grad == step + 0.5).all() and (module.b.grad == step + 0.5).all()

    run_local(2, main)


def test_memory_of_another_library_is_left_alone():
    class Foreign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, parameter, array):
            ctx.array = array
            return parameter.sum()

        @staticmethod
        def backward(ctx, _):
            return torch.from_numpy(ctx.array), None

    def main(comm):
        module = Vectors(a=LARGE)
        module.forward = lambda array: Foreign.apply(module.a, array)
        model = DataParallel(module, comm)
        array = np.full(LARGE, comm.rank * 2.0, np.float32)
        model(array).backward()
        assert (array == comm.rank * 2.0).all()
        assert (module.a.grad == 1.0).all()

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


class Strided(nn.Module):
    """Parameters in memory as channels_last, and as a transpose."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        image = torch.randn(4, 3, 2, 2, generator=generator)
        self.a = nn.Parameter(image.to(memory_format=torch.channels_last))
        self.b = nn.Parameter(torch.randn(3, 5, generator=generator).t())
        self.c = nn.Parameter(torch.randn(3, 5, generator=generator, dtype=torch.cfloat).t())

    def forward(self, scale, name):
        return scale * getattr(self, name).abs().pow(3).sum()


@pytest.mark.parametrize("wire", [None, "fp32", "bf16", "powersgd:1"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_gradients_from_other_ranks_have_the_parameters_strides(name, wire):
    """Fused optimizers mixed up the elements of ranks that had no gradient of their own."""

    def main(comm):
        model = DataParallel(Strided(), comm, wire=wire)
        real = [p for p in model.parameters() if not p.is_complex()]
        optimizer = torch.optim.Adam(real, lr=0.1, fused=True)
        for _ in range(2):
            model.zero_grad()
            # The others have a gradient of another parameter.
            model(2.0, name if comm.rank == 1 else "b" if name == "a" else "a").backward()
            gradients = [(p.grad, p) for p in model.parameters() if p.grad is not None]
            assert len(gradients) == 2 and all(g.stride() == p.stride() for g, p in gradients)
            if wire is None:
                parameter = getattr(model.module, name)
                expected = 3 * parameter.abs() * parameter  # 2 / 2 of the slope of |x|^3
                torch.testing.assert_close(parameter.grad, expected)
            optimizer.step()
        model.check_replicas()

    run_local(2, main)


@pytest.mark.parametrize("wire", [None, "bf16"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_an_expanded_gradient_is_replaced(name, wire):
    """What came in could not be written to it, once all ranks had waited for each other."""

    def main(comm):
        model = DataParallel(Strided(), comm, wire=wire)
        parameter = getattr(model.module, name)
        parameter.grad = torch.tensor(comm.rank + 2.0, dtype=parameter.dtype).expand(
            parameter.shape
        )
        model.reduce_gradients()
        assert parameter.grad.eq(2.5).all() and parameter.grad.stride() == parameter.stride()

    run_local(2, main)
