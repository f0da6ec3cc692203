"""Layers that stand within several layers of a pipeline, or serve several engines."""

import copy
import threading
import weakref

import pytest
import torch
from little_layers import Times, mean_output
from tied import nested_network, tied_network, tokens
from torch import nn

from ringfold import Dropout, Mesh, Pipeline, StageError, run_local
from ringfold.parallel import SyncBatchNorm
from ringfold.parallel.ties import move, untie


def train_nested(num_data, pipe, network, layers_of=lambda layers, mesh: layers, **options):
    """Train three steps; return losses, names and states, by rank."""
    x, y = tokens()

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=pipe)
        engine = Pipeline(
            layers_of(network(), mesh),
            mesh,
            loss_fn=nn.functional.cross_entropy,
            microbatches=8,
            **options,
        )
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.5)
        share = 16 // num_data
        mine = slice(mesh.data.rank * share, (mesh.data.rank + 1) * share)
        losses = []
        for _ in range(3):
            engine.zero_grad()
            losses.append(engine.step(x[mine], y[mine]).item())
            optimizer.step()
        return losses, [name for name, _ in engine.named_parameters()], engine.state_dict()

    return run_local(num_data * pipe, main)


def without_dropout():
    layers = nested_network()
    for module in nn.ModuleList(layers).modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    return layers


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4)])
def test_a_submodule_inside_several_layers_is_one_weight(grid, reduction):
    """The copy of the first layer was changed with that of the last, and had no gradient."""
    module = nn.Sequential(*without_dropout())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    x, y = tokens()
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    found = train_nested(*grid, without_dropout, reduction=reduction)
    names = {name for _, own, _ in found for name in own}
    assert names == {name for name, _ in module.named_parameters()}
    assert {key for *_, state in found for key in state} == module.state_dict().keys()
    for losses, _, state in found:
        assert losses == pytest.approx(expected, rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, module.state_dict()[name], rtol=1e-4, atol=1e-5)
    copies = [v for *_, state in found for k, v in state.items() if "embed" in k]
    assert all(torch.equal(copies[0], value) for value in copies)


def test_a_dropout_inside_several_layers_draws_alike_for_every_split():
    """It had the name of its first place in all of them, and counted its calls by rank."""
    losses, *_ = train_nested(1, 1, nested_network, reduction="tree")[0]
    for grid, schedule in [((1, 2), "1f1b"), ((1, 1), "interleaved"), ((2, 2), "1f1b")]:
        found = train_nested(*grid, nested_network, reduction="tree", schedule=schedule)
        assert found[0][0] == losses


@pytest.mark.parametrize("network", [tied_network, nested_network])
@pytest.mark.parametrize("pipe", [1, 2])
def test_layers_serve_a_second_engine(pipe, network):
    """The first one had left them with parameters of which each was another."""

    def again(layers, mesh):
        module = nn.Sequential(*layers)
        before = list(module.named_parameters(remove_duplicate=False))
        Pipeline(layers, mesh).close()
        after = list(module.named_parameters(remove_duplicate=False))
        assert [(name, id(p)) for name, p in before] == [(name, id(p)) for name, p in after]
        return copy.deepcopy(layers)

    once, twice = (train_nested(1, pipe, network, layers_of=f) for f in (_same, again))
    for (losses, names, state), (*got, other) in zip(once, twice, strict=True):
        assert [losses, names] == got
        assert all(torch.equal(value, other[name]) for name, value in state.items())


def _same(layers, mesh):
    return layers


class Recorder:
    def __init__(self):
        self.shapes = []

    def note(self, module, given, output):
        self.shapes.append(tuple(output.shape))


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.own = norm, nn.Linear(3, 3)
        self.noise = torch.Generator().manual_seed(1)
        self.register_forward_hook(self.double)

    def double(self, module, given, output):
        assert module is self
        return output * 2

    def forward(self, x):
        return self.norm(self.own(x))


def test_a_copy_has_in_common_what_is_not_its_layer_s():
    """A hook's owner, a channel, a generator; what the layer has alone is no copy."""

    def main(comm):
        norm, recorder = SyncBatchNorm(3, comm), Recorder()
        layers = [Normed(norm), Normed(norm)]
        layers[1].register_forward_hook(recorder.note)
        ((_, first), (_, last)), ties = untie([("0", layers[0]), ("1", layers[1])])
        assert first is layers[0]
        assert (last is layers[1], last.norm is norm) == (False, False)
        assert (last.own is layers[1].own, last.noise is layers[1].noise) == (True, True)
        assert last.norm.channel is norm.channel
        assert last.norm.running_mean is norm.running_mean
        assert [(tie.name, tie.layers) for tie in ties] == [
            ("0.norm.weight", (0, 1)),
            ("0.norm.bias", (0, 1)),
        ]
        assert all(tie.uses[1].data_ptr() == tie.uses[0].data_ptr() for tie in ties)
        last(torch.arange(6.0 + 3 * comm.rank).view(-1, 3))
        return recorder.shapes

    assert run_local(2, main) == [[(2, 3)], [(3, 3)]]


def test_a_layer_that_cannot_be_copied_is_refused_by_name():
    class Locked(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.act, self.lock = act, threading.Lock()

    class Stubborn(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def __deepcopy__(self, memo):
            return Stubborn(nn.Linear(2, 2))

    act, linear = nn.Tanh(), nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"layer b shares .* cannot be copied: .*lock"):
        untie([("a", nn.Sequential(act)), ("b", Locked(act))])
    with pytest.raises(TypeError, match=r"layer b .* cannot be copied over the same memory: Stubb"):
        untie([("a", nn.Sequential(linear)), ("b", Stubborn(linear))])


def test_a_move_keeps_shared_tensors_one():
    """Each use had memory of its own after it, and a buffer of two modules became two."""
    first, norm, last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    last.weight, last.running_mean = norm.weight, norm.running_mean
    layers = [first, norm, nn.Sequential(first, last)]
    named = [(str(i), layer) for i, layer in enumerate(layers)]
    move(named, [0, 1], torch.float64)  # as a move to a GPU, it replaces what parameters hold
    assert last.running_mean is norm.running_mean
    made, ties = untie(named)
    assert [tie.name for tie in ties] == ["0.weight", "0.bias", "1.weight"]
    for tie in ties:
        one, other = tie.uses
        assert one.dtype == torch.float64
        assert one.data_ptr() == other.data_ptr()
    assert made[2][1][1].running_mean.data_ptr() == norm.running_mean.data_ptr()
    assert last.bias.dtype == torch.float32


def test_a_device_keeps_ties():
    """A move to this one makes other parameters, of which each layer had its own."""

    def main(comm):
        engine = Pipeline(tied_network(), Mesh(comm), loss_fn=mean_output, device="meta")
        assert {p.device.type for p in engine.parameters()} == {"meta"}
        return [name for name, _ in engine.named_parameters()]

    expected = [name for name, _ in nn.Sequential(*tied_network()).named_parameters()]
    assert run_local(1, main) == [expected]


class Weakly(nn.Module):
    """Compute with a layer that it only knows by other ways than its own parts."""

    def __init__(self, layer, way):
        super().__init__()
        self.layer = layer
        if way == "weak reference":
            self.get = weakref.ref(layer)
        elif way == "closure":
            self.get = lambda: layer
        else:
            self.get = lambda: None
            self.register_forward_pre_hook(lambda _, given: (layer(given[0]),))

    def forward(self, x):
        return (self.get() or self.layer)(x).tanh()


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
@pytest.mark.parametrize("way", ["weak reference", "closure", "hook"])
@pytest.mark.parametrize("shared", ["module", "weight"])
def test_computing_with_the_original_of_a_copy(shared, way, schedule):
    """Its gradient was lost without a word; on the stage of the original all is as it was."""

    def main(comm, pipe):
        first, last = nn.Linear(2, 2), nn.Linear(2, 2)
        last.weight = first.weight
        given = [first, Weakly(first if shared == "module" else last, way)]
        first.weight.grad = torch.ones(2, 2)  # of before
        engine = Pipeline(
            given, Mesh(comm, pipe=pipe), loss_fn=mean_output, microbatches=2, schedule=schedule
        )
        if pipe == 1:
            first.weight.grad = None
            engine.step(torch.eye(2))
            return first.weight.grad
        with pytest.raises(StageError) as error:
            engine.step(torch.eye(2))
        assert comm.rank == 0 or first.weight.grad.eq(1).all()
        return str(error.value)

    texts = run_local(2, lambda comm: main(comm, 2))
    assert texts[0] == texts[1]
    assert texts[0].startswith("rank 1 of 2: stage 1 failed in the backward ")
    assert "0.weight is in several layers" in texts[0] and "closes over a layer" in texts[0]
    assert run_local(1, lambda comm: main(comm, 1))[0].abs().sum() > 0


class Listed(nn.Module):
    """Compute with a layer that it has in a list, where torch does not see it."""

    def __init__(self, layer):
        super().__init__()
        self.layers = [layer]

    def forward(self, x):
        return x @ self.layers[0].weight


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble", "interleaved"])
def test_computing_with_a_layer_of_another_rank(schedule):
    """Its gradient was lost without a word, and the weight there stayed as it was."""

    def main(comm):
        first = nn.Linear(2, 2)
        layers = [first, Times(2), Times(3), Listed(first)]
        first.weight.grad = torch.full((2, 2), 7.0)
        engine = Pipeline(
            layers, Mesh(comm, pipe=comm.size), loss_fn=mean_output, schedule=schedule
        )
        if comm.size == 1:
            return engine.step(torch.eye(2)).item()
        with pytest.raises(StageError) as error:
            engine.step(torch.eye(2))
        assert comm.rank == 0 or first.weight.grad.eq(7).all()
        return str(error.value)

    texts = run_local(2, main)
    assert texts[0] == texts[1] and "stage on another rank" in texts[0]
    assert texts[0].startswith("rank 1 of 2: stage ") and ": 0.weight is of" in texts[0]
    run_local(1, main)
