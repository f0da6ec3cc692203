"""Run batches through all stages without gradients: for outputs, or for the loss alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .batch import row_bounds, split_rows
from .messages import broadcast_value
from .random_keys import Samples
from .rows import agree_on_rows_of_pipe
from .stage_error import raise_together
from .stage_worker import Batch
from .tensors import numbers_of

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from .outline import Choices
    from .split_model import SplitModel
    from .worker import Worker

__all__ = ["Evaluator"]


class Evaluator:
    """Evaluate a split model; collective over `pipe`, without a word to other replicas.

    steps: taken so far. A Dropout in training mode draws for the batch as for that of this step.
    """

    def __init__(
        self, pipe: Communicator, model: SplitModel, worker: Worker, choices: Choices
    ) -> None:
        self._pipe, self._model, self._worker, self._choices = pipe, model, worker, choices
        self._last = pipe.size - 1

    def outputs(self, x: Any, steps: int) -> Any:
        """Return the last stage's output on every rank."""
        batch, _ = self._run(x, None, steps, judged=False)
        where = "output of the last stage"
        joined = None
        if self._pipe.rank == self._last and self._worker.failure is None:
            joined = self._worker.join(batch, where)
        self._raise_failures()
        return broadcast_value(self._pipe, joined, self._last, where, self._model.device)

    def loss(self, x: Any, y: Any, steps: int) -> Tensor:
        """Return the batch's loss on every rank."""
        batch, bounds = self._run(x, y, steps, judged=True)
        self._raise_failures()
        total = np.zeros(1)
        if self._pipe.rank == self._last:
            is_mean, rows = self._choices.loss_reduction == "mean", bounds[-1][1]
            weights = [(end - first) / rows if is_mean else 1.0 for first, end in bounds]
            losses = numbers_of([batch.losses[m] for m in range(len(bounds))])
            total[0] = sum(w * loss for w, loss in zip(weights, losses, strict=True))
        self._pipe.broadcast(total, root=self._last)
        return torch.tensor(total[0], dtype=torch.float64, device="cpu")

    def _run(
        self, x: Any, y: Any, steps: int, *, judged: bool
    ) -> tuple[Batch, tuple[tuple[int, int], ...]]:
        self._worker.require_whole()
        rows = agree_on_rows_of_pipe(self._pipe, x, y)
        bounds = row_bounds(rows, self._choices.microbatches)
        batch = Batch(
            inputs=split_rows(x, bounds) if self._pipe.rank == 0 else [],
            targets=split_rows(y, bounds) if judged and self._pipe.rank == self._last else [],
            samples=[Samples(steps, first, end - first) for first, end in bounds],
            judged=judged,
        )
        self._model.ties.follow()
        self._worker.evaluate(len(bounds), batch)
        return batch, bounds

    def _raise_failures(self) -> None:
        failure = self._worker.failure
        with self._worker.ending():
            failed = self._pipe.allreduce(np.array([failure is not None]), op="max")[0]
        if failed:
            raise_together(self._pipe, failure)
