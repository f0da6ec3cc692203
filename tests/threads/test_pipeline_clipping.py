"""The norm of gradients over all stages, and clipping by it."""

import pytest
import torch
from little_layers import Times, mean_output, sum_output
from torch import nn

from ringfold import Mesh, Pipeline, run_local


@pytest.mark.parametrize("num_data", [1, 2])
@pytest.mark.parametrize(
    ("norm_type", "limit", "norm", "after"),
    [
        (2.0, 1.0, 5.0, (0.6, 0.8)),
        (float("inf"), 1.0, 4.0, (0.75, 1.0)),
        (2.0, 100.0, 5.0, (3.0, 4.0)),
        (1.0, 3.5, 7.0, (1.5, 2.0)),
    ],
)
def test_pr26_clipping_by_the_norm_over_all_stages(num_data, norm_type, limit, norm, after):
    """Each stage scaled by its own norm, so the update was not the unsplit model's."""

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=2)
        engine = Pipeline([Times(1), Times(1)], mesh, loss_fn=mean_output)
        (parameter,) = engine.parameters()
        parameter.grad = torch.tensor(3.0 + engine.stage)
        found = engine.clip_grad_norm_(limit, norm_type)
        return found.item(), parameter.grad.item()

    for rank, (found, gradient) in enumerate(run_local(2 * num_data, main)):
        assert found == norm
        exact = limit == 100
        assert gradient == (after[rank % 2] if exact else pytest.approx(after[rank % 2], rel=1e-6))


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("rows", [[[1, 4, 4, 2]], [[3], [3]], [[3]]])
def test_clipping_takes_sparse_gradients(rows, norm_type):
    """One rank raised, and the others waited for it."""

    def stages(sparse):
        generator = torch.Generator().manual_seed(2)
        made = [nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)]
        for parameter in nn.ModuleList(made).parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return made

    x = torch.tensor(rows)
    whole = nn.Sequential(*stages(sparse=False))
    whole(x).sum().backward()
    norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.5, norm_type)

    def main(comm):
        engine = Pipeline(
            stages(sparse=True),
            Mesh(comm, pipe=2),
            loss_fn=sum_output,
            loss_reduction="sum",
            microbatches=2,
        )
        engine.step(x)
        assert engine.clip_grad_norm_(0.5, norm_type).item() == pytest.approx(norm.item())
        for name, parameter in engine.named_parameters():
            gradient = parameter.grad
            assert gradient.is_sparse == (name == "0.weight")
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            torch.testing.assert_close(dense, whole.get_parameter(name).grad)

    run_local(2, main)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_shows_a_nan_on_every_rank(norm_type):
    def main(comm):
        engine = Pipeline([Times(1), Times(1)], Mesh(comm, pipe=2), loss_fn=mean_output)
        (parameter,) = engine.parameters()
        parameter.grad = torch.tensor(float("nan") if comm.rank == 0 else 4.0)
        return engine.clip_grad_norm_(1.0, norm_type).isnan().item()

    assert run_local(2, main) == [True, True]


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_where_a_gradient_has_no_elements(norm_type):
    """One stage raised, as nothing has no greatest element, and left the other in the allreduce.

    Such is a parameter of 0 elements, and a sparse gradient where all tokens are padding.
    """

    def main(comm):
        padded = nn.Embedding(5, 3, padding_idx=0, sparse=True)
        ends = nn.Linear(3, 2)
        ends.register_parameter("none", nn.Parameter(torch.zeros(0)))
        engine = Pipeline([padded, ends], Mesh(comm, pipe=2), loss_fn=sum_output, microbatches=1)
        engine.step(torch.zeros(4, dtype=torch.long))
        own = dict(engine.named_parameters())
        if comm.rank == 1:
            own["1.none"].grad = torch.zeros(0)
            own["1.weight"].grad.zero_()
            own["1.bias"].grad.copy_(torch.tensor([0.0, 4.0]))
        else:
            assert own["0.weight"].grad._nnz() == 0
        return engine.clip_grad_norm_(1.0, norm_type).item()

    assert run_local(2, main) == [4.0, 4.0]


@pytest.mark.parametrize("norm_type", [2.0, 64.0, 5e-4])
def test_a_norm_beyond_a_float_is_infinite_on_every_rank(norm_type):
    """Python raises where a power overflows: on the stage whose norm is that great, alone."""
    great = 1e200 if norm_type == 2 else 1e5

    def main(comm):
        engine = Pipeline([Times(1), Times(1)], Mesh(comm, pipe=2), loss_fn=mean_output)
        (parameter,) = engine.parameters()
        parameter.data = parameter.data.double()
        parameter.grad = torch.tensor(1.0 if comm.rank else great, dtype=torch.float64)
        norm = engine.clip_grad_norm_(1.0, norm_type).item()
        return norm, parameter.grad.item()

    assert run_local(2, main) == [(float("inf"), 0.0)] * 2
