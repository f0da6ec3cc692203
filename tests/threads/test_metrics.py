"""Metrics are sums over micro-batches, stages and replicas, the same on every rank."""

import pytest
import torch
from torch import nn

from ringfold import Mesh, Pipeline, run_local
from ringfold.parallel import Metrics


@pytest.mark.parametrize(("num_data", "num_pipe"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_what_the_last_stages_see_is_known_on_every_rank(num_data, num_pipe):
    """Unequal replicas and micro-batches: a mean of means would count rows unequally."""
    rows = [7, 4, 0][:num_data]

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=num_pipe)
        metrics = Metrics(mesh.comm)

        def loss_fn(output, target):
            metrics.add(right=(output > target).sum(), rows=len(target))
            return output.mean()

        layers = [nn.Linear(1, 1), nn.Identity(), nn.Identity()]
        nn.init.ones_(layers[0].weight)
        nn.init.zeros_(layers[0].bias)
        engine = Pipeline(layers, mesh, loss_fn=loss_fn, microbatches=3)
        found = []
        for threshold in (2.5, 0.0):
            x = torch.arange(1.0, rows[mesh.data.rank] + 1)[:, None]
            engine.step(x, torch.full_like(x, threshold))
            found.append(metrics.total())
        return found, metrics.total()

    right = sum(max(count - 2, 0) for count in rows)
    expected = [{"right": right, "rows": sum(rows)}, {"right": sum(rows), "rows": sum(rows)}]
    assert run_local(num_data * num_pipe, main) == [(expected, {})] * (num_data * num_pipe)


def test_names_on_some_ranks_only_and_what_is_no_number():
    def main(comm):
        metrics = Metrics(comm)
        if comm.rank == 1:
            metrics.add(b=0.25)
            metrics.add(b=torch.tensor([0.5]), a=1)
        with pytest.raises(ValueError, match=r"metric many: expected one element, got shape \(2,"):
            metrics.add(many=torch.ones(2))
        return list(metrics.total().items())

    assert run_local(3, main) == [[("a", 1.0), ("b", 0.75)]] * 3
