"""What an engine's reductions carry from step to step, in a checkpoint beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..carried import Carried, Layout, digest_of, merged
from .values import decode, encode, references

if TYPE_CHECKING:
    from ..data_parallel import DataParallel
    from ..pipeline import Pipeline
    from .manifest import Manifest
    from .state import Captured

__all__ = ["CarriedPart"]


class CarriedPart:
    """Keep what every data rank carries under its number, by full parameter names.

    With as many data ranks as wrote it, each goes on with its own. With another number, or where
    some are lost, every rank takes the mean of those that are there: nothing more is lost. A
    checkpoint without this, or of another wire, is gone on from with nothing carried.
    """

    whole = ""

    def __init__(self, path: str, engine: DataParallel | Pipeline) -> None:
        self.path, self.engine = path, engine

    def capture(self, into: Captured) -> None:
        carried = self.engine.carried()
        if carried is None:
            return
        into.values[f"{self.path}/steps"] = carried.steps
        into.values[f"{self.path}/size"] = carried.size
        into.values[f"{self.path}/wire"] = carried.wire
        if carried.layout is not None:
            path = f"{self.path}/layout/{carried.layout.names}"
            into.values[path] = encode(asdict(carried.layout), path, into.tensors)
        for name, entry in carried.hook.items():
            path = f"{self.path}/hook/{carried.rank}/{name}"
            into.values[path] = encode(entry, path, into.tensors)
        for name in carried.sparse:
            into.values[f"{self.path}/sparse/{name}/{carried.rank}"] = True

    def _sources(self, manifest: Manifest, own: Carried) -> list[int]:
        """Return the data ranks whose state of the wire this one takes."""
        if not own.wire or manifest.values.get(f"{self.path}/wire") != own.wire:
            return []
        prefix = f"{self.path}/hook/"
        paths = [path for path in manifest.values if path.startswith(prefix)]
        there = {int(path[len(prefix) :].partition("/")[0]) for path in paths}
        same = manifest.values.get(f"{self.path}/size") == own.size and len(there) == own.size
        return [own.rank] if same else sorted(there)

    def _paths(self, manifest: Manifest, own: Carried) -> dict[str, list[str]]:
        """Return, by parameter name, where the states are that this rank goes on from."""
        sources = self._sources(manifest, own)
        found = {
            name: [f"{self.path}/hook/{rank}/{name}" for rank in sources] for name in own.names
        }
        kept = {name: [p for p in paths if p in manifest.values] for name, paths in found.items()}
        return {name: paths for name, paths in kept.items() if paths}

    def _layout(self, manifest: Manifest, own: Carried) -> Layout | None:
        saved = manifest.values.get(f"{self.path}/layout/{digest_of(own.names)}")
        if saved is None:
            return None
        no_tensors: dict[str, Tensor] = {}
        found: dict[str, Any] = decode(saved, no_tensors.__getitem__)
        return Layout(**found)

    def wanted(self, manifest: Manifest) -> list[str]:
        own = self.engine.carried()
        if own is None:
            return []
        rows = self._paths(manifest, own).values()
        return [name for row in rows for path in row for name in references(manifest.values[path])]

    def restore(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        own = self.engine.carried()
        if own is None:
            return
        prefix = f"{self.path}/sparse/"
        sparse = {
            p[len(prefix) :].rpartition("/")[0] for p in manifest.values if p.startswith(prefix)
        }
        hook = {
            name: merged([decode(manifest.values[p], tensors.__getitem__) for p in paths])
            for name, paths in self._paths(manifest, own).items()
        }
        self.engine.carry_on(
            replace(
                own,
                steps=int(manifest.values.get(f"{self.path}/steps", own.steps)),
                layout=self._layout(manifest, own),
                hook=hook,
                sparse=tuple(name for name in own.names if name in sparse),
            )
        )
