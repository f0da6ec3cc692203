"""Gradients of a GPU against those of the host, of each workload's first step; for mpirun.

python gradients_job.py [FACTOR]    # a mutation: what lands on the GPU is times this

The losses of a run tell little of gradients: Adam's steps are the same for any multiple of them.
A process for each rank, since ranks that are threads would share autograd's thread of the GPU.
"""

import copy
import sys
from collections.abc import Sequence

import torch

import ringfold
from ringfold.parallel.flight import Flight
from ringfold.workloads import load
from ringfold.workloads.workload import Share

FACTOR = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
RTOL = 1e-3
LEAST = 1e-3
"""Of all gradients' norm: a parameter whose gradient is smaller is measured by that."""

landed = Flight.land


def land(flight: Flight, counts: Sequence[float]) -> None:
    landed(flight, counts)
    for parameter in flight.load.parameters:
        if parameter.is_cuda and parameter.grad is not None and FACTOR != 1:
            parameter.grad.mul_(FACTOR)


Flight.land = land  # type: ignore[method-assign]

with ringfold.Communicator() as comm:
    for name in ("digits", "text"):
        workload = load(name)
        torch.manual_seed(3)
        layers = torch.nn.Sequential(*workload.layers())
        x, y = next(iter(workload.data(Share(16, comm.rank, comm.size, 0)).batches(0)))
        found = []
        for device in ("cpu", "cuda"):
            module = copy.deepcopy(layers).to(device)
            model = ringfold.DataParallel(module, comm, bucket_bytes=100_000)
            workload.loss(model(x.to(device)), y.to(device)).backward()
            found.append({n: p.grad.cpu().double() for n, p in model.module.named_parameters()})
        least = LEAST * torch.stack([one.norm() for one in found[0].values()]).norm()
        for key, one in found[0].items():
            off = float((found[1][key] - one).norm() / torch.maximum(one.norm(), least))
            assert off <= RTOL, f"{name}, {key}: the gradient is off by {off:.2g} of its norm"
print("right")
