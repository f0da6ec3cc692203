"""Send one rank's optimizer to all, as after a checkpoint was read on that rank alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .objects import broadcast_object
from .replicas import check_equal, check_root, dtype_name
from .sharded_optimizer import ShardedOptimizer
from .strides import laid_out_like

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["broadcast_optimizer"]


@dataclass(frozen=True)
class _Place:
    """Stand for a tensor in a nested value that travels without its tensors."""

    position: int


@dataclass(frozen=True)
class _Parameter:
    """Stand for a parameter of the optimizer, by its position over all groups."""

    position: int


def broadcast_optimizer(optimizer: Optimizer, comm: Communicator, root: int = 0) -> None:
    """Make every rank's optimizer equal to root's in hyper-parameters and state.

    Values keep their Python types and dtypes, whatever there is: no state, a part of it, several
    groups, frozen parameters, schedulers' entries in the groups. Collective. ValueError on every
    rank, before anything is changed, if the kinds of optimizer, or the numbers, shapes or dtypes of
    parameters differ; the parameters themselves are not sent. TypeError on every rank, as early,
    for a ShardedOptimizer, which holds other state on every rank, and for entries without a pickle.
    """
    check_root(comm, root)
    kind = type(optimizer).__name__
    lines = [
        f"{kind}, group {number}: {tuple(parameter.shape)} {dtype_name(parameter.dtype)}"
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    ]
    check_equal(comm, [*lines, kind], "parameters of the optimizer")
    if isinstance(optimizer, ShardedOptimizer):
        raise TypeError(
            f"{kind} holds a part of the state on each rank: give the whole state, as of its "
            "state_dict, to load_state_dict on every rank"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: list[Tensor] = []
    sent: Any = None
    if comm.rank == root:
        positions = {p: _Parameter(i) for i, p in enumerate(parameters)}
        state = [(positions.get(key, key), value) for key, value in optimizer.state.items()]
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        skeleton = _take([groups, state], tensors)
        sent = skeleton, [(t.dtype, tuple(t.shape), t.is_cuda) for t in tensors]
    skeleton, described = broadcast_object(sent, comm, root)
    if comm.rank != root:
        # Some of an optimizer's state stays on the host, wherever the parameters are.
        there = parameters[0].device if parameters else torch.device("cpu")
        tensors = [
            torch.empty(shape, dtype=dtype, device=there if on_gpu else "cpu")
            for dtype, shape, on_gpu in described
        ]
    for tensor in tensors:
        # What travels is contiguous, whatever the strides here and there.
        flat = tensor.detach().contiguous()
        comm.broadcast(flat, root=root)
    if comm.rank == root:
        return
    groups, state = _put(skeleton, tensors)
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        own = group["params"]
        group.clear()
        group.update({"params": own, **given})
    optimizer.state.clear()
    for key, value in state:
        if isinstance(key, _Parameter):
            optimizer.state[parameters[key.position]] = _laid_out(value, parameters[key.position])
        else:
            optimizer.state[key] = value


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
