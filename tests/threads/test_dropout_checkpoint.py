"""Keyed dropout within torch.utils.checkpoint: the repetition has the masks of the first run.

It drew those of the next call, and often of a later micro-batch: the loss was right, and the
gradients were not.
"""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ringfold import DataParallel, Dropout, Mesh, Pipeline, StageError, run_local
from ringfold.parallel import same_masks, show_samples
from ringfold.parallel.plan import PLANS
from ringfold.parallel.random_keys import Samples

LOCK = threading.Lock()  # torch's seed is one for all threads
KEPT = partial(checkpoint, use_reentrant=False)
REENTRANT = partial(checkpoint, use_reentrant=True)


def plain(body, x):
    return body(x)


def nested(body, x):
    return KEPT(lambda value: body[2:](KEPT(body[:2], value)), x)


def nested_reentrant(body, x):
    return REENTRANT(lambda value: body[2:](REENTRANT(body[:2], value)), x)


def in_two(body, x):
    """Draw from one Dropout in two checkpoints, and between them."""
    through = partial(KEPT, context_fn=same_masks(body))
    return through(body[:2], body[1](through(body, x)))


class Block(nn.Module):
    def __init__(self, through):
        super().__init__()
        self.through = through
        self.body = nn.Sequential(nn.Linear(6, 6), Dropout(0.5, seed=3), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x):
        return self.through(self.body, x)


def network(through):
    with LOCK, torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 6), Block(through), Block(through), nn.Linear(6, 1))


def batch(rows=7):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 1, generator=generator)


def step(through, pipe=1, schedule="1f1b", **options):
    def main(comm):
        engine = Pipeline(
            network(through), Mesh(comm, pipe=pipe), loss_fn=nn.functional.mse_loss, microbatches=2,
            schedule=schedule, reduction="tree", **options,
        )  # fmt: skip
        loss = engine.step(*batch()).item()
        return loss, {name: p.grad for name, p in engine.named_parameters()}

    results = run_local(pipe, main)
    return results[0][0], {name: g for _, found in results for name, g in found.items()}


def assert_same(found, expected):
    assert found[0] == expected[0] and found[1].keys() == expected[1].keys()
    assert [n for n, g in expected[1].items() if not torch.equal(found[1][n], g)] == []


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize("pipe", [1, 2])
def test_the_same_bits_as_without(pipe, schedule, recompute):
    """Micro-batches of 4 and 3 rows: those of the last forward were taken, or did not fit."""
    expected = step(plain)
    reentrant = [REENTRANT, nested_reentrant] if schedule != "zero-bubble" else []
    for through in [KEPT, nested, *reentrant]:
        assert_same(step(through, pipe, schedule, recompute=recompute), expected)


@pytest.mark.parametrize("schedule", PLANS)
def test_one_dropout_in_several_checkpoints(schedule):
    def directly(body, x):
        return body[:2](body[1](body(x)))

    expected = step(directly)
    assert expected[0] != step(plain)[0]
    assert_same(step(in_two, 1, schedule), expected)
    assert_same(step(in_two, 1, schedule, recompute=True), expected)


def test_several_calls_without_their_place_are_refused():
    def twice(body, x):
        return KEPT(body[:2], body(x))

    with pytest.raises(StageError) as caught:
        step(twice)
    assert "dropout '2.body.1' has been called 2 times in a forward" in str(caught.value)
    assert "context_fn=ringfold.parallel.same_masks(module)" in str(caught.value)


@pytest.mark.parametrize("wrap", [lambda model, comm: model, DataParallel])
def test_beside_a_pipeline(wrap):
    """What is shown after a forward is not what its backward repeats."""
    x = batch()[0]

    def gradients(through, comm, forwards=1):
        module = network(through)
        model, loss = wrap(module, comm), 0
        for number in range(forwards):
            show_samples(module, Samples(step=3, first=7 * number, rows=7))
            loss = loss + model(x).sum()
        loss.backward()
        return loss.item(), {name: p.grad for name, p in module.named_parameters()}

    def placed(body, x):
        return KEPT(body, x, context_fn=same_masks(body))

    def main(comm):
        expected = gradients(plain, comm)
        for through in (KEPT, REENTRANT, nested, nested_reentrant, placed):
            assert_same(gradients(through, comm), expected)
        assert_same(gradients(placed, comm, forwards=2), gradients(plain, comm, forwards=2))
        with pytest.raises(RuntimeError, match="backward of another forward than that of its"):
            gradients(KEPT, comm, forwards=2)
        return True

    assert run_local(1, main) == [True]
