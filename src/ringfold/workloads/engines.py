"""Replicas and stages behind one face, which is all that a training loop needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..parallel.carried import Carried
from ..parallel.data_parallel import DataParallel
from ..parallel.mesh import Mesh
from ..parallel.partition import balance
from ..parallel.pipeline import Pipeline
from .options import Grid, Options, UsageError, needs_stages, plan_of
from .workload import Data, Workload

__all__ = ["Engine", "Replicas", "Stages", "check_stages", "layers_of", "make_engine"]


@dataclass(frozen=True)
class Kept:
    """What a step changes before it counts, as it was when the last one did.

    buffers: such as running statistics, which the forward of a step that is given up has seen.
    """

    carried: Carried | None
    buffers: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: DataParallel | Pipeline) -> Kept:
        return cls(model.carried(), {name: b.clone() for name, b in _buffers(model).items()})

    def bring_back(self, model: DataParallel | Pipeline) -> None:
        for name, buffer in _buffers(model).items():
            buffer.copy_(self.buffers[name])
        if self.carried is not None:
            model.carry_on(self.carried)


def _buffers(model: DataParallel | Pipeline) -> dict[str, Tensor]:
    parameters = {name for name, _ in model.named_parameters()}
    return {name: t for name, t in model.state_dict().items() if name not in parameters}


class Engine(ABC):
    """Train one model, however it is split.

    wire_bytes: what this rank has put into the reductions of gradients, flags included; not those
        in a tree.
    state: what has this rank's part of the parameters and buffers as a state_dict, by the names of
        the unsplit nn.Sequential.
    """

    def __init__(self, state: DataParallel | Pipeline, device: torch.device, uneven: bool) -> None:
        """uneven: whether ranks may leave: shares get unequal, and steps may be given up."""
        self.wire_bytes = 0
        self.state = state
        self.device = device
        self.uneven = uneven
        self._kept: Kept | None = None

    @property
    @abstractmethod
    def layers_per_stage(self) -> tuple[int, ...]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's part."""
        return self.state.named_parameters()

    def begin_at(self, step: int) -> None:
        """Begin: this step comes next."""
        self.commit()

    def commit(self) -> None:
        """Let the last step count; the ranks have agreed."""
        if self.uneven:
            self._kept = Kept.of(self.state)

    def go_back(self) -> None:
        """Bring back what reductions carry, and buffers, as they were at the last commit."""
        if self._kept is not None:
            self._kept.bring_back(self.state)

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> float:
        """Run forward and backward on this data rank's share.

        After it gradients are those of the global batch.

        Returns: a loss whose mean over the data ranks is that of the global batch.
        """

    @abstractmethod
    def predict(self, x: Tensor) -> Tensor | None:
        """Return the model's output, or None on a rank without its last layer."""


class Replicas(Engine):
    """Hold the whole model on every rank; average gradients while backward goes on."""

    def __init__(
        self,
        layers: list[nn.Module],
        workload: Workload,
        mesh: Mesh,
        options: Options,
        device: torch.device,
    ) -> None:
        self.model = DataParallel(
            nn.Sequential(*layers).to(device),
            mesh.data,
            bucket_bytes=int(options.bucket_mb * 2**20),
            wire=options.wire,
            check_finite=options.check_finite,
        )
        super().__init__(self.model, device, options.uneven)
        self.loss = workload.loss
        self.batch_size = options.batch_size
        self.size = mesh.data.size

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        return (len(self.model.module),)  # type: ignore[arg-type]

    def step(self, x: Tensor, y: Tensor) -> float:
        self.model.train()
        # Equal shares need no weights. Where they may become unequal, what weights need is compiled
        # in the first step, not while others wait for a rank that has died.
        even = not self.uneven
        with nullcontext() if even else self.model.weighted(len(x)):
            loss = self.loss(self.model(x.to(self.device)), y.to(self.device))
            loss.backward()  # type: ignore[no-untyped-call]
        record = self.model.last_step
        self.wire_bytes += 0 if record is None else record.nbytes
        factor = 1.0 if even else len(x) * self.size / self.batch_size
        return float(loss.detach()) * factor

    def predict(self, x: Tensor) -> Tensor | None:
        self.model.eval()
        with torch.no_grad():
            output: Tensor = self.model(x.to(self.device))
        return output.cpu()


class Stages(Engine):
    """Hold some layers on every rank; micro-batches follow each other from stage to stage."""

    def __init__(
        self,
        layers: list[nn.Module],
        workload: Workload,
        mesh: Mesh,
        options: Options,
        microbatches: int,
        sample: Tensor | None,
        device: torch.device,
    ) -> None:
        self.pipeline = Pipeline(
            layers,
            mesh,
            loss_fn=workload.loss,
            microbatches=microbatches,
            schedule=plan_of(options),
            recompute=options.recompute,
            bucket_bytes=int(options.bucket_mb * 2**20),
            wire_dtype=options.wire,
            reduction=options.reduction,
            check_finite=options.check_finite,
            balance=options.balance,
            sample=sample,
            device=device,
        )
        super().__init__(self.pipeline, device, options.uneven)

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        return tuple(map(len, self.pipeline.stages))

    def begin_at(self, step: int) -> None:
        """Begin: random layers are keyed by this step, which comes next."""
        self.pipeline.steps_taken = step
        super().begin_at(step)

    def step(self, x: Tensor, y: Tensor) -> float:
        self.pipeline.train()
        loss = float(self.pipeline.step(x.to(self.device), y.to(self.device)))
        record = self.pipeline.last_step
        if record is not None and record.reduction is not None:
            self.wire_bytes += record.reduction.nbytes
        return loss

    def predict(self, x: Tensor) -> Tensor | None:
        self.pipeline.eval()
        output: Tensor | None = self.pipeline.forward(x.to(self.device))
        return None if output is None else output.cpu()


def check_stages(layers: list[nn.Module], stages: int) -> None:
    """Raise UsageError, before anything is split, if a stage would be left without layers."""
    try:
        balance([sum(p.numel() for p in layer.parameters()) for layer in layers], stages)
    except ValueError as error:
        raise UsageError(f"--pipe: {stages} stages: {error}") from None


def layers_of(workload: Workload, options: Options) -> list[nn.Module]:
    """Make the model's layers, which draws from torch's generator, or raise UsageError."""
    if not options.dropout:
        return workload.layers()
    if workload.layers_with_dropout is None:
        raise UsageError(f"--dropout: the workload {options.workload} has none")
    return workload.layers_with_dropout(options.dropout, options.seed)


def make_engine(
    layers: list[nn.Module],
    workload: Workload,
    mesh: Mesh,
    options: Options,
    grid: Grid,
    data: Data,
    device: str = "cpu",
) -> Engine:
    """Split the model as the grid says, measuring on a micro-batch of `data` where it says so.

    Collective over the mesh. device: this rank's; of one kind on all ranks.
    """
    # Keyed dropout asks for its samples, which the pipeline tells it, of one stage too.
    pipeline = grid.pipe > 1 or needs_stages(options)
    if not pipeline and options.reduction == "bucket" and not options.dropout:
        return Replicas(layers, workload, mesh, options, torch.device(device))
    sample = None
    if options.balance != "parameters":
        x, _ = next(iter(data.batches(0)))
        share = grid.microbatches // grid.data if options.reduction == "tree" else grid.microbatches
        sample = x[: len(x) // share]
    return Stages(layers, workload, mesh, options, grid.microbatches, sample, torch.device(device))
