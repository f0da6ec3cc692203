"""Gradients of another dtype than their parameters, by torch's `grad_dtype`."""

import pytest
import torch
from torch import nn

from ringfold import DataParallel, Mesh, Pipeline, ShardedOptimizer, run_local

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype"
)

FINE = 1 + 2.0**-12  # 1 in bfloat16


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.shape = weight.shape
        return weight.float().sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.expand(ctx.shape)


class Scale(nn.Module):
    """Have gradients that only float32 can tell from those of others."""

    def __init__(self, shape=(4, 3), weight=None):
        super().__init__()
        made = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16).t())  # not contiguous
        made.grad_dtype = torch.float32
        self.w = made if weight is None else weight

    def forward(self, x):
        return x * Sum.apply(self.w)


def backward(module, comm, value=FINE):
    (module(torch.tensor([value])) * (1 + comm.rank)).sum().backward()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("wire", [None, "fp32", "powersgd:1"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (700, 800)])
def test_gradients_are_reduced_in_their_own_dtype(shape, wire, kept):
    """The first backward ended in "expected bfloat16, got float32"."""

    def main(comm):
        module = DataParallel(Scale(shape), comm, wire=wire)
        for _ in range(2):
            module.zero_grad(set_to_none=not kept)
            backward(module, comm)
        gradient = module.module.w.grad
        return gradient.dtype, gradient.shape, set(gradient.flatten().tolist())

    for dtype, found, values in run_local(2, main):
        assert (dtype, found) == (torch.float32, torch.Size(shape[::-1]))
        exact = wire != "powersgd:1"
        assert len(values) == 1 if exact else values
        for value in values:
            assert value == (1.5 * FINE if exact else pytest.approx(1.5 * FINE, rel=1e-3))


@pytest.mark.parametrize("wire", [None, "bf16"])
def test_rank_without_a_gradient_gets_one_of_that_dtype(wire):
    def main(comm):
        module = DataParallel(Scale(), comm, wire=wire)
        if comm.rank:
            module.reduce_gradients()
        else:
            backward(module, comm)
        gradient = module.module.w.grad
        return gradient.dtype, gradient[0, 0].item()

    assert run_local(2, main) == [(torch.float32, FINE / 2 if wire is None else 0.5)] * 2


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
@pytest.mark.parametrize(("num_data", "pipe"), [(1, 1), (2, 1), (1, 2)])
def test_pipeline_with_a_weight_that_two_layers_share(num_data, pipe, schedule, reduction):
    def main(comm):
        first = Scale((1, 1))
        engine = Pipeline(
            [first, Scale(weight=first.w)],
            Mesh(comm, data=num_data, pipe=pipe),
            loss_fn=lambda output, _: output.sum(),
            loss_reduction="sum",
            microbatches=2,
            schedule=schedule,
            reduction=reduction,
        )
        engine.step(torch.full((2 // num_data,), FINE))
        (weight,) = engine.parameters()
        return weight.grad.dtype, weight.grad.item()

    results = run_local(num_data * pipe, main)
    assert results == [(torch.float32, 4 * FINE)] * (num_data * pipe)


def test_ranks_that_choose_differently_are_refused():
    def main(comm):
        module = Scale()
        if comm.rank:
            module.w.grad_dtype = torch.bfloat16
        with pytest.raises(ValueError, match=r"w .* with gradients of float32 on rank 0"):
            DataParallel(module, comm)

    run_local(2, main)


def test_other_dtype_after_wrapping_is_refused():
    def main(comm):
        module = DataParallel(Scale(), comm)
        module.module.w.grad_dtype = torch.bfloat16
        with pytest.raises(TypeError, match=r"expected float32, got bfloat16.*grad_dtype"):
            backward(module, comm)

    run_local(2, main)


def test_sharded_optimizer_refuses_it():
    """The first step ended in torch's words on a gradient of a part."""

    def main(comm):
        with pytest.raises(TypeError, match=r"w: a parameter of torch.bfloat16 with gradients of"):
            ShardedOptimizer(Scale().named_parameters(), comm, torch.optim.SGD, lr=0.1)

    run_local(2, main)
