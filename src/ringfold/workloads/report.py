"""What a training run leaves behind: one JSON file, and a digest of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..comm.text_file import why_unwritable, write_whole
from ..parallel.tensors import flat_bytes
from .options import UsageError

if TYPE_CHECKING:
    from ..parallel.mesh import Mesh

__all__ = ["CheckpointTimes", "Report", "check_writable", "weights_sha256", "write"]


@dataclass(frozen=True)
class CheckpointTimes:
    """Say how many checkpoints were written, and what they cost on rank 0.

    Training stood still for `stood_still_seconds` in all; writing took `writing_seconds`, in the
    background.
    """

    count: int
    stood_still_seconds: float
    writing_seconds: float


@dataclass(frozen=True)
class Report:
    """Hold the numbers of a run; `losses` has one entry per step, of the global batch.

    `seconds` is the time of the steps alone, without set-up and evaluation; a resumed run's are
    those from `resumed_at` on. `wire_bytes` is what all ranks together have put into the reductions
    of gradients, flags included; 0 with one replica, and those in a tree are not counted.
    `events`: ranks that died or joined, of an elastic run.
    """

    workload: str
    ranks: int
    data: int
    pipe: int
    steps: int
    seconds: float
    samples_per_second: float
    losses: Sequence[float]
    final_metric: dict[str, float]
    weights_sha256: str
    wire_bytes: int = 0
    resumed_at: int = 0
    checkpoints: CheckpointTimes | None = None
    dump: str | None = None
    events: Sequence[dict[str, Any]] = ()


def check_writable(files: Mapping[str, Path | None]) -> None:
    """Raise UsageError where the file of an option could not be written, without writing it."""
    for option, path in files.items():
        if path is not None and (refused := why_unwritable(path)):
            raise UsageError(f"{option} {refused}")


def write(path: Path, report: Report) -> None:
    """Write the file at once, so that a reader finds the old report or the new one."""
    write_whole(path, json.dumps(asdict(report), indent=1, allow_nan=False) + "\n")


def weights_sha256(
    mesh: Mesh, whole: Iterable[tuple[str, Tensor]], mine: Iterable[tuple[str, Tensor]]
) -> str:
    """Return one digest over all parameters by full name, the same text on every rank.

    `whole` lists the unsplit model's parameters, of which names, shapes and types count; `mine` the
    trained ones that this rank holds.  Collective.  RuntimeError where the data ranks have come to
    different weights.
    """
    names = {name: (row, tensor) for row, (name, tensor) in enumerate(whole)}
    rows = np.zeros((len(names), 32), np.uint8)
    held = np.zeros(len(names), np.uint8)
    for name, tensor in mine:
        row, like = names[name]
        assert tensor.shape == like.shape and tensor.dtype == like.dtype, name
        rows[row] = np.frombuffer(_digest(tensor), np.uint8)
        held[row] = 1
    mesh.pipe.allreduce(rows, op="max")  # a row that a stage does not hold is zeros there
    mesh.pipe.allreduce(held, op="max")
    assert held.all(), [name for name, (row, _) in names.items() if not held[row]]
    total = hashlib.sha256()
    for name, (row, like) in names.items():
        total.update(
            f"{name} {like.dtype} {tuple(like.shape)} {rows[row].tobytes().hex()}\n".encode()
        )
    everyone = mesh.data.allgather(np.frombuffer(total.digest(), np.uint8))
    differing = [rank for rank, found in enumerate(everyone) if (found != everyone[0]).any()]
    if differing:
        raise RuntimeError(f"data ranks {differing} hold other weights than data rank 0")
    return total.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(flat_bytes(tensor.cpu()).numpy().tobytes()).digest()
