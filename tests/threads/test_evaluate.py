"""A pipeline tells a batch's loss without its outputs going anywhere."""

import pytest
import torch
from little_layers import Call, Times
from torch import nn

from ringfold import Mesh, Pipeline, StageError, run_local
from ringfold.parallel.plan import PLANS

WEIGHTS = torch.linspace(-1, 1, 98)


def network():
    layers = [
        nn.Linear(5, 7),
        nn.Tanh(),
        nn.Linear(7, 4),
        nn.LayerNorm(4),
        nn.GELU(),
        nn.Linear(4, 2),
    ]
    for layer in layers:
        for p in layer.parameters():
            p.data = WEIGHTS[: p.numel()].view_as(p).clone()
    return layers


def data():
    x = torch.arange(24 * 5.0).sin().view(24, 5)
    return x, x[:, :2].cos()


@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("num_pipe", "microbatches"), [(1, 1), (1, 5), (2, 5), (3, 4)])
def test_the_loss_is_that_of_the_outputs(schedule, reduction, num_pipe, microbatches):
    """Of micro-batches of unequal rows, and with no gradient left behind."""
    loss_fn = nn.MSELoss(reduction=reduction)

    def main(comm):
        engine = Pipeline(
            network(),
            Mesh(comm, pipe=num_pipe),
            loss_fn=loss_fn,
            loss_reduction=reduction,
            microbatches=microbatches,
            schedule=schedule,
        )
        x, y = data()
        first, last = comm.rank == 0, comm.rank == num_pipe - 1
        loss = engine.evaluate(x if first else None, y if last else None)
        assert loss.dtype == torch.float64 and not loss.requires_grad
        assert all(p.grad is None for p in engine.parameters())
        assert loss.item() == pytest.approx(loss_fn(engine.forward(x), y).item(), rel=1e-6)
        return loss.item(), engine.step(x, y).item()

    found = run_local(num_pipe, main)
    assert len(set(found)) == 1 and found[0][0] == pytest.approx(found[0][1], rel=1e-6)


def test_replicas_evaluate_apart_and_outputs_may_be_what_the_loss_takes():
    def main(comm):
        mesh = Mesh(comm, data=2, pipe=2)
        spread = Call(lambda x: torch.distributions.Normal(x, 1.0))
        engine = Pipeline(
            [Times(2), Times(3), spread],
            mesh,
            loss_fn=lambda found, y: (found.mean - y).sum(),
            loss_reduction="sum",
        )
        one = torch.tensor([1.0 + mesh.data.rank])
        return engine.evaluate(one, one).item() if mesh.data.rank == 1 else None

    assert run_local(4, main) == [None, None, 10.0, 10.0]


def test_what_does_not_fit_is_told_on_every_rank_and_the_engine_goes_on():
    def main(comm):
        def loss_fn(output, target):
            if output.isinf().any():
                raise RuntimeError("too much")
            return output.mean() if target is None else output

        engine = Pipeline([Times(2), Times(3)], Mesh(comm, pipe=2), loss_fn=loss_fn, microbatches=1)
        with pytest.raises(
            ValueError, match=r"x has 2 rows on the first stage, y has 3 on the last"
        ):
            engine.evaluate(torch.ones(2), torch.ones(3))
        with pytest.raises(
            ValueError, match=r"x: expected at least one row|on the first stage: Val"
        ):
            engine.evaluate(torch.ones(0))
        with pytest.raises((TypeError, ValueError), match=r"y: expected|on the last stage: Val"):
            engine.evaluate(torch.ones(2), torch.ones(()))
        for wrong in (torch.tensor([1.0, torch.inf]), torch.ones(4)):
            with pytest.raises(StageError, match=r"too much|a tensor of one element"):
                engine.evaluate(wrong, torch.ones(len(wrong)) if wrong.isfinite().all() else None)
        return engine.evaluate(torch.ones(2)).item()

    assert run_local(2, main) == [6.0, 6.0]


def test_without_a_loss_there_is_none():
    def main(comm):
        engine = Pipeline([Times(2), Times(3)], Mesh(comm, pipe=2))
        with pytest.raises(
            ValueError, match="without loss_fn on its last stage cannot tell a loss"
        ):
            engine.evaluate(torch.ones(2))
        return engine.forward(torch.ones(1)).item()

    assert run_local(2, main) == [6.0, 6.0]
