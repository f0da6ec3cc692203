"""Re-entrant checkpoints run backwards within the backward: one pass reduces what all have left."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ringfold import Communicator, DataParallel, Mesh, Pipeline, run_local

WIDTH = 3


class Layers(nn.Module):
    """Linear layers one after the other, by their numbers; in checkpoints but for the last."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x, order, reentrant: bool, head: bool):
        for number in order:
            x = torch.tanh(checkpoint(self.layers[number], x, use_reentrant=reentrant))
        return self.layers[-1](x) if head else x


def layers() -> nn.ModuleList:
    found = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return found


def batch(rank: int, step: int):
    generator = torch.Generator().manual_seed(rank + 10 * step)
    return torch.randn(4, WIDTH, generator=generator).requires_grad_()


def one_process(orders, step: int, head: bool):
    """Return the mean of all ranks' gradients."""
    module = Layers(layers())
    for rank, order in enumerate(orders):
        loss = module(batch(rank, step), order, False, head).square().sum()
        (loss / len(orders)).backward()
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize("bucket_bytes", [1, 60, 1 << 20])
@pytest.mark.parametrize(
    ("orders", "head"),
    [
        ([(0, 1, 2), (0, 1, 2)], False),
        ([(0, 0, 0), (0, 0, 0)], True),  # one layer, shared
        ([(0, 1, 2), (0, 2)], False),  # ranks drop layers
        ([(0, 1, 0, 1), (0, 1, 1), (1, 0)], True),
    ],
)
def test_gradients_are_those_without_checkpoints(orders, head, bucket_bytes) -> None:
    def main(comm: Communicator):
        module = Layers(layers())
        model = DataParallel(module, comm, bucket_bytes=bucket_bytes)
        found = []
        for step in range(3):
            model.zero_grad()
            model(batch(comm.rank, step), orders[comm.rank], True, head).square().sum().backward()
            found.append([None if p.grad is None else p.grad.clone() for p in module.parameters()])
        return found

    results = run_local(len(orders), main)
    for step in range(3):
        expected = one_process(orders, step, head)
        for found in results:
            torch.testing.assert_close(found[step], expected)


def test_a_gradient_that_has_left_is_not_accumulated_again() -> None:
    """What came after the first checkpoint was lost, without a word."""

    def main(comm: Communicator) -> None:
        model = DataParallel(Layers(layers()[:1]), comm, bucket_bytes=1)
        with pytest.raises(RuntimeError, match=r"layers\.0\.bias: accumulated again.*use_reent"):
            model(batch(comm.rank, 0), (0, 0), True, False).sum().backward()

    run_local(2, main)


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fails):
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.fails:
            raise FloatingPointError("out of memory")
        return gradient, None


def failing(module: nn.Module, x, fails: bool):
    first, second = module
    return second(Fail.apply(first(x), fails)).square().sum()


def pair() -> nn.Module:
    return nn.Sequential(*layers()[:2])


def test_what_a_failed_backward_has_begun_is_given_up_without_the_wrapper() -> None:
    """A call of the module itself found the old pass, which no end would come for."""

    def main(comm: Communicator):
        module = pair()
        alone = copy.deepcopy(module)
        model = DataParallel(module, comm, bucket_bytes=1)
        x = batch(comm.rank, 0)
        loss = failing(model.module, x, True)
        with pytest.raises(FloatingPointError):
            loss.backward()
        for _ in range(2):
            model.zero_grad()
            failing(model.module, x, False).backward()
        for rank in range(comm.size):
            (failing(alone, batch(rank, 0), False) / comm.size).backward()
        return all(
            torch.allclose(a.grad, b.grad)
            for a, b in zip(module.parameters(), alone.parameters(), strict=True)
        )

    assert all(run_local(2, main))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_step_before_the_ranks_have_met_is_refused(set_to_none, nested) -> None:
    """Each rank stepped by its own gradient, without a word."""

    def main(comm: Communicator):
        model, other = (DataParallel(pair(), comm) for _ in range(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = batch(comm.rank, 0)

        def step(_):
            optimizer.step()
            optimizer.zero_grad(set_to_none)

        def train(_=None):
            with torch.enable_grad():
                model(x).sum().backward()
            step(None)

        if nested:  # the backward of one model within that of another
            hidden = other.module[0](x)
            hidden.register_hook(train)
            loss = other.module[1](hidden).sum()
        else:
            model.module[0].bias.register_post_accumulate_grad_hook(step)
            loss = model(x).sum()
        with pytest.raises(RuntimeError, match=r"was written to while backward ran.*has returned"):
            loss.backward()

    run_local(2, main)


@pytest.mark.parametrize("before", [False, True])
def test_a_gradient_that_a_hook_takes_before_the_ranks_have_met_is_refused(before) -> None:
    """As a step by `data`, of which a parameter's version tells nothing, whoever came first."""

    def main(comm: Communicator):
        module = pair()

        def step(parameter):
            parameter.data.add_(parameter.grad, alpha=-0.1)
            parameter.grad = None

        for wrap in (False, True) if before else (True, False):
            if wrap:
                model = DataParallel(module, comm)
            else:
                module[0].bias.register_post_accumulate_grad_hook(step)
        with pytest.raises(RuntimeError, match=r"gradient of 0.bias .* is gone before it was red"):
            model(batch(comm.rank, 0)).sum().backward()

    run_local(2, main)


class Twice(nn.Module):
    """One layer in two checkpoints."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        for _ in range(2):
            x = torch.tanh(checkpoint(self.layer, x, use_reentrant=True))
        return x


@pytest.mark.parametrize("pipe", [1, 2])
def test_stages_of_replicas_accumulate_a_gradient_again(pipe: int) -> None:
    """The first step was refused, since the gradient had been sent."""

    def stages() -> list[nn.Module]:
        first, second, third, _ = layers()
        return [first, Twice(second), Twice(third)]

    def main(comm: Communicator):
        mesh = Mesh(comm, data=2, pipe=pipe)
        loss_fn = nn.functional.mse_loss
        engine = Pipeline(stages(), mesh, loss_fn=loss_fn, microbatches=2, bucket_bytes=1)
        found = {}
        for step in range(2):
            engine.zero_grad()
            x = batch(mesh.data.rank, step).detach()
            engine.step(x, x)
            found |= {(step, n): p.grad.clone() for n, p in engine.named_parameters()}
        return found

    found = {k: v for part in run_local(2 * pipe, main) for k, v in part.items()}
    for step in range(2):
        module = nn.Sequential(*stages())
        x = torch.cat([batch(rank, step).detach() for rank in range(2)])
        nn.functional.mse_loss(module(x), x).backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(found[step, name], parameter.grad)
