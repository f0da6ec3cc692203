"""Wrappers of a rank that share parameters reduce each of them once, and reduce together."""

import pytest
import torch
from torch import nn

from ringfold import DataParallel, run_local

WIDE = 520
"""A weight of so many rows and columns has a bucket of its own, and is reduced where it lies."""


class Towers(nn.Module):
    """Two towers on one encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        encoder = nn.Linear(width, width)
        self.small = nn.Sequential(encoder, nn.Linear(width, 2))
        self.large = nn.Sequential(encoder, nn.Tanh(), nn.Linear(width, 3), nn.Linear(3, 2))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)


def batch(rank: int, step: int, width: int) -> torch.Tensor:
    return torch.randn(4, width, generator=torch.Generator().manual_seed(rank + 10 * step))


def loss_of(models, x: torch.Tensor) -> torch.Tensor:
    return sum(model(x).square().mean() for model in models)


def gradients(module: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def in_one_process(width: int, weights, which: str, step: int):
    """Return the gradients of the weighted mean of all ranks' losses."""
    towers = Towers(width)
    models = [towers.get_submodule(name) for name in which.split()]
    losses = [loss_of(models, batch(r, step, width)) * w for r, w in enumerate(weights)]
    (sum(losses) / sum(weights)).backward()
    return gradients(towers)


@pytest.mark.parametrize(("width", "wire"), [(5, None), (5, "bf16"), (WIDE, None)])
@pytest.mark.parametrize("groups", ["one", "each"])
def test_towers_on_one_encoder(width, groups, wire):
    """One reduced the large gradient in place while the other copied what was half done."""
    steps = ("small large", "large", "small", "small large", "large")

    def main(comm):
        towers = Towers(width)
        comms = [comm, comm.split(0)] if groups == "each" else [comm, comm]
        small, large = models = [
            DataParallel(tower, own, wire=wire)
            for tower, own in zip((towers.small, towers.large), comms, strict=True)
        ]
        found = []
        for step, which in enumerate(steps):
            if step == 4:
                small.close()
            towers.zero_grad()
            used = [m for m, name in zip(models, ("small", "large"), strict=True) if name in which]
            loss_of(used, batch(comm.rank, step, width)).backward()
            found.append(gradients(towers))
            if step == 3:  # the encoder is the larger one's
                assert large.last_step.nbytes > small.last_step.nbytes + width * width
        return found

    results = run_local(3, main)
    rtol, atol = (1e-5, 1e-6) if wire is None else (0.05, 0.02)
    for step, which in enumerate(steps):
        expected = in_one_process(width, (1, 1, 1), which, step)
        for found in results:
            torch.testing.assert_close(found[step], expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("width", [5, WIDE])
def test_switches_of_one_tower(width):
    """The encoder follows the tower that is weighted, and is not left out with one in no_sync."""

    def main(comm):
        towers = Towers(width)
        small, large = (DataParallel(tower, comm) for tower in (towers.small, towers.large))
        found = []
        for step in range(6):
            towers.zero_grad()
            x = batch(comm.rank, step, width)
            if step % 3 == 0:
                with small.weighted(comm.rank + 1):
                    loss_of([small], x).backward()
            elif step % 3 == 1:
                with large.no_sync():
                    loss_of([small], x).backward()
            else:
                with large.no_sync(), small.no_sync():
                    loss_of([small], x).backward()
                large.reduce_gradients()  # the small one's, too
                if comm.rank:
                    small.reduce_gradients()  # is done
            found.append(gradients(towers))
        return found

    results = run_local(2, main)
    for step in range(6):
        weights = (1, 2) if step % 3 == 0 else (1, 1)
        expected = in_one_process(width, weights, "small", step)
        for found in results:
            torch.testing.assert_close(found[step], expected)


def test_ranks_that_reach_one_tower_each():
    """All that share something take part, though nothing of theirs but the other's was reached."""

    def main(comm):
        towers = Towers(3)
        models = [DataParallel(tower, comm) for tower in (towers.small, towers.large)]
        found = []
        for step in range(3):
            towers.zero_grad()
            used = models[comm.rank]
            head = used.module[1:] if step == 1 else used  # what is shared is not reached
            loss_of([head], batch(comm.rank, step, 3)).backward()
            found.append(gradients(towers))
        return found

    results = run_local(2, main)
    for step in range(3):
        towers = Towers(3)
        for rank, tower in enumerate((towers.small, towers.large)):
            used = tower[1:] if step == 1 else tower
            (loss_of([used], batch(rank, step, 3)) / 2).backward()
        for found in results:
            torch.testing.assert_close(found[step], gradients(towers))


class Counted(nn.Module):
    """One weight, and a buffer that counts batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("batches", torch.tensor(0.0))

    def forward(self, x):
        self.batches += 1
        return self.weight * x


@pytest.mark.parametrize("average", ["active", "all"])
def test_a_wrapper_within_a_wrapper_takes_turns(average):
    """The outer one's weights and its source of buffers count: the inner one sent root's."""
    batches = ([1.0], [2.0, 3.0, 5.0], [7.0, 11.0])

    def main(comm):
        inner = DataParallel(Counted(), comm)
        outer = DataParallel(nn.Sequential(inner), comm)
        found = []
        for one in outer.join(batches[comm.rank], average=average):
            outer.zero_grad()
            if one is None:
                outer.reduce_gradients()
            else:
                outer(torch.tensor(one)).backward()
            found.append((inner.module.weight.grad.item(), inner.module.batches.item()))
        return found

    means = (10 / 3, 7.0, 5.0) if average == "active" else (10 / 3, 14 / 3, 5 / 3)
    for found in run_local(3, main):
        assert [n for _, n in found] == [1.0, 2.0, 3.0]
        assert [g for g, _ in found] == pytest.approx(means)


@pytest.mark.parametrize("outer", ["head", "again"])
def test_one_that_takes_over_finds_the_gradients_as_they_are(outer):
    """They lay in the memory of the one before, which wrote zeros there as it packed nothing."""

    def main(comm):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(0.5)
        first = DataParallel(net, comm)
        x = torch.ones(2, 3) * (comm.rank + 1)
        first(x).sum().backward()
        module = nn.Sequential(first, nn.Linear(2, 4)) if outer == "head" else net
        taking = DataParallel(module, comm)
        for parameter in taking.parameters():
            parameter.data.fill_(0.5)
        for _ in range(2):
            first.zero_grad(set_to_none=False)
            net(x).sum().backward()
        return [p.grad.sum().item() for p in net.parameters()]

    found = run_local(2, main)
    # Of the mean batch, 1.5 in each of 3 places and 2 rows: dW = w2 * x, db = w2, and so on.
    assert found == [[27.0, 6.0, 33.0, 4.0]] * 2


def test_alternating_towers_of_which_a_rank_runs_none():
    """The second one's call was taken for a part of the first one's."""

    def main(comm):
        towers = Towers(3)
        models = [DataParallel(tower, comm) for tower in (towers.small, towers.large)]
        found = []
        for step in range(4):
            towers.zero_grad()
            if comm.rank == 0:
                loss_of([models[step % 2]], batch(0, step, 3)).backward()
            else:
                models[step % 2].reduce_gradients()
            found.append(gradients(towers))
        return found

    for found in run_local(2, main):
        for step in range(4):
            expected = in_one_process(3, (0.5, 0.0), ("small", "large")[step % 2], step)
            half = [None if g is None else g / 2 for g in expected]
            torch.testing.assert_close(found[step][:2], half[:2])


def test_families_end_in_the_order_of_their_calls():
    """A critic made between two towers on one encoder: ranks waited in different families."""

    def main(comm):
        towers = Towers(3)
        models = [
            DataParallel(module, comm) for module in (towers.small, nn.Linear(3, 4), towers.large)
        ]
        for step in range(3):
            if comm.rank == 0:
                loss_of(models, batch(0, step, 3)).backward()
            else:
                for model in models:
                    model.reduce_gradients()
        return [model.last_step is not None for model in models]

    assert run_local(2, main) == [[True] * 3] * 2


def test_weighted_towers_of_which_each_rank_reaches_another():
    """Each rank waited, in a bucket on its way, for the weight of a tower the other begins late."""

    def main(comm):
        towers = Towers(30)
        models = [DataParallel(t, comm, bucket_bytes=100) for t in (towers.small, towers.large)]
        for step in range(3):
            towers.zero_grad()
            with models[0].weighted(comm.rank + 1), models[1].weighted(comm.rank + 1):
                loss_of([models[comm.rank]], batch(comm.rank, step, 30)).backward()
        return gradients(towers)

    first, second = run_local(2, main)
    torch.testing.assert_close(first, second)
    towers = Towers(30)
    losses = [loss_of([t], batch(r, 2, 30)) for r, t in enumerate((towers.small, towers.large))]
    ((losses[0] + 2 * losses[1]) / 3).backward()
    torch.testing.assert_close(first, gradients(towers))


def test_a_frozen_encoder_ties_nobody():
    def main(comm):
        towers = Towers(3)
        towers.small[0].requires_grad_(False)
        small, large = (DataParallel(tower, comm) for tower in (towers.small, towers.large))
        small(batch(comm.rank, 0, 3)).sum().backward()
        return small.last_step is None, large.last_step is None

    assert run_local(2, main) == [(False, True)] * 2


def test_wrappers_over_different_ranks_are_refused():
    def main(comm):
        towers = Towers(3)
        pair = comm.split(0 if comm.rank else 1)
        small, large = DataParallel(towers.small, comm), DataParallel(towers.large, pair)
        if comm.rank == 0:
            return None
        with large.no_sync(), small.no_sync():
            loss_of([small, large], batch(comm.rank, 0, 3)).backward()
        with pytest.raises(RuntimeError) as error:
            loss_of([small, large], batch(comm.rank, 0, 3)).backward()
        return str(error.value)

    text = (
        "0.weight is in two wrappers that would reduce it in one backward, over ranks 0, 1, 2 and "
        "ranks 1, 2: wrap it once, or keep one of them out with no_sync()"
    )
    assert [found and sorted(found.split()) for found in run_local(3, main)] == [None] + [
        sorted(text.split())
    ] * 2
