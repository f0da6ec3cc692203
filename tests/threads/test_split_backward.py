"""A backward in two halves: the same bits, and nothing computed twice."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ringfold.parallel.split_backward import SplitBackward

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Bare(nn.Module):
    """Weights of its own, used as `function(x, *weights)` says."""

    def __init__(self, function, *shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weights = nn.ParameterList(torch.randn(s, generator=generator) for s in shapes)
        self.function = function

    def forward(self, x):
        return self.function(x, *self.weights)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)


def residual(x, a, b):
    return x + torch.tanh(x @ a) @ b


def in_place(x, a, b):
    x.mul_(a)
    y = x @ b
    y.relu_()
    return y


def several_outputs(x, a, b):
    first, second = (x @ a).split(2, dim=1)
    return torch.cat([second * b, first, x * 2], dim=1)


def weight_norm(x, v, g):
    return x @ (v * (g / v.norm(dim=0)))


def weights_alone(x, a, b):
    return x * 0.5 + (a @ b).sum(0)


def in_place_on_a_view(x, a, b):
    x = x * 1
    x[:, :2].mul_(a)
    x[:, 1:].add_(b)
    return x


def parts_of_one_weight(x, w):
    a, b = w.unbind(0)
    return torch.addcmul(x, a, b.tanh())


def elastic_net(x, w):
    return (torch.tanh(x * w) * w).sum() + w.abs().sum() + w.square().sum()


def penalty_made_first(x, w):
    penalty = w.abs().sum() + w.square().sum()
    return (torch.tanh(x * w) * w).sum() + penalty


def cells(x, w, b):
    """A recurrent layer whose first state is zeros."""
    state = torch.zeros(1, 4)
    for row in x.split(1):
        state = torch.tanh(row + torch.addmm(b, state, w))
    return state


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)),
    "norms": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.PReLU(), nn.Linear(6, 2)
    ),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "residual": lambda: Bare(residual, (4, 3), (3, 4)),
    "in place": lambda: Bare(in_place, (4,), (4, 3)),
    "several outputs": lambda: Bare(several_outputs, (4, 4), (2,)),
    "weight norm": lambda: Bare(weight_norm, (4, 3), (3,)),
    "custom function": lambda: Bare(lambda x, w, v: Scale.apply(x, w) @ v, (4,), (4, 2)),
    "weights alone": lambda: Bare(weights_alone, (4, 4), (4, 4)),
    "shared weight": lambda: Bare(lambda x, w: ((x @ w.t()).tanh() @ w.t()).tanh() @ w.t(), (4, 4)),
    "shared bias": lambda: Bare(lambda x, w, b: (x @ w + b).tanh() @ w + b, (4, 4), (4,)),
    "in place on a view": lambda: Bare(in_place_on_a_view, (2,), (3,)),
    "parts of one weight": lambda: Bare(parts_of_one_weight, (2, 4)),
    "broadcast": lambda: Bare(lambda x, a, b: x * a + b, (1,), (1, 1)),
    "wider weight": lambda: Bare(lambda x, w: x * w, (1,)).double(),
    "real weight": lambda: Bare(lambda x, w: (x * 1j * w + w).abs(), (4,)),
    "elastic net": lambda: Bare(elastic_net, (4,)),
    "penalty made first": lambda: Bare(penalty_made_first, (4,)),
    "recurrent": lambda: Bare(cells, (4, 4), (4,)),
    "no weights": lambda: nn.Tanh(),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 3, 1)),
    "not used": lambda: Bare(lambda x, w, v: x @ w, (4, 2), (3,)),
}
AGAIN = {"elastic net"}


def run(module, backward):
    """Return the input's gradient and the weights', after `backward(output, entered, leaf)`."""
    torch.manual_seed(0)
    leaf = X.clone().requires_grad_()
    entered = leaf * 1
    door = entered.grad_fn
    output = module(entered)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    backward(output, gradient, door, leaf)
    return [leaf.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_two_halves_are_the_whole(name):
    torch.manual_seed(4)
    module = MODELS[name]()
    twin = MODELS[name]()
    twin.load_state_dict(module.state_dict())

    def halves(output, gradient, door, leaf):
        split = SplitBackward([output], [gradient], door, leaf)
        assert split.computes_again == (name in AGAIN)
        split.to_input()
        assert leaf.grad is not None
        assert all(p.grad is None for p in module.parameters())
        before = leaf.grad.clone()
        split.to_weights()
        assert torch.equal(leaf.grad, before)

    found = run(module, halves)
    expected = run(twin, lambda output, gradient, door, leaf: output.backward(gradient))
    assert [g is None for g in found] == [g is None for g in expected]
    for got, want in zip(found, expected, strict=True):
        assert want is None or torch.equal(got, want)


def test_roots_that_do_not_lead_to_the_input():
    w = nn.Parameter(torch.tensor([2.0]))
    leaf = torch.ones(1, requires_grad=True)
    entered = leaf * 1
    roots = [entered * w, w * 3, w]
    split = SplitBackward(roots, [torch.ones(1)] * 3, entered.grad_fn, leaf)
    # The last root's end is where the first one's weights end, too.
    split.to_input()
    assert leaf.grad.item() == 2.0 and w.grad is None
    split.to_weights()
    assert w.grad.item() == 1 + 3 + 1


@pytest.mark.parametrize("again", [False, True])
def test_leaves_of_the_loss_get_gradients(again):
    """Where the graph is run again, it was run to the stage's parameters alone."""
    w, temperature = (nn.Parameter(torch.tensor([value])) for value in (2.0, 5.0))
    leaf = torch.ones(1, requires_grad=True)
    entered = leaf * 1
    loss = (entered + w) * temperature + ((w + w * 2) if again else w * 3)
    split = SplitBackward([loss], [torch.ones(1)], entered.grad_fn, leaf)
    assert split.computes_again == again
    split.to_input()
    assert w.grad is None and temperature.grad is None
    split.to_weights()
    assert (leaf.grad.item(), w.grad.item(), temperature.grad.item()) == (5.0, 5.0 + 3.0, 3.0)


class Watched(torch.autograd.Function):
    """Count how often the way to the input is gone."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Watched.calls += 1
        return gradient


def test_what_lies_between_the_weights_is_not_computed_again():
    class Watch(nn.Module):
        def forward(self, x):
            return Watched.apply(x)

    module = nn.Sequential(nn.Linear(4, 4), Watch(), nn.Linear(4, 4), Watch(), nn.Linear(4, 4))

    def halves(output, gradient, door, leaf):
        Watched.calls = 0
        split = SplitBackward([output], [gradient], door, leaf)
        split.to_input()
        assert Watched.calls == 2
        split.to_weights()
        assert Watched.calls == 2

    run(module, halves)


def test_a_custom_function_runs_once():
    """It computes all its gradients in the first half; it did so in both."""

    class Count(Scale):
        calls = 0

        @staticmethod
        def backward(ctx, gradient):
            Count.calls += 1
            return Scale.backward(ctx, gradient)

    def halves(output, gradient, door, leaf):
        split = SplitBackward([output], [gradient], door, leaf)
        split.to_input()
        split.to_weights()

    run(Bare(lambda x, w, v: Count.apply(Count.apply(x, w), v), (4,), (4,)), halves)
    assert Count.calls == 2


@pytest.mark.parametrize("weights", [1, 5])
def test_what_is_checkpointed_runs_again_once_for_each_half(weights):
    """It ran once for every operation with weights: each was a task of autograd by itself."""
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(weights)), nn.LayerNorm(4))
    module = Bare(lambda x, *_: checkpoint(body, x, use_reentrant=False))
    module.layers = layers
    calls = []

    def body(x):
        calls.append(1)
        return layers(torch.tanh(x))

    def halves(output, gradient, door, leaf):
        split = SplitBackward([output], [gradient], door, leaf)
        for half, runs in ((split.to_input, 2), (split.to_weights, 3)):
            half()
            assert len(calls) == runs

    found = run(module, halves)
    module.zero_grad()
    expected = run(module, lambda output, gradient, door, leaf: output.backward(gradient))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_hooks_on_parameters_run_once():
    module = nn.Linear(4, 4)
    seen = []
    module.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))

    def halves(output, gradient, door, leaf):
        split = SplitBackward([output], [gradient], door, leaf)
        split.to_input()
        assert seen == []
        split.to_weights()

    run(module, halves)
    assert seen == [True]
