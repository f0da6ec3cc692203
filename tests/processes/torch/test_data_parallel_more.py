"""Wires, uneven batches, synchronised statistics and a resume, on the real transport."""

import pytest
import torch
from torch import nn

from ringfold import DataParallel
from ringfold.parallel import broadcast_optimizer, convert_sync_batchnorm


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 30), nn.Linear(30, 1)
    )


def batch(step, rows):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(step)) + 2


@pytest.mark.parametrize("wire", ["powersgd:2", "topk:0.1"])
def test_compressed_replicas_stay_equal_and_learn(comm, wire):
    model = DataParallel(network(), comm, bucket_bytes=4096, wire=wire)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(batch(comm.rank, 8)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.check_replicas()
    assert losses[-1] < 0.5 * losses[0]
    if comm.size > 1 and wire.startswith("topk"):
        total = sum(p.numel() for p in model.parameters())
        assert model.last_step.nbytes < 4 * total / 2


def test_synchronised_statistics_equal_one_process(comm):
    rows = [5 + 2 * rank for rank in range(comm.size)]
    first = sum(rows[: comm.rank])
    whole = network()
    module = convert_sync_batchnorm(network(), comm)
    model = DataParallel(module, comm, bucket_bytes=1)
    for step in range(2):
        x = batch(step, sum(rows))
        whole.zero_grad()
        whole(x).square().mean().backward()
        model.zero_grad()
        mine = x[first : first + rows[comm.rank]]
        (model(mine).square().mean() * model.loss_factor(len(mine))).backward()
    for name, parameter in whole.named_parameters():
        found = module.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


def test_pr17_uneven_batches_and_pr21_resume(comm):
    model = DataParallel(nn.Linear(1, 1, bias=False), comm)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * (comm.rank + 1))
    broadcast_optimizer(optimizer, comm)
    seen = []
    for x in model.join([float(comm.rank + 1)] * (comm.rank + 1)):
        optimizer.zero_grad()
        if x is None:
            model.reduce_gradients()
        else:
            model(torch.tensor([[x]])).sum().backward()
        optimizer.step()
        seen.append(model.module.weight.grad.item())
    model.check_replicas()
    size = comm.size
    # In turn t the ranks from t on have a batch, of values t + 1 to size.
    assert seen == pytest.approx([(t + 1 + size) / 2 for t in range(size)])
    if comm.rank > 0:
        with torch.no_grad():
            optimizer.state[model.module.weight]["exp_avg"].zero_()
    broadcast_optimizer(optimizer, comm)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert (comm.allgather(optimizer.state[model.module.weight]["exp_avg"]) != 0).all()
