"""What the public classes say to arguments of another type, and to numbers that none can take."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import nn
from torch.optim import SGD

import ringfold
from ringfold import parallel

Make = Callable[[Any], object]


def layer() -> nn.Linear:
    return nn.Linear(2, 2)


def named() -> list[tuple[str, nn.Parameter]]:
    return list(layer().named_parameters())


OF_A_COMM: list[Make] = [
    lambda x: ringfold.DataParallel(layer(), x),
    lambda x: ringfold.Mesh(x),
    lambda x: ringfold.ShardedOptimizer(named(), x),
    lambda x: ringfold.LossScaler(x),
    lambda x: ringfold.Checkpoints("no/such", x),
    lambda x: ringfold.load("no/such", {}, x),
    lambda x: ringfold.save("no/such", {}, x),
    lambda x: ringfold.trace(x).__enter__(),
    lambda x: parallel.Metrics(x),
    lambda x: parallel.SyncBatchNorm(2, x),
    lambda x: parallel.convert_sync_batchnorm(layer(), x),
    lambda x: parallel.broadcast_object(1, x),
    lambda x: parallel.allgather_objects(1, x),
    lambda x: parallel.gather_objects(1, x),
    lambda x: parallel.scatter_objects([1], x),
    lambda x: parallel.send_object(1, 0, x),
    lambda x: parallel.recv_object(0, x),
    lambda x: parallel.broadcast_optimizer(SGD(layer().parameters(), lr=1), x),
    lambda x: parallel.check_replicas(x, named()),
]

OTHERS: list[tuple[str, Make]] = [
    ("module", lambda comm: ringfold.DataParallel(3, comm)),  # type: ignore[arg-type]
    ("module", lambda comm: parallel.convert_sync_batchnorm("x", comm)),  # type: ignore[arg-type]
    ("bucket_bytes", lambda comm: ringfold.DataParallel(layer(), comm, bucket_bytes=1.5)),  # type: ignore[arg-type]
    ("bucket_bytes", lambda comm: ringfold.ShardedOptimizer(named(), comm, bucket_bytes="x")),  # type: ignore[arg-type]
    ("root", lambda comm: ringfold.DataParallel(layer(), comm, root="0")),  # type: ignore[arg-type]
    ("loss_scaler", lambda comm: ringfold.DataParallel(layer(), comm, loss_scaler=3)),  # type: ignore[arg-type]
    ("optimizer", lambda comm: ringfold.ShardedOptimizer(named(), comm, "Adam")),  # type: ignore[arg-type]
    ("named", lambda comm: ringfold.ShardedOptimizer(3, comm)),  # type: ignore[arg-type]
    ("data", lambda comm: ringfold.Mesh(comm, data="1")),  # type: ignore[arg-type]
    ("pipe", lambda comm: ringfold.Mesh(comm, pipe=1.0)),  # type: ignore[arg-type]
    ("factor", lambda comm: ringfold.LossScaler(comm, "big")),  # type: ignore[arg-type]
    ("interval", lambda comm: ringfold.LossScaler(comm, interval=1.5)),  # type: ignore[arg-type]
    ("keep", lambda comm: ringfold.Checkpoints("no/such", comm, keep=1.5)),  # type: ignore[arg-type]
    ("patience", lambda comm: ringfold.Checkpoints("no/such", comm, patience="x")),  # type: ignore[arg-type]
    ("rank", lambda comm: parallel.ShardSampler(8, comm, 1)),
    ("rank", lambda comm: parallel.PowerSGD(1.5)),  # type: ignore[arg-type]
    ("ratio", lambda comm: parallel.TopK("half")),  # type: ignore[arg-type]
    ("p", lambda comm: ringfold.Dropout("half")),  # type: ignore[arg-type]
    ("size", lambda comm: ringfold.run_local("2", len)),  # type: ignore[arg-type]
    ("main", lambda comm: ringfold.run_local(1, 3)),  # type: ignore[arg-type]
    ("settings", lambda comm: ringfold.run_local(1, id, settings=3)),  # type: ignore[arg-type]
    ("settings", lambda comm: ringfold.Communicator(settings=3)),  # type: ignore[arg-type]
    ("settings", lambda comm: ringfold.Elastic(settings=3)),  # type: ignore[arg-type]
    ("attempts", lambda comm: ringfold.Elastic(attempts=1.5)),  # type: ignore[arg-type]
    ("command", lambda comm: ringfold.Elastic(command="python train.py")),
    ("command", lambda comm: ringfold.Elastic(command=["python", 3])),  # type: ignore[list-item]
    ("command", lambda comm: ringfold.Elastic(command=[])),
]

OF_A_PIPELINE = {
    "layers": 3,
    "microbatches": 1.5,
    "schedule": 3,
    "stages_per_rank": "2",
    "boundaries": 3,
    "bucket_bytes": "auto",
    "recompute": 3,
    "loss_fn": 3,
    "loss_scaler": 3,
}


def alone(make: Make) -> object:
    return ringfold.run_local(1, make)[0]


@pytest.mark.parametrize("make", OF_A_COMM)
@pytest.mark.parametrize("other", ["None", "a Mesh"])
def test_a_comm_is_asked_for_by_name(make: Make, other: str) -> None:
    """None, or a Mesh, was told as an attribute that it lacks; some took it until later."""
    told = rf"^comm: expected a Communicator, such as ringfold.Communicator\(\), got {other}"
    with pytest.raises(TypeError, match=told):
        alone(lambda comm: make(None if other == "None" else ringfold.Mesh(comm)))


@pytest.mark.parametrize("name, make", OTHERS)
def test_arguments_of_another_type_are_named(name: str, make: Make) -> None:
    """There was "'<' not supported between instances of 'str' and 'int'", or no word at all."""
    with pytest.raises(TypeError, match=f"^{name}: expected .*, got "):
        alone(make)


@pytest.mark.parametrize("name", OF_A_PIPELINE)
def test_arguments_of_a_pipeline_are_named(name: str) -> None:
    given: dict[str, Any] = {"layers": [layer()], name: OF_A_PIPELINE[name]}
    with pytest.raises(TypeError, match=f"^{name}: expected .*, got "):
        alone(lambda comm: ringfold.Pipeline(mesh=ringfold.Mesh(comm), **given))


def test_patience_is_a_time() -> None:
    """-1 was taken, and every checkpoint given up at once."""
    for patience in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"^patience must be above 0 s, got "):
            alone(lambda comm, p=patience: ringfold.Checkpoints("no/such", comm, patience=p))


@pytest.mark.parametrize("dtype", [object, "U3", "M8[s]", ">f4" if np.little_endian else "<f4"])
def test_memory_is_of_a_type_that_can_be_sent(dtype: Any) -> None:
    """`comm.empty(3, object)` gave an array that no collective takes."""
    with pytest.raises(TypeError, match=r"is not supported; there is|byte order"):
        alone(lambda comm: comm.empty(3, dtype))
