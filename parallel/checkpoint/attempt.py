"""Read one checkpoint for a state, on all ranks, before anything is overwritten."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ...comm.texts import gather_texts
from .errors import CheckpointError, Damaged, text_of
from .files import read_tensors
from .fitting import wanted_by
from .manifest import Manifest
from .state import Part
from .store import Place, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from ...comm.communicator import Communicator

__all__ = ["Attempt"]

_SHOWN = 3


class Attempt:
    """One rank's reading of one checkpoint.

    manifest, tensors: what it found, once `problem` has returned None.
    """

    def __init__(self, place: Place, parts: Mapping[str, Part]) -> None:
        self.place, self.parts = place, parts
        self.manifest: Manifest
        self.tensors: dict[str, Tensor] = {}
        self._cause: Exception | None = None

    def problem(self, comm: Communicator) -> str | None:
        """Read, and return what is damaged, on any rank; None if nothing is.  Collective.

        CheckpointError if it is whole, but does not fit.
        """
        path = self.place.path
        rows = [json.loads(row) for row in gather_texts(comm, self._read())]
        damaged = [row["damaged"] for row in rows if row["damaged"]]
        if damaged:
            return str(damaged[0])
        misfit = next((row["misfit"] for row in rows if row["misfit"]), None)
        if misfit is not None:
            raise CheckpointError(f"{path} does not fit: {misfit}") from self._cause
        wanted = {name for row in rows for name in row["wanted"]}
        wholes = [(name, kind) for row in rows for name, kind in row["whole"]]
        _refuse_unwanted(self.manifest, wanted, wholes, path)
        return None

    def _read(self) -> str:
        """Read all that this rank wants; return JSON that says what was wrong."""
        wanted: list[str] = []
        damaged = misfit = ""
        try:
            if not self.place.path.is_dir():
                raise Damaged("this rank does not see the folder")
            self.manifest = read_manifest(self.place)
            wanted = wanted_by(self.parts, self.manifest)
            entries = {name: self.manifest.tensors[name] for name in wanted}
            self.tensors = read_tensors(self.place.path, self.manifest.files, entries)
        except Damaged as error:
            damaged = str(error)
        except Exception as error:  # such as a MemoryError: the others wait to be told
            misfit, self._cause = text_of(error), error
        whole = [(name, part.whole) for name, part in self.parts.items() if part.whole]
        return json.dumps({"damaged": damaged, "misfit": misfit, "wanted": wanted, "whole": whole})


def _refuse_unwanted(
    manifest: Manifest, wanted: set[str], wholes: Iterable[tuple[str, str]], path: Path
) -> None:
    """Raise CheckpointError if no rank wants some tensors of an object that must be loaded whole.

    wanted: the tensors that any rank wants.
    wholes: name and kind (`Part.whole`) of every object that must be whole, of all ranks: some may
        load what others do not.

    An optimizer of two models may go on with one of them: its state is missed only where a module
    that is loaded has the parameter.
    """
    found = dict.fromkeys(wholes)
    modules = {name for name, kind in found if kind == "module"}
    for name, kind in found:
        below = f"{name}/" if kind == "module" else f"{name}/state/"
        left = (t.removeprefix(below) for t in manifest.tensors if _is_left(t, below, wanted))
        # Up to the key of an optimizer's state.
        missed = sorted({t.partition("/")[0] for t in left})
        if kind == "optimizer":
            missed = [p for p in missed if _is_of(p, modules, manifest)]
        if missed:
            few = ", ".join(missed[:_SHOWN])
            more = f" and {len(missed) - _SHOWN} more" if len(missed) > _SHOWN else ""
            then = (
                ": give the optimizer their parameters first, by add_param_group"
                if kind == "optimizer"
                else ""
            )
            raise CheckpointError(
                f"{path} does not fit: {few}{more} of its {below[:-1]} are on no rank{then}"
            )


def _is_left(tensor: str, below: str, wanted: set[str]) -> bool:
    return tensor.startswith(below) and tensor not in wanted


def _is_of(parameter: str, modules: set[str], manifest: Manifest) -> bool:
    """Tell whether a parameter is of one of these modules, or of any where there are none."""
    module, colon, _ = parameter.partition(":")
    if colon:
        return module in modules
    return not modules or any(f"{path}/{parameter}" in manifest.tensors for path in modules)
