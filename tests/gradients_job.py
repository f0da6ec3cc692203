"""DataParallel on a GPU against the same on the host; for mpirun: a process for each rank.

Ranks that are threads would share autograd's thread of the GPU.
"""

import copy

import torch

import ringfold

DEVICES = ("cpu", "cuda")

with ringfold.Communicator() as comm:
    found = {}
    torch.manual_seed(3)
    whole = torch.nn.Sequential(torch.nn.Linear(300, 1000), torch.nn.Linear(1000, 7))
    generator = torch.Generator().manual_seed(comm.rank)
    x = torch.randn(16, 300, generator=generator)
    for device in DEVICES:
        module = copy.deepcopy(whole).to(device)
        model = ringfold.DataParallel(module, comm, bucket_bytes=100_000)
        for _ in range(3):
            model.zero_grad()
            model(x.to(device)).square().mean().backward()
        found[device] = [p.grad.cpu() for p in model.parameters()]
    for one, other in zip(*found.values(), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
print("right")
