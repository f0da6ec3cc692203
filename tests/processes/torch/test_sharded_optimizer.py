"""The sharded optimizer on the real transport, beside a wrapper and alone."""

import pytest
import torch
from torch import nn
from torch.optim import Adam

from ringfold import DataParallel, Mesh, ShardedOptimizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 301), nn.Tanh(), nn.Linear(301, 2))


def train(comm, module, model, optimizer):
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + comm.rank))
        model(x).pow(2).mean().backward()
        optimizer.step()
    return module.state_dict()


@pytest.mark.parametrize("reduce", [False, True])
def test_equals_the_whole_optimizer(comm, reduce):
    module = network()
    expected = train(comm, module, DataParallel(module, comm), Adam(module.parameters(), lr=0.01))
    with Mesh(comm) as mesh:
        module = network()
        model = module if reduce else DataParallel(module, mesh.data)
        optimizer = ShardedOptimizer(
            module.named_parameters(), mesh.data, Adam, reduce=reduce, bucket_bytes=1024, lr=0.01
        )
        found = train(comm, module, model, optimizer)
        state = optimizer.state_dict()["state"]
    for name, value in expected.items():
        if reduce:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(found[name], value)
        assert state[name]["exp_avg"].shape == value.shape
