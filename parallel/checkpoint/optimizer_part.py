"""An optimizer in a checkpoint: hyper-parameters by group, state by the parameters' names."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..strides import laid_out_like
from .errors import CheckpointError
from .files import raw_bytes
from .fitting import value_at
from .kinds import kind_of, misfit
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

    def _kind(self) -> dict[str, Any]:
        return kind_of(self.optimizer, type(self.optimizer))

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
        path = f"{self.path}/kind"
        into.values[path] = encode(self._kind(), path, into.tensors)
        for index, (group, members) in enumerate(self._groups()):
            hyper = {key: value for key, value in group.items() if key not in _NOT_HYPER}
            # By contents: ranks of a pipeline may have other groups under the same number.
            digest = _digest(hyper, f"{self.path}/groups")
            home = f"{self.path}/groups/{digest}"
            if home not in into.values:
                into.values[home] = encode(hyper, home, into.tensors)
            into.values[f"{self.path}/group_at/{index}/{digest}"] = home
            for (name, *_), _ in members:
                into.values[f"{self.path}/group_of/{name}"] = home
                path = f"{self.path}/state/{name}"
                into.values[path] = encode(found.get(name, {}), path, into.tensors)
        state = f"{self.path}/state/"
        into.alike.extend(path for path in into.tensors if path.startswith(state))

    def _saved(self, manifest: Manifest) -> list[list[str]]:
        """Return, by group, under which names the checkpoint has the parameters."""
        of: dict[str, str] = {}
        found = []
        for _, members in self._groups():
            found.append([self._saved_name(manifest, names) for names, _ in members])
            for saved, (names, _) in zip(found[-1], members, strict=True):
                if of.setdefault(saved, names[0]) != names[0]:
                    raise CheckpointError(
                        f"{self.path}/state/{saved}: {manifest.title} does "
                        f"not tell whether it is of {of[saved]} or of {names[0]}"
                    )
        return found

    def _saved_name(self, manifest: Manifest, names: tuple[str, ...]) -> str:
        there = (name for name in names if f"{self.path}/state/{name}" in manifest.values)
        found = next(there, names[0])
        value_at(manifest, f"{self.path}/state/{found}")
        return found

    def _saved_group(self, manifest: Manifest, index: int, names: list[str]) -> str | None:
        """Return where a group's hyper-parameters are.

        A group without parameters on this rank takes those of its number, if all ranks that wrote
        had the same; else None, and it keeps its own.
        """
        homes: dict[str, str] = {}
        for name in names:
            home = value_at(manifest, f"{self.path}/group_of/{name}")
            # A number, in checkpoints whose groups had the same one on all ranks.
            homes.setdefault(home if isinstance(home, str) else self._numbered(home), name)
        if not names:
            at = f"{self.path}/group_at/{index}/"
            there = {home for path, home in manifest.values.items() if path.startswith(at)}
            old = {self._numbered(index)} & manifest.values.keys()
            homes = dict.fromkeys(there | old, "")
        contents = {json.dumps(value_at(manifest, home)): home for home in homes}
        if len(contents) > 1 and names:
            first, second, *_ = contents.values()
            keys = _differing(value_at(manifest, first), value_at(manifest, second))
            raise CheckpointError(
                f"{self.path}: parameter group {index} holds {homes[first]} and {homes[second]}, "
                f"which differ in {', '.join(keys)} in {manifest.title}"
            )
        return next(iter(contents.values())) if len(contents) == 1 else None

    def _numbered(self, index: int) -> str:
        return f"{self.path}/groups/{index}"

    def _hyper(
        self, manifest: Manifest, index: int, names: list[str], tensors: Tensors
    ) -> dict[str, Any]:
        home = self._saved_group(manifest, index, names)
        if home is None:
            return {}
        # Each group its own copy: several may come from one, and a tensor is changed in place.
        found: dict[str, Any] = decode(manifest.values[home], lambda path: tensors[path].clone())
        return found

    def _fit_kind(self, manifest: Manifest) -> None:
        """Raise CheckpointError if another kind of optimizer has written; old ones do not tell."""
        no_tensors: dict[str, Tensor] = {}
        saved = decode(manifest.values.get(f"{self.path}/kind"), no_tensors.__getitem__)
        own = self._kind()
        if saved is not None and misfit(saved, own):
            raise CheckpointError(
                f"{self.path}: expected the state of {_told(own)}, {manifest.title} has "
                f"that of {_told(saved)}"
            )

    def wanted(self, manifest: Manifest) -> list[str]:
        self._fit_kind(manifest)
        found = []
        for index, names in enumerate(self._saved(manifest)):
            home = self._saved_group(manifest, index, names)
            found += [] if home is None else references(value_at(manifest, home))
            for name in names:
                found += references(value_at(manifest, f"{self.path}/state/{name}"))
        return found

    def restore(self, manifest: Manifest, tensors: Tensors) -> None:
        saved = self._saved(manifest)
        for index, ((group, members), names) in enumerate(zip(self._groups(), saved, strict=True)):
            group.update(self._hyper(manifest, index, names, tensors))
            on_device = bool(group.get("capturable") or group.get("fused"))
            for name, (_, parameter) in zip(names, members, strict=True):
                state = decode(manifest.values[f"{self.path}/state/{name}"], tensors.__getitem__)
                if not state:  # it has had no gradient yet, and must look so
                    self.optimizer.state.pop(parameter, None)
                    continue
                self.optimizer.state[parameter] = {
                    key: _placed(value, parameter, on_device) for key, value in state.items()
                }


class ShardedPart(OptimizerPart):
    """A ShardedOptimizer: kept as the whole optimizer would be, so that either goes on from it."""

    optimizer: ShardedOptimizer

    def _kind(self) -> dict[str, Any]:
        return kind_of(self.optimizer, self.optimizer.kind)

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
            hyper = self._hyper(manifest, index, names, tensors)
            groups.append({**hyper, "params": list(own)})
            for name, saved in zip(own, names, strict=True):
                state = decode(manifest.values[f"{self.path}/state/{saved}"], tensors.__getitem__)
                if state:
                    whole[name] = state
        self.optimizer.load_state_dict({"state": whole, "param_groups": groups})


def _placed(value: Any, parameter: Tensor, on_device: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(parameter.device) if value.dim() or on_device else value
    return laid_out_like(value, parameter)


def _told(kind: dict[str, Any]) -> str:
    return f"{kind['name']} ({', '.join(kind['hyper'])})"


def _digest(hyper: dict[str, Any], path: str) -> str:
    """Return a short digest of hyper-parameters, the same for every group that has the same.

    path: for the TypeError of a value that cannot be kept.
    """
    tensors: dict[str, Tensor] = {}
    found = hashlib.sha256(json.dumps(encode(hyper, path, tensors)).encode())
    for tensor in tensors.values():
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw_bytes(tensor.detach().cpu().contiguous()))
    return found.hexdigest()[:16]


def _differing(left: Any, right: Any) -> list[str]:
    """Return the keys in which two encoded mappings differ."""
    rows = [dict(next(iter(encoded.values()))) for encoded in (left, right)]
    keys = dict.fromkeys([*rows[0], *rows[1]])
    return [key for key in keys if rows[0].get(key) != rows[1].get(key)]
