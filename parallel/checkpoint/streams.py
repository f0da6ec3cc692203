"""The random streams of a rank: torch's, NumPy's and Python's, and any generators by name."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import CheckpointError
from .fitting import fit, value_at
from .values import decode, encode, references

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .manifest import Manifest
    from .state import Captured

__all__ = ["RandomStreams", "StreamsPart"]

Generator = torch.Generator | np.random.Generator


class RandomStreams:
    """Stand, in a state, for every random stream of this rank.

    Always torch's, NumPy's and Python's global ones (and torch's on the current CUDA device, where
    in use); `generators` adds others by name. With as many ranks as wrote the checkpoint, each goes
    on with its own streams, all of which must be in it. With another number, every rank starts new
    ones, drawn from those of rank 0 and its own number: different on every rank, and the same in
    every such resume.
    """

    def __init__(self, **generators: Generator) -> None:
        self.generators = generators

    def read(self) -> dict[str, Any]:
        """Return all states as plain values and tensors."""
        version, words, gauss = random.getstate()
        numpy_state: Any = np.random.get_state(legacy=True)
        name, keys, place, has_gauss, cached = numpy_state
        assert name == "MT19937", name
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if cuda else None,
            "python": (version, torch.tensor(words, dtype=torch.int64, device="cpu"), gauss),
            "numpy": (torch.from_numpy(keys.astype(np.int64)), place, has_gauss, cached),
            "generators": {
                key: generator.get_state()
                if isinstance(generator, torch.Generator)
                else _plain(generator.bit_generator.state)
                for key, generator in self.generators.items()
            },
        }

    def write(self, state: Mapping[str, Any]) -> None:
        """Go on with states that `read` returned."""
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
        keys, place, has_gauss, cached = state["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), place, has_gauss, cached))
        for key, generator in self.generators.items():
            if isinstance(generator, torch.Generator):
                generator.set_state(state["generators"][key])
            else:
                generator.bit_generator.state = _numpy(state["generators"][key])

    def seed(self, seed: int) -> None:
        """Start all streams anew."""
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for index, generator in enumerate(self.generators.values()):
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed + 1 + index)
            else:
                fresh = type(generator.bit_generator)(np.random.SeedSequence([seed, index]))
                generator.bit_generator.state = fresh.state


class StreamsPart:
    """Keep every rank's streams under its number."""

    whole = False

    def __init__(self, path: str, streams: RandomStreams, rank: int, num_ranks: int) -> None:
        self.path, self.streams, self.rank, self.num_ranks = path, streams, rank, num_ranks

    def capture(self, into: Captured) -> None:
        path = f"{self.path}/{self.rank}"
        into.values[path] = encode(self.streams.read(), path, into.tensors)

    def _source(self, manifest: Manifest) -> str:
        return f"{self.path}/{self.rank if manifest.ranks == self.num_ranks else 0}"

    def wanted(self, manifest: Manifest) -> list[str]:
        saved = value_at(manifest, self._source(manifest))
        if manifest.ranks == self.num_ranks:
            self._fit_generators(manifest)
        return references(saved)

    def _fit_generators(self, manifest: Manifest) -> None:
        """Raise CheckpointError unless each has a state of its kind there."""
        source = self._source(manifest)
        kept = decode(manifest.values[source], _Reference)["generators"]
        for key, generator in self.streams.generators.items():
            where = f"{source}/generators/{key}"
            if key not in kept:
                raise CheckpointError(
                    f"{where}: {manifest.title} has no such stream, only {sorted(kept)}"
                )
            expected, found = _kind(generator), _kind_of_state(kept[key])
            if found != expected:
                raise CheckpointError(
                    f"{where}: expected a state of {expected}, {manifest.title} has one of {found}"
                )
            if isinstance(generator, torch.Generator):  # on another device it has another size
                fit(manifest, kept[key].path, generator.get_state())

    def restore(self, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        state = decode(manifest.values[self._source(manifest)], tensors.__getitem__)
        if manifest.ranks == self.num_ranks:
            self.streams.write(state)
            return
        origin = state["torch"].numpy().tobytes()
        digest = hashlib.sha256(origin + f"{self.rank}".encode()).digest()
        self.streams.seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class _Reference:
    """Stand for a tensor that has not been read yet."""

    path: str


def _kind(generator: Generator) -> str:
    if isinstance(generator, torch.Generator):
        return "torch.Generator"
    return str(generator.bit_generator.state["bit_generator"])


def _kind_of_state(state: Any) -> str:
    return "torch.Generator" if isinstance(state, _Reference) else str(state["bit_generator"])


def _plain(value: Any) -> Any:
    """Turn NumPy's state, a nesting of dicts with arrays and wide integers, into tensors and text.

    A wide integer becomes text, since JSON readers disagree beyond 53 bits.
    """
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.int64)), str(value.dtype)
    return f"{value:d}i" if isinstance(value, int) else value


def _numpy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numpy(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return value[0].numpy().astype(value[1])
    if isinstance(value, str) and value.endswith("i"):
        return int(value[:-1])
    return value
