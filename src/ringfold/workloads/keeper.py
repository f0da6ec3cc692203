"""When train.py writes a checkpoint, what is in it, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..parallel.checkpoint.errors import CheckpointError
from ..parallel.checkpoint.session import Checkpoints
from ..parallel.checkpoint.streams import RandomStreams
from .options import UsageError
from .report import CheckpointTimes

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from .engines import Engine
    from .losses import GlobalLosses
    from .options import Options
    from .workload import Data

__all__ = ["Keeper", "batches_from"]


def batches_from(data: Data, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this share of the batches of all epochs, from that of training step `step` on."""
    first_epoch, done = divmod(step, data.steps_per_epoch)
    for epoch in count(first_epoch):
        yield from islice(data.batches(epoch), done if epoch == first_epoch else 0, None)


class Keeper:
    """Write the checkpoints that the options ask for; none without --checkpoint.

    All methods are collective.
    """

    def __init__(
        self,
        comm: Communicator,
        options: Options,
        data: Data,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        losses: GlobalLosses,
    ) -> None:
        self.options = options
        self.losses = losses
        self.checkpoints: Checkpoints | None = None
        self.past = CheckpointTimes(0, 0.0, 0.0)
        if options.checkpoint is not None:
            self.checkpoints = Checkpoints(options.checkpoint, comm, keep=options.keep)
        # What makes a batch what it is: with another one, no step would be the step that it was.
        self.run = {
            "workload": options.workload,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "data": data.fingerprint,
        }
        self.state = {"model": engine.state, "optimizer": optimizer, "random": RandomStreams()}
        self.saved = -1
        self.first = True

    def resume(self) -> int:
        """Return how many steps have been trained already, after loading them.

        UsageError if the folder does not suit the options, before anything in it is touched.
        """
        if self.checkpoints is None:
            return 0
        try:
            newest = self.checkpoints.newest()
            if newest is not None and not self.options.resume:
                raise UsageError(
                    f"--checkpoint {self.options.checkpoint} holds a checkpoint of step {newest}: "
                    "go on from it by --resume, or name another folder"
                )
            self.checkpoints.probe()
            return 0 if newest is None else self._load(self.checkpoints)
        except CheckpointError as error:
            raise UsageError(f"--checkpoint: {error}") from None

    def _load(self, checkpoints: Checkpoints) -> int:
        saved = checkpoints.load({"run": None}).values["run"]
        for key, value in self.run.items():
            if saved[key] != value:
                raise UsageError(
                    f"--resume: {key} is {value} here, but {saved[key]} in the checkpoint in "
                    f"{self.options.checkpoint}"
                )
        loaded = checkpoints.load({**self.state, "losses": None})
        self.losses.known[:] = loaded.values["losses"].tolist()
        self.saved = loaded.step
        return loaded.step

    def reload(self) -> int:
        """Return how many steps the newest checkpoint holds, after loading it.

        CheckpointError where there is none.
        """
        if self.checkpoints is None:
            raise CheckpointError("no checkpoint to go on from: --checkpoint DIR keeps some")
        return self._load(self.checkpoints)

    def follow(self, before: Keeper) -> None:
        """Count on from an earlier keeper of this run; not collective."""
        self.past = before._times()

    def let_go(self, all_live: bool) -> None:
        """End what is being written: to its end, collectively, where all ranks live."""
        if self.checkpoints is None:
            return
        if all_live:
            self.checkpoints.wait()
        else:
            self.checkpoints.give_up()

    def after(self, step: int, last: bool) -> None:
        """Write a checkpoint if it is time for one, `step` steps being done."""
        if self.checkpoints is None or step == self.saved:
            return
        first, self.first = self.first, False
        if first and not last and step % self.options.every:
            self.checkpoints.prepare(self.state)
        if last or step % self.options.every == 0:
            self.losses.flush()
            losses = torch.tensor(self.losses.known, dtype=torch.float64)
            values: dict[str, Any] = {"run": self.run, "losses": losses}
            self.checkpoints.save({**self.state, **values}, step)
            self.saved = step

    def finish(self) -> CheckpointTimes | None:
        """Return when the last checkpoint is on the disk."""
        if self.checkpoints is None:
            return None
        self.checkpoints.wait()
        return self._times()

    def _times(self) -> CheckpointTimes:
        found, past = self.checkpoints, self.past
        if found is None:
            return past
        return CheckpointTimes(
            past.count + found.count,
            past.stood_still_seconds + found.stood_still,
            past.writing_seconds + found.writing,
        )
