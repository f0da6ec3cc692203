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
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if cuda else None,
            "python": (version, torch.tensor(words, dtype=torch.int64, device="cpu"), gauss),
            "numpy": _global_state(),
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
        _set_global_state(state["numpy"])
        for key, generator in self.generators.items():
            if isinstance(generator, torch.Generator):
                generator.set_state(state["generators"][key])
            else:
                generator.bit_generator.state = _numpy(state["generators"][key])

    def seed(self, seed: int) -> None:
        """Start all streams anew."""
        torch.manual_seed(seed)
        random.seed(seed)
        _seed_global(seed, len(self.generators))
        for index, generator in enumerate(self.generators.values()):
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed + 1 + index)
            else:
                fresh = type(generator.bit_generator)(np.random.SeedSequence([seed, index]))
                generator.bit_generator.state = fresh.state


class StreamsPart:
    """Keep every rank's streams under its number."""

    whole = ""

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
        state = decode(manifest.values[source], _Reference)
        kept = state["generators"]
        _fit_kind(manifest, f"{source}/numpy", _global_kind(), _kind_of_state(state["numpy"]))
        for key, generator in self.streams.generators.items():
            where = f"{source}/generators/{key}"
            if key not in kept:
                raise CheckpointError(
                    f"{where}: {manifest.title} has no such stream, only {sorted(kept)}"
                )
            _fit_kind(manifest, where, _kind(generator), _kind_of_state(kept[key]))
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


def _fit_kind(manifest: Manifest, where: str, expected: str, found: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"{where}: expected a state of {expected}, {manifest.title} has one of {found}"
        )


def _kind(generator: Generator) -> str:
    if isinstance(generator, torch.Generator):
        return "torch.Generator"
    return str(generator.bit_generator.state["bit_generator"])


def _kind_of_state(state: Any) -> str:
    if isinstance(state, tuple):  # of NumPy's global stream, as it is without a word from the user
        return "MT19937"
    return "torch.Generator" if isinstance(state, _Reference) else str(state["bit_generator"])


def _global_kind() -> str:
    """Return the bit generator of NumPy's global stream; np.random.set_bit_generator changes it."""
    return str(np.random.get_state(legacy=False)["bit_generator"])


def _global_state() -> Any:
    """Return the state of NumPy's global stream: of MT19937 a tuple, as checkpoints always had."""
    state = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return _plain(state)
    twister = state["state"]
    keys = torch.from_numpy(twister["key"].astype(np.int64))
    return keys, twister["pos"], state["has_gauss"], state["gauss"]


def _set_global_state(state: Any) -> None:
    if not isinstance(state, tuple):
        np.random.set_state(_numpy(state))
        return
    keys, place, has_gauss, cached = state
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), place, has_gauss, cached))


def _seed_global(seed: int, index: int) -> None:
    """Start NumPy's global stream anew.  index: no other stream's."""
    untyped: Any = np.random  # its annotations leave this function out
    kind = type(untyped.get_bit_generator())
    if kind is np.random.MT19937:
        np.random.seed(seed % 2**32)
    else:
        fresh: Any = kind(np.random.SeedSequence([seed, index]))
        np.random.set_state(fresh.state)


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
