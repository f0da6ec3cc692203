"""A step that is given up leaves nothing behind in what a model carries beside its weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ringfold import Communicator, DataParallel, Mesh, Pipeline, run_local
from ringfold.workloads.engines import Kept


def layers() -> list[nn.Module]:
    torch.manual_seed(3)
    return [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)]


def batch(comm: Communicator, step: int) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(10 * step + comm.rank))
    return x, y[:, :2]


def replicas(comm: Communicator) -> tuple[Any, Callable[[int], object]]:
    model = DataParallel(nn.Sequential(*layers()), comm)

    def step(number: int) -> None:
        x, y = batch(comm, number)
        nn.functional.mse_loss(model(x), y).backward()

    return model, step


def stages(comm: Communicator) -> tuple[Any, Callable[[int], object]]:
    mesh = Mesh(comm, data=1, pipe=comm.size)
    loss = nn.functional.mse_loss
    pipeline = Pipeline(layers(), mesh, loss_fn=loss, microbatches=2)
    return pipeline, lambda number: pipeline.step(*batch(comm, number))


@pytest.mark.parametrize("engine", [replicas, stages])
def test_running_statistics_go_back_to_the_last_step_that_counted(engine) -> None:
    def main(comm: Communicator) -> None:
        model, step = engine(comm)
        step(0)
        wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kept = Kept.of(model)
        step(1)
        changed = [n for n, t in model.state_dict().items() if not torch.equal(t, wanted[n])]
        assert changed == [n for n in wanted if "running" in n or "num_batches" in n]
        kept.bring_back(model)
        assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())

    run_local(2, main)
