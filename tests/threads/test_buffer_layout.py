"""Buffers that layers replace as they run: ranks agree on their shapes before any is sent."""

import pytest
import torch
from torch import nn

from ringfold import DataParallel, Mesh, Pipeline, run_local


class Rotary(nn.Module):
    """Keep a table that grows with the longest sequence, as those of rotary positions do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(2), persistent=False)
        self.register_buffer("rest", torch.arange(3.0))

    def forward(self, x):
        if len(x) > len(self.table):
            self.table = torch.arange(float(len(x)))
        return self.linear(x) * self.table[: len(x), None]


def told(of, name, shapes):
    found = "; ".join(f"{name} ({n},) float32 on rank {rank}" for rank, n in enumerate(shapes))
    return (
        f"{of}, which one rank sends to all unless broadcast_buffers=False, differ between ranks, "
        f"first at entry 0: {found}"
    )


@pytest.mark.parametrize("wire", [None, "bf16", "topk:0.5", "powersgd:1"])
def test_a_buffer_of_another_shape_on_one_rank_is_named_on_all(wire):
    """The ranks' calls differed, it said: neither which buffer, nor how to leave it alone."""

    def main(comm):
        model = DataParallel(Rotary(), comm, wire=wire)
        found = []
        # As long everywhere, longer on rank 1 alone, as long again, and no longer than before.
        for lengths in ([3, 3], [3, 5], [3, 4], [7, 7], [1, 2]):
            model.zero_grad()
            try:
                model(torch.ones(lengths[comm.rank], 4)).sum().backward()
                found.append(None)
            except ValueError as error:
                found.append(str(error))
            comm.allreduce(grad := model.module.linear.bias.grad.clone())
            torch.testing.assert_close(grad, 2 * model.module.linear.bias.grad)
        return found

    expected = told("buffers of the module", "table", (3, 5))
    assert run_local(2, main) == [[None, expected, expected, None, None]] * 2


def test_without_broadcast_buffers_each_rank_has_its_own():
    def main(comm):
        model = DataParallel(Rotary(), comm, broadcast_buffers=False)
        model(torch.ones(3 + comm.rank, 4)).sum().backward()
        return len(model.module.table)

    assert run_local(2, main) == [3, 4]


def test_shapes_that_add_up_to_the_same_size_are_not_mixed_up():
    """What rank 0 has in one buffer was in the other on rank 1, without a word."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)
            self.a, self.b = nn.Buffer(torch.zeros(4)), nn.Buffer(torch.zeros(4))

        def forward(self, x, first):
            self.a, self.b = torch.full((first,), 1.0), torch.full((8 - first,), 2.0)
            return self.linear(x)

    def main(comm):
        model = DataParallel(Two(), comm)
        with pytest.raises(ValueError, match=r"a \(3,\) float32 on rank 0; a \(5,\) float32 on r"):
            model(torch.ones(1, 1), 3 + 2 * comm.rank).sum().backward()
        return [set(buffer.tolist()) for buffer in model.buffers()]

    assert run_local(2, main) == [[{1.0}, {2.0}]] * 2


def test_ranks_that_disagree_on_sending_buffers_are_refused():
    """The rank that sends waited for one that does not."""

    def main(comm):
        with pytest.raises(ValueError, match=r"broadcast_buffers True on rank 0; .* False on rank"):
            DataParallel(Rotary(), comm, broadcast_buffers=comm.rank == 0)

    run_local(2, main)


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
def test_replicas_of_a_stage_whose_buffers_differ_are_told_of_on_all_stages(reduction):
    """Ranks of that stage had calls that differ, and the others waited for them."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Rotary()

        def forward(self, x):
            return self.inner(x[0])[None]

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=2)
        layers = [nn.Linear(4, 4), Turned()]
        options = {"microbatches": 2, "reduction": reduction}
        engine = Pipeline(layers, mesh, loss_fn=lambda y, _: y.square().mean(), **options)
        found = []
        for lengths in ([3, 3], [4, 6], [7, 7]):
            engine.zero_grad()
            try:
                engine.step(torch.ones(1, lengths[mesh.data.rank], 4))
                found.append(None)
            except ValueError as error:
                found.append(str(error))
        return found

    expected = told("replicas' buffers of stage 1", "1.inner.table", (4, 6))
    assert run_local(4, main) == [[None, expected, None]] * 4
