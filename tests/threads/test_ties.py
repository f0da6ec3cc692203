"""Weights that layers share: one value and one gradient, on whichever stages the layers are."""

import copy
import threading
import weakref

import pytest
import torch
from little_layers import Times
from torch import nn

from ringfold import Dropout, Mesh, Pipeline, ShardedOptimizer, StageError, run_local
from ringfold.parallel import SyncBatchNorm
from ringfold.parallel.ties import move, untie


def mean_output(output, _):
    return output.mean()


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("num_data", [1, 2])
@pytest.mark.parametrize("pipe", [1, 2])
def test_pr25_copies_are_one_weight(num_data, pipe, reduction):
    """Each stage stepped on its own gradient, and the copies drifted apart."""

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=pipe)
        first, last = Times(3 if comm.rank == 0 else 5), Times(7)
        last.w = first.w
        engine = Pipeline(
            [first, last], mesh, loss_fn=mean_output, microbatches=num_data, reduction=reduction
        )
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
        loss = engine.step(torch.tensor([2.0 + 2 * mesh.data.rank])).item()
        ((name, parameter),) = engine.named_parameters()
        gradient = parameter.grad.item()
        norm = engine.clip_grad_norm_(1e6).item()
        optimizer.step()
        state = {key: value.item() for key, value in engine.state_dict().items()}
        return loss, name, gradient, norm, parameter.item(), state

    expected = 12.0 if num_data == 1 else 18.0
    results = run_local(num_data * pipe, main)
    for loss, name, gradient, norm, value, state in results:
        assert loss == (18.0 if num_data == 1 else 27.0)
        assert (name, gradient, norm) == ("0.w", expected, expected)
        assert value == pytest.approx(3 - 0.1 * expected, rel=1e-6)
        assert value == results[0][4]
        assert set(state.values()) == {value}
    names = {name for *_, state in results for name in state}
    assert names == {"0.w", "1.w"}


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 6, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        return self.weight[x]


class Project(nn.Module):
    """Use the embedding twice: as the output's weights, and once more as a bias."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.t() + self.weight.sum(1)


def tied_network():
    generator = torch.Generator().manual_seed(5)
    embed = Embed()
    middle = [nn.Linear(6, 6) for _ in range(3)]
    for layer in middle:
        nn.init.normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    middle[2].weight = middle[0].weight
    again = nn.LayerNorm(6)
    return [embed, middle[0], again, nn.Tanh(), middle[1], again, middle[2], Project(embed.weight)]


def train(num_data, pipe, sharded=False, **options):
    generator = torch.Generator().manual_seed(9)
    x = torch.randint(0, 11, (16,), generator=generator)
    y = torch.randint(0, 11, (16,), generator=generator)

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=pipe)
        engine = Pipeline(
            tied_network(),
            mesh,
            loss_fn=nn.functional.cross_entropy,
            microbatches=8,
            **{"reduction": "tree", **options},
        )
        if sharded:
            optimizer = ShardedOptimizer(
                engine.named_parameters(), mesh.data, torch.optim.AdamW, lr=0.01
            )
        else:
            optimizer = torch.optim.AdamW(engine.parameters(), lr=0.01)
        share = 16 // num_data
        mine = slice(mesh.data.rank * share, (mesh.data.rank + 1) * share)
        losses, norms = [], []
        for _ in range(3):
            engine.zero_grad()
            engine.step(x[mine], y[mine])
            losses.append(engine.step(x[mine], y[mine]).item())  # gradients accumulate
            norms.append(engine.clip_grad_norm_(1e9).item())
            optimizer.step()
        return losses, norms, engine.state_dict(), dict(engine.named_parameters())

    results = run_local(num_data * pipe, main)
    state: dict = {}
    for losses, norms, own, _ in results:
        assert (losses, norms) == results[0][:2]
        for name, value in own.items():
            assert torch.equal(state.setdefault(name, value), value)
    parameters: dict = {}
    for *_, own in results:
        for name, value in own.items():
            assert torch.equal(parameters.setdefault(name, value), value)
    return results[0][0], results[0][1], state, parameters


GRIDS = [(1, 2), (1, 3), (2, 2), (4, 1), (1, 4)]
TIED = [("0.weight", "7.weight"), ("1.weight", "6.weight"), ("2.bias", "5.bias")]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble"])
def test_shared_weights_are_the_same_bits_on_every_grid(schedule):
    losses, norms, state, parameters = train(1, 1)
    module = nn.Sequential(*tied_network())
    assert parameters.keys() == dict(module.named_parameters()).keys()
    assert state.keys() == module.state_dict().keys()
    for one, other in TIED:
        assert torch.equal(state[one], state[other])
    for grid in GRIDS:
        found = train(*grid, schedule=schedule)
        assert found[0] == losses
        assert found[1] == pytest.approx(norms, rel=1e-12)
        for expected, got in ((state, found[2]), (parameters, found[3])):
            assert got.keys() == expected.keys()
            assert [n for n, v in expected.items() if not torch.equal(got[n], v)] == []


def test_equal_to_the_unsplit_model():
    """Without the tree and on one rank, as plain autograd has it."""
    module = nn.Sequential(*tied_network())
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(9)
    x = torch.randint(0, 11, (16,), generator=generator)
    y = torch.randint(0, 11, (16,), generator=generator)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            nn.functional.cross_entropy(module(x), y).backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1e9)
        optimizer.step()
    for grid in [(1, 1), *GRIDS]:
        _, norms, state, _ = train(*grid, reduction="bucket")
        assert norms[-1] == pytest.approx(norm.item(), rel=1e-3)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)


def test_sharded_optimizer_keeps_copies_equal():
    plain = train(2, 2)
    found = train(2, 2, sharded=True)
    for name, value in plain[3].items():
        torch.testing.assert_close(found[3][name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pipe", [1, 2])
def test_frozen_and_unused_shared_weights(pipe):
    def main(comm):
        first, last = Times(3), Times(3)
        last.w = first.w
        first.w.requires_grad_(False)
        engine = Pipeline(
            [first, Times(2), last, Times(2)], Mesh(comm, pipe=pipe), loss_fn=mean_output
        )
        loss = engine.step(torch.tensor([2.0])).item()
        return loss, {n: p.grad for n, p in engine.named_parameters() if p.grad is not None}

    for loss, grads in run_local(pipe, main):
        assert loss == 72.0
        assert {n: g.item() for n, g in grads.items()}.items() <= {"1.w": 36.0, "3.w": 36.0}.items()


class Encode(nn.Module):
    def __init__(self, embed, act):
        super().__init__()
        self.embed, self.act = embed, act

    def forward(self, x):
        return self.act(self.embed(x))


class Decode(nn.Module):
    """Know the embedding by a plain list as well, as some do to save a name in the state."""

    def __init__(self, embed, act, linear=None):
        super().__init__()
        self.linear, self.embed, self.act = linear, embed, act
        self.listed = [embed]

    def forward(self, h):
        h = self.act(h if self.linear is None else self.linear(h))
        return h @ self.listed[0].weight.t()


def nested_network():
    """An embedding inside three layers: the usual way to tie."""
    generator = torch.Generator().manual_seed(5)
    embed, act = nn.Embedding(11, 6), nn.Sequential(nn.Tanh(), Dropout(0.25))
    layers = [
        Encode(embed, act),
        Decode(embed, act, nn.Linear(6, 6)),
        nn.Sequential(nn.Linear(11, 11), nn.Softmax(1)),
        Mix(embed),
        Decode(embed, act),
    ]
    for parameter in nn.ModuleList(layers).parameters():
        nn.init.normal_(parameter, generator=generator)
    return layers


class Mix(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = embed

    def forward(self, h):
        return h @ self.embed.weight


def train_nested(num_data, pipe, network, layers_of=lambda layers, mesh: layers, **options):
    """Train three steps; return losses, names and states, by rank."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randint(0, 11, (16,), generator=generator)
    y = torch.randint(0, 11, (16,), generator=generator)

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
    generator = torch.Generator().manual_seed(9)
    x = torch.randint(0, 11, (16,), generator=generator)
    y = torch.randint(0, 11, (16,), generator=generator)
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


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_shared_weight_is_frozen_later_and_released_again(grid, reduction):
    """Only the first use on a rank was frozen, and the gradients of the others moved it."""

    def main(comm):
        mesh = Mesh(comm, data=grid[0], pipe=grid[1])
        layers = nested_network()
        layers[0].embed.weight.no_decay = "embed"
        engine = Pipeline(
            layers,
            mesh,
            loss_fn=nn.functional.cross_entropy,
            microbatches=grid[0],
            reduction=reduction,
        )
        generator = torch.Generator().manual_seed(mesh.data.rank)
        x, y = torch.randint(0, 11, (2, 8), generator=generator)
        (embed,) = (p for n, p in engine.named_parameters() if n == "0.embed.weight")
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.5)
        moved = []
        for learns in (True, False, True):
            embed.requires_grad_(learns)
            before = embed.detach().clone()
            engine.zero_grad()
            engine.step(x, y)
            optimizer.step()
            moved.append(not torch.equal(embed, before))
        return moved, embed.no_decay

    assert run_local(grid[0] * grid[1], main) == [([True, False, True], "embed")] * (
        grid[0] * grid[1]
    )


class Convolve(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, padding=1).tanh()


def test_a_complex_weight_of_several_stages():
    """The gradient of a use began at an odd place among real elements."""

    def main(comm):
        first, last = Times(1), Times(1)
        first.w = last.w = nn.Parameter(torch.tensor(2 + 1j))
        engine = Pipeline([first, last], Mesh(comm, pipe=2), loss_fn=lambda y, _: y.abs().mean())
        engine.step(torch.tensor([2.0, 4.0]))
        return [p.grad.item() for p in engine.parameters()]

    assert run_local(2, main) == [[pytest.approx(12 + 6j)]] * 2  # of 3 |w| ** 2


@pytest.mark.parametrize("pipe", [1, 2])
def test_a_sum_of_uses_has_the_strides_of_the_weight(pipe):
    """A fused optimizer mixed up the elements of gradients that came from other ranks."""

    def main(comm):
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(4, 4, 3, 3, generator=generator)
        weight = nn.Parameter(values.to(memory_format=torch.channels_last))
        layers = [Convolve(weight), nn.Identity(), Convolve(weight)]
        mesh = Mesh(comm, pipe=pipe)
        engine = Pipeline(layers, mesh, loss_fn=mean_output, boundaries=[1] * (pipe > 1))
        (held,) = engine.parameters()
        optimizer = torch.optim.SGD([held], lr=0.5, fused=True)
        for _ in range(2):
            engine.zero_grad()
            engine.step(torch.randn(2, 4, 5, 5, generator=generator))
            assert held.grad.stride() == held.stride()
            optimizer.step()
        return held.detach()

    found = run_local(pipe, main)
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(4, 4, 3, 3, generator=generator))
    for _ in range(2):
        weight.grad = None
        x = torch.randn(2, 4, 5, 5, generator=generator)
        Convolve(weight)(Convolve(weight)(x)).mean().backward()
        with torch.no_grad():
            weight -= 0.5 * weight.grad
    for value in found:
        torch.testing.assert_close(value, weight.detach(), rtol=1e-4, atol=1e-6)


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


def test_a_state_with_two_values_of_a_shared_weight_is_refused():
    """Each rank took that of its own layer, and they trained apart from then on."""
    whole = {f"{i}.w": torch.tensor(float(i)) for i in range(3)}

    def main(comm):
        given = [Times(2), Times(3), Times(4)]
        given[2].w = given[0].w
        engine = Pipeline(given, Mesh(comm, pipe=2), loss_fn=mean_output)
        with pytest.raises(ValueError, match=r"0\.w and 2\.w are one weight"):
            engine.load_state_dict(whole)
        before = [p.item() for p in engine.parameters()]
        engine.load_state_dict({**whole, "2.w": torch.tensor(0.0)})
        return before, [p.item() for p in engine.parameters()]

    (first, later), (last, last_later) = run_local(2, main)
    assert sorted(first + last) == [2, 2, 3] and sorted(later + last_later) == [0, 0, 1]


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


@pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_the_gradient_of_a_shared_weight_are_refused(method):
    """They saw the gradient of one use, and that of the others was left as it was."""
    text = rf"0\.w is in several layers, and has a hook on its gradient \({method}\)"

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=1)

        def engine(layers):
            return Pipeline(layers, mesh, loss_fn=mean_output, microbatches=1)

        layers = [Times(3), Times(7)]
        layers[1].w = layers[0].w
        engine(layers)
        again = engine(layers)  # what an engine hangs there does not count
        again.step(torch.ones(1))
        (held,) = again.parameters()
        handle = getattr(held, method)(lambda _: None)
        with pytest.raises(StageError, match=text):
            again.step(torch.ones(1))
        with pytest.raises(ValueError, match=text):
            engine(layers)
        handle.remove()
        again.zero_grad()
        again.step(torch.ones(1))
        alone = [Times(3), Times(7)]
        getattr(alone[0].w, method)(lambda _: None)
        engine(alone).step(torch.ones(1))

    run_local(2, main)


class Halve(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.w = weight

    def forward(self, x):
        return x / 2 * self.w


@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("change", ["data", "double", "vector", "swap"])
def test_all_uses_follow_what_is_written_to_data(change, pipe):
    """The first use on a rank alone had the new value, in training, evaluation and checkpoints."""

    def write(engine, value):
        (weight,) = engine.parameters()
        if change == "data":
            weight.data = torch.tensor([value])
        elif change == "vector":
            nn.utils.vector_to_parameters(torch.tensor([value]), [weight])
        elif change == "double":
            weight.data = torch.tensor([value], dtype=torch.float64)
        else:
            torch.utils.swap_tensors(weight, nn.Parameter(torch.tensor([value])))

    def main(comm):
        first = Times(1)
        engine = Pipeline(
            [first, Halve(first.w), Halve(first.w)],
            Mesh(comm, pipe=pipe),
            loss_fn=mean_output,
            microbatches=1,
        )
        x = torch.ones(2, dtype=torch.float64 if change == "double" else torch.float32)
        write(engine, 3.0)
        with torch.inference_mode():
            evaluated = engine.forward(x).tolist()
        write(engine, 4.0)
        state = {name: value.item() for name, value in engine.state_dict().items()}
        write(engine, 2.0)
        loss = engine.step(x).item()
        (weight,) = engine.parameters()
        weight.data.sub_(1.0)  # in place, as an optimizer does
        assert engine.forward(x).tolist() == [0.25, 0.25]
        return evaluated, set(state.values()), loss, weight.grad.item()

    assert run_local(pipe, main) == [([6.75, 6.75], {4.0}, 2.0, 3.0)] * pipe


def test_what_is_written_to_a_later_use_does_not_count():
    """It untied the uses without a word; the first is the one that `parameters` yields."""

    def main(comm):
        first = Times(3)
        layers = [first, Halve(first.w)]
        engine = Pipeline(layers, Mesh(comm), loss_fn=mean_output, microbatches=1)
        engine.layers[1].w.data = torch.tensor([7.0])
        return engine.step(torch.ones(2)).item()

    assert run_local(1, main) == [4.5]
