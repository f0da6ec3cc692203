"""What the reductions of gradients carry from one step to the next, as data to keep and give back.

The order in which gradients arrived decides the buckets, and with them the order of additions; a
compressing wire has errors that it has not sent yet. A run that stops without these goes on with
other bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Carried", "Layout", "StatefulHook", "digest_of", "merged", "placed", "stateful"]

HookState = Mapping[str, Mapping[str, Any]]


@runtime_checkable
class StatefulHook(Protocol):
    """A wire hook that keeps something from step to step; a user's own may do so, too.

    state_dict returns parameter name -> key -> a tensor or a plain value; as its state changes, a
    hook replaces these tensors and does not write to them. load_state_dict takes such a state, in
    place of the hook's own.
    """

    def state_dict(self) -> HookState: ...

    def load_state_dict(self, state: HookState) -> None: ...


@dataclass(frozen=True)
class Layout:
    """How the ranks have laid out their buckets; the same on all of them.

    names: a digest of the parameters' names.
    trainable: the indices of the parameters that are reduced.
    order: indices in the order in which gradients arrive; None if unknown, or of no consequence.
    arrived: whether a pass has told the order.
    limit: the bytes of a bucket, if two passes have led to it; else None.
    """

    names: str
    trainable: tuple[int, ...]
    order: tuple[int, ...] | None
    arrived: bool
    limit: int | None


@dataclass(frozen=True)
class Carried:
    """What one rank carries on.

    names: of the parameters.
    rank, size: of the communicator over which gradients are reduced.
    steps: how many the engine has taken.
    layout: None before the first step.
    wire, hook: the kind of the wire hook, and its state.
    sparse: names of parameters that have had a sparse gradient here.
    """

    names: tuple[str, ...]
    rank: int
    size: int
    steps: int
    layout: Layout | None
    wire: str
    hook: HookState = field(default_factory=dict)
    sparse: tuple[str, ...] = ()


def stateful(hook: object) -> StatefulHook | None:
    """Return a wire hook that keeps something from step to step, else None."""
    return hook if isinstance(hook, StatefulHook) else None


def digest_of(names: Sequence[str]) -> str:
    """Return a digest of names in their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def merged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge what several ranks' hooks keep of one parameter into a state for any number of ranks.

    Tensors of floats are averaged: where every rank goes on with the mean, the mean of what the
    ranks have not sent is the same as before. Of anything else, the first rank's counts.
    """
    found = dict(rows[0])
    for key, first in rows[0].items():
        if isinstance(first, Tensor) and first.is_floating_point() and len(rows) > 1:
            total = torch.zeros_like(first)
            for row in rows:
                total += row[key]
            found[key] = total / len(rows)
    return found


def placed(state: HookState, devices: Mapping[str, torch.device]) -> HookState:
    """Return a hook's state with tensors where the parameters are; of those named only."""
    return {
        name: {k: v.to(devices[name]) if isinstance(v, Tensor) else v for k, v in entry.items()}
        for name, entry in state.items()
        if name in devices
    }
