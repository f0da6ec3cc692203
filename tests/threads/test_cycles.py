"""Memory of a step is given back when the step is over, not when the garbage collector runs."""

import gc

import pytest
import torch
from torch import nn

from ringfold import Communicator, Mesh, Pipeline, run_local


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
def test_a_step_leaves_nothing_to_the_garbage_collector(schedule: str, recompute: bool) -> None:
    """What lies in a cycle keeps its memory until the collector happens to run."""

    def main(comm: Communicator) -> list[str]:
        mesh = Mesh(comm, data=1, pipe=2)
        layers = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)))
        engine = Pipeline(
            layers,
            mesh,
            loss_fn=nn.functional.mse_loss,
            microbatches=4,
            schedule=schedule,
            recompute=recompute,
        )
        x, y = torch.randn(2, 8, 5)
        engine.step(x, y)
        comm.barrier()
        if comm.rank == 0:
            gc.collect()
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)
        comm.barrier()
        engine.step(x, y)
        comm.barrier()
        if comm.rank == 0:
            gc.collect()
            found = [type(one).__name__ for one in gc.garbage if isinstance(one, torch.Tensor)]
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        comm.barrier()
        return found if comm.rank == 0 else []

    assert run_local(2, main)[0] == []
