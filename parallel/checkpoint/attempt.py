"""Read one checkpoint for a state, on all ranks, before anything is overwritten."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ...comm.texts import gather_texts
from .errors import CheckpointError, Damaged, text_of
from .files import read_tensors
from .fitting import wanted_by
from .manifest import Manifest
from .state import Part
from .store import Place, read_manifest
from .unwanted import refuse_unwanted

if TYPE_CHECKING:
    from ...comm.communicator import Communicator

__all__ = ["Attempt"]


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
        refuse_unwanted(self.manifest, wanted, wholes, path)
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
