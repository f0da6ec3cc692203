"""Both engines on the real transport: training equals the single-process run on every grid."""

import copy
import time
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from ringfold import Communicator, DataParallel, Mesh, Pipeline, Settings
from ringfold.parallel import autograd
from ringfold.parallel.plan import PLANS

ROWS = 24
STEPS = 4
# One bucket of many messages, and activations beyond any eager limit.
WIDE = 700


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.LayerNorm(WIDE), nn.ReLU(),
        nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 2),
    )  # fmt: skip


def data(rows=ROWS):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 2, generator=generator)


def part(tensor, index, size):
    return tensor[index * len(tensor) // size : (index + 1) * len(tensor) // size]


def grids(size):
    return [(data, size // data) for data in range(1, size + 1) if size % data == 0]


@cache
def alone():
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        x, y = data()
        loss = nn.functional.mse_loss(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, module


def compare(losses, state):
    expected_losses, module = alone()
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for name, value in state.items():
        torch.testing.assert_close(value, module.state_dict()[name], rtol=1e-4, atol=1e-6)


def equal_on_all(comm, tensors):
    return all(
        bool((rows == rows[0]).all()) for rows in map(comm.allgather, (t.detach() for t in tensors))
    )


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
@pytest.mark.parametrize("wire", [None, "bf16"])
def test_data_parallel(comm, bucket_bytes, wire):
    model = DataParallel(network(comm.rank), comm, bucket_bytes=bucket_bytes, wire_dtype=wire)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        x, y = (part(tensor, comm.rank, comm.size) for tensor in data())
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(comm.allreduce(np.array([loss.item()]), op="mean")[0])
    if wire is None:
        compare(losses, model.state_dict())
    else:
        np.testing.assert_allclose(losses, alone()[0], rtol=1e-2)
    assert equal_on_all(comm, model.parameters())
    if comm.size > 1:
        assert model.last_step.reductions == len(model._reducer.plan.bucketing.buckets)
        assert (model.last_step.reductions == 10) == (bucket_bytes == 1)


def pipeline(mesh, **options):
    return Pipeline(
        network(mesh.data.rank),
        mesh,
        loss_fn=nn.functional.mse_loss,
        **{"microbatches": 5, **options},
    )


@pytest.mark.parametrize("schedule", PLANS)
def test_pipeline_on_every_grid(comm, schedule):
    for num_data, num_pipe in grids(comm.size):
        with Mesh(comm, data=num_data, pipe=num_pipe) as mesh:
            engine = pipeline(mesh, schedule=schedule)
            optimizer = torch.optim.SGD(engine.parameters(), lr=0.01, momentum=0.9)
            losses = []
            for _ in range(STEPS):
                optimizer.zero_grad()
                x, y = (part(tensor, mesh.data.rank, num_data) for tensor in data())
                losses.append(engine.step(x, y).item())
                optimizer.step()
            compare(losses, engine.state_dict())
            assert equal_on_all(mesh.data, engine.state_dict().values())
            output = engine.forward(data()[0])
            expected = alone()[1](data()[0]).detach()
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
            engine.close()


def test_pr15_accumulation(comm):
    module = nn.Linear(1, 1, bias=False)
    model = DataParallel(module, comm)
    scale = 10**comm.rank
    for x in (1.0, 2.0):
        with model.no_sync():
            model(torch.tensor([[x * scale]])).sum().backward()
    model(torch.tensor([[3.0 * scale]])).sum().backward()
    mean = sum(10**rank for rank in range(comm.size)) / comm.size
    assert module.weight.grad.item() == pytest.approx(6 * mean)
    if comm.size == 2:
        assert module.weight.grad.item() == 33.0
        assert model.last_step.reductions == 1


def test_pr14_unused_on_some_ranks_and_pr19_evaluation_alone(comm):
    module = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    module.forward = lambda name, x: module[name](x)
    model = DataParallel(module, comm, bucket_bytes=1)
    x = torch.ones(1, 1)
    for turn in range(3):
        model.zero_grad()
        model("ab"[(comm.rank + turn) % 2], x * (comm.rank + 1)).sum().backward()
        model.eval()
        if comm.rank == turn % comm.size:
            with torch.no_grad():
                model("a", x)
        model.train()
        comm.barrier()
        for offset, name in enumerate("ab"):
            ranks = [r for r in range(comm.size) if (r + turn) % 2 == offset]
            gradient = module[name].weight.grad
            if not ranks:
                assert gradient is None
            else:
                expected = sum(r + 1 for r in ranks) / comm.size
                assert gradient.item() == pytest.approx(expected)


def test_pr20_copy_is_independent(comm):
    model = DataParallel(nn.Linear(1, 1, bias=False), comm)
    twin = copy.deepcopy(model)
    if comm.rank == 0:
        twin(torch.ones(1, 1)).sum().backward()
    model(torch.full((1, 1), comm.rank + 1.0)).sum().backward()
    assert model.module.weight.grad.item() == (comm.size + 1) / 2


class Slow(nn.Module):
    """Take time over each micro-batch, and note what came in."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))
        self.seen = []

    def forward(self, x):
        time.sleep(0.05)
        self.seen.append((x.min().item(), x.max().item()))
        return x * self.w


def test_pr08_a_stage_that_runs_ahead_keeps_what_it_sends(comm):
    layers = [nn.Sequential(Slow()) if stage else nn.Linear(1, 1) for stage in range(comm.size)]
    with torch.no_grad():
        layers[0].weight.fill_(1)
        layers[0].bias.zero_()
    with Mesh(comm, pipe=comm.size) as mesh:
        engine = Pipeline(
            layers, mesh, loss_fn=lambda out, _: out.mean(), microbatches=4, schedule="gpipe"
        )
        x = torch.arange(1.0, 5.0).view(4, 1, 1).expand(4, 100_000, 1)
        loss = engine.step(x).item()
        assert loss == 2.5
        if comm.rank > 0:
            assert layers[comm.rank][0].seen == [(float(k), float(k)) for k in range(1, 5)]
        engine.close()


def test_pr26_clipping_equals_the_unsplit_models(comm):
    x, y = data()
    module = network(0)
    nn.functional.mse_loss(module(x), y).backward()
    whole = nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    expected = {name: p.grad for name, p in module.named_parameters()}
    for num_data, num_pipe in grids(comm.size):
        with Mesh(comm, data=num_data, pipe=num_pipe) as mesh:
            engine = pipeline(mesh)
            engine.load_state_dict(network(0).state_dict())
            engine.step(*(part(tensor, mesh.data.rank, num_data) for tensor in (x, y)))
            norm = engine.clip_grad_norm_(0.1)
            assert norm.item() == pytest.approx(whole.item(), rel=1e-5)
            for name, parameter in engine.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
            engine.close()


def test_wrappers_over_groups_opened_separately_in_one_backward(comm):
    """Ranks reach them in different orders, and have opened each group over mpi4py's world."""
    with Communicator(settings=Settings(timeout=20, watch=False)) as other:
        modules = [network(seed) for seed in (1, 2)]
        first, second = (DataParallel(m, c) for m, c in zip(modules, (comm, other), strict=True))
        models = [second, first] if comm.rank % 2 else [first, second]
        x, y = (part(tensor, comm.rank, comm.size) for tensor in data())
        sum(nn.functional.mse_loss(model(x), y) for model in models).backward()
        for seed, module in zip((1, 2), modules, strict=True):
            whole = network(seed)
            nn.functional.mse_loss(whole(data()[0]), data()[1]).backward()
            for got, expected in zip(module.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6)
        second.close()


def test_a_loss_over_all_ranks_rows_is_that_of_one_process(comm):
    """Backward meets the other ranks on comm while a reduction goes on beside it."""
    module = network(2)
    model = DataParallel(module, comm, bucket_bytes=1000)
    x, _ = data()
    for _ in range(2):  # in the second, buckets start as gradients arrive
        module.zero_grad()
        own = model(part(x, comm.rank, comm.size))
        every = autograd.allgather(own, comm).flatten(0, 1)
        (own @ every.T).logsumexp(1).mean().backward()
    whole = network(2)
    rows = whole(x)
    (rows @ rows.T).logsumexp(1).mean().backward()
    for got, expected in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6)
    model.close()
