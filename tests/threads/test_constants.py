"""Buffers that layers of several ranks share, which nothing changes."""

import gc
import weakref

import pytest
import torch
from torch import nn

from ringfold import Mesh, Pipeline, StageError, run_local


class Angles(nn.Module):
    """Rotate by a table, as blocks of one network do; `writes` is what must not be."""

    def __init__(self, seed, writes=False):
        super().__init__()
        table = torch.randn(4, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("kept", torch.ones(1).expand(4), persistent=False)
        self.writes = writes

    def forward(self, x):
        if self.writes:
            self.table.mul_(2)
        return x * self.table.clone() * self.kept


class Block(nn.Module):
    def __init__(self, value, angles):
        super().__init__()
        self.weight, self.angles = nn.Parameter(torch.full((4,), value)), angles

    def forward(self, x):
        return self.angles(torch.tanh(x * self.weight))


def blocks(seed, writes=False):
    angles = Angles(seed, writes)
    listed = nn.Identity()
    listed.register_buffer("same", angles.table, persistent=False)
    return [Block(1.5, angles), Block(-0.5, angles), listed, Block(0.25, angles)]


def square(output, _):
    return output.square().mean()


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2)])
def test_ranks_share_a_table(grid, schedule):
    """It was refused, though each rank can have one of its own."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    module = nn.Sequential(*blocks(seed=0))
    square(module(x), None).backward()

    def main(comm):
        mesh = Mesh(comm, data=grid[0], pipe=grid[1])
        layers = blocks(seed=comm.rank)
        if mesh.data.size > 1:  # replicas write to theirs
            layers[0].angles.kept = torch.ones(4)
        engine = Pipeline(layers, mesh, loss_fn=square, microbatches=2, schedule=schedule)
        share = 8 // grid[0]
        mine = x[mesh.data.rank * share : (mesh.data.rank + 1) * share]
        engine.step(mine, mine)
        torch.testing.assert_close(engine.forward(x), module(x).detach())
        return {name: p.grad for name, p in engine.named_parameters()}

    found = [part for own in run_local(grid[0] * grid[1], main) for part in own.items()]
    assert {name for name, _ in found} == {"0.weight", "1.weight", "3.weight"}
    for name, gradient in found:
        torch.testing.assert_close(gradient, module.get_parameter(name).grad)


def test_a_rank_lets_go_of_the_layers_of_others():
    """Layers with a buffer in common were kept by all."""

    def main(comm):
        mask, layers = torch.ones(4), [nn.Linear(4, 4) for _ in range(4)]
        for layer in layers:
            layer.register_buffer("mask", mask, persistent=False)
        layers[3].weight = layers[0].weight
        seen = [weakref.ref(layer) for layer in layers]
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=square, microbatches=2)
        del layers, layer
        gc.collect()
        engine.step(torch.ones(4, 4))
        return [found() is not None for found in seen]

    # Of the last, a copy has taken the place.
    assert run_local(2, main) == [[True, True, False, False], [False, False, True, False]]


def test_a_layer_that_writes_to_a_shared_table_fails_on_every_rank():
    """Its rank alone would go on with other numbers."""
    message = (
        "rank 0 of 2: stage 0 failed in the forward of micro-batch 0: RuntimeError: a layer has "
        "written to 0.angles.table of stage 0, which is 1.angles.table of stage 1 as well"
    )

    def main(comm):
        engine = Pipeline(blocks(0, writes=True), Mesh(comm, pipe=2), loss_fn=square)
        x = torch.ones(4, 4)
        for run in (lambda: engine.step(x, x), lambda: engine.forward(x)):
            with pytest.raises(StageError, match=message):
                run()

    run_local(2, main)


class Shifted(nn.Module):
    """Add a table, which autograd need not keep."""

    def __init__(self, value, table):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), value))
        self.register_buffer("table", table, persistent=False)

    def forward(self, x):
        return torch.tanh(x * self.weight) + self.table


def test_a_table_made_in_inference_mode():
    """It has no version to watch, and could not be made equal."""
    x = torch.ones(4, 4)

    def main(comm):
        with torch.inference_mode():
            table = torch.arange(4.0) + comm.rank
        layers = [Shifted(1.5, table), Shifted(-0.5, table)]
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=square)
        return engine.step(x, x).item(), table.tolist()

    expected = nn.Sequential(*(Shifted(value, torch.arange(4.0)) for value in (1.5, -0.5)))
    loss = square(expected(x), None).item()
    assert run_local(2, main) == [(pytest.approx(loss), [0.0, 1.0, 2.0, 3.0])] * 2


@pytest.mark.parametrize("pipe", [1, 2])
def test_a_table_of_one_rank_may_change(pipe):
    def main(comm):
        angles = Angles(comm.rank, writes=True)
        layers = [Block(1.5, angles), Block(-0.5, angles), Block(0.25, Angles(0))]
        mesh = Mesh(comm, pipe=pipe)
        engine = Pipeline(
            layers, mesh, loss_fn=square, microbatches=1, boundaries=[2] if pipe == 2 else []
        )
        before = angles.table.clone()
        engine.step(torch.ones(2, 4), torch.ones(2, 4))
        return (angles.table / before).tolist()

    assert run_local(pipe, main) == [[4.0] * 4, [1.0] * 4][:pipe]


def test_a_shared_buffer_of_the_state_is_refused():
    def main(comm):
        angles = Angles(0)
        angles._non_persistent_buffers_set.discard("table")
        layers = [Block(1.5, angles), Block(-0.5, angles)]
        with pytest.raises(ValueError, match="register it with persistent=False if nothing"):
            Pipeline(layers, Mesh(comm, pipe=2), loss_fn=square, device="meta")
        return layers[0].weight.device.type

    assert run_local(2, main) == ["cpu", "cpu"]
