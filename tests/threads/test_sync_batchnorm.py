"""Synchronised BatchNorm equals one process on the whole batch: output, gradients, statistics."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ringfold import DataParallel, run_local
from ringfold.parallel.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm


def layers(momentum=0.1, affine=True):
    return nn.Sequential(
        nn.Conv2d(2, 3, 1),
        nn.BatchNorm2d(3, momentum=momentum, affine=affine),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 1),
    )


def network(**options):
    module = layers(**options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def batch(step, rows=12):
    generator = torch.Generator().manual_seed(step)
    # A mean far from zero: sums of squares would lose what the variance is made of.
    return torch.randn(rows, 2, 2, 2, generator=generator) + 30


CUTS = {2: (0, 7, 12), 3: (0, 5, 5, 12), 4: (0, 1, 2, 3, 12)}


@pytest.mark.parametrize("size", sorted(CUTS))
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}])
def test_equals_one_process_with_unequal_batches_and_an_empty_one(size, options):
    steps = 3
    whole = network(**options)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        whole(batch(step)).square().mean().backward()
        optimizer.step()

    def main(comm):
        module = convert_sync_batchnorm(network(**options), comm)
        model = DataParallel(module, comm, bucket_bytes=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        first, end = CUTS[size][comm.rank : comm.rank + 2]
        for step in range(steps):
            optimizer.zero_grad()
            x = batch(step)[first:end]
            factor = model.loss_factor(len(x))
            loss = model(x).square().sum() / max(len(x), 1)
            (loss * factor).backward()
            optimizer.step()
        model.eval()
        return module.state_dict(), model(batch(9)[comm.rank : comm.rank + 1])

    module = whole.eval()
    for rank, (state, output) in enumerate(run_local(size, main)):
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=2e-4, atol=2e-5)
        expected = module(batch(9)[rank : rank + 1])
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


def test_gradient_of_the_input_is_that_of_all_losses():
    x = batch(0).double()
    weights = torch.linspace(-1, 2, 12).double()

    def losses(output, chosen):
        return (output.flatten(1).sin().sum(1) * weights[chosen]).sum()

    reference = nn.BatchNorm2d(2).double()
    whole = x.clone().requires_grad_()
    losses(reference(whole), slice(None)).backward()

    def main(comm):
        layer = SyncBatchNorm(2, comm).double()
        chosen = slice(comm.rank * 4, comm.rank * 4 + 4)
        mine = x[chosen].clone().requires_grad_()
        losses(layer(mine), chosen).backward()
        return mine.grad, layer.weight.grad, layer.bias.grad

    results = run_local(3, main)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), whole.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sum(r[1] for r in results), reference.weight.grad)
    torch.testing.assert_close(sum(r[2] for r in results), reference.bias.grad)


def test_ranks_whose_graphs_differ_do_not_mix_their_messages():
    """One rank skips a branch, so its buckets start at other moments of its backward."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.norm = nn.BatchNorm1d(2)
            self.extra = nn.Linear(2, 2)

        def forward(self, x, extra):
            x = self.norm(self.first(x))
            return self.extra(x) if extra else x

    def main(comm):
        torch.manual_seed(0)
        model = DataParallel(convert_sync_batchnorm(Branches(), comm), comm, bucket_bytes=1)
        for step in range(3):
            model.zero_grad()
            model(torch.randn(3, 2), extra=(comm.rank + step) % 2 == 0).square().sum().backward()
        return [p.grad for p in model.parameters()]

    one, two = run_local(2, main)
    assert all(map(torch.equal, one, two))


def test_evaluation_copies_and_pickles_send_nothing():
    def main(comm):
        module = convert_sync_batchnorm(network(), comm)
        module(batch(0)).sum().backward()
        twin = copy.deepcopy(module)
        loaded = pickle.loads(pickle.dumps(module))
        if comm.rank == 0:
            module.eval()(batch(1))
            for other in (twin, loaded):
                expected = network()(batch(2))
                torch.testing.assert_close(other.train()(batch(2)), expected)

    run_local(2, main)


def test_converts_in_place_and_keeps_tensors():
    def main(comm):
        module = network()
        module.again = module[1]
        before = dict(module.named_parameters()), dict(module.named_buffers())
        converted = convert_sync_batchnorm(module, comm)
        assert converted is module and module.again is module[1]
        assert isinstance(module[1], SyncBatchNorm) and isinstance(module[5], SyncBatchNorm)
        assert all(module.get_parameter(n) is p for n, p in before[0].items())
        assert all(module.get_buffer(n) is b for n, b in before[1].items())
        plain = nn.BatchNorm1d(2)
        seen = []
        plain.register_forward_hook(lambda *_: seen.append(comm.rank))
        plain.stays = True
        for given in (plain, nn.SyncBatchNorm(2)):
            made = convert_sync_batchnorm(given, comm)
            assert isinstance(made, SyncBatchNorm)
            x = batch(0)[:, :, 0, 0]
            torch.testing.assert_close(made(x), given(x))
        assert plain.stays and seen == [comm.rank, comm.rank]
        with pytest.raises(ValueError, match=r"expected input of \(rows, 3, ...\), got \(2, 4\)"):
            module[1](torch.ones(2, 4))
        with pytest.raises(ValueError, match=r"more than 1 value per channel.*got 1.0 on all"):
            module[5](torch.ones(1 if comm.rank else 0, 5))

    run_local(2, main)


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Activated(2), "has a forward of its own"),
        (nn.LazyBatchNorm1d, "has no shape yet"),
    ],
)
def test_what_would_get_lost_is_refused_by_name_before_anything_is_replaced(make, told):
    """What the layer did besides was gone, or a layer met nobody, without a word."""

    def main(comm):
        module = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(make()))
        if comm.rank == 1:
            module[1][0] = nn.Identity()
        with pytest.raises((TypeError, ValueError), match=rf"on rank 0: 1\.0, a \w+, {told}"):
            convert_sync_batchnorm(module, comm)
        return type(module[0])

    assert run_local(2, main) == [nn.BatchNorm1d] * 2


@pytest.mark.parametrize("without", ["weight", "bias"])
def test_without_a_weight_or_a_bias(without):
    """BatchNorm(bias=False) of torch 2.13 has a weight alone."""
    x = batch(0)
    weight, bias = (None if n == without else torch.arange(2.0) for n in ("weight", "bias"))
    expected = nn.functional.batch_norm(x, None, None, weight, bias, True)

    def main(comm):
        plain = nn.BatchNorm2d(2)
        for name, value in {"weight": weight, "bias": bias}.items():
            plain.register_parameter(name, None if value is None else nn.Parameter(value.clone()))
        layer = convert_sync_batchnorm(plain, comm)
        first = comm.rank * 4
        output = layer(x[first : first + 4 * (comm.rank + 1)])
        output.sum().backward()
        return output.detach()

    torch.testing.assert_close(torch.cat(run_local(2, main)), expected)


def test_a_compiled_module_meets_the_other_ranks_outside_of_what_is_compiled():
    def main(comm):
        found = []
        for compiled in (False, True):
            module = convert_sync_batchnorm(network(), comm)
            run = torch.compile(module, backend="aot_eager") if compiled else module
            for step in range(2):
                run(batch(step)).square().mean().backward()
            found.append([p.grad for p in module.parameters()] + list(module.buffers()))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)

    run_local(1, main)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    def main(comm):
        layer = SyncBatchNorm(2, comm).to(dtype)
        x = batch(0).to(dtype).requires_grad_()
        output = layer(x)
        output.sum().backward()
        assert output.dtype == x.grad.dtype == dtype
        return layer.running_mean.double()

    for mean in run_local(2, main):
        torch.testing.assert_close(mean, torch.full((2,), 3.0).double(), rtol=0.05, atol=0)
