"""torch's default device, as a program sets it to a GPU, does not decide where results lie."""

import ast
import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._device import _device_constructors

from ringfold import (
    Checkpoints,
    DataParallel,
    Mesh,
    Pipeline,
    RandomStreams,
    ShardedOptimizer,
    StageError,
    load,
    run_local,
)
from ringfold.parallel import autograd, convert_sync_batchnorm

ROOT = Path(__file__).parents[2]


def elsewhere():
    """Let it be "meta", which stands for a GPU: a mode of the thread that is in it."""
    return torch.device("meta")


def collectives(comm, rows):
    return [
        comm.allgather(rows),
        comm.reduce_scatter(rows),
        comm.alltoall(rows),
        comm.scatter(rows if comm.rank == 1 else None, root=1),
        comm.gather(rows) if comm.rank else comm.gather(rows)[0],
        autograd.allgather(rows, comm),
        comm.empty(2, torch.float32).zero_(),
    ]


NETWORK = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))


def network():
    return copy.deepcopy(NETWORK)


def square(output, target):
    return (output - target).square().mean()


def data_parallel(comm, rows):
    model = DataParallel(convert_sync_batchnorm(network(), comm), comm, wire="powersgd:1")
    parameters = model.named_parameters()
    optimizer = ShardedOptimizer(parameters, comm, torch.optim.SGD, lr=0.1, momentum=0.9)
    for _ in range(3):
        square(model(rows), rows).backward(rows.new_ones(()))
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    return [*model.parameters(), *(value["momentum_buffer"] for value in state.values())]


def pipeline(reduction):
    def run(comm, rows):
        mesh = Mesh(comm, pipe=comm.size) if reduction == "bucket" else Mesh(comm, data=comm.size)
        layers, rows = network(), rows.repeat(4, 1)
        layers[2].weight = layers[0].weight
        options = {"microbatches": comm.size, "reduction": reduction, "recompute": True}
        engine = Pipeline(layers, mesh, loss_fn=square, **options)
        losses = [engine.step(rows, rows), engine.clip_grad_norm_(0.1)]
        with pytest.raises(StageError):
            engine.step(rows[:, 1:], rows)
        return [*losses, *engine.parameters(), engine.forward(rows)]

    return run


def checkpoint(folder):
    def run(comm, rows):
        state = {"model": network(), "none": rows.new_ones(0, 3), "random": RandomStreams()}
        path = f"{folder}-{torch.get_default_device()}"
        with Checkpoints(path, comm) as kept:
            kept.save(state, 1)
        load(path, state, comm)
        return [*state["model"].parameters(), state["none"]]

    return run


@pytest.mark.parametrize(
    "name", ["collectives", "data parallel", "pipeline", "pipeline in a tree", "checkpoint"]
)
def test_no_default_device_decides_where_results_lie(name, tmp_path):
    """Results for tensors on the host were made on the default device: refused, or left there."""
    run = {
        "collectives": collectives,
        "data parallel": data_parallel,
        "pipeline": pipeline("bucket"),
        "pipeline in a tree": pipeline("tree"),
        "checkpoint": checkpoint(tmp_path / "kept"),
    }[name]

    def main(comm):
        found = []
        for device in (nullcontext(), elsewhere()):
            rows = (torch.arange(6.0 * comm.size).view(comm.size, 6) + comm.rank).sin()
            with device:
                made = run(comm, rows)
            found.append([x.detach() for x in made if x is not None])
        return found

    # In a tree, three replicas have no pairs: their parts are gathered.
    for plain, other in run_local(3, main):
        assert [x.device.type for x in other] == ["cpu"] * len(plain)
        assert all(map(torch.equal, plain, other))


def test_every_tensor_that_is_made_names_its_device():
    """One that does not lies on the program's default device."""
    names = {constructor.__name__ for constructor in _device_constructors()}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for folder in ("comm", "parallel")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in names
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    assert found == []
