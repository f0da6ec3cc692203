"""Weights that layers share: one value and one gradient, on whichever stages the layers are."""

import pytest
import torch
from little_layers import Times, mean_output
from tied import nested_network, tied_network, tokens
from torch import nn

from ringfold import Mesh, Pipeline, ShardedOptimizer, StageError, run_local


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


def train(num_data, pipe, sharded=False, **options):
    x, y = tokens()

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
    x, y = tokens()
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
