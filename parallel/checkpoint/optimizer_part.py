"""An optimizer in a checkpoint: hyper-parameters by group, state by the parameters' names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import CheckpointError
from .fitting import value_at
from .values import decode, encode, references

if TYPE_CHECKING:
    import torch

    from ..sharded_optimizer import ShardedOptimizer
    from .manifest import Manifest
    from .names import Names
    from .state import Captured, Tensors

__all__ = ["OptimizerPart", "ShardedPart"]

_NOT_HYPER = ("params", "param_names")

Member = tuple[tuple[str, ...], Tensor]
"""The names of a parameter, the one to write first, and the parameter."""


class OptimizerPart:
    """A torch optimizer, keyed by the names of its parameters."""

    whole = False

    def __init__(self, path: str, optimizer: torch.optim.Optimizer, names: Names) -> None:
        self.path, self.optimizer, self.names = path, optimizer, names

    def _state(self) -> dict[str, dict[str, Any]]:
        """Return the state of every parameter by name; collective where it is shared out."""
        members = (member for _, members in self._groups() for member in members)
        return {names[0]: dict(self.optimizer.state.get(p, {})) for names, p in members}

    def _groups(self) -> list[tuple[dict[str, Any], list[Member]]]:
        """Return every group with its named parameters."""
        found = []
        for group in self.optimizer.param_groups:
            members = []
            for parameter in group["params"]:
                names = self.names.get(parameter)
                if names is not None:
                    members.append((names, parameter))
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
            for (name, *_), _ in members:
                into.values[f"{self.path}/group_of/{name}"] = index
                path = f"{self.path}/state/{name}"
                into.values[path] = encode(found.get(name, {}), path, into.tensors)

    def _saved(self, manifest: Manifest) -> list[list[str]]:
        """Return, by group, under which names the checkpoint has the parameters."""
        of: dict[str, str] = {}
        found = []
        for _, members in self._groups():
            found.append([self._saved_name(manifest, names) for names, _ in members])
            for saved, (names, _) in zip(found[-1], members, strict=True):
                if of.setdefault(saved, names[0]) != names[0]:
                    raise CheckpointError(
                        f"{self.path}/state/{saved}: the checkpoint of step {manifest.step} does "
                        f"not tell whether it is of {of[saved]} or of {names[0]}"
                    )
        return found

    def _saved_name(self, manifest: Manifest, names: tuple[str, ...]) -> str:
        there = (name for name in names if f"{self.path}/state/{name}" in manifest.values)
        found = next(there, names[0])
        value_at(manifest, f"{self.path}/state/{found}")
        return found

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
        found = []
        for index, names in enumerate(self._saved(manifest)):
            found += references(value_at(manifest, self._saved_group(manifest, index, names)))
            for name in names:
                found += references(value_at(manifest, f"{self.path}/state/{name}"))
        return found

    def restore(self, manifest: Manifest, tensors: Tensors) -> None:
        saved = self._saved(manifest)
        for index, ((group, members), names) in enumerate(zip(self._groups(), saved, strict=True)):
            path = self._saved_group(manifest, index, names)
            group.update(decode(manifest.values[path], tensors.__getitem__))
            on_device = bool(group.get("capturable") or group.get("fused"))
            for name, (_, parameter) in zip(names, members, strict=True):
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


class ShardedPart(OptimizerPart):
    """A ShardedOptimizer: kept as the whole optimizer would be, so that either goes on from it."""

    optimizer: ShardedOptimizer

    def _state(self) -> dict[str, dict[str, Any]]:
        state: dict[str, dict[str, Any]] = self.optimizer.state_dict()["state"]
        return state

    def _groups(self) -> list[tuple[dict[str, Any], list[Member]]]:
        return [
            (
                group,
                [
                    ((name, *self.names.get(parameter, ())), parameter)
                    for name, parameter in zip(names, group["params"], strict=True)
                ],
            )
            for group, names in zip(self.optimizer.param_groups, self.optimizer.names, strict=True)
        ]

    def restore(self, manifest: Manifest, tensors: Tensors) -> None:
        groups = []
        whole = {}
        for index, (own, names) in enumerate(
            zip(self.optimizer.names, self._saved(manifest), strict=True)
        ):
            path = self._saved_group(manifest, index, names)
            hyper = decode(manifest.values[path], tensors.__getitem__)
            groups.append({**hyper, "params": list(own)})
            for name, saved in zip(own, names, strict=True):
                state = decode(manifest.values[f"{self.path}/state/{saved}"], tensors.__getitem__)
                if state:
                    whole[name] = state
        self.optimizer.load_state_dict({"state": whole, "param_groups": groups})
