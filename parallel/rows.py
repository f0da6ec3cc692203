"""Agree on the rows of a batch before any of them is sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..comm.texts import gather_texts
from .batch import count_rows

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from .mesh import Mesh

__all__ = ["agree_on_rows", "agree_on_rows_of_pipe"]

_NOT_GIVEN = -1
_REFUSED = -2


def agree_on_rows(mesh: Mesh, x: Any, y: Any, meets: bool) -> tuple[tuple[int, ...], bool]:
    """Return the rows of every replica's batch, by replica, and whether any rank `meets`.

    x: looked at on first stages; None has no rows.  y: on last stages, if given.
    meets: whether layers of this rank meet other replicas in their forward.

    Collective over mesh.comm. ValueError on every rank if no replica has rows. If a batch is unfit,
    its rank raises the error itself, and all others a ValueError with the text and the rank.
    """
    count = partial(_count, mesh.pipe, x, y, meets)
    table = _gathered(mesh.comm, count, lambda rank: f"rank {rank} of the mesh")
    num_data, num_pipe = mesh.shape
    rows_x = table[[mesh.rank_at(d, 0) for d in range(num_data)], 0].tolist()
    rows_y = table[[mesh.rank_at(d, num_pipe - 1) for d in range(num_data)], 1].tolist()
    for replica, (in_x, in_y) in enumerate(zip(rows_x, rows_y, strict=True)):
        if in_y not in (_NOT_GIVEN, in_x):
            raise ValueError(
                f"replica {replica}: x has {in_x} rows on the first stage, y has {in_y} on the last"
            )
    if sum(rows_x) == 0:
        raise ValueError(
            "the global batch has no rows: expected a tensor with rows as x on a first stage"
        )
    return tuple(map(int, rows_x)), bool(table[:, 2].any())


def agree_on_rows_of_pipe(pipe: Communicator, x: Any, y: Any) -> int:
    """Return the rows of x as the first stage has it, at least one; y, if given, has as many.

    Collective over `pipe`; raises on every rank as `agree_on_rows` does.
    """
    last = pipe.size - 1
    count = partial(_count, pipe, x, y)
    table = _gathered(pipe, count, lambda rank: f"the {'last' if rank else 'first'} stage")
    rows, of_targets = int(table[0, 0]), int(table[last, 1])
    if rows == 0:
        raise ValueError("x: expected at least one row, got none")
    if of_targets not in (_NOT_GIVEN, rows):
        raise ValueError(f"x has {rows} rows on the first stage, y has {of_targets} on the last")
    return rows


def _count(pipe: Communicator, x: Any, y: Any, meets: bool = False) -> list[int]:
    """Return the rows of x on the first stage, those of y on the last, and whether it meets."""
    in_x, in_y = _NOT_GIVEN, _NOT_GIVEN
    if pipe.rank == 0:
        in_x = 0 if x is None else count_rows(x, "x")
    if pipe.rank == pipe.size - 1 and y is not None:
        in_y = count_rows(y, "y")
    return [in_x, in_y, meets]


def _gathered(
    comm: Communicator, count: Callable[[], list[int]], place: Callable[[int], str]
) -> npt.NDArray[np.int64]:
    """Return what every rank counts; raise on every rank where one refuses.  place: of a rank."""
    error: Exception | None = None
    try:
        mine = np.array(count(), dtype=np.int64)
    except (TypeError, ValueError) as caught:
        error, mine = caught, np.full(3, _REFUSED, dtype=np.int64)
    table = comm.allgather(mine)
    if _REFUSED in table:
        texts = gather_texts(comm, "" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        rank = next(rank for rank, text in enumerate(texts) if text)
        raise ValueError(f"the batch was refused on {place(rank)}: {texts[rank]}")
    rows: npt.NDArray[np.int64] = table
    return rows
