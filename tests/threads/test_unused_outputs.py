"""What the next stage does not use has no gradient, on every split: weights stay as they are.

It had zeros behind a stage's edge, so that weight decay changed weights which the unsplit model
leaves alone.
"""

import threading

import pytest
import torch
from torch import nn

from ringfold import Mesh, Pipeline, run_local
from ringfold.parallel.plan import PLANS

LOCK = threading.Lock()  # torch's seed is one for all threads


class Router(nn.Module):
    """Hand on the hidden values, and logits that nobody may want."""

    def __init__(self):
        super().__init__()
        self.linear, self.aux = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.linear(x)
        return {"hidden": hidden, "logits": self.aux(hidden), "wanted": bool(x[0, 0] > 0)}


class Through(nn.Module):
    """Change one of two values, and hand the other one on."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(2, 2)

    def forward(self, value):
        logits = self.other(value["logits"])
        return {**value, "hidden": self.linear(value["hidden"]), "logits": logits}


class Picks(nn.Module):
    """Use the logits of some micro-batches alone, or nothing that the layers before have made."""

    def __init__(self, uses_logits=False, stops=False):
        super().__init__()
        self.linear, self.uses_logits, self.stops = nn.Linear(4, 4), uses_logits, stops

    def forward(self, value):
        hidden = value["hidden"]
        if self.uses_logits and value["wanted"]:
            hidden = hidden + value["logits"].sum(1, keepdim=True)
        return self.linear(hidden.detach() if self.stops else hidden)


class Probe(nn.Module):
    """Train a head alone, whose only input has no gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.detach())


def network(kind):
    with LOCK, torch.random.fork_rng():
        torch.manual_seed(3)
        last = {
            "never": [Picks()],
            "sometimes": [Picks(uses_logits=True)],
            "nothing": [Picks(stops=True)],
            "only": [Picks(), Probe()],
        }
        layers = [Router(), Through(), Through(), *last[kind]]
        layers[2].linear = layers[1].linear  # a shared weight
        return layers


def train(kind, pipe, schedule="1f1b", num_data=1, reduction="tree", recompute=False):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, 8, 4, generator=generator)
    x[:, 0] = torch.tensor([1.0] * 4 + [-1.0] * 4)  # the first half wants the logits

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=pipe)
        engine = Pipeline(
            network(kind), mesh, loss_fn=nn.functional.mse_loss, schedule=schedule,
            microbatches=4 if reduction == "tree" else 4 // num_data, reduction=reduction,
            recompute=recompute,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(engine.parameters(), lr=0.1, weight_decay=0.1)
        mine = slice(mesh.data.rank * 8 // num_data, (mesh.data.rank + 1) * 8 // num_data)
        for _ in range(2):
            engine.zero_grad()
            engine.step(x[mine], y[mine])
            optimizer.step()
        return {name: (p.grad, p.detach()) for name, p in engine.named_parameters()}

    return {name: p for found in run_local(num_data * pipe, main) for name, p in found.items()}


def assert_same(found, expected, exact=True):
    assert found.keys() == expected.keys()
    missing = [[n for n, (g, _) in side.items() if g is None] for side in (found, expected)]
    assert sorted(missing[0]) == sorted(missing[1])
    bound = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    for name, (gradient, value) in expected.items():
        torch.testing.assert_close(found[name][1], value, **bound)
        if gradient is not None:
            torch.testing.assert_close(found[name][0], gradient, **bound)


@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize("kind", ["never", "sometimes", "nothing", "only"])
def test_the_same_as_unsplit(kind, schedule):
    expected = train(kind, 1)
    without = {name for name, (gradient, _) in expected.items() if gradient is None}
    assert len(without) == {"never": 6, "sometimes": 0, "nothing": 10, "only": 12}[kind]
    for pipe, recompute in [(2, False), (2, True)]:
        assert_same(train(kind, pipe, schedule, recompute=recompute), expected)
    if schedule != "interleaved":
        assert_same(train(kind, 4, schedule), expected)


@pytest.mark.parametrize("kind", ["never", "sometimes", "only"])
def test_replicas(kind):
    """Where one replica uses a value and the other one does not, it has a gradient on both."""
    expected = train(kind, 1)
    assert_same(train(kind, 2, num_data=2), expected)
    for pipe in (1, 2):
        assert_same(train(kind, pipe, num_data=2, reduction="bucket"), expected, exact=False)
