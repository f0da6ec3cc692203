"""Hooks on gradients do with a backward in two halves what they do with a whole one.

The second half ran the nodes that have weights once more, and their hooks with them: a hook that
halves a gradient left a quarter of it, without an error.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.utils.parametrizations import weight_norm

from ringfold import Mesh, Pipeline, run_local
from ringfold.parallel.actions import Kind
from ringfold.parallel.plan import PLANS
from ringfold.parallel.plan_text import parse_plan
from ringfold.parallel.split_backward import SplitBackward


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum(0)


class Deep(nn.Module):
    """Operations with weights of all kinds; `at(name, tensor)` is shown what the forward makes.

    shared: whether the first and the last of them have a weight in common.
    """

    def __init__(self, at, shared):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.normed = weight_norm(nn.Linear(4, 4))
        self.norm = nn.LayerNorm(4)
        self.bare = nn.Parameter(torch.rand(4))
        self.shift = self.bare if shared else nn.Parameter(torch.rand(4))
        self.matrix = nn.Parameter(torch.rand(4, 4))
        self.at = at

    def forward(self, x):
        x = self.show("first", self.first(x))
        x = self.show("normed", self.normed(torch.tanh(x)))
        x = self.show("custom", Scale.apply(x, self.bare))
        x = self.show("product", x @ self.show("made", torch.tanh(self.matrix)))
        left, right = self.norm(x).split(2, dim=1)
        return torch.cat([right, self.show("left", left)], dim=1) + self.shift

    def show(self, name, tensor):
        if tensor.requires_grad:
            self.at(name, tensor)
        return tensor


class Hooks:
    """Hooks of one kind on a Deep, and what they saw under each name."""

    def __init__(self, kind, shared=False):
        torch.manual_seed(0)
        self.seen = {}
        self.kept = {}
        self.on_inner = {
            "tensors": lambda name, tensor: tensor.register_hook(partial(self.halve, name)),
            "retain_grad": self.keep,
            "halved and retained": self.halve_and_keep,
            "tensors together": self.gather,
            "before nodes": self.before,
            "after nodes": self.after,
        }.get(kind)
        self.module = Deep(self.on_inner or (lambda name, tensor: None), shared)
        for name, parameter in self.module.named_parameters():
            if kind == "parameters":
                parameter.register_hook(partial(self.halve, name))
            if kind == "after accumulation":
                parameter.register_post_accumulate_grad_hook(partial(self.halve_sum, name))
        if kind == "parameters together":
            register_multi_grad_hook(list(self.module.parameters()), partial(self.note, "all"))
        for name, layer in self.module.named_children():
            if kind == "modules":
                layer.register_full_backward_hook(partial(self.of_module, name))
            if kind == "before modules":
                layer.register_full_backward_pre_hook(partial(self.before_module, name))

    def note(self, name, gradients):
        copies = [None if g is None else g.clone() for g in gradients]
        self.seen.setdefault(name, []).append(copies)

    def halve(self, name, gradient):
        self.note(name, [gradient])
        return gradient * 0.5

    def halve_sum(self, name, parameter):
        self.note(name, [parameter.grad])
        parameter.grad *= 0.5

    def of_module(self, name, module, found, gradients):
        self.note(name, gradients)
        return tuple(g if g is None else g * 0.5 for g in found)

    def before_module(self, name, module, gradients):
        self.note(name, gradients)
        return tuple(g * 0.5 for g in gradients)

    def keep(self, name, tensor):
        tensor.retain_grad()
        self.kept.setdefault(name, []).append(tensor)

    def halve_and_keep(self, name, tensor):
        tensor.register_hook(partial(self.halve, name))
        self.keep(name, tensor)

    def gather(self, name, tensor):
        # All but the made weight, whose gradient is there in the second half only.
        if name == "first":
            self.together = [tensor]
        elif name != "made":
            self.together.append(tensor)
        if name == "left":
            register_multi_grad_hook(self.together, partial(self.note, "all"))

    def before(self, name, tensor):
        tensor.grad_fn.register_prehook(
            lambda gradients: tuple(g if g is None else self.halve(name, g) for g in gradients)
        )

    def after(self, name, tensor):
        # It runs in each half, with the gradients of that half: so nothing is noted.
        tensor.grad_fn.register_hook(
            lambda found, _: tuple(g if g is None else g * 0.5 for g in found)
        )

    def results(self):
        """Return all gradients, of parameters, kept and seen."""
        found = {name: [[p.grad]] for name, p in self.module.named_parameters()}
        for name, kept in self.kept.items():
            found[f"kept {name}"] = [[t.grad] for t in kept if t.grad is not None]
        return found | {f"seen {name}": seen for name, seen in self.seen.items()}


KINDS = [
    "parameters",
    "after accumulation",
    "parameters together",
    "tensors",
    "retain_grad",
    "halved and retained",
    "tensors together",
    "before nodes",
    "after nodes",
    "modules",
    "before modules",
]
SPLIT = [name for name, f in PLANS.items() if any(a.kind is Kind.INPUT for a in f(1, 2, 2))]
OWN = parse_plan("stage 0: F0 F1 I0 I1 W0 W1\nstage 1: F0 F1 I0 I1 W0 W1")
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert [len(each) for each in got[name]] == [len(each) for each in want[name]], name
        for ours, theirs in zip(got[name], want[name], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert (a is None and b is None) or torch.equal(a, b), name


def run(kind, shared, backward):
    hooks = Hooks(kind, shared)
    leaf = X.clone().requires_grad_()
    entered = leaf * 1
    door = entered.grad_fn
    output = hooks.module(entered)
    backward(output, torch.ones_like(output), door, leaf)
    return hooks.results() | {"input": [[leaf.grad]]}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run_once_and_their_gradients_count(kind, shared):
    """Every gradient has the same bits, and every hook has seen the same, as often."""

    def halves(output, gradient, door, leaf):
        split = SplitBackward([output], [gradient], door, leaf)
        assert not split.computes_again
        split.to_input()
        split.to_weights()

    def whole(output, gradient, door, leaf):
        output.backward(gradient)

    found = run(kind, shared, halves)
    expected = run(kind, shared, whole)
    assert any(n.startswith(("seen", "kept")) for n in expected) == (kind != "after nodes")
    if kind not in ("retain_grad", "parameters together", "tensors together"):
        plain = run("none", shared, whole)
        assert not torch.equal(found["first.bias"][0][0], plain["first.bias"][0][0])
    equal(found, expected)


@pytest.mark.filterwarnings("ignore:Full backward hook")  # the first stage's input needs none
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", [*SPLIT, OWN])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_that_split_give_the_bits_of_1f1b(kind, schedule, recompute):
    """On every stage but the first, weights' gradients were those of hooks applied twice."""

    def train(plan):
        made = [[Hooks(kind), Hooks(kind)] for _ in range(2)]

        def main(comm):
            layers = [hooks.module for hooks in made[comm.rank]]
            mesh = Mesh(comm, data=1, pipe=2)
            engine = Pipeline(
                layers,
                mesh,
                loss_fn=nn.functional.mse_loss,
                microbatches=2,
                schedule=plan,
                recompute=recompute,
                reduction="tree",
            )
            engine.step(X, X)
            return made[comm.rank][comm.rank].results()

        return run_local(2, main)

    for got, want in zip(train(schedule), train("1f1b"), strict=True):
        equal(got, want)
