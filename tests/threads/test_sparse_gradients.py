"""Sparse gradients stay sparse, and are the same on all ranks."""

import pytest
import torch
from torch import nn

from ringfold import DataParallel, run_local


def test_sparse_gradients_stay_sparse():
    def main(comm):
        module = nn.Embedding(6, 2, sparse=True)
        model = DataParallel(module, comm)
        model(torch.tensor([comm.rank, 4, 4])).sum().backward()
        gradient = module.weight.grad
        return gradient.is_sparse, gradient.coalesce().indices().tolist(), gradient.to_dense()

    for is_sparse, rows, dense in run_local(2, main):
        assert is_sparse
        assert rows == [[0, 1, 4]]
        assert dense[:, 0].tolist() == [0.5, 0.5, 0, 0, 2, 0]


def rows_one(*indices, width=1):
    """An embedding's gradient by rows, for the sum over looked-up rows."""
    table = torch.zeros(4, width)
    for index in indices:
        table[index] += 1
    return table


class Rows(nn.Module):
    """An embedding that does not say that it is sparse; known after its first gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1))

    def forward(self, index):
        return nn.functional.embedding(index, self.weight, sparse=True)


@pytest.mark.parametrize("wire", [None, "bf16", "topk:1.0"])
@pytest.mark.parametrize("declared", [True, False])
def test_sparse_gradient_on_one_rank_is_sparse_on_all(wire, declared):
    """A rank without a row had a dense gradient, which SparseAdam refuses."""

    def main(comm):
        module = nn.Embedding(4, 1, sparse=True) if declared else Rows()
        model = DataParallel(module, comm, wire=wire)
        model(torch.tensor([0])).sum().backward()
        model.zero_grad()
        if comm.rank == 0:
            model(torch.tensor([1, 1, 3])).sum().backward()
        else:
            model.reduce_gradients()
        gradient = module.weight.grad
        torch.optim.SparseAdam(list(model.parameters())).step()
        return gradient.layout, gradient.to_dense()

    for layout, gradient in run_local(2, main):
        assert layout == torch.sparse_coo
        assert torch.equal(gradient, rows_one(1, 1, 3) / 2)


def test_sparse_gradient_of_one_expanded_row():
    """torch makes zeros of it: what is summed over one row is an expanded single element."""

    def main(comm):
        module = nn.Embedding(4, 1, sparse=True)
        model = DataParallel(module, comm)
        found = []
        for index in range(3):
            model.zero_grad(set_to_none=False)
            model(torch.tensor([index])).sum().backward()
            found.append(module.weight.grad.coalesce().to_dense() + 0)
        return found

    for found in run_local(2, main):
        for index, gradient in enumerate(found):
            assert torch.equal(gradient, rows_one(index))


def test_sparse_gradients_accumulate_and_are_weighted():
    def main(comm):
        module = nn.Embedding(4, 2, sparse=True)
        model = DataParallel(module, comm)
        with model.no_sync():
            model(torch.tensor([0, 0])).sum().backward()
        with model.weighted((1, 3)[comm.rank]):
            model(torch.tensor([comm.rank + 1])).sum().backward()
        return module.weight.grad.to_dense()

    expected = rows_one(0, 0, width=2) + rows_one(1, width=2) / 4 + rows_one(2, width=2) * 0.75
    for gradient in run_local(2, main):
        assert torch.equal(gradient, expected)
