"""With reduction="tree" training is the same to the last bit however it is split."""

import threading

import pytest
import torch
from torch import nn

from ringfold import Dropout, Mesh, Pipeline, run_local
from ringfold.parallel.plan import PLANS

LOCK = threading.Lock()  # torch's seed is one for all threads


def network():
    with LOCK, torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(5, 9), Dropout(0.3, seed=5), nn.GELU(), nn.Linear(9, 9), Dropout(0.3, seed=5),
            nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 3),
        )  # fmt: skip


def train(num_data, num_pipe, schedule="1f1b", microbatches=8, rows=24, steps=3, **options):
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(rows, 5, generator=generator), torch.randn(rows, 3, generator=generator)
    dtype = options.pop("dtype", torch.float32)
    x, y = x.to(dtype), y.to(dtype)

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=num_pipe)
        engine = Pipeline(
            network().to(dtype),
            mesh,
            loss_fn=nn.functional.mse_loss,
            microbatches=microbatches,
            schedule=schedule,
            **{"reduction": "tree", **options},
        )
        optimizer = torch.optim.AdamW(engine.parameters(), lr=0.01, eps=1e-4)  # not 0 in float16
        index, size = mesh.data.rank, mesh.data.size
        mine = slice(index * rows // size, (index + 1) * rows // size)
        losses = []
        for _ in range(steps):
            engine.zero_grad()
            losses.append(engine.step(x[mine], y[mine]).item())
            optimizer.step()
        return losses, engine.state_dict()

    results = run_local(num_data * num_pipe, main)
    assert all(losses == results[0][0] for losses, _ in results)
    for rank, (_, state) in enumerate(results):
        for name, value in state.items():
            assert torch.equal(value, results[rank % num_pipe][1][name])
    return results[0][0], {k: v for _, state in results for k, v in state.items()}


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert [k for k, v in expected[1].items() if not torch.equal(found[1][k], v)] == []


@pytest.mark.parametrize("schedule", PLANS)
def test_same_bits_on_every_grid_with_every_plan(schedule):
    alone = train(1, 1)
    for grid in [(2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (2, 2), (2, 3)]:
        assert_same(train(*grid, schedule), alone)


@pytest.mark.parametrize(("microbatches", "rows"), [(6, 24), (6, 6), (12, 12), (8, 6)])
def test_same_bits_where_replicas_are_no_nodes_of_the_tree(microbatches, rows):
    sizes = {"microbatches": microbatches, "rows": rows}
    alone = train(1, 1, **sizes)
    for grid in [(2, 1), (3, 1), (6, 1), (3, 2)]:
        assert_same(train(*grid, **sizes), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_bits_with_parameters_of_half_width(dtype):
    """Halves were rounded at every node of the tree within a rank, and once between 4 ranks.

    The allreduce between a power of two of replicas adds them in float32, and so does all else now.
    """
    alone = train(1, 1, steps=2, dtype=dtype)
    for grid in [(2, 1), (4, 1), (2, 2)]:
        assert_same(train(*grid, steps=2, dtype=dtype), alone)
    # And where no pairs of ranks meet, with an allgather in place of the allreduce.
    alone = train(1, 1, microbatches=6, steps=1, dtype=dtype)
    assert_same(train(3, 1, microbatches=6, steps=1, dtype=dtype), alone)


def test_another_number_of_microbatches_is_another_sum():
    """Were the bits equal here too, the tests above would show nothing."""
    assert train(1, 1, microbatches=8)[0] != train(1, 1, microbatches=3)[0]


def test_without_the_tree_dropout_is_the_same_and_sums_are_close():
    alone = train(1, 1)
    for grid in [(1, 2), (2, 2), (3, 1)]:
        losses, state = train(*grid, reduction="bucket", microbatches=4)
        torch.testing.assert_close(losses, alone[0], rtol=1e-5, atol=0)
        for name, value in alone[1].items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pipe", [1, 2])
def test_dropout_of_an_evaluation_in_training_mode(pipe):
    """It did not know its samples, or took those of the last micro-batch of a step."""

    def main(comm, microbatches):
        engine = Pipeline(
            [nn.Identity(), Dropout(0.5, seed=3)],
            Mesh(comm, pipe=comm.size),
            microbatches=microbatches,
        )
        first = engine.forward(torch.ones(6, 50))
        engine.steps_taken = 1
        return first, engine.forward(torch.ones(6, 50))

    ((first, second),) = run_local(1, lambda comm: main(comm, 1))
    assert not torch.equal(first, second) and {0.0, 2.0} == {*first.unique().tolist()}
    for found in run_local(pipe, lambda comm: main(comm, 4)):
        assert torch.equal(found[0], first) and torch.equal(found[1], second)


class Sometimes(nn.Module):
    """A parameter that the first micro-batch alone uses, and one that none does."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.none = (nn.Parameter(torch.tensor(2.0)) for _ in range(3))

    def forward(self, x):
        return x * self.w * (self.v if x[0] == 1 else 1.0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_add_to_what_is_there_and_may_be_missing(size):
    def main(comm):
        engine = Pipeline(
            [Sometimes()], Mesh(comm), loss_fn=lambda out, _: out.sum(), loss_reduction="sum",
            microbatches=4, reduction="tree",
        )  # fmt: skip
        x = torch.arange(1.0, 5.0)
        share = 4 // size
        for _ in range(2):
            loss = engine.step(x[comm.rank * share : (comm.rank + 1) * share])
        grads = [None if p.grad is None else p.grad.item() for p in engine.parameters()]
        return loss.item(), grads

    assert run_local(size, main) == [(22.0, [22.0, 4.0, None])] * size


def test_unfit_settings_and_batches_are_refused_on_every_rank():
    def main(comm):
        mesh = Mesh(comm)
        options = {"loss_fn": nn.functional.mse_loss, "microbatches": 4}
        with pytest.raises(ValueError, match="unknown reduction 'trie'"):
            Pipeline(network(), mesh, reduction="trie", **options)
        with pytest.raises(ValueError, match="as they are, not as bf16"):
            Pipeline(network(), mesh, reduction="tree", wire_dtype="bf16", **options)
        engine = Pipeline(network(), mesh, reduction="tree", **options)
        x = torch.ones(3 + comm.rank * 2, 5)
        with pytest.raises(ValueError, match=r"replicas of \[3, 5\] rows: replica 1 begins at"):
            engine.step(x, x[:, :3])
        return True

    assert run_local(2, main) == [True, True]
