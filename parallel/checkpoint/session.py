"""Save and load as all ranks do it together."""

from __future__ import annotations

import json
import operator
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...comm.arguments import seconds, whole
from ...comm.scope import Scope
from ...comm.texts import gather_texts
from ..demands import require_comm
from .agreement import agree, together
from .attempt import Attempt
from .errors import CheckpointError, text_of
from .partial import Partial, make_partial
from .restoring import restored
from .shares import captured_by, share_out, summary_of
from .snapshot import Snapshot
from .state import Part, parts_of
from .store import Place, places, wrong_step
from .writer import Job, Writing

if TYPE_CHECKING:
    from ...comm.communicator import Communicator
    from ...comm.work import Work

__all__ = ["Checkpoints", "Loaded", "load", "save"]

_VISIBLE = 5.0
"""Seconds until a folder that rank 0 has made must be seen by all ranks."""

_ROTATED = 100
"""Checkpoints that may be removed by others while they are read, until `load` gives up."""


@dataclass(frozen=True)
class Loaded:
    """Tell what was loaded: the plain values of the state by name, and where from.

    damaged: one line for every newer checkpoint that was passed over.
    """

    step: int
    path: Path
    values: Mapping[str, Any]
    damaged: tuple[str, ...]


class Checkpoints(Scope):
    """Write checkpoints into a folder while training goes on, and load the newest whole one.

    folder: shared by all ranks; a relative one is where it is now.
    keep: how many checkpoints stay in it, the newest; None for all.
    patience: seconds that ranks wait for the slowest one's file, whatever the deadline of `comm`.

    A state maps names of your choice to objects: modules, DataParallel or Pipeline engines, torch
    optimizers of their parameters, a `RandomStreams()`, and nestings of plain values and tensors
    that are the same on every rank. What several ranks hold is written by one of them. All methods
    but give_up are collective over `comm`. CheckpointError on all ranks alike, before anything old
    is touched.

    The end of a `with` waits for what is being written. So does a program that exits within, with
    whatever status (SystemExit), on each such rank by itself: with CheckpointError instead where
    that fails here. Another exception gives it up.

    stood_still: seconds that this rank's program has waited in `save`.
    writing: seconds that writing has taken in the background.  count: checkpoints begun.
    """

    def __init__(
        self,
        folder: str | Path,
        comm: Communicator,
        *,
        keep: int | None = None,
        patience: float = 600.0,
    ) -> None:
        require_comm(comm)
        if keep is not None:
            whole("keep", keep, 1)
        self.folder = Path(os.path.abspath(folder))  # wherever the program goes meanwhile
        self.comm = comm
        self.stood_still = 0.0
        self.writing = 0.0
        self.count = 0
        self._keep = keep
        self._patience = seconds("patience", patience)
        self._writing: Writing | None = None
        self._others: Work | None = None  # which come once their files are written
        self._snapshot = Snapshot()

    def save(self, state: Mapping[str, Any], step: int) -> None:
        """Copy the state and return; it is written in the background.

        step: a whole number from 0 on, which names the checkpoint and `load` finds it by.
        Waits for the checkpoint before, if that is still being written, and raises its error.
        The copies stay allocated for the next one: about this rank's share of the checkpoint.
        """
        start = time.perf_counter()
        try:
            self.wait()
            complaint = wrong_step(step)
            what = f"checkpoint of step {step}"
            mine, values, nbytes = self._share_out(state, what, complaint, step)
            step = operator.index(step)
            copies: dict[str, Tensor] = {}
            complaint = ""
            try:
                copies = self._snapshot.take(mine)
            except Exception as error:  # no memory, on the host or on a GPU
                complaint = f"no copies of the state: {text_of(error)}"
            folder, made = self._open(step, nbytes, complaint)
            self._writing = Writing(
                Job(
                    folder=folder,
                    made=made,
                    step=step,
                    rank=self.comm.rank,
                    num_ranks=self.comm.size,
                    tensors=copies,
                    values=values,
                    keep=self._keep,
                    patience=self._patience,
                )
            )
            self.count += 1
        finally:
            self.stood_still += time.perf_counter() - start

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Begin, in the background, to get the memory that the first `save` of this state needs.

        Useful once the state is whole, such as after the first step of an optimizer that makes its
        own then; `save` works without, and then waits for the memory.
        """
        start = time.perf_counter()
        self._snapshot.prepare(self._share_out(state, "checkpoint")[0])
        self.stood_still += time.perf_counter() - start

    def _share_out(
        self, state: Mapping[str, Any], what: str, complaint: str = "", step: int | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any], int]:
        """Return what this rank writes, all values, and the bytes that all ranks write."""
        captured, problem, cause = captured_by(state, self.comm)
        agree(self.comm, complaint or problem, what, cause)
        number = None if step is None else operator.index(step)
        rows = gather_texts(self.comm, summary_of(captured, number))
        chosen, values, nbytes = share_out([json.loads(row) for row in rows])
        mine = {n: captured.tensors[n] for n, r in chosen.items() if r == self.comm.rank}
        return mine, values, nbytes

    @property
    def busy(self) -> bool:
        """Tell whether this rank is still writing; not collective."""
        return self._writing is not None and self._writing.running

    def wait(self) -> Path | None:
        """Return when the checkpoint begun last is whole on the disk, with its path on rank 0.

        Which warns of an old one that cannot be removed: it stays.
        """
        writing = self._writing
        if writing is None:
            return None
        what = f"checkpoint of step {writing.job.step} in {self.folder}"
        try:
            problem = writing.wait_for_own()
            # First over the communicator, which knows of ranks that have died: rank 0 would wait
            # for their files. Begun once, also where this is called again after a CommTimeout.
            self._others = self._others or self.comm.barrier(blocking=False)
            self._others.wait(self._patience)
            self._others = None
            agree(self.comm, problem, what)
            writing.join()
            agree(self.comm, writing.error, what)
        except CheckpointError:
            self.give_up()
            if writing.job.made is not None:
                writing.job.made.discard()
            raise
        self._writing = None
        self.writing += writing.seconds
        if writing.stays:
            warnings.warn(writing.stays, RuntimeWarning, stacklevel=2)
        return writing.path

    def load(self, state: Mapping[str, Any], step: int | None = None) -> Loaded:
        """Restore the objects of a state, in place, from the newest whole checkpoint.

        step: from the newest of that step instead. Damaged ones are passed over with a warning on
        rank 0. Every name, shape, dtype and checksum is checked on all ranks before anything is
        overwritten, but for shapes that code of a module's own decides; where an object's own
        load_state_dict raises on any rank, the objects that came before get back what they held.
        Waits for what is being written. The folder may be a checkpoint itself, such as a copy.
        CheckpointError where none is whole, or one does not fit.
        """
        comm = self.comm
        what = f"loading from {self.folder}"
        parts = together(comm, what, lambda: parts_of(state, comm.rank, comm.size))
        attempt, damaged = self._newest_whole(parts, step)
        place = attempt.place
        values = restored(comm, str(place.path), parts, attempt.manifest, attempt.tensors)
        return Loaded(place.step, place.path, values, damaged)

    def _newest_whole(
        self, parts: Mapping[str, Part], step: int | None
    ) -> tuple[Attempt, tuple[str, ...]]:
        """Return what was read of the newest whole checkpoint, and what newer ones lack."""
        damaged: list[str] = []
        tried: set[Path] = set()
        rotated = 0
        listed = self._list()
        while rotated < _ROTATED:
            left = (p for p in listed if p.path not in tried and step in (None, p.step))
            place = next(left, None)
            if place is None:
                break
            tried.add(place.path)
            attempt = Attempt(place, parts)
            problem = attempt.problem(self.comm)
            if problem is None:
                return attempt, tuple(damaged)
            # A job that keeps few may have removed it meanwhile, and then written another.
            listed = self._list()
            if place not in listed:
                rotated += 1
                continue
            damaged.append(problem)
            if self.comm.rank == 0:
                warnings.warn(
                    f"{place.path} is damaged, taking the one before: {problem}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        reasons = "".join(f"\n  {line}" for line in damaged)
        if rotated:
            reasons += f"\n  {rotated} removed while they were read: let who writes keep more"
        raise CheckpointError(f"{self.folder} has {what} that can be loaded{reasons}")

    def probe(self) -> None:
        """Raise CheckpointError now if the folder cannot be made, written, or seen by all ranks."""
        _, made = self._open(0, 0)
        if made is not None:
            made.discard()

    def newest(self) -> int | None:
        """Return the step of the newest checkpoint, None where there is none; by name alone."""
        return next((place.step for place in self._list()), None)

    def _list(self) -> list[Place]:
        """Return the checkpoints that rank 0 sees, the newest first.

        Once what is being written is whole.
        """
        self.wait()
        complaint, found = "", list[Place]()
        if self.comm.rank == 0:
            try:
                found = places(self.folder)
            except OSError as error:
                complaint = str(error)
        agree(self.comm, complaint, f"reading {self.folder}")
        rows = [(p.sequence, p.step, os.path.relpath(p.path, self.folder)) for p in found]
        told = json.loads(gather_texts(self.comm, json.dumps(rows))[0])
        return [Place(sequence, step, self.folder / name) for sequence, step, name in told]

    def give_up(self) -> None:
        """Stop what is being written; not collective."""
        writing, self._writing, self._others = self._writing, None, None
        if writing is not None:
            writing.give_up()

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, SystemExit):
            self._finish()
        else:
            self.give_up()

    def _finish(self) -> None:
        """Return when what this rank has begun is whole; not collective: others may go on.

        They write their files all the same, so rank 0 waits for these as long as patience lasts.
        """
        writing, self._writing, self._others = self._writing, None, None
        if writing is not None:
            writing.join()
            if writing.error:
                what = f"checkpoint of step {writing.job.step} in {self.folder}"
                raise CheckpointError(f"{what}: rank {self.comm.rank}: {writing.error}")

    def _open(self, step: int, nbytes: int, complaint: str = "") -> tuple[Path, Partial | None]:
        """Return the folder to write in, and on rank 0 what holds it.

        complaint: why this rank cannot write, or no text.
        """
        made = None
        if self.comm.rank == 0 and not complaint:
            try:
                if any(place.path == self.folder for place in places(self.folder)[:1]):
                    raise FileExistsError("the folder is a checkpoint; name one to hold some")
                made = make_partial(self.folder, step, nbytes)
            except OSError as error:
                complaint = str(error)
        what = f"checkpoint of step {step} in {self.folder}"
        try:
            agree(self.comm, complaint, what)
            name = gather_texts(self.comm, "" if made is None else made.path.name)[0]
            folder = self.folder / name
            end = time.monotonic() + _VISIBLE
            while not folder.is_dir() and time.monotonic() < end:
                time.sleep(0.01)
            seen = "" if folder.is_dir() else "does not see the folder that rank 0 has made"
            agree(self.comm, seen, what)
        except BaseException:
            if made is not None:
                made.discard()
            raise
        return folder, made


def save(
    folder: str | Path,
    state: Mapping[str, Any],
    comm: Communicator,
    *,
    step: int = 0,
    keep: int | None = None,
) -> None:
    """Write one checkpoint and wait until it is whole; see `Checkpoints`.  Collective."""
    with Checkpoints(folder, comm, keep=keep) as checkpoints:
        checkpoints.save(state, step)


def load(
    folder: str | Path, state: Mapping[str, Any], comm: Communicator, *, step: int | None = None
) -> Loaded:
    """Restore a state from the newest whole checkpoint; see `Checkpoints.load`.  Collective."""
    return Checkpoints(folder, comm).load(state, step)
