"""Collectives within a loss: results through which backward goes on to all ranks' inputs.

What gradients mean: where rank r has the loss L_r, the gradient of a rank's x is that of the sum of
all L_r, and the mean of `DataParallel` makes of it the gradient of the mean of all L_r.

Each of these is a linear map of what all ranks hold, so its backward is the transposed map, which
is one of them again, and can be differentiated in turn. Backward is collective: the losses of all
ranks depend on the result, and reach several such calls in the same order, as equal programs do. It
takes part on a rank whose x needs no gradient, too; for what needs none on any rank there are the
communicator's own calls. Give it a communicator on which nothing else goes on beside backward:
that of a `DataParallel` is one, for a `Pipeline` take `mesh.data.split(0)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..comm.uneven import checked_counts
from .replica_calls import Call, meet, note
from .tensors import real_view

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = [
    "allgather",
    "allgatherv",
    "allreduce",
    "alltoall",
    "alltoallv",
    "broadcast",
    "reduce_scatter",
]


def allreduce(x: Tensor, comm: Communicator, op: Literal["sum", "mean"] = "sum") -> Tensor:
    """Return the sum or the mean of all ranks' x; x stays as it is. Collective."""
    if op not in ("sum", "mean"):
        raise ValueError(f"op {op!r}: expected 'sum' or 'mean', which are linear")
    return _apply(x, comm, Allreduce(op))


def allgather(x: Tensor, comm: Communicator) -> Tensor:
    """Return all ranks' x, of shape (size, *x.shape). Collective."""
    return _apply(x, comm, Allgather())


def reduce_scatter(x: Tensor, comm: Communicator) -> Tensor:
    """Return the sum of this rank's row of all ranks' x: (size, *shape) -> shape. Collective."""
    _require_rows(x, comm)
    return _apply(x, comm, ReduceScatter())


def alltoall(x: Tensor, comm: Communicator) -> Tensor:
    """Return the rows that the ranks have for this one: (size, *shape) -> the same. Collective."""
    _require_rows(x, comm)
    return _apply(x, comm, Alltoall())


def allgatherv(x: Tensor, comm: Communicator) -> Tensor:
    """Return all ranks' x joined along the first axis, of another length on each. Collective."""
    counts = _exchanged(comm.allgather, [len(x)], comm, Allgather())
    return _apply(x, comm, Allgatherv(counts))


def alltoallv(x: Tensor, counts: Iterable[int], comm: Communicator) -> tuple[Tensor, list[int]]:
    """Send the first counts[0] rows of x to rank 0, and so on. Collective.

    Returns: the rows that the ranks have for this one, and how many from each.
    """
    sent = checked_counts(counts, comm.size, len(x))
    received = _exchanged(comm.alltoall, sent, comm, Alltoall())
    return _apply(x, comm, Alltoallv(tuple(sent), received)), list(received)


def broadcast(x: Tensor, comm: Communicator, root: int = 0) -> Tensor:
    """Return root's x, whose gradient is the sum of those of all results. Collective.

    x has root's shape on every rank, and stays as it is.
    """
    return _apply(x, comm, Broadcast(root))


@dataclass(frozen=True)
class Allreduce:
    op: str

    def __call__(self, x: Tensor, comm: Communicator) -> Tensor:
        result = _copy(x)
        comm.allreduce(real_view(result), op=self.op)
        return result

    @property
    def transposed(self) -> Move:
        return self


@dataclass(frozen=True)
class Allgather:
    def __call__(self, x: Tensor, comm: Communicator) -> Tensor:
        result: Tensor = comm.allgather(_dense(x))
        return result

    @property
    def transposed(self) -> Move:
        return ReduceScatter()


@dataclass(frozen=True)
class ReduceScatter:
    def __call__(self, x: Tensor, comm: Communicator) -> Tensor:
        rows = real_view(_dense(x))
        part: Tensor = comm.reduce_scatter(rows)  # equal rows are the parts of all
        part = part.reshape(rows.shape[1:])
        return torch.view_as_complex(part) if x.is_complex() else part

    @property
    def transposed(self) -> Move:
        return Allgather()


@dataclass(frozen=True)
class Alltoall:
    def __call__(self, x: Tensor, comm: Communicator) -> Tensor:
        result: Tensor = comm.alltoall(_dense(x))
        return result

    @property
    def transposed(self) -> Move:
        return self


@dataclass(frozen=True)
class Allgatherv:
    """counts: how many rows each rank has."""

    counts: tuple[int, ...]

    def __call__(self, x: Tensor, comm: Communicator) -> Tensor:
        return comm.allgatherv(_dense(x))

    @property
    def transposed(self) -> Move:
        return ReduceScatterv(self.counts)


@dataclass(frozen=True)
class ReduceScatterv:
    """Add what all ranks have for this one; counts: how many rows each rank gets."""

    counts: tuple[int, ...]

    def __call__(self, x: Tensor, comm: Communicator) -> Tensor:
        rows, _ = comm.alltoallv(_dense(x), self.counts)
        return rows.reshape(comm.size, self.counts[comm.rank], *x.shape[1:]).sum(0)

    @property
    def transposed(self) -> Move:
        return Allgatherv(self.counts)


@dataclass(frozen=True)
class Alltoallv:
    """sent, received: how many rows go to each rank, and come from each."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    def __call__(self, x: Tensor, comm: Communicator) -> Tensor:
        rows, _ = comm.alltoallv(_dense(x), self.sent)
        return rows

    @property
    def transposed(self) -> Move:
        return Alltoallv(self.received, self.sent)


@dataclass(frozen=True)
class Broadcast:
    root: int

    def __call__(self, x: Tensor, comm: Communicator) -> Tensor:
        result: Tensor = comm.broadcast(_copy(x), root=self.root)
        return result

    @property
    def transposed(self) -> Move:
        return Reduce(self.root)


@dataclass(frozen=True)
class Reduce:
    root: int

    def __call__(self, x: Tensor, comm: Communicator) -> Tensor:
        result = _copy(x)
        comm.reduce(real_view(result), root=self.root)
        return result if comm.rank == self.root else torch.zeros_like(result)

    @property
    def transposed(self) -> Move:
        return Broadcast(self.root)


Move = (
    Allreduce
    | Allgather
    | ReduceScatter
    | Alltoall
    | Allgatherv
    | ReduceScatterv
    | Alltoallv
    | Broadcast
    | Reduce
)
"""A linear map of the ranks' tensors."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, anchor: Tensor, comm: Communicator, move: Move) -> Tensor:
        return meet(x, comm, move)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.comm, ctx.move = inputs

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, ...], x: Tensor, anchor: Tensor, comm: Any, move: Move
    ) -> tuple[Tensor, int]:
        # Behind all axes, of which the first may be the ranks'.
        result = _apply(x.movedim(in_dims[0], -1), comm, move)
        return result, result.dim() - 1

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *rest: None) -> Tensor:
        return _apply(tangent, ctx.comm, ctx.move)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(gradient, ctx.comm, ctx.move.transposed), None, None, None


def _apply(x: Tensor, comm: Communicator, move: Move) -> Tensor:
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        what = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"x: expected a torch tensor of floats, got {what}: what has no gradient goes by the "
            "communicator's own calls"
        )
    result: Tensor = _meet(x, comm, move)
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _meet(x: Tensor, comm: Communicator, move: Move) -> Any:
    # So that all ranks take part in backward, whoever of them has an x that needs a gradient.
    anchor = torch.empty(0, device="cpu", requires_grad=True)
    return _Linear.apply(x, anchor, comm, move)  # type: ignore[no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _exchanged(
    call: Callable[[Any], Any], counts: list[int], comm: Communicator, move: Move
) -> tuple[int, ...]:
    """Exchange counts by a call, and note its move, as all that layers call is noted.

    In NumPy's arrays: a tensor made within a transform of torch.func has no memory to send.
    """
    found = call(np.array(counts, np.int64))
    note(Call(move, comm, (len(counts),), torch.int64, torch.device("cpu")))
    return tuple(found.ravel().tolist())


def _copy(x: Tensor) -> Tensor:
    return x.detach().resolve_conj().clone(memory_format=torch.contiguous_format)


def _dense(x: Tensor) -> Tensor:
    return x.resolve_conj().contiguous()


def _require_rows(x: Tensor, comm: Communicator) -> None:
    if isinstance(x, Tensor) and (x.dim() == 0 or len(x) != comm.size):
        raise ValueError(
            f"x: expected a first axis of {comm.size}, a row per rank, got shape {tuple(x.shape)}"
        )
