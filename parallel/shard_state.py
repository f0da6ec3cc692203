"""Gather a sharded optimizer's state by full parameter name, and take a part of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .objects import allgather_objects
from .shard import Piece, Shard

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["gather_state", "own_state"]

State = dict[str, dict[str, Any]]

# By name, since a parameter of no dimension has state of no dimension as well.
_SCALARS = ("step", "eta", "mu", "mu_product")


def gather_state(
    shards: Sequence[Shard],
    inner: Mapping[Any, Mapping[str, Any]],
    comm: Communicator,
    root: int | None,
) -> State:
    """Return name -> key -> tensor of the parameter's shape, or scalar; collective.

    inner: the state of this rank's pieces. root: the only rank that gets it; None for all.
    """
    described = allgather_objects([_describe(shard, inner) for shard in shards], comm)
    state: State = {}
    for number, shard in enumerate(shards):
        entries: dict[str, dict[str, Any]] = {}
        for rank in described:
            entries.update(rank[number])
        columns = sorted(
            {(k, v) for e in entries.values() for k, v in e.items() if _is_dtype(k, v)}
        )
        wholes = {key: _gather(shard, inner, key, dtype, comm, root) for key, dtype in columns}
        for name, parameter, place in shard.columns():
            if name not in entries or root not in (None, comm.rank):
                continue
            state[name] = {
                key: wholes[key][place].view(parameter.shape).clone()
                if _is_dtype(key, value)
                else value
                for key, value in entries[name].items()
            }
    return state


def own_state(shards: Sequence[Shard], state: Mapping[str, Mapping[str, Any]]) -> dict[Any, Any]:
    """Return piece -> key -> this rank's elements of a whole state.

    ValueError for a name that no shard has, or a tensor of another shape than its parameter.
    """
    members = {name: parameter for shard in shards for name, parameter in shard.members}
    for name, entry in state.items():
        if name not in members:
            raise ValueError(f"the state holds {name}, which is no parameter of this optimizer")
        for key, value in entry.items():
            if _is_elementwise(key, value) and value.shape != members[name].shape:
                raise ValueError(
                    f"{key} of {name}: expected shape {tuple(members[name].shape)}, got "
                    f"{tuple(value.shape)}"
                )
    return {
        piece.parameter: {key: _part(piece, key, value) for key, value in state[piece.name].items()}
        for shard in shards
        for piece in shard.pieces
        if piece.name in state
    }


def _is_elementwise(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and key not in _SCALARS


def _is_dtype(key: str, value: Any) -> bool:
    return key not in _SCALARS and isinstance(value, str) and value.startswith("torch.")


def _describe(shard: Shard, inner: Mapping[Any, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return name -> key -> the dtype of a tensor of elements, or the scalar itself."""
    return {
        piece.name: {
            key: str(value.dtype) if _is_elementwise(key, value) else value
            for key, value in inner[piece.parameter].items()
        }
        for piece in shard.pieces
        if inner.get(piece.parameter)
    }


def _gather(
    shard: Shard,
    inner: Mapping[Any, Mapping[str, Any]],
    key: str,
    dtype: str,
    comm: Communicator,
    root: int | None,
) -> Tensor:
    named = getattr(torch, dtype.removeprefix("torch."))
    mine = torch.zeros(shard.length, dtype=named, device=shard.flat.device)
    for piece in shard.pieces:
        value = inner.get(piece.parameter, {}).get(key)
        if value is not None:
            mine[piece.at] = value
    rows = comm.allgather(mine) if root is None else comm.gather(mine, root=root)
    return mine.new_empty(0) if rows is None else rows.reshape(-1)


def _part(piece: Piece, key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not _is_elementwise(key, value):
        return value.clone()
    return value.reshape(-1)[piece.first : piece.end].clone()
