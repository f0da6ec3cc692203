"""Modules of a few numbers, and a small network, for tests of data-parallel training."""

import torch
from torch import nn

SIZES = (1, 2, 3, 4)


class Scalars(nn.Module):
    """Scalar parameters by name; forward hands them to a function of the test."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(float(value))))

    def forward(self, function):
        return function(self)


def grad(parameter):
    return None if parameter.grad is None else parameter.grad.tolist()


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7, bias=False), nn.Tanh(), nn.Linear(7, 2)
        )


def data(rows=24):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 2, generator=generator)
