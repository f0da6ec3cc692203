"""Recomputation gives the same bits, with random layers and running statistics too."""

import threading
import time
import weakref
from functools import partial

import pytest
import torch
from fake_cuda import CUDA, on_cuda
from torch import nn

from ringfold import Dropout, Mesh, Pipeline, run_local
from ringfold.parallel.buffer_copies import BufferCopies
from ringfold.parallel.plan import PLANS, plan_function, whole_plan
from ringfold.parallel.plan_check import check_plan, stage_peaks
from ringfold.parallel.plan_text import parse_plan
from ringfold.parallel.random_keys import Samples
from ringfold.parallel.recompute import Replay
from ringfold.parallel.structure import take_apart

LOCK = threading.Lock()  # torch's seed is one for all threads


class Pair(nn.Module):
    """Hand on several values, some of them without gradients."""

    def forward(self, x):
        return {"x": x, "mask": x > 0, "none": None, "twice": x * 2}


class Join(nn.Module):
    def forward(self, value):
        assert value["none"] is None
        return torch.where(value["mask"], value["x"], value["twice"])


class Moving(nn.Module):
    """Put other tensors in the place of its buffers, and make one where there is none."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(9))
        self.register_buffer("scale", None)

    def forward(self, x):
        if self.scale is None:
            self.scale = 2 / (1 + x.detach().std(0))
        self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        return (x - self.mean) * self.scale


def network(plain_dropout=False):
    with LOCK, torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(5, 9),
            nn.Dropout(0.3) if plain_dropout else Dropout(0.3, seed=5),
            nn.BatchNorm1d(9),
            Moving(),
            Pair(),
            Join(),
            nn.ReLU(inplace=True),
            nn.Linear(9, 9),
            nn.Linear(9, 3),
        )


def train(pipe, schedule="1f1b", recompute=False, plain_dropout=False, num_data=1):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(16, 5, generator=generator), torch.randn(16, 3, generator=generator)

    def main(comm):
        if plain_dropout:
            torch.manual_seed(11)
        mesh = Mesh(comm, data=num_data, pipe=pipe)
        losses_seen = []

        def loss_fn(output, target):
            losses_seen.append(1)
            return nn.functional.mse_loss(output.sub_(0.5), target)

        engine = Pipeline(
            network(plain_dropout),
            mesh,
            loss_fn=loss_fn,
            microbatches=4,
            schedule=schedule,
            reduction="tree",
            recompute=recompute,
        )
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.1, momentum=0.9)
        share = 16 // num_data
        mine = slice(mesh.data.rank * share, (mesh.data.rank + 1) * share)
        losses = []
        for _ in range(3):
            engine.zero_grad()
            losses.append(engine.step(x[mine], y[mine]).item())
            optimizer.step()
        assert len(losses_seen) in (0, 12 // num_data)  # the loss is not computed again
        return losses, engine.state_dict()

    results = run_local(pipe * num_data, main)
    return results[0][0], {k: v for _, state in results for k, v in state.items()}


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert [k for k, v in expected[1].items() if not torch.equal(found[1][k], v)] == []


@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize("pipe", [1, 2, 4])
def test_the_same_bits_as_without(pipe, schedule):
    expected = train(pipe, schedule)
    assert expected[1]["2.num_batches_tracked"] == 12
    assert_same(train(pipe, schedule, recompute=True), expected)
    assert_same(train(pipe, schedule, recompute={pipe - 1}), expected)


def test_the_generator_of_torch_is_brought_back():
    expected = train(1, plain_dropout=True)
    assert_same(train(1, plain_dropout=True, recompute=True), expected)
    assert_same(train(1, "gpipe", plain_dropout=True, recompute=True), expected)


class Codes(nn.Module):
    """Large buffers: a table, and codes that some micro-batches write to, as `data` or not."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.register_buffer("table", torch.arange(40000).to(torch.bfloat16))
        self.register_buffer("codes", torch.zeros(20001)[1:])
        self.register_buffer("other", self.codes)  # the same under another name

    def forward(self, x):
        at = int(x.detach().sum()) % 3
        if at == 1:
            self.codes.data[7] += 1
        if at == 2:
            self.codes[7] *= 3
        return x * self.w * (self.other[7] + self.table[3])


@pytest.mark.parametrize(
    "plan", ["F0 F1 F2 F3 F4 F5 B5 B2 B3 B4 B0 B1", "F0 F1 B1 F2 F3 B0 B3 F4 B2 F5 B5 B4"]
)
def test_large_buffers_that_do_not_change_are_copied_once(plan):
    def main(comm, recompute):
        engine = Pipeline(
            [Codes(), Codes()],
            Mesh(comm),
            loss_fn=lambda out, _: out.sum(),
            microbatches=6,
            schedule=parse_plan(f"stage 0: {plan}"),
            recompute=recompute,
        )
        loss = engine.step(torch.tensor([0.0, 1, 0, 2, 0, 1]))
        state = {**engine.state_dict(), **{n: p.grad for n, p in engine.named_parameters()}}
        return [loss.item()], state

    assert_same(*(run_local(1, partial(main, recompute=again))[0] for again in (True, False)))
    layer = Codes()
    first, seen = BufferCopies([layer]), []
    first.look()
    second = BufferCopies([layer], first)
    layer.codes.data[7] += 1
    second.look()
    third = BufferCopies([layer], second)
    third.look()
    for copies in (second, third, first):
        with copies.in_place():
            assert layer.codes is layer.other
            layer.other[7] += copies is second
            seen.append((layer.table.data_ptr(), layer.codes.data_ptr(), layer.codes[7].item()))
    tables, places, values = zip(*seen, strict=True)
    assert len({*tables}) == 1 and len({*places}) == 3 and values == (1, 1, 0)
    assert layer.codes[7] == 1 and layer.table.data_ptr() not in tables


def test_stages_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"expected stages 0 to 1, got \[2\]"):
        train(2, recompute=[0, 2])


class Kept:
    """What one forward has saved."""


class Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.kept = Kept()
        layer.kept.add(ctx.kept)
        layer.peak = max(layer.peak, len(layer.kept))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Counts(nn.Module):
    """Keep the graphs that hold what this layer has saved, as long as these live.

    In a set, not a number: the collector, and with it what counts down, runs in any rank's thread.
    """

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.kept = weakref.WeakSet()
        self.peak = 0

    def forward(self, x):
        return Save.apply(x * self.w, self)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize("microbatches", [2, 6])
def test_live_activations_are_as_many_as_the_plan_says(schedule, microbatches, recompute):
    """Counted by what autograd keeps alive, not by what the engine believes."""
    ranks = 3

    def main(comm):
        layers = [Counts() for _ in range(6)]
        num_stages = 6 if schedule == "interleaved" else ranks
        engine = Pipeline(
            layers,
            Mesh(comm, pipe=ranks),
            loss_fn=lambda out, _: out.sum(),
            microbatches=microbatches,
            schedule=schedule,
            boundaries=[6 // num_stages * s for s in range(1, num_stages)],
            recompute=recompute,
        )
        engine.step(torch.ones(microbatches, 1))
        per_stage = 6 // num_stages
        end = time.monotonic() + 20
        while any(layer.kept for layer in layers) and time.monotonic() < end:
            time.sleep(0.01)  # what is on its way to a rank that is late lives a little longer
        assert not any(layer.kept for layer in layers)
        return [layers[stage * per_stage].peak for stage in engine.own_stages]

    rows = whole_plan(plan_function(schedule), ranks, microbatches)
    report = check_plan(rows, microbatches)
    for rank, peaks in enumerate(run_local(ranks, main)):
        if recompute:
            # A graph lives while its forward or its backward runs, and for split ones until W.
            assert max(peaks) <= (ranks if schedule == "zero-bubble" else 1)
        elif len(peaks) == 1:
            assert peaks == [report.peak_activations[rank]]
        else:
            assert peaks == [stage_peaks(rows)[stage] for stage in (rank, rank + ranks)]
            assert sum(peaks) >= report.peak_activations[rank]


def test_a_gpus_generator_is_where_it_was(monkeypatch):
    """nn.Dropout on a GPU draws from the GPU's generator, which the host's does not tell."""
    states = {CUDA: torch.tensor([5])}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda place: states[place].clone())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, place: states.update({place: state})
    )

    def draw():
        states[CUDA] = states[CUDA] + 1
        return int(states[CUDA])

    x = on_cuda(torch.ones(2))
    replay = Replay(nn.ReLU(), take_apart(x, "x")[0], [x], Samples(0, 0, 2))
    first = draw(), draw()
    with replay.again():
        assert (draw(), draw()) == first
    assert draw() == first[1] + 1
