"""Layers and losses that change the batch in place, as they may in the unsplit model."""

import pytest
import torch
from torch import nn

from ringfold import Mesh, Pipeline, StageError, run_local

SCHEDULES = ["naive", "gpipe", "1f1b", "zero-bubble"]
ROWS = 6


class Standardise(nn.Module):
    def forward(self, x):
        return x.sub_(0.5).div_(0.5)


class Scale(nn.Module):
    """Change what belongs to every row, and keep it for backward."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, pair):
        x, scale = pair
        return x * self.w * scale.mul_(2)


def masked(output, target):
    target[target == 1] = -100
    return nn.functional.cross_entropy(output, target, reduction="sum")


def squares(output, target):
    return (output * target.mul_(2)).sum()


def network(first):
    layers = nn.Sequential(first, nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    generator = torch.Generator().manual_seed(3)  # torch's own is one for all threads
    with torch.no_grad():
        for layer in (layers[1], layers[3]):
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layers


def batch():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(ROWS, 3, generator=generator), torch.arange(ROWS) % 3


def trained(layers, comm, x, y, loss_fn=masked, **options):
    """Return this rank's gradients."""
    mesh = Mesh(comm, pipe=comm.size)
    engine = Pipeline(
        layers, mesh, loss_fn=loss_fn, loss_reduction="sum", microbatches=3, **options
    )
    engine.step(x, y)
    return {name: parameter.grad.clone() for name, parameter in engine.named_parameters()}


@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batch_is_changed_in_place(schedule, recompute, pipe):
    """Micro-batches counted each other's changes as their own, and backward was refused."""
    model = network(Standardise())
    x, y = batch()
    masked(model(x), y).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}

    def main(comm):
        x, y = batch()
        layers = network(Standardise())
        return trained(layers, comm, x, y, schedule=schedule, recompute=recompute)

    found = {k: v for own in run_local(pipe, main) for k, v in own.items()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_what_has_memory_in_common_is_still_watched():
    """A change of the target is one of the input, too, which the first layer has kept."""

    def main(comm):
        x, _ = batch()
        stream = torch.randn(ROWS, 4)
        for one, other in ((x, x), (stream[:, :-1], stream[:, 1:])):
            with pytest.raises(StageError, match="modified by an inplace operation"):
                trained(network(nn.Identity()), comm, one, other, squares)

    run_local(1, main)


def test_what_belongs_to_every_row_is_still_watched():
    def main(comm):
        x, y = batch()
        with pytest.raises(StageError, match="modified by an inplace operation"):
            trained(network(Scale()), comm, (x, torch.tensor(1.0)), y, schedule="gpipe")

    run_local(1, main)


def test_targets_keep_their_graph():
    def main(comm):
        x, _ = batch()
        target = torch.zeros(ROWS, 3, requires_grad=True)
        trained(network(nn.Identity()), comm, x, target, lambda a, b: (a - b).square().sum())
        return target.grad.abs().min().item() > 0

    assert run_local(1, main) == [True]


def test_batch_made_in_inference_mode():
    def main(comm):
        with torch.inference_mode():
            _, y = batch()
        x, _ = batch()
        loss_fn = lambda output, target: output.sum() * target.sum()  # noqa: E731
        return len(trained(network(nn.Identity()), comm, x, y, loss_fn))

    assert run_local(1, main) == [4]
