"""Take the objects of a training run apart into named tensors and values, and restore them.

Names do not depend on the rank that holds something: a parameter is MODEL/full.name, an optimizer's
state OPTIMIZER/state/full.name/key. That is why a checkpoint fits any grid.
"""

from __future__ import annotations

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
from .files import DTYPES
from .manifest import Manifest
from .streams import RandomStreams, StreamsPart
from .values import decode, encode, references

__all__ = ["Captured", "Part", "parts_of"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Captured:
    """What one rank holds: tensors by full name (not copied), and JSON values by path."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


class Part(Protocol):
    """One named object of a state."""

    whole: bool
    """Whether every tensor of the checkpoint under this name must be wanted by some rank."""

    def capture(self, into: Captured) -> None:
        """Add this rank's tensors and values; TypeError for what cannot be kept."""

    def wanted(self, manifest: Manifest) -> list[str]:
        """Return the tensors that this rank needs; CheckpointError if one does not fit."""

    def restore(self, manifest: Manifest, tensors: Tensors) -> Any:
        """Write into the object, in place, or return the value; what fits cannot fail."""


class Model:
    """A module, or an engine around one: names from its own state_dict."""

    whole = True

    def __init__(self, path: str, module: Any) -> None:
        self.path, self.module = path, module

    def capture(self, into: Captured) -> None:
        for name, value in self.module.state_dict().items():
            path = f"{self.path}/{name}"
            if isinstance(value, Tensor):
                into.tensors[path] = value
            else:
                into.values[path] = encode(value, path, into.tensors)

    def wanted(self, manifest: Manifest) -> list[str]:
        names = []
        for name, value in self.module.state_dict().items():
            path = f"{self.path}/{name}"
            if isinstance(value, Tensor):
                fit(manifest, path, value)
                names.append(path)
            else:
                names += references(value_at(manifest, path))
        return names

    def restore(self, manifest: Manifest, tensors: Tensors) -> None:
        state = {
            name: tensors[path]
            if isinstance(value, Tensor)
            else decode(manifest.values[path], tensors.__getitem__)
            for name, value in self.module.state_dict().items()
            for path in (f"{self.path}/{name}",)
        }
        self.module.load_state_dict(state)


class Optimizer:
    """A torch optimizer, keyed by the full names of its parameters."""

    whole = False

    def __init__(
        self, path: str, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
    ) -> None:
        self.path, self.optimizer, self.names = path, optimizer, names

    def _state(self) -> dict[str, dict[str, Any]]:
        """Return the state of every parameter by name; collective where it is shared out."""
        named = (member for _, members in self._groups() for member in members)
        return {name: dict(self.optimizer.state.get(p, {})) for name, p in named}

    def _groups(self) -> list[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
        """Return every group with its named parameters."""
        found = []
        for group in self.optimizer.param_groups:
            members = []
            for parameter in group["params"]:
                name = self.names.get(parameter)
                if name is not None:
                    members.append((name, parameter))
                elif parameter.numel():  # an empty placeholder is in no state
                    raise CheckpointError(
                        f"{self.path}: a parameter of shape {tuple(parameter.shape)} is in no "
                        "module of the state, so it has no name"
                    )
            found.append((group, members))
        return found

    def capture(self, into: Captured) -> None:
        found = self._state()
        for index, (group, members) in enumerate(self._groups()):
            path = f"{self.path}/groups/{index}"
            hyper = {key: value for key, value in group.items() if key not in _NOT_HYPER}
            into.values[path] = encode(hyper, path, into.tensors)
            for name, _ in members:
                into.values[f"{self.path}/group_of/{name}"] = index
                path = f"{self.path}/state/{name}"
                into.values[path] = encode(found.get(name, {}), path, into.tensors)

    def _saved_group(self, manifest: Manifest, index: int, names: list[str]) -> str:
        paths = [f"{self.path}/group_of/{name}" for name in names]
        saved = {int(value_at(manifest, path)) for path in paths} or {index}
        if len(saved) > 1:
            raise CheckpointError(
                f"{self.path}: parameter group {index} holds parameters of the checkpoint's groups "
                f"{sorted(saved)}"
            )
        return f"{self.path}/groups/{saved.pop()}"

    def wanted(self, manifest: Manifest) -> list[str]:
        names = []
        for index, (_, members) in enumerate(self._groups()):
            group = self._saved_group(manifest, index, [name for name, _ in members])
            names += references(value_at(manifest, group))
            for name, _ in members:
                names += references(value_at(manifest, f"{self.path}/state/{name}"))
        return names

    def restore(self, manifest: Manifest, tensors: Tensors) -> None:
        for index, (group, members) in enumerate(self._groups()):
            path = self._saved_group(manifest, index, [name for name, _ in members])
            group.update(decode(manifest.values[path], tensors.__getitem__))
            on_device = bool(group.get("capturable") or group.get("fused"))
            for name, parameter in members:
                state = decode(manifest.values[f"{self.path}/state/{name}"], tensors.__getitem__)
                if not state:  # it has had no gradient yet, and must look so
                    self.optimizer.state.pop(parameter, None)
                    continue
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device)
                    if isinstance(value, Tensor) and (value.dim() or on_device)
                    else value
                    for key, value in state.items()
                }


class Sharded(Optimizer):
    """A ShardedOptimizer: kept as the whole optimizer would be, so that either goes on from it."""

    optimizer: ShardedOptimizer

    def _state(self) -> dict[str, dict[str, Any]]:
        state: dict[str, dict[str, Any]] = self.optimizer.state_dict()["state"]
        return state

    def _groups(self) -> list[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
        return [
            (group, list(zip(names, group["params"], strict=True)))
            for group, names in zip(self.optimizer.param_groups, self.optimizer.names, strict=True)
        ]

    def restore(self, manifest: Manifest, tensors: Tensors) -> None:
        groups = []
        whole = {}
        for index, names in enumerate(self.optimizer.names):
            path = self._saved_group(manifest, index, names)
            hyper = decode(manifest.values[path], tensors.__getitem__)
            groups.append({**hyper, "params": list(names)})
            for name in names:
                state = decode(manifest.values[f"{self.path}/state/{name}"], tensors.__getitem__)
                if state:
                    whole[name] = state
        self.optimizer.load_state_dict({"state": whole, "param_groups": groups})


_NOT_HYPER = ("params", "param_names")


class Value:
    """A nesting of plain values and tensors, the same on every rank; or what gives such a one."""

    whole = False

    def __init__(self, path: str, value: Any) -> None:
        self.path, self.value = path, value
        self.stateful = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")

    def capture(self, into: Captured) -> None:
        value = self.value.state_dict() if self.stateful else self.value
        into.values[self.path] = encode(value, self.path, into.tensors)

    def wanted(self, manifest: Manifest) -> list[str]:
        return references(value_at(manifest, self.path))

    def restore(self, manifest: Manifest, tensors: Tensors) -> Any:
        value = decode(manifest.values[self.path], tensors.__getitem__)
        if not self.stateful:
            return value
        self.value.load_state_dict(value)
        return None


def fit(manifest: Manifest, path: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless the checkpoint has a tensor of this name, dtype and shape."""
    entry = manifest.tensors.get(path)
    if entry is None:
        raise CheckpointError(f"tensor {path}: the checkpoint of step {manifest.step} has none")
    expected = DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
    if (entry.dtype, entry.shape) != expected:
        raise CheckpointError(
            f"tensor {path}: expected {expected[0]} {expected[1]}, the checkpoint of step "
            f"{manifest.step} has {entry.dtype} {entry.shape}"
        )


def value_at(manifest: Manifest, path: str) -> Any:
    """Return an encoded value; CheckpointError if the checkpoint has none."""
    if path not in manifest.values:
        raise CheckpointError(f"{path}: the checkpoint of step {manifest.step} has no such value")
    return manifest.values[path]


def parts_of(state: Mapping[str, Any], rank: int, num_ranks: int) -> dict[str, Part]:
    """Choose how each object of a state is kept; TypeError for a name that holds a slash."""
    names: dict[Tensor, str] = {}
    for value in state.values():
        if hasattr(value, "named_parameters"):
            names |= {parameter: name for name, parameter in value.named_parameters()}
    parts: dict[str, Part] = {}
    for path, value in state.items():
        if not isinstance(path, str) or not path or "/" in path or ":" in path:
            raise TypeError(f"expected names without slash or colon in a state, got {path!r}")
        if isinstance(value, nn.Module) or hasattr(value, "named_parameters"):
            parts[path] = Model(path, value)
            if isinstance(value, DataParallel | Pipeline):
                parts[f"{path}:carried"] = CarriedPart(f"{path}:carried", value)
        elif isinstance(value, ShardedOptimizer):
            parts[path] = Sharded(path, value, names)
        elif isinstance(value, torch.optim.Optimizer):
            parts[path] = Optimizer(path, value, names)
        elif isinstance(value, RandomStreams):
            parts[path] = StreamsPart(path, value, rank, num_ranks)
        else:
            parts[path] = Value(path, value)
    return parts
