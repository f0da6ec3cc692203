"""Train a model whose layers are split over ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..comm.arguments import require
from ..comm.timeline import STEP, span
from .actions import Action
from .addition import InBuckets, InTree
from .balancing import balanced_stages
from .batch import split_batch
from .carried import Carried
from .evaluation import Evaluator
from .finite import FiniteCheck
from .gpu_threads import check_gpu_threads
from .hooks import WireFormat, WireHook
from .loss_scale import LossScaler
from .mesh import Mesh
from .outline import Choices, Outline
from .partition import cut
from .plan import PlanFunction
from .plan_check import stage_peaks
from .reducer import Reducer
from .reduction import ReductionRecord
from .replicas import check_sendable
from .rows import agree_on_rows
from .share import share_of
from .sparse import sparse_parameters
from .split_model import SplitModel
from .stage_error import raise_together
from .stage_worker import Batch
from .tensors import numbers_of
from .tree_gradients import TreeGradients
from .worker import Worker

__all__ = ["Pipeline", "StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """Tell what the last step did on this rank.

    actions: what this rank executed, in order.
    peak_in_flight: the most micro-batches whose activations it held at once, on all its stages.
    reduction: the reduction of its gradients over mesh.data in buckets; None with one replica, and
        in a tree.
    """

    actions: tuple[Action, ...]
    peak_in_flight: int
    reduction: ReductionRecord | None


class Pipeline:
    """Split layers over mesh.pipe and replicate every stage over mesh.data.

    A stage is a contiguous part of the layers. Each rank of mesh.pipe holds one, or several as the
    schedule says: stage s is on rank s modulo the ranks. `step` cuts this replica's batch into
    micro-batches that follow each other through the stages, and leaves in `.grad` the gradients
    that the unsplit model would have for the loss of the whole global batch, that is of the batches
    of all replicas together. As `loss.backward()` does, it adds to what is there: clear the
    gradients before.

    layers: an nn.Sequential or a list of modules, the whole model, on every rank; each is called
        with the output of the one before: a tensor, or a nesting of tuples, lists, dicts and
        dataclasses. That of the last one may be whatever loss_fn takes, where its stage does not
        recompute.
    loss_fn: loss_fn(output, target) -> a tensor of one element, called on the last stage for every
        micro-batch; needed there.
    loss_reduction: "mean" if loss_fn is a mean over its rows: micro-batches, and replicas, count by
        their rows. "sum" if it is a sum over its rows.
    microbatches: at most so many; a batch of fewer rows makes fewer. Their rows may be unequal.
    schedule: a name of `PLANS`, or a plan function; checked before it runs.
    stages_per_rank: of the schedule "interleaved", by default 2. Other schedules take only 1, and a
        plan function none, as its actions name their stages.
    boundaries: the first layer of every stage but the first.
    balance: without boundaries, what is to be as equal as can be: "parameters"; "time" of forward
        and backward, or "memory" of parameters and kept activations, measured on `sample`.
    sample: a micro-batch, as x of `step`; needed on rank 0 where layers are measured.
    recompute: True, or the numbers of stages that keep a micro-batch's input alone, and run their
        layers again before its backward. The gradients are the same to the last bit.
    bucket_bytes, wire_dtype, broadcast_buffers: of the reduction over mesh.data, as in
        DataParallel.
    reduction: "bucket", or "tree" for gradients and losses that are the same to the last bit for
        every (data, pipe). `microbatches` are those of the global batch then, dealt to the
        replicas in order, and they are added in one fixed binary tree: halves in float32, rounded
        once.
    loss_scaler: scales what backward starts from; the loss that `step` returns is as it is. Over
        mesh.comm.
    device: where this rank's stages go, and what comes to them; of one kind on all ranks. None to
        leave them where the layers are.
    check_finite: look at the gradients after every backward of a micro-batch: `step` raises
        NotFinite on every rank, with the first rank of mesh.comm, parameter, step and micro-batch
        of that replica where one is infinite or NaN; in buckets, no replica has added it.

    Attributes:
        stages: the layers of every stage, as ranges.
        layers: this rank's, by their names in the unsplit model.
        shared_names: all names of every weight that several layers share.
        steps_taken: steps so far; with the samples it keys random layers, so a resumed run sets it.

    Collective over mesh.comm. Parameters and buffers start as those of replica 0. ValueError on
    every rank for layers or settings that differ between ranks, a stage left without layers, an
    unknown schedule, or a persistent buffer that two ranks share. What layers share is one on all
    ranks (`ties`, `constants`): the first layer's value counts, gradients of all uses are added.
    """

    def __init__(
        self,
        layers: nn.Sequential | nn.ModuleList | Sequence[nn.Module],
        mesh: Mesh,
        *,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        loss_reduction: str = "mean",
        microbatches: int = 8,
        schedule: str | PlanFunction = "1f1b",
        stages_per_rank: int | None = None,
        boundaries: Sequence[int] | None = None,
        balance: str = "parameters",
        sample: Any = None,
        bucket_bytes: int = 4 << 20,
        wire_dtype: WireFormat | WireHook | None = None,
        broadcast_buffers: bool = True,
        reduction: str = "bucket",
        recompute: bool | Collection[int] = False,
        check_finite: bool = False,
        loss_scaler: LossScaler | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        require("mesh", mesh, Mesh, "Mesh(comm, pipe=2)")
        self.mesh = mesh
        self.last_step: StepRecord | None = None
        self.steps_taken = 0
        self._loss_scaler = loss_scaler
        last = mesh.pipe.size - 1
        has_loss = bool(mesh.pipe.broadcast(np.array([loss_fn is not None]), root=last)[0])
        self._choices = choices = Choices(
            microbatches=microbatches,
            has_loss=has_loss,
            loss_reduction=loss_reduction,
            reduction=reduction,
            boundaries=boundaries,
            balance=balance,
            recompute=recompute,
            bucket_bytes=bucket_bytes,
            wire_dtype=wire_dtype,
            broadcast_buffers=broadcast_buffers,
            check_finite=check_finite,
            scales_loss=loss_scaler is not None,
            device=device,
        )
        outline = Outline.agreed(
            layers, mesh, choices, schedule, stages_per_rank, loss_fn, loss_scaler
        )
        self._plan, named, num_stages = outline.plans, outline.named, outline.num_stages
        tensors = chain(outline.whole.named_parameters(), outline.whole.named_buffers())
        check_sendable(tensors, empty_only=mesh.data.size == 1)
        self._finite = FiniteCheck(mesh.comm, num_stages) if check_finite else None

        if boundaries is None:
            count = microbatches if reduction == "bucket" else -(-microbatches // mesh.data.size)
            in_flight = stage_peaks(self._plan(count))
            self.stages = balanced_stages(named, mesh.comm, balance, in_flight, sample)
        else:
            self.stages = cut(len(named), num_stages, boundaries)
        self._model = SplitModel(
            named, self.stages, mesh, again=outline.again, device=device, bucket_bytes=bucket_bytes
        )
        self.layers = module = self._model.module
        self.shared_names = self._model.shared_names
        self._reducer = Reducer(
            list(module.named_parameters()),
            mesh.data,
            bucket_bytes=bucket_bytes,
            wire=wire_dtype,
            sparse=sparse_parameters(module),
            finite=self._finite,
            loss_scaler=loss_scaler,
        )
        in_tree = reduction == "tree"
        tree = TreeGradients(self._model.parameters_by_stage, mesh.data) if in_tree else None
        self._adding = InBuckets(mesh, self._reducer) if tree is None else InTree(mesh, tree)
        reducer = self._reducer if mesh.data.size > 1 and tree is None else None
        if reducer is not None:
            check_gpu_threads(mesh.data, module.parameters())
            reducer.attach(self._gradient_ready)
        self._channel = channel = mesh.pipe.split(0, key=mesh.pipe.rank)
        stages = self._model.stages
        self._worker = Worker(stages, num_stages, channel, loss_fn, reducer, tree, self._finite)
        self._evaluator = Evaluator(mesh.pipe, self._model, self._worker, choices)

    @property
    def stage(self) -> int:
        """Return the number of this rank's stage, of several the first."""
        return self._model.stages[0].index

    @property
    def own_stages(self) -> tuple[int, ...]:
        """Return the numbers of this rank's stages."""
        return tuple(stage.index for stage in self._model.stages)

    def step(self, x: Any = None, y: Any = None) -> Tensor:
        """Run forward and backward of one batch and return its loss.

        x: this replica's batch, nested tensors whose first dimension is the rows; needed on the
            first stage. y: its targets, with as many rows; needed on the last stage, if loss_fn
            uses them. Elsewhere they are ignored. Replicas may have unequal batches, some of them
            no rows, or None.
        Returns: the loss of the whole global batch, over all replicas, on every rank: a float64
            tensor of no dimension, without a graph.

        Collective over mesh.comm. When it returns, the gradients are ready, averaged over
        mesh.data. ValueError on every rank if a batch does not fit, as where SyncBatchNorm layers
        would meet in unequal numbers of micro-batches. StageError on every rank, naming stage,
        micro-batch, shapes and dtypes, if a stage or the loss raises, as on an input that does not
        fit: clear the gradients then, which hold a part of the batch. What breaks a step off, such
        as Ctrl-C or a CommTimeout, is raised as it is, and later steps are refused.
        """
        self._worker.require_whole()
        self._require_loss("train, only give outputs")
        rows, meeting = agree_on_rows(self.mesh, x, y, self._model.meets_replicas)
        share = share_of(
            rows,
            self.mesh.data.rank,
            self._choices.microbatches,
            is_mean=self._choices.loss_reduction == "mean",
            in_tree=self._adding.in_tree,
            meeting=meeting,
        )
        # On all ranks before anything is sent, as a plan may refuse what one replica has.
        for count in sorted(set(share.counts)):
            self._plan(count)
        factor = self._adding.factor
        if self._loss_scaler is not None:
            factor = self._loss_scaler.scale(factor)
        batch = Batch(
            *split_batch(x if self._is_first else None, y if self._is_last else None, share.bounds),
            scales=[weight * factor for weight in share.weights],
            samples=share.samples(self.steps_taken),
        )
        self._model.begin()
        self._adding.begin(share, batch)
        plan = self._plan(len(share.bounds))[self.mesh.pipe.rank]
        with span(self.mesh.comm.timeline, STEP, f"step {self.steps_taken}"):
            self._worker.train(plan, batch)
        losses = zip(batch.losses, numbers_of(list(batch.losses.values())), strict=True)
        weighed = {m: share.weights[m] * value for m, value in losses}
        evens = self._choices.broadcast_buffers
        changed = evens and self._model.buffers_changed
        with self._worker.ending():
            added = self._adding.finish(weighed, self._failed, changed)
            if evens and not added.changed:
                self._model.even_buffers(rows)
            self._model.ties.finish()
        if added.failed:
            if self._finite is not None:
                self._finite.forget()
            raise_together(self.mesh.comm, self._worker.failure)
        if self._finite is not None:
            self._finite.step = self.steps_taken
            self._finite.agree()
        if added.changed:
            self._model.agree_on_buffers()
            self._model.even_buffers(rows)
        self.steps_taken += 1
        self.last_step = StepRecord(plan, self._worker.peak_in_flight, added.reduction)
        return torch.tensor(added.loss, dtype=torch.float64, device="cpu")

    def forward(self, x: Any = None) -> Any:
        """Run a batch through all stages, without gradients, and return the output on every rank.

        x: as in `step`, needed on the first stage; at least one row. Collective over mesh.pipe
        only: replicas evaluate independently of each other. Layers behave as `train` and `eval`
        have said; a Dropout in training mode takes the rows of x for those of a batch of
        `steps_taken`. The outputs of the micro-batches are joined along their first dimension.
        """
        return self._evaluator.outputs(x, self.steps_taken)

    def evaluate(self, x: Any = None, y: Any = None) -> Tensor:
        """Run a batch as `forward` does, and return its loss on every rank, the outputs on none.

        x, y: as in `step`, of at least one row. Returns: the loss of this replica's batch, a mean
        or a sum as loss_reduction says: a float64 tensor of no dimension. Collective over mesh.pipe
        only, and no gradient changes. Raises as `step` does.
        """
        self._require_loss("tell a loss, only give outputs")
        return self._evaluator.loss(x, y, self.steps_taken)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of this rank's stages, a shared one once.

        On a rank with nothing to train, a placeholder without elements follows, which is in no
        state: optimizers refuse an empty list, and so can be made alike on every rank.
        """
        return self._model.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of this rank's stages, by their names in the unsplit model.

        A shared one comes once, by the first of its names, on every rank that holds it.
        """
        return self._model.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters and buffers of this rank, by their names in the unsplit model."""
        return self._model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load this rank's part of a state: of the unsplit model's, or of `state_dict`'s.

        ValueError for a name that is in no stage, and for different values of one weight that
        layers share; RuntimeError, as torch has it, for a missing name or a shape that differs. No
        communication: give every replica the same state.
        """
        self._model.load(state)

    def carried(self) -> Carried:
        """Return what the next step depends on besides weights and batch; see DataParallel."""
        return self._reducer.carried(self.steps_taken)

    def carry_on(self, carried: Carried) -> None:
        """Go on from what `carried` returned; on all ranks, between steps."""
        self._reducer.carry_on(carried)
        self.steps_taken = carried.steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of this rank's parameters."""
        self._model.module.zero_grad(set_to_none)

    def train(self, mode: bool = True) -> Pipeline:
        """Set the layers to training mode."""
        self._model.module.train(mode)
        return self

    def eval(self) -> Pipeline:
        """Set the layers to evaluation mode."""
        return self.train(False)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients so that their norm over all stages is at most max_norm.

        Returns the norm before, the same on every rank. Replicas hold equal gradients, which count
        once. As in torch, gradients are multiplied by min(1, max_norm / (norm + 1e-6)). Collective
        over mesh.pipe.
        """
        return self._model.clip(max_norm, norm_type)

    def close(self) -> None:
        """Give the engine's own channel back; collective over mesh.pipe. The mesh stays open."""
        self._reducer.detach()
        self._model.ties.close()
        self._channel.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Pipeline belongs to its ranks, and has no copy and no pickle: take its "
            "state_dict(), or copies of what named_parameters() yields, as for an average"
        )

    def _require_loss(self, what: str) -> None:
        if not self._choices.has_loss:
            raise ValueError(f"a pipeline without loss_fn on its last stage cannot {what}")

    @property
    def _is_first(self) -> bool:
        return self.mesh.pipe.rank == 0

    @property
    def _is_last(self) -> bool:
        return self.mesh.pipe.rank == self.mesh.pipe.size - 1

    @property
    def _failed(self) -> bool:
        return self._worker.failure is not None

    def _gradient_ready(self, index: int) -> None:
        # Only the last micro-batch's backward completes a gradient.
        if self._model.stage_of[index] in self._worker.completing and self._reducer.active:
            # As if backwards ran within it, as of re-entrant checkpoints: then nothing leaves in
            # the first step, which finds out whether any gradient is accumulated again.
            self._reducer.mark(index, nested=True)
