"""Collectives within a loss have the gradients of one process that holds what all ranks do."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from ringfold import DataParallel, Mesh, Pipeline, run_local
from ringfold.parallel import autograd

ROWS = 3


def own(rank: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(17 + rank)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def alone(name: str, xs: list[torch.Tensor], rank: int) -> torch.Tensor:
    """Return what a rank gets of all ranks' x, by torch in one process."""
    all_of_them = torch.stack(xs)
    return {
        "sum": lambda: all_of_them.sum(0),
        "mean": lambda: all_of_them.mean(0),
        "allgather": lambda: all_of_them,
        "reduce_scatter": lambda: all_of_them.sum(0)[rank],
        "alltoall": lambda: all_of_them[:, rank],
        "allgatherv": lambda: torch.cat([x[: r + 1] for r, x in enumerate(xs)]),
        "alltoallv": lambda: xs[rank - 1],
        "broadcast": lambda: all_of_them[-1],
    }[name]()


def to_the_next(x, comm) -> list[int]:
    return [len(x) if rank == (comm.rank + 1) % comm.size else 0 for rank in range(comm.size)]


CALLS = {
    "sum": lambda x, comm: autograd.allreduce(x, comm),
    "mean": lambda x, comm: autograd.allreduce(x, comm, op="mean"),
    "allgather": autograd.allgather,
    "reduce_scatter": autograd.reduce_scatter,
    "alltoall": autograd.alltoall,
    "allgatherv": lambda x, comm: autograd.allgatherv(x[: comm.rank + 1], comm),
    "alltoallv": lambda x, comm: autograd.alltoallv(x, to_the_next(x, comm), comm)[0],
    "broadcast": lambda x, comm: autograd.broadcast(x, comm, root=comm.size - 1),
}


def loss_of(result: torch.Tensor, rank: int) -> torch.Tensor:
    """Return a loss that differs by rank, element and order of derivative."""
    return (result.sin() * own(100 + rank, *result.shape)).sum()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_of_first_and_second_order(name: str, size: int) -> None:
    shape = (size, ROWS, 2)

    def main(comm):
        x = own(comm.rank, *shape).requires_grad_()
        before = x.detach().clone()
        # Not contiguous: what backward hands on need not be either.
        result = CALLS[name](x.transpose(1, 2), comm)
        loss = loss_of(result, comm.rank)
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert torch.equal(x, before)
        # By torch.func as well, and forwards (of which torch has one level for all threads).
        call = partial(CALLS[name], comm=comm)
        again = torch.func.grad(lambda x: loss_of(call(x.transpose(1, 2)), comm.rank))(before)
        assert torch.equal(again, first)
        if size == 1:
            with forward_ad.dual_level():
                value = call(forward_ad.make_dual(before, before + 1))
                assert torch.equal(forward_ad.unpack_dual(value).tangent, call(before + 1))
        return result.detach(), first.detach(), second

    xs = [own(rank, *shape).requires_grad_() for rank in range(size)]
    results = [alone(name, [x.transpose(1, 2) for x in xs], rank) for rank in range(size)]
    total = torch.stack([loss_of(results[rank], rank) for rank in range(size)]).sum()
    firsts = torch.autograd.grad(total, xs, create_graph=True)
    seconds = torch.autograd.grad(sum(first.square().sum() for first in firsts), xs)
    for rank, found in enumerate(run_local(size, main)):
        expected = results[rank], firsts[rank], seconds[rank]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("size", [1, 2])
def test_mapped_over_an_axis(name: str, size: int) -> None:
    """`vmap` was refused, and with it jacobians and hessians of torch.func."""

    def main(comm) -> None:
        call = partial(CALLS[name], comm=comm)
        x = own(comm.rank, 3, size, 2)
        one_by_one = torch.stack([call(row) for row in x])
        for axis in range(3):
            mapped = torch.func.vmap(call, in_dims=axis)(x.movedim(0, axis))
            assert torch.equal(mapped, one_by_one)
        twice = torch.func.vmap(torch.func.vmap(call))(torch.stack([x, 2 * x]))
        assert torch.equal(twice[0], one_by_one)

        jacobian = torch.func.jacrev(lambda x: call(x.sin()))(x[0])
        expected = torch.autograd.functional.jacobian(lambda x: call(x.sin()), x[0])
        torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-12)
        if size == 1:  # forwards torch has one level for all threads

            def loss(x: torch.Tensor) -> torch.Tensor:
                return call(x.sin()).square().sum()

            hessian = torch.autograd.functional.hessian(loss, x[0])
            torch.testing.assert_close(torch.func.hessian(loss)(x[0]), hessian)

    run_local(size, main)


@pytest.mark.parametrize("name", CALLS)
def test_complex_values(name: str) -> None:
    """Of a conjugate, whose memory holds other numbers; gradients of complex sums were refused."""
    size = 2

    def value(rank: int) -> torch.Tensor:
        return torch.view_as_complex(own(rank, size, ROWS, 2)).requires_grad_()

    def loss(result: torch.Tensor, rank: int) -> torch.Tensor:
        return (result * torch.tensor(1 + 2j)).real.sin().sum() * (rank + 1)

    def main(comm):
        x = value(comm.rank)
        result = CALLS[name](x.conj(), comm)
        loss(result, comm.rank).backward()
        return result.detach(), x.grad

    xs = [value(rank) for rank in range(size)]
    results = [alone(name, [x.conj() for x in xs], rank) for rank in range(size)]
    sum(loss(result, rank) for rank, result in enumerate(results)).backward()
    for rank, (result, gradient) in enumerate(run_local(size, main)):
        torch.testing.assert_close(result, results[rank].detach())
        # torch leaves none where nothing depends on it.
        expected = torch.zeros_like(gradient) if xs[rank].grad is None else xs[rank].grad
        torch.testing.assert_close(gradient, expected)


def test_a_contrastive_loss_beside_data_parallel_is_that_of_the_whole_batch() -> None:
    """Each rank compares its embeddings with those of all, as InfoNCE does."""
    size = 3
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6)).double()

    def info_nce(mine: torch.Tensor, every: torch.Tensor, first: int) -> torch.Tensor:
        target = torch.arange(first, first + len(mine))
        return nn.functional.cross_entropy(mine @ every.T, target)

    def main(comm):
        model = DataParallel(copy.deepcopy(network), comm, bucket_bytes=100)
        z = model(own(comm.rank, ROWS, 4))
        every = autograd.allgather(z, comm).flatten(0, 1)
        info_nce(z, every, ROWS * comm.rank).backward()
        return [p.grad for p in model.parameters()]

    z = network(torch.cat([own(rank, ROWS, 4) for rank in range(size)]))
    info_nce(z, z, 0).backward()
    for gradients in run_local(size, main):
        for found, parameter in zip(gradients, network.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-11, atol=1e-13)


class Summed(nn.Linear):
    """A layer whose rows lie on several ranks, as of tensor-parallel models."""

    def __init__(self, comm) -> None:
        super().__init__(2, 1, bias=False)
        self.comm = comm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return autograd.allreduce(super().forward(x), self.comm)


def test_a_module_with_a_communicator_is_copied_and_averaged() -> None:
    def main(comm):
        layer = Summed(comm)
        nn.init.constant_(layer.weight, comm.rank + 1.0)
        average = torch.optim.swa_utils.AveragedModel(layer)
        average.update_parameters(layer)
        assert average.module.comm is comm and average.module.weight is not layer.weight
        with pytest.raises(TypeError, match=r"Communicator\(rank . of 2.*no pickle: it belongs"):
            pickle.dumps(layer)
        engine = Pipeline([layer], Mesh(comm, data=2))
        with pytest.raises(TypeError, match=r"a Pipeline .* no copy .* take its state_dict\(\)"):
            copy.deepcopy(engine)
        return average(torch.ones(1, 2)).item()

    assert run_local(2, main) == [6.0, 6.0]


def test_a_rank_whose_input_needs_no_gradient_takes_part() -> None:
    def main(comm):
        x = own(comm.rank, ROWS).requires_grad_(comm.rank == 0)
        loss_of(autograd.allgather(x, comm), comm.rank).backward()
        return x.grad

    first, second = run_local(2, main)
    expected = sum(own(0, ROWS).cos() * own(100 + rank, 2, ROWS)[0] for rank in range(2))
    torch.testing.assert_close(first, expected)
    assert second is None


def test_what_has_no_gradient_or_no_row_per_rank_is_refused() -> None:
    def main(comm):
        for x in (torch.arange(3), np.ones(3)):
            with pytest.raises(TypeError, match="expected a torch tensor of floats, got"):
                autograd.allgather(x, comm)
        for call in (autograd.alltoall, autograd.reduce_scatter):
            with pytest.raises(ValueError, match=r"first axis of 2, .* got shape \(3, 2\)"):
                call(torch.ones(3, 2), comm)
        with pytest.raises(ValueError, match="'max': expected 'sum' or 'mean'"):
            autograd.allreduce(torch.ones(3), comm, op="max")
        comm.barrier()

    run_local(2, main)
