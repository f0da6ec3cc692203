"""Take the objects of a training run apart into named tensors and values, and restore them.

Names do not depend on the rank that holds something: a parameter is MODEL/full.name, an optimizer's
state OPTIMIZER/state/full.name/key (`names`). That is why a checkpoint fits any grid.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data_parallel import DataParallel
from ..pipeline import Pipeline
from ..sharded_optimizer import ShardedOptimizer
from .carried_part import CarriedPart
from .errors import CheckpointError
from .fitting import entry_at, fit, fit_shared, value_at
from .manifest import Manifest
from .module_names import is_extra, loaded_by_code, saved_names
from .names import Names
from .optimizer_part import OptimizerPart
from .sharded_part import ShardedPart
from .streams import RandomStreams, StreamsPart
from .values import decode, encode, references

__all__ = ["Captured", "Part", "Value", "parts_of"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Captured:
    """What one rank holds: tensors by full name (not copied), and JSON values by path.

    alike: the full names of those that must be alike on all ranks: parameters, not buffers, and an
    optimizer's state of them.
    equal: of those that must be equal to the bit, as numbers are: what is given by value.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    alike: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)


class Part(Protocol):
    """One named object of a state."""

    whole: str
    """Which tensors of it some rank must want, see `attempt`: module, optimizer, or no text."""

    def capture(self, into: Captured) -> None:
        """Add this rank's tensors and values; CheckpointError for what cannot be kept."""

    def wanted(self, manifest: Manifest) -> list[str]:
        """Return the tensors that this rank needs; CheckpointError if one does not fit."""

    def restore(self, manifest: Manifest, tensors: Tensors) -> Any:
        """Write into the object, in place, or return the value.

        What fits cannot fail, but for code of the user's.
        """


class Model:
    """A module, or an engine around one: names from its own state_dict."""

    whole = "module"

    def __init__(self, path: str, module: Any) -> None:
        self.path, self.module = path, module

    def capture(self, into: Captured) -> None:
        learned = {name for name, _, _ in saved_names(self.module)}
        for name, value in self.module.state_dict().items():
            path = f"{self.path}/{name}"
            if isinstance(value, Tensor):
                into.tensors[path] = value
                if name in learned:
                    into.alike.append(path)
            else:
                into.values[path] = encode(value, path, into.tensors)

    def wanted(self, manifest: Manifest) -> list[str]:
        names = []
        own = loaded_by_code(self.module)
        for name, value in self.module.state_dict().items():
            path = f"{self.path}/{name}"
            if path in manifest.values or not (isinstance(value, Tensor) or is_extra(name)):
                names += references(value_at(manifest, path))
                continue
            if is_extra(name) or name.startswith(own):
                entry_at(manifest, path)
            else:
                fit(manifest, path, value)
            names.append(path)
        if isinstance(self.module, Pipeline):
            fit_shared(manifest, self.path, self.module.shared_names)
        return names

    def restore(self, manifest: Manifest, tensors: Tensors) -> None:
        state = {
            name: decode(manifest.values[path], tensors.__getitem__)
            if path in manifest.values
            else tensors[path]
            for name in self.module.state_dict()
            for path in (f"{self.path}/{name}",)
        }
        self.module.load_state_dict(state)


class Value:
    """A nesting of plain values and tensors, the same on every rank; or what gives such a one."""

    whole = ""

    def __init__(self, path: str, value: Any) -> None:
        self.path, self.value = path, value
        self.foreign = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")

    def held(self) -> Any:
        """Return a copy of what the object holds, for `put_back`."""
        return copy.deepcopy(self.value.state_dict())

    def put_back(self, held: Any) -> None:
        """Give the object again what it held."""
        self.value.load_state_dict(held)

    def capture(self, into: Captured) -> None:
        value = self.value.state_dict() if self.foreign else self.value
        into.values[self.path] = encode(value, self.path, into.tensors)
        into.equal.extend(references(into.values[self.path]))

    def wanted(self, manifest: Manifest) -> list[str]:
        return references(value_at(manifest, self.path))

    def restore(self, manifest: Manifest, tensors: Tensors) -> Any:
        value = decode(manifest.values[self.path], tensors.__getitem__)
        if not self.foreign:
            return value
        self.value.load_state_dict(value)
        return None


def parts_of(state: Mapping[str, Any], rank: int, num_ranks: int) -> dict[str, Part]:
    """Choose how each object of a state is kept; CheckpointError for a name that holds a slash."""
    names = Names(state)
    parts: dict[str, Part] = {}
    for path, value in state.items():
        if not isinstance(path, str) or not path or "/" in path or ":" in path:
            raise CheckpointError(f"expected names without slash or colon in a state, got {path!r}")
        if isinstance(value, nn.Module) or hasattr(value, "named_parameters"):
            parts[path] = Model(path, value)
            for place, engine in _engines(value, num_ranks):
                own = f"{path}:carried{place and f':{place}'}"
                parts[own] = CarriedPart(own, engine)
        elif isinstance(value, ShardedOptimizer):
            parts[path] = ShardedPart(path, value, names)
        elif isinstance(value, torch.optim.Optimizer):
            parts[path] = OptimizerPart(path, value, names)
        elif isinstance(value, RandomStreams):
            parts[path] = StreamsPart(path, value, rank, num_ranks)
        else:
            parts[path] = Value(path, value)
    return parts


def _engines(value: Any, num_ranks: int) -> list[tuple[str, DataParallel | Pipeline]]:
    """Return what carries something from step to step: the object, and wrappers in a module.

    But for those over a part of the ranks, which number these by themselves.
    """
    if not isinstance(value, nn.Module):
        return [("", value)] if isinstance(value, Pipeline) else []
    found = [(place, m) for place, m in value.named_modules() if isinstance(m, DataParallel)]
    return [
        (place, engine)
        for place, engine in found
        if not place or (engine.comm is not None and engine.comm.size == num_ranks)
    ]
