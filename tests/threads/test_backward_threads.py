"""Backwards in several threads of a rank: each ends for the wrappers in it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ringfold import DataParallel, Settings, run_local

WIDTH = 3


class Meet(torch.autograd.Function):
    """Pass values on; in the middle of backward call a function."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.function()
        return gradient, None


def layers() -> nn.ModuleList:
    found = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return found


def batch(rank: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(rank))


def loss_of(module: nn.ModuleList, x: torch.Tensor, function=lambda: None) -> torch.Tensor:
    return module[1](Meet.apply(module[0](x), function)).square().sum()


def backward_within(first: torch.Tensor, reached: threading.Event, left: threading.Event, second):
    """Run a whole backward while another thread is in the middle of one."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(first.backward)
        assert reached.wait(30)
        try:
            second.backward()
        finally:
            left.set()
            other.result()


@pytest.mark.parametrize("ranks", [(0,), (0, 1)])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_a_backward_does_not_end_another_thread_s(bucket_bytes: int, ranks) -> None:
    """It reduced what that one had left so far: wrong gradients, and an AssertionError."""

    def main(comm):
        one, other = layers(), layers()
        models = [DataParallel(m, comm, bucket_bytes=bucket_bytes) for m in (one, other)]
        reached, left = threading.Event(), threading.Event()
        x = batch(comm.rank)
        if comm.rank in ranks:
            first = loss_of(one, x, lambda: (reached.set(), left.wait(30)))
            backward_within(first, reached, left, loss_of(other, 2 * x))
        else:
            loss_of(other, 2 * x).backward()
            loss_of(one, x).backward()
        used = [p.grad for module in (one, other) for p in module[:2].parameters()]
        return used, [model.last_step.unused for model in models]

    expected = []
    for factor in (1, 2):
        module = layers()
        for rank in range(2):
            (loss_of(module, factor * batch(rank)) / 2).backward()
        expected += [p.grad for p in module[:2].parameters()]
    for found, unused in run_local(2, main, settings=Settings(timeout=10)):
        torch.testing.assert_close(found, expected)
        assert [sorted(names) for names in unused] == [["2.bias", "2.weight"]] * 2


@pytest.mark.parametrize("shared", [False, True])
def test_two_backwards_at_once_through_one_wrapper_are_refused(shared: bool) -> None:
    """Or through two that share parameters: half of one was reduced with the other."""

    def main(comm):
        module = layers()
        for _ in range(2 if shared else 1):
            model = DataParallel(module, comm)
        reached, left = threading.Event(), threading.Event()
        x = batch(comm.rank)
        first = loss_of(module, x, lambda: (reached.set(), left.wait(30)))
        with pytest.raises(RuntimeError, match=r"two backwards through one wrapper, .* two thr"):
            backward_within(first, reached, left, loss_of(module, x))
        model.zero_grad()
        loss_of(module, x).backward()
        return [p.grad.clone() for p in module[:2].parameters()]

    first, second = run_local(2, main)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_backward_within_a_backward_is_none_beside_it() -> None:
    """What follows on a checkpoint comes after a branch that the outer backward goes first."""

    def main(comm):
        module = layers()
        model = DataParallel(module, comm)
        x = batch(comm.rank).requires_grad_()
        hidden = module[0](x)
        beside = module[1](x)
        within = checkpoint(module[2], hidden, use_reentrant=True)
        (within + beside).square().sum().backward()
        model.zero_grad()
        return model.last_step.unused

    assert run_local(2, main) == [(), ()]
