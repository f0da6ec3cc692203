"""An optimizer in a checkpoint: hyper-parameters by group, state by the parameters' names.

Both are what its state_dict tells. What that has beside them is kept as it is.
"""

from __future__ import annotations

import hashlib
import json
from copy import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..optimizer_dict import (
    beside_of,
    has_hooks,
    has_own_dict,
    ids_of,
    load_into,
    state_dict_of,
)
from ..tensors import laid_out_like
from .errors import CheckpointError
from .files import raw_bytes
from .fitting import value_at
from .kinds import kind_of, misfit
from .values import decode, encode, references

if TYPE_CHECKING:
    import torch

    from .manifest import Manifest
    from .names import Names
    from .state import Captured, Tensors

__all__ = ["Member", "OptimizerPart"]

_NOT_HYPER = ("params", "param_names")

Member = tuple[tuple[str, ...], Tensor]
"""The names of a parameter, the one to write first, and the parameter."""


class OptimizerPart:
    """A torch optimizer, keyed by the names of its parameters."""

    whole = "optimizer"

    def __init__(self, path: str, optimizer: torch.optim.Optimizer, names: Names) -> None:
        self.path, self.optimizer, self.names = path, optimizer, names

    def _kind(self) -> dict[str, Any]:
        return kind_of(self.optimizer, type(self.optimizer))

    @property
    def foreign(self) -> bool:
        """Whether code of the user's runs in `restore`, which may fail."""
        return has_own_dict(self.optimizer) or has_hooks(self.optimizer)

    def held(self) -> dict[str, Any]:
        """Return what `put_back` takes; its tensors are no copies: a load puts others there."""
        told = self._state_dict()
        state = {key: copy(entry) for key, entry in told["state"].items()}
        return {**told, "state": state, "param_groups": [*map(dict, told["param_groups"])]}

    def put_back(self, held: dict[str, Any]) -> None:
        """Give the optimizer again what it held."""
        load_into(self.optimizer, held)

    def _state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state_dict; collective where the state is shared out."""
        return state_dict_of(self.optimizer)

    def _frame(self) -> dict[str, Any]:
        """Return a state_dict to put state into; not collective."""
        return self._state_dict()

    def _groups(self) -> list[list[Member]]:
        """Return the named parameters of every group."""
        found = []
        for group in self.optimizer.param_groups:
            members = []
            for parameter in group["params"]:
                names = self.names.of(parameter)
                if names:
                    members.append((names, parameter))
                elif parameter.numel():  # an empty placeholder is in no state
                    raise CheckpointError(
                        f"{self.path}: a parameter of shape {tuple(parameter.shape)} is in no "
                        "module of the state, so it has no name"
                    )
            found.append(members)
        return found

    def capture(self, into: Captured) -> None:
        told = self._state_dict()
        ids = self._ids(told)
        for path, value in (("kind", self._kind()), ("beside", beside_of(told, ids))):
            path = f"{self.path}/{path}"
            into.values[path] = encode(value, path, into.tensors)
        for index, (group, members) in enumerate(
            zip(told["param_groups"], self._groups(), strict=True)
        ):
            hyper = {key: value for key, value in group.items() if key not in _NOT_HYPER}
            # By contents: ranks of a pipeline may have other groups under the same number.
            digest = _digest(hyper, f"{self.path}/groups")
            home = f"{self.path}/groups/{digest}"
            if home not in into.values:
                into.values[home] = encode(hyper, home, into.tensors)
            into.values[f"{self.path}/group_at/{index}/{digest}"] = home
            for (name, *_), parameter in members:
                into.values[f"{self.path}/group_of/{name}"] = home
                path = f"{self.path}/state/{name}"
                entry = told["state"].get(ids[parameter], {})
                into.values[path] = encode(entry, path, into.tensors)
        state = (f"{self.path}/state/", f"{self.path}/beside/")
        into.alike.extend(path for path in into.tensors if path.startswith(state))

    def _saved(self, manifest: Manifest) -> list[list[str]]:
        """Return, by group, under which names the checkpoint has the parameters."""
        of: dict[str, str] = {}
        found = []
        for members in self._groups():
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

    def _ids(self, state_dict: dict[str, Any]) -> dict[Tensor, Any]:
        try:
            return ids_of(self.optimizer, state_dict)
        except TypeError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def wanted(self, manifest: Manifest) -> list[str]:
        self._fit_kind(manifest)
        self._ids(self._frame())  # refused where it does not tell what its parameters are called
        found = references(manifest.values.get(f"{self.path}/beside"))
        for index, names in enumerate(self._saved(manifest)):
            home = self._saved_group(manifest, index, names)
            found += [] if home is None else references(value_at(manifest, home))
            for name in names:
                found += references(value_at(manifest, f"{self.path}/state/{name}"))
        return found

    def restore(self, manifest: Manifest, tensors: Tensors) -> None:
        frame = self._frame()
        ids = self._ids(frame)
        beside = decode(manifest.values.get(f"{self.path}/beside"), tensors.__getitem__)
        # Old checkpoints have nothing beside: what the optimizer has stays.
        beside = beside or beside_of(frame, ids)
        known = set(ids.values())
        state = {key: entry for key, entry in frame["state"].items() if key in known}
        state.update(beside["state"])
        groups = []
        for index, (own, members, names) in enumerate(
            zip(frame["param_groups"], self._groups(), self._saved(manifest), strict=True)
        ):
            group = {**own, **self._hyper(manifest, index, names, tensors)}
            groups.append(group)
            on_device = bool(group.get("capturable") or group.get("fused"))
            for name, (_, parameter) in zip(names, members, strict=True):
                entry = decode(manifest.values[f"{self.path}/state/{name}"], tensors.__getitem__)
                state.pop(ids[parameter], None)
                if entry:  # or it has had no gradient yet, and must look so
                    state[ids[parameter]] = self._place(entry, parameter, on_device)
        given = {**frame, **beside["more"], "state": state, "param_groups": groups}
        load_into(self.optimizer, given)

    def _place(self, entry: dict[str, Any], parameter: Tensor, on_device: bool) -> dict[str, Any]:
        return {key: _placed(value, parameter, on_device) for key, value in entry.items()}


def _placed(value: Any, parameter: Tensor, on_device: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(parameter.device) if value.dim() or on_device else value
    return laid_out_like(value, parameter)


def _told(kind: dict[str, Any]) -> str:
    return f"{kind['name']} ({', '.join(kind['hyper'])})"


def _digest(hyper: dict[str, Any], path: str) -> str:
    """Return a short digest of hyper-parameters, the same for every group that has the same.

    path: for the CheckpointError of a value that cannot be kept.
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
