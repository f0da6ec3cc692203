"""What the benchmarks of training share: one step, who waits, and whether replicas are equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from harness import Contender
from torch import Tensor, nn

import ringfold

LEARNING_RATE = 1e-3
NAP = 5e-4
"""Seconds between two looks of a rank that waits asleep."""


@dataclass
class Trainer:
    """A model, perhaps wrapped, and its plain SGD.

    settle: waits until a step has ended, where it only starts it.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    settle: Callable[[], object] = lambda: None
    lr: float = LEARNING_RATE

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Forward, backward with whatever the wrapper does there, and the optimizer's step."""
        self.optimizer.zero_grad()
        self.loss(self.model(x), y).backward()
        self.optimizer.step()
        self.settle()

    def no_sync(self) -> Any:
        return (
            self.model.no_sync() if isinstance(self.model, ringfold.DataParallel) else nullcontext()
        )


class Alone:
    """Let rank 0 work while the others sleep, so that it has the machine to itself."""

    def __init__(self, comm: ringfold.Communicator) -> None:
        from mpi4py import MPI

        self.rank = comm.rank
        self.mpi = MPI.COMM_WORLD.Dup()

    def contender(self, run: Callable[[], object]) -> Contender:
        """Return what only rank 0 runs."""
        return Contender("alone", run if self.rank == 0 else lambda: None, after=self.wait)

    def wait(self) -> None:
        """Wait for all ranks, asleep: MPI's own waiting would keep a core busy."""
        request = self.mpi.Ibarrier()
        while not request.Test():
            time.sleep(NAP)

    def close(self) -> None:
        self.mpi.Free()


def differing(comm: ringfold.Communicator, model: nn.Module) -> int:
    """Count the elements of this rank's parameters that are not the largest over the ranks.

    Zero on all ranks if the replicas are equal. Collective.
    """
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return int((comm.allreduce(flat.clone(), "max") != flat).sum())


def wrapped(
    fresh: Callable[[], nn.Module],
    comm: ringfold.Communicator,
    sizes: Sequence[int],
    trainer: Callable[[nn.Module], Trainer],
) -> list[tuple[str, Trainer]]:
    """Return trainers of replicas: "ours", or one for each size of buckets in bytes."""
    if not sizes:
        return [("ours", trainer(ringfold.DataParallel(fresh(), comm)))]
    return [
        (f"ours-{nbytes}", trainer(ringfold.DataParallel(fresh(), comm, bucket_bytes=nbytes)))
        for nbytes in sizes
    ]


def unsynchronised(trainer: Trainer, x: Tensor, y: Tensor) -> None:
    """Take a step whose gradients stay this rank's own."""
    with trainer.no_sync():
        trainer.step(x, y)


def limited(
    step: Callable[[], object], comm: ringfold.Communicator, trainer: Trainer
) -> Callable[[], None]:
    """Return what takes a step and then reduces as many bytes as it has gradients.

    The bytes are no gradients, but lie in registered memory from the start, and a plan reduces
    them: no reduction of gradients that autograd has made elsewhere can cost less than that.
    """
    parameters = list(trainer.model.parameters())
    count, device = sum(parameter.numel() for parameter in parameters), parameters[0].device
    plan = comm.plan(
        "allreduce", comm.empty(count, torch.float32, device=device.type).fill_(1.0), op="mean"
    )

    def run() -> None:
        step()
        plan()
        trainer.settle()

    return run


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    """Return a function that takes so many steps."""

    def run() -> None:
        for _ in range(times):
            step()

    return run
