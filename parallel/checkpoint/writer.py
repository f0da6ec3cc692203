"""Write one checkpoint behind the back of training: every rank its file, rank 0 the manifest.

The ranks tell each other through the folder, which they share anyway: their collectives belong to
training meanwhile.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import write_tensors, write_text
from .manifest import Entry, Manifest
from .partial import Partial
from .store import commit, part_name, thin_out

__all__ = ["Job", "Writing"]

_LOOK = 0.005
"""Seconds between two looks of rank 0 for what the others have finished."""


@dataclass(frozen=True)
class Job:
    """All that writing needs to know; the tensors are this rank's own copies.

    folder: where all ranks write.  made: the same on rank 0, which has made it.
    keep: how many checkpoints stay, None for all.  patience: seconds for the slowest rank.
    """

    folder: Path
    made: Partial | None
    step: int
    rank: int
    num_ranks: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    keep: int | None
    patience: float


class Writing:
    """One checkpoint on its way to the disk, in a thread.

    path: of the whole checkpoint, on rank 0.  stays: why an old one could not be removed then.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.seconds = 0.0
        self.error: str = ""
        self.path: Path | None = None
        self.stays = ""
        self._own_done = threading.Event()
        self._own_error = ""
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ringfold-checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Tell whether the thread still works; the others' may, too."""
        return self._thread.is_alive()

    def wait_for_own(self) -> str:
        """Wait until this rank's file is on the disk; return what went wrong, or no text."""
        self._own_done.wait()
        return self._own_error

    def join(self) -> None:
        """Wait until this rank has nothing more to do: rank 0, for the files of all others."""
        self._thread.join()

    def give_up(self) -> None:
        """End soon, without a checkpoint unless it is whole already."""
        self._given_up.set()
        self._thread.join()

    def _run(self) -> None:
        start = time.perf_counter()
        job = self.job
        try:
            done: dict[str, Any] = self._write_own()
            self._own_done.set()
            if job.made is not None:
                rows = [done, *(self._result_of(rank) for rank in range(1, job.num_ranks))]
                self.path = commit(job.made, self._manifest(rows))
                if job.keep is not None:
                    self.stays = thin_out(self.path.parent, job.keep)
        except Exception as error:  # the waiter reports it, on all ranks
            self.error = f"{type(error).__name__}: {self._cause(error)}"
            if not self._own_done.is_set():
                self._own_error = self.error
            if job.made is not None:
                job.made.discard()
            else:
                with suppress(OSError):  # rank 0 has removed the folder, or is told by `wait`
                    self._tell({"error": self.error})
        self.seconds = time.perf_counter() - start
        self._own_done.set()

    def _cause(self, error: Exception) -> str:
        """Say what is missing: the folder itself, whichever of its files was looked for."""
        folder = self.job.folder
        missing = error.filename if isinstance(error, FileNotFoundError) else None
        if missing and Path(missing).is_relative_to(folder) and not folder.exists():
            return f"{folder} has been removed"
        return str(error)

    def _write_own(self) -> dict[str, Any]:
        job = self.job
        name = f"{part_name(job.rank)}.safetensors"
        nbytes, entries = write_tensors(job.folder / name, job.tensors)
        done = {
            "file": name,
            "nbytes": nbytes,
            "tensors": {key: asdict(entry) for key, entry in entries.items()},
        }
        if job.rank != 0:
            self._tell(done)
        return done

    def _tell(self, what: Mapping[str, Any]) -> None:
        write_text(self.job.folder / f"{part_name(self.job.rank)}.json", json.dumps(what))

    def _result_of(self, rank: int) -> dict[str, Any]:
        path = self.job.folder / f"{part_name(rank)}.json"
        end = time.monotonic() + self.job.patience
        while not path.exists():
            if self._given_up.is_set():
                raise InterruptedError("the checkpoint was given up")
            self.job.folder.stat()  # FileNotFoundError where somebody has removed it
            if time.monotonic() > end:
                raise TimeoutError(
                    f"rank {rank} has not written its part within {self.job.patience:g} s"
                )
            time.sleep(_LOOK)
        result: dict[str, Any] = json.loads(path.read_text())
        if "error" in result:
            raise OSError(f"rank {rank} could not write its part: {result['error']}")
        path.unlink()
        return result

    def _manifest(self, rows: list[dict[str, Any]]) -> Manifest:
        job = self.job
        return Manifest(
            step=job.step,
            ranks=job.num_ranks,
            files={row["file"]: row["nbytes"] for row in rows},
            tensors={
                key: Entry(e["file"], e["dtype"], tuple(e["shape"]), e["sha256"])
                for row in rows
                for key, e in row["tensors"].items()
            },
            values=job.values,
        )
