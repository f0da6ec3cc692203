"""Give all parts of a state what was read for them, or none."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .agreement import agree
from .errors import CheckpointError
from .optimizer_part import OptimizerPart
from .state import Part, Value

if TYPE_CHECKING:
    from ...comm.communicator import Communicator
    from .manifest import Manifest

__all__ = ["restored"]

_Failure = tuple[str, Exception]


def restored(
    comm: Communicator,
    what: str,
    parts: Mapping[str, Part],
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Restore all parts, and return the plain values among them, also those that are None.

    what: names what is restored, in errors.

    Collective. Code of the user's may fail, so what runs it comes first: objects of the user's,
    then optimizers. If one fails on any rank, all of these get back what they held, and
    CheckpointError is raised on every rank. Models and other optimizers follow, which are known to
    fit. Only a module with loading code of its own may still fail: the CheckpointError then says
    that other parts have been restored.
    """
    users: dict[str, Value | OptimizerPart] = {
        path: part
        for kind in (Value, OptimizerPart)
        for path, part in parts.items()
        if isinstance(part, kind) and part.foreign
    }
    others = {path: part for path, part in parts.items() if path not in users}
    before = _held(users)
    failure, _ = _restore(users, manifest, tensors)
    try:
        _agree(comm, failure, "nothing is changed", what)
    except CheckpointError:
        for path, held in before.items():
            with suppress(Exception):  # of the one that has failed, again
                users[path].put_back(held)
        raise
    failure, found = _restore(others, manifest, tensors)
    _agree(comm, failure, "other parts of the state are restored", what)
    return {path: value for path, value in found.items() if isinstance(parts[path], Value)}


def _held(users: Mapping[str, Value | OptimizerPart]) -> dict[str, Any]:
    """Return what objects hold, of those that can tell."""
    found = {}
    for path, part in users.items():
        with suppress(Exception):  # code of the user's
            found[path] = part.held()
    return found


def _restore(
    parts: Mapping[str, Part], manifest: Manifest, tensors: Mapping[str, Tensor]
) -> tuple[_Failure | None, dict[str, Any]]:
    """Restore parts up to one that fails; return that, and what the others gave."""
    found = {}
    for path, part in parts.items():
        try:
            found[path] = part.restore(manifest, tensors)
        except Exception as error:  # code of the user's
            return (path, error), found
    return None, found


def _agree(comm: Communicator, failure: _Failure | None, then: str, what: str) -> None:
    if failure is None:
        agree(comm, "", what)
        return
    path, error = failure
    told = f"{path} did not take its state: {type(error).__name__}: {error}; {then}"
    agree(comm, told, what, error)
