"""Arrange ranks on two axes: replicas of the data, stages of the pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..comm.arguments import whole
from ..comm.scope import Scope
from .demands import require_comm

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["Mesh"]


class Mesh(Scope):
    """Lay the ranks of a communicator out as data x pipe.

    The pipe index varies fastest: rank = data_index * pipe + pipe_index, so that neighbouring
    stages, which exchange activations, sit on neighbouring ranks. Collective over `comm`.

    Attributes:
        comm: the communicator of the whole mesh, owned by the caller.
        data: the ranks that hold the same stage; `data.rank` is this rank's replica.
        pipe: the ranks that hold the same replica; `pipe.rank` is this rank's place in the pipe.
    """

    comm: Communicator
    data: Communicator
    pipe: Communicator

    def __init__(self, comm: Communicator, *, data: int | None = None, pipe: int = 1) -> None:
        """Split `comm`; without `data`, as many replicas as the ranks allow.

        ValueError on every rank unless data x pipe is the number of ranks.
        """
        require_comm(comm)
        data, pipe = None if data is None else whole("data", data), whole("pipe", pipe)
        if data is None and pipe >= 1 and comm.size % pipe == 0:
            data = comm.size // pipe
        if data is None or data < 1 or pipe < 1 or data * pipe != comm.size:
            shown = "ranks / pipe" if data is None else data
            raise ValueError(
                f"a mesh of data={shown} x pipe={pipe} does not fit {comm.size} ranks: "
                f"expected data * pipe == {comm.size}, both at least 1"
            )
        data_index, pipe_index = divmod(comm.rank, pipe)
        self.comm = comm
        self.data = comm.split(pipe_index, key=data_index)
        self.pipe = comm.split(data_index, key=pipe_index)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (data, pipe)."""
        return self.data.size, self.pipe.size

    @property
    def coordinates(self) -> tuple[int, int]:
        """Return (data index, pipe index) of this rank."""
        return self.data.rank, self.pipe.rank

    def rank_at(self, data_index: int, pipe_index: int) -> int:
        """Return the rank in `comm` at these coordinates; IndexError outside of the mesh."""
        num_data, num_pipe = self.shape
        if not (0 <= data_index < num_data and 0 <= pipe_index < num_pipe):
            raise IndexError(
                f"({data_index}, {pipe_index}) is outside of the mesh of {num_data} x {num_pipe}"
            )
        return data_index * num_pipe + pipe_index

    def close(self) -> None:
        """Close `data` and `pipe`; `comm` stays open."""
        self.pipe.close()
        self.data.close()

    def require_open(self) -> None:
        """Raise CommError where it is closed; for the package's own use."""
        self.pipe.require_open()
        self.data.require_open()

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            self.close()

    def __repr__(self) -> str:
        return f"Mesh(data={self.data.size}, pipe={self.pipe.size}, at {self.coordinates})"
