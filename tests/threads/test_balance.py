"""Stages by what layers cost: numbers of parameters, measured seconds, measured bytes."""

import time

import pytest
import torch
from torch import nn

from ringfold import Dropout, Mesh, Pipeline, run_local
from ringfold.parallel.balancing import balanced_stages
from ringfold.parallel.layer_costs import kept_bytes, layer_seconds, parameter_bytes


def named(*layers):
    return [(str(index), layer) for index, layer in enumerate(layers)]


class Clock:
    """Stand still but for what layers say that they take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Busy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.layer.clock.now += ctx.layer.backward_seconds
        return gradient, None


class Takes(nn.Module):
    """Take so long, and ten times that the first time."""

    def __init__(self, clock, forward_seconds, backward_seconds):
        super().__init__()
        self.clock, self.called = clock, 0
        self.forward_seconds, self.backward_seconds = forward_seconds, backward_seconds
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.clock.now += self.forward_seconds * (1 if self.called else 10)
        self.called += 1
        return Busy.apply(x * self.w, self)


def test_seconds_are_those_of_forward_and_backward_without_the_first_time():
    clock = Clock()
    layers = named(Takes(clock, 1, 2), Takes(clock, 4, 8), nn.ReLU(inplace=True))
    assert layer_seconds(layers, torch.ones(2, 3), clock=clock) == [3.0, 12.0, 0.0]


class Counts(nn.Module):
    """Count in a buffer, by another tensor in its place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls = self.calls + 1
        return x


def test_measuring_leaves_nothing_behind():
    torch.manual_seed(3)
    layers = named(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.Dropout(0.5),
        Dropout(0.5),
        nn.ReLU(inplace=True),
        Counts(),
    )
    weight = layers[0][1].weight
    weight.grad = torch.full_like(weight, 7.0)
    before = {f"{n}.{k}": v.clone() for n, layer in layers for k, v in layer.state_dict().items()}
    random = torch.random.get_rng_state()
    sample = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    kept = sample.clone()
    layer_seconds(layers, sample)
    kept_bytes(layers, sample)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(sample, kept)
    assert bool((weight.grad == 7).all()) and layers[0][1].bias.grad is None
    for n, layer in layers:
        for k, v in layer.state_dict().items():
            assert torch.equal(v, before[f"{n}.{k}"])
    assert layers[3][1].draws is None


def test_kept_bytes_count_what_is_kept_once():
    rows, wide = 10, 100
    layers = named(nn.Linear(4, wide), nn.Tanh(), nn.Linear(wide, 1), nn.Identity())
    # The first keeps its input, Tanh its output, which the next keeps too.
    assert kept_bytes(layers, torch.ones(rows, 4)) == [160.0, 4 * rows * wide, 0.0, 0.0]
    frozen = named(nn.Linear(4, wide).requires_grad_(False), nn.Tanh())
    assert kept_bytes(frozen, torch.ones(rows, 4)) == [0.0, 0.0]


def test_bytes_of_parameters_and_gradients():
    half = nn.Linear(3, 2).half()
    frozen = nn.Linear(3, 2, bias=False).requires_grad_(False)
    assert parameter_bytes(named(half, frozen, nn.ReLU())) == [2.0 * 8 * 2, 24.0, 0.0]


def cuts(size, layers, **options):
    """Return the number of layers of every stage, as every rank has them."""

    def main(comm):
        given = dict(options)
        if comm.rank > 0:
            given.pop("sample", None)
        engine = Pipeline(
            layers(), Mesh(comm, pipe=size), loss_fn=lambda out, _: out.mean(), **given
        )
        if "sample" in options:
            engine.step(options["sample"])
        return [len(stage) for stage in engine.stages]

    results = run_local(size, main)
    assert results == [results[0]] * size
    return results[0]


def test_the_stage_that_holds_more_microbatches_gets_fewer_activations():
    """By numbers of parameters both stages would have three layers.

    The first layer keeps its input and its output, each other one its output.
    """

    def layers():
        return [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)]

    sample = torch.ones(1000, 8)
    assert cuts(2, layers) == [3, 3]
    # One in flight on the last stage, two on the one before.
    by_memory = {"balance": "memory", "sample": sample, "microbatches": 4}
    assert cuts(2, layers, **by_memory) == [1, 5]  # 2 x 2 and 5
    assert cuts(2, layers, schedule="gpipe", **by_memory) == [3, 3]  # 4 x 4 and 4 x 3


class Sleeps(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        time.sleep(self.seconds)
        return x * self.w


def test_by_time_an_expensive_layer_stands_alone():
    layers = [0.0, 0.0, 0.0, 0.05]
    sample = torch.ones(2, 1)

    def make():
        return [Sleeps(seconds) for seconds in layers]

    assert cuts(2, make) == [2, 2]
    assert cuts(2, make, balance="time", sample=sample) == [3, 1]


@pytest.mark.parametrize("by", ["time", "memory"])
def test_nested_samples_with_integers(by):
    class Look(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, batch):
            return {"h": self.table(batch["idx"]), "mask": batch["mask"]}

    class Use(nn.Module):
        def forward(self, value):
            return (value["h"].sum(-1) * value["mask"], None)

    class Last(nn.Module):
        def forward(self, pair):
            return pair[0]

    sample = {"idx": torch.tensor([1, 2, 4]), "mask": torch.tensor([True, False, True])}
    stages = cuts(3, lambda: [Look(), Use(), Last()], balance=by, sample=sample)
    assert stages == [1, 1, 1]


def test_refusals_on_every_rank():
    def main(comm, layers, options):
        with pytest.raises((ValueError, TypeError)) as caught:
            balanced_stages(named(*layers), comm, in_flight=[1, 1], **options)
        return str(caught.value)

    two = [nn.Linear(2, 2), nn.Linear(3, 3)]
    for layers, options, shown in (
        (two, {"by": "size"}, "unknown balance 'size', expected one of: parameters, time, memory"),
        (two, {"by": "time"}, "balance 'time' measures layers on a micro-batch: give it as sample"),
        (two[:1], {"by": "memory", "sample": torch.ones(1)}, "stage 1 of 2 is left without layers"),
        (two, {"by": "memory", "sample": torch.ones(1, 2)}, "layer 1 (Linear) on the sample: mat1"),
        (two, {"by": "time", "sample": {1}}, "balance 'time', on rank 0: sample: a set cannot be"),
    ):
        for text in run_local(2, lambda comm, a=layers, o=options: main(comm, a, o)):
            assert text.startswith(shown)


@pytest.mark.parametrize("by", ["time", "memory"])
def test_a_layer_that_raises_on_one_rank_is_told_on_all(by):
    """Others were told no more than that a layer had raised on another rank."""

    def main(comm):
        layers = named(nn.Linear(2, 2), nn.Linear(2 + comm.rank, 2))
        with pytest.raises(ValueError) as caught:
            balanced_stages(layers, comm, by, [1, 1], torch.ones(1, 2))
        return str(caught.value)

    for text in run_local(2, main):
        assert text.startswith(f"balance '{by}', on rank 1: layer 1 (Linear) on the sample: mat1")
