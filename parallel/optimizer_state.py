"""Send one rank's optimizer to all, as after a checkpoint was read on that rank alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .demands import require_comm
from .objects import broadcast_object
from .optimizer_dict import ids_of, load_into, state_dict_of
from .replicas import check_equal, check_root
from .sharded_optimizer import ShardedOptimizer
from .tensors import dtype_name, laid_out_like

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["broadcast_optimizer"]


@dataclass(frozen=True)
class _Place:
    """Stand for a tensor in a nested value that travels without its tensors."""

    position: int


def broadcast_optimizer(optimizer: Optimizer, comm: Communicator, root: int = 0) -> None:
    """Make every rank's optimizer equal to root's in hyper-parameters and state.

    Values keep their Python types and dtypes, whatever there is: no state, a part of it, several
    groups, frozen parameters, schedulers' entries in the groups, what hooks of its state_dict add.
    An optimizer with a state_dict of its own, as one that wraps another, is read and written by
    that. Collective. ValueError on every rank, before anything is changed, if the kinds of
    optimizer, or the numbers, shapes or dtypes of parameters differ; the parameters themselves are
    not sent. TypeError on every rank, as early, for a ShardedOptimizer, which holds other state on
    every rank, for entries without a pickle, and for a state_dict that does not tell which state is
    whose. ValueError, too, where a load_state_dict of its own, or a hook, raises on some rank.
    """
    require_comm(comm)
    check_root(comm, root)
    kind = type(optimizer).__name__
    told: dict[str, Any] = {}

    def lines() -> list[str]:
        if not isinstance(optimizer, ShardedOptimizer):  # which is refused on all ranks below
            told.update(_told(optimizer))
        return [*_lines(optimizer), kind]

    check_equal(comm, lines, "parameters of the optimizer")
    if isinstance(optimizer, ShardedOptimizer):
        raise TypeError(
            f"{kind} holds a part of the state on each rank: give the whole state, as of its "
            "state_dict, to load_state_dict on every rank"
        )
    given = _sent(optimizer, told, comm, root)

    def load() -> list[str]:
        try:
            if comm.rank != root:
                load_into(optimizer, given)
        except Exception as error:  # code of the user's
            raise ValueError(f"{kind} did not take it: {type(error).__name__}: {error}") from error
        return []

    check_equal(comm, load, "state of the optimizer")


def _lines(optimizer: Optimizer) -> list[str]:
    return [
        f"{type(optimizer).__name__}, group {number}: {tuple(parameter.shape)} "
        f"{dtype_name(parameter.dtype)}"
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    ]


def _told(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state_dict, of plain dicts; TypeError where it cannot be sent."""
    try:
        found = state_dict_of(optimizer)
    except Exception as error:  # code of the user's
        raise ValueError(
            f"{type(optimizer).__name__} did not tell its state: {type(error).__name__}: {error}"
        ) from error
    ids_of(optimizer, found)
    return {**found, "state": dict(found["state"]), "param_groups": list(found["param_groups"])}


def _sent(
    optimizer: Optimizer, told: dict[str, Any], comm: Communicator, root: int
) -> dict[str, Any]:
    """Return root's state_dict, with tensors that lie where this rank's parameters do."""
    tensors: list[Tensor] = []
    sent: Any = None
    if comm.rank == root:
        skeleton = _take(told, tensors)
        sent = skeleton, [(t.dtype, tuple(t.shape), t.is_cuda) for t in tensors]
    skeleton, described = broadcast_object(sent, comm, root)
    if comm.rank != root:
        # Some of an optimizer's state stays on the host, wherever the parameters are.
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        there = next((p.device for p in parameters), torch.device("cpu"))
        tensors = [
            torch.empty(shape, dtype=dtype, device=there if on_gpu else "cpu")
            for dtype, shape, on_gpu in described
        ]
    for tensor in tensors:
        # What travels is contiguous, whatever the strides here and there.
        flat = tensor.detach().contiguous()
        comm.broadcast(flat, root=root)
    if comm.rank == root:
        return told
    given: dict[str, Any] = _put(skeleton, tensors)
    for parameter, name in ids_of(optimizer, given).items():
        if name in given["state"]:
            given["state"][name] = _laid_out(given["state"][name], parameter)
    return given


def _laid_out(state: Any, parameter: Tensor) -> Any:
    if type(state) is not dict:
        return state
    return {
        key: laid_out_like(value, parameter) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def _take(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if type(value) in (list, tuple):
        return type(value)(_take(child, tensors) for child in value)
    if type(value) is dict:
        return {key: _take(child, tensors) for key, child in value.items()}
    return value


def _put(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.position]
    if type(value) in (list, tuple):
        return type(value)(_put(child, tensors) for child in value)
    if type(value) is dict:
        return {key: _put(child, tensors) for key, child in value.items()}
    return value
