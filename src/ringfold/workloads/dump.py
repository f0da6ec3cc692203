"""Weights of every step on disk, for `ringfold compare`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .agree import settle
from .options import UsageError

if TYPE_CHECKING:
    from ..parallel.mesh import Mesh
    from .engines import Engine

__all__ = ["Dump", "step_of"]

_PATTERN = "step{step:08d}.stage{stage}.safetensors"


def step_of(path: Path) -> int:
    """Return the step that a file of a dump holds."""
    return int(path.name.partition(".")[0].removeprefix("step"))


class Dump:
    """Write the parameters by full name after every step; one file per stage.

    Data rank 0 of each stage writes; the folder must be the same on all their hosts.
    """

    def __init__(self, folder: Path, mesh: Mesh, engine: Engine, again: bool = False) -> None:
        """Make the folder.

        again: the run goes on, and the dump with it.

        Raises: UsageError where it cannot be made or written, or holds a dump already.
        """
        self.folder, self.mesh, self.engine = folder, mesh, engine
        if mesh.data.rank == 0 and mesh.pipe.rank == 0 and not again:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--dump {folder}: {error.strerror}") from None
            if any(folder.glob("step*.safetensors")):
                raise UsageError(f"--dump {folder} holds a dump already; name another folder")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise UsageError(f"--dump {folder} may not be written")

    def after(self, step: int) -> None:
        """Write what step number `step`, from 1 on, has made of the weights.

        Collective.  UsageError on all ranks where one cannot, as for a full disk: who asks for a
        dump trains for its sake.
        """
        settle(self.mesh.comm, lambda: self._write(step))

    def _write(self, step: int) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self.mesh.data.rank != 0:
            return
        tensors = {
            name: parameter.detach().contiguous().clone()
            for name, parameter in self.engine.named_parameters()
        }
        path = self.folder / _PATTERN.format(step=step, stage=self.mesh.pipe.rank)
        try:
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:  # the library's, of a full disk, too
            with suppress(OSError):  # half a file would be no step that `compare` can read
                path.unlink()
            raise UsageError(f"cannot write the dump: {path}: {error}") from None
