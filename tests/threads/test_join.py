"""Ranks with unequal numbers of batches end together, with equal parameters."""

import pytest
import torch
from torch import nn

from ringfold import DataParallel, run_local
from ringfold.comm.errors import PeerLost
from ringfold.parallel.join import even_batches
from ringfold.parallel.sync_batchnorm import convert_sync_batchnorm


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.w * x


INPUTS = [(1.0, 2.0, 5.0), (3.0, 4.0)]


def train(comm, inputs, **options):
    model = DataParallel(Scalar(), comm)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    for x in model.join(inputs[comm.rank], **options):
        optimizer.zero_grad()
        if x is None:
            model.reduce_gradients()
        else:
            model(x).backward()
        optimizer.step()
        seen.append(model.module.w.item())
    assert model._mode.weight is None
    model.check_replicas()
    return seen


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({}, [-10.0]),
        ({"average": "all"}, [-7.5]),
        ({"at_end": "stop"}, []),
    ],
)
def test_pr17_unequal_numbers_of_batches(options, last):
    """The rank with more batches waited for ever in its reduction."""
    results = run_local(2, lambda comm: train(comm, INPUTS, **options))
    assert results == [[-2.0, -5.0, *last]] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [-1, -3, -8]), ({"average": "all"}, [-0.5, -1.5, -4]), ({"at_end": "stop"}, [])],
)
def test_pr17_a_rank_with_no_batch_at_all(options, expected):
    results = run_local(2, lambda comm: train(comm, [INPUTS[0], ()], **options))
    assert results == [expected] * 2


@pytest.mark.parametrize("first", [0, 1])
def test_pr17_without_join_the_rank_that_waits_is_told_who_left(first):
    def main(comm):
        model = DataParallel(Scalar(), comm)
        for x in INPUTS[(comm.rank + first) % 2]:
            model(x).backward()

    with pytest.raises(PeerLost, match=f"rank {1 - first}"):
        run_local(2, main)


def test_pr16_mean_over_samples_of_unequal_last_batches_within_join():
    """A weighted mean within a turn, tokens for example; who has run out weighs nothing."""
    counts = [(3, 1, 2), (1,), ()]

    def main(comm):
        model = DataParallel(Scalar(), comm)
        grads = []
        for count in model.join(counts[comm.rank]):
            model.zero_grad()
            if count is None:
                model.reduce_gradients()
            else:
                with model.weighted(count):
                    model(torch.full((count,), 10.0**comm.rank)).mean().backward()
            grads.append(model.module.w.grad.item())
        return grads

    assert run_local(3, main) == [[(3 * 1 + 1 * 10) / 4, 1.0, 1.0]] * 3


def test_a_loss_that_reaches_no_parameter():
    def main(comm):
        model = DataParallel(Scalar(), comm)
        if comm.rank == 1:
            model.reduce_gradients()
        else:
            model(4.0 * (comm.rank + 1)).backward()
        return model.module.w.grad.item(), model.last_step.partial

    assert run_local(3, main) == [(pytest.approx(16 / 3), ("w",))] * 3


@pytest.mark.parametrize("average", ["active", "all"])
@pytest.mark.parametrize("root", [0, 2])
def test_running_statistics_are_those_of_a_rank_that_still_has_batches(root, average):
    """Those of root overwrote the others' in every turn, also where it had run out."""
    counts = (1, 4, 2)

    def main(comm):
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=None))
        model = DataParallel(module, comm, root=root)
        batches = [torch.randn(4, 2) for _ in range(counts[comm.rank])]
        tracked = []
        for batch in model.join(batches, average=average):
            model.zero_grad()
            if batch is None:
                model.reduce_gradients()
            else:
                model(batch).sum().backward()
            model.check_replicas()
            tracked.append(module[1].num_batches_tracked.item())
        assert model._mode.source == root
        return tracked

    assert run_local(3, main) == [[1, 2, 3, 4]] * 3


@pytest.mark.parametrize("at_end", ["none", "stop"])
def test_layers_that_meet_in_forward_take_a_batch_without_rows(at_end):
    """Nothing said so: with `reduce_gradients` one waited in join for those that wait in it."""
    counts = (3, 1, 2)
    data = torch.randn(3, 3, 4, 2, generator=torch.Generator().manual_seed(1))

    def layers():
        made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        return made

    def trained(model, batches, params):
        optimizer = torch.optim.SGD(params, lr=0.1)
        for x in batches:
            optimizer.zero_grad()
            empty = x is None
            out = model(data[0, 0, :0] if empty else x)
            (out.sum() if empty else (out - 1).square().mean()).backward()
            optimizer.step()
        return [p.detach() for p in params]

    def main(comm):
        module = convert_sync_batchnorm(layers(), comm)
        model = DataParallel(module, comm)
        batches = model.join(data[comm.rank, : counts[comm.rank]], at_end=at_end)
        found = trained(model, batches, [*module.parameters()])
        model.check_replicas()
        return found

    turns = max(counts) if at_end == "none" else min(counts)
    whole = [torch.cat([data[r, t] for r in range(3) if t < counts[r]]) for t in range(turns)]
    alone = layers()
    expected = trained(alone, whole, [*alone.parameters()])
    for found in run_local(3, main):
        torch.testing.assert_close(found, expected)


def test_even_batches():
    def main(comm):
        mine = range(comm.rank)
        return list(even_batches(comm, mine)), list(even_batches(comm, mine, "none"))

    assert run_local(3, main) == [([], [None, None]), ([], [0, None]), ([], [0, 1])]
    assert run_local(1, lambda comm: list(even_batches(comm, "ab"))) == [["a", "b"]]


def test_unknown_words():
    def main(comm):
        model = DataParallel(Scalar(), comm)
        with pytest.raises(ValueError, match="unknown at_end 'drop', expected one of: stop, none"):
            model.join([], at_end="drop")
        with pytest.raises(ValueError, match="unknown average 'mean', expected one of: active"):
            model.join([], average="mean")

    run_local(2, main)
