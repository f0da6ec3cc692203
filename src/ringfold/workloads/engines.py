"""Replicas and stages behind one face, which is all that a training loop needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

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


class Engine(Protocol):
    """Train one model, however it is split.

    `step` runs forward and backward on this data rank's share, after which gradients are those of
    the global batch, and returns a loss whose mean over the data ranks is that of the global batch.
    `predict` returns the model's output, or None on a rank without its last layer.
    `named_parameters` yields this rank's part under the names of the unsplit nn.Sequential.
    `wire_bytes` counts what this rank has put into the reductions of gradients, flags included; not
    those in a tree.
    `state` is what has this part's parameters and buffers as a state_dict, by the same names.
    `begin_at` says which step comes next; `commit` that the last one counts on all ranks, and
    `go_back` that all since the last commit does not: what reductions carry is then as it was.
    """

    wire_bytes: int

    @property
    def state(self) -> DataParallel | Pipeline: ...

    @property
    def layers_per_stage(self) -> tuple[int, ...]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def begin_at(self, step: int) -> None: ...

    def commit(self) -> None: ...

    def go_back(self) -> None: ...

    def step(self, x: Tensor, y: Tensor) -> float: ...

    def predict(self, x: Tensor) -> Tensor | None: ...


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


class Replicas:
    """Hold the whole model on every rank; average gradients while backward goes on."""

    def __init__(
        self,
        layers: list[nn.Module],
        workload: Workload,
        mesh: Mesh,
        options: Options,
        device: str = "cpu",
    ) -> None:
        self.wire_bytes = 0
        self.loss = workload.loss
        self.device = torch.device(device)
        self.batch_size = options.batch_size
        self.size = mesh.data.size
        self.uneven = options.uneven
        self._kept: Kept | None = None
        self.model = DataParallel(
            nn.Sequential(*layers).to(self.device),
            mesh.data,
            bucket_bytes=int(options.bucket_mb * 2**20),
            wire=options.wire,
            check_finite=options.check_finite,
        )

    @property
    def state(self) -> DataParallel:
        return self.model

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        return (len(self.model.module),)  # type: ignore[arg-type]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def begin_at(self, step: int) -> None:
        """Begin: no layer is keyed by the step."""
        self.commit()

    def commit(self) -> None:
        if self.uneven:
            self._kept = Kept.of(self.model)

    def go_back(self) -> None:
        if self._kept is not None:
            self._kept.bring_back(self.model)

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


class Stages:
    """Hold some layers on every rank; micro-batches follow each other from stage to stage."""

    def __init__(
        self,
        layers: list[nn.Module],
        workload: Workload,
        mesh: Mesh,
        options: Options,
        microbatches: int,
        sample: Tensor | None,
        device: str = "cpu",
    ) -> None:
        self.wire_bytes = 0
        self.device = torch.device(device)
        self._uneven = options.uneven
        self._kept: Kept | None = None
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
            device=self.device,
        )

    @property
    def state(self) -> Pipeline:
        return self.pipeline

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        return tuple(map(len, self.pipeline.stages))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.pipeline.named_parameters()

    def begin_at(self, step: int) -> None:
        """Key random layers by this step, which comes next."""
        self.pipeline.steps_taken = step
        self.commit()

    def commit(self) -> None:
        if self._uneven:
            self._kept = Kept.of(self.pipeline)

    def go_back(self) -> None:
        if self._kept is not None:
            self._kept.bring_back(self.pipeline)

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
        return Replicas(layers, workload, mesh, options, device)
    sample = None
    if options.balance != "parameters":
        x, _ = next(iter(data.batches(0)))
        share = grid.microbatches // grid.data if options.reduction == "tree" else grid.microbatches
        sample = x[: len(x) // share]
    return Stages(layers, workload, mesh, options, grid.microbatches, sample, device)
