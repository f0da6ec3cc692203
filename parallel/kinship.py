"""Tell which of a rank's wrappers have parameters in common, and which of them reduces each.

Towers on one encoder, heads with a tied embedding, or a wrapper within a wrapped module: each would
reduce the same gradient, one where it lies while another copies it. All that the answers depend on
is equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

from torch import nn

from ..comm.texts import shown_ranks

__all__ = ["Kin", "Mode"]


@dataclass
class Mode:
    """How a wrapper's next backward is reduced; what counts is what stands here when it runs.

    source: the rank that sends its buffers to all at the end, if `buffers`.
    synchronize: whether it is reduced at all.
    weight: of this rank in the mean; None where all count alike.
    """

    source: int
    buffers: bool
    synchronize: bool = True
    weight: float | None = None


class Kin:
    """One wrapper, and what it shares with the other wrappers of its rank.

    named: its parameters.
    ranks: those that it reduces over, by their numbers in the world.
    age: greater than that of every wrapper before it; the same on all ranks.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], ranks: Sequence[int], mode: Mode
    ) -> None:
        self._named, self._ranks = named, ranks
        self._mode = mode
        self.age = 0
        self._shared: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()

    def meet(self, older: Sequence[Self]) -> None:
        """Find what is shared with the wrappers that were made before."""
        own = {id(parameter): index for index, (_, parameter) in enumerate(self._named)}
        for other in older:
            self.age = max(self.age, other.age + 1)
            pairs = [
                (own[id(parameter)], index)
                for index, (_, parameter) in enumerate(other._named)
                if id(parameter) in own
            ]
            # What one rank has by itself is reduced with nobody, but for its weight.
            if pairs and (len(self._ranks) > 1) == (len(other._ranks) > 1):
                self._shared[other] = [mine for mine, _ in pairs]
                other._shared[self] = [its for _, its in pairs]

    def part(self) -> None:
        """Have nothing in common with anybody any more."""
        for other in list(self._shared):
            other._shared.pop(self, None)
        self._shared.clear()

    def family(self) -> list[Self]:
        """Return all wrappers that reduce together with this one, the oldest first.

        They share a parameter that is trained now with this one, or with another of the family.
        Wrappers whose backwards are not to be reduced are left out.

        Raises: RuntimeError where they reduce over different ranks.
        """
        if not self._shared:
            return [self]
        found, new = {self}, [self]
        while new:
            one = new.pop()
            for other, indices in list(one._shared.items()):
                shared = [one._named[index] for index in indices]
                trained = [name for name, parameter in shared if parameter.requires_grad]
                if other in found or not other._mode.synchronize or not trained:
                    continue
                if sorted(other._ranks) != sorted(one._ranks):
                    raise RuntimeError(
                        f"{trained[0]} is in two wrappers that would reduce it in one backward, "
                        f"over {_shown(one._ranks)} and {_shown(other._ranks)}: wrap it once, or "
                        "keep one of them out with no_sync()"
                    )
                found.add(other)
                new.append(other)
        return sorted(found, key=lambda one: one.age)

    def ahead(self, family: Sequence[Self]) -> list[Self]:
        """Return those of the family that reduce, in this one's place, what it shares with them.

        Wrappers with a weight come before those without, which do not know the weights; then those
        with more parameters, as a wrapper around a wrapper; then the younger ones.
        """
        return [other for other in family if other._precedence > self._precedence]

    def shared_with(self, others: Sequence[Self]) -> frozenset[int]:
        """Return the indices of the parameters that others have, too."""
        return frozenset(index for other in others for index in self._shared.get(other, ()))

    @property
    def _precedence(self) -> tuple[bool, int, int]:
        return self._mode.weight is not None, len(self._named), self.age


def _shown(ranks: Sequence[int]) -> str:
    return shown_ranks(sorted(ranks))
