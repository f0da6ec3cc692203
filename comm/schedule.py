"""A collective algorithm as data: rounds of (who talks to whom, which chunks move, reduce or copy).

Rules are formulas over an array of ranks, so that the same schedule is proven over all ranks, run
by each of them, and priced at a hundred thousand.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .collective import Collective
from .errors import ScheduleError

NOBODY = -1
"""The peer of a rank that sits a direction of a round out."""

Ranks = Any
"""An integer array of ranks, which a rule leaves as it is; it returns as many, or one for all."""


class Peers:
    """Who talks to whom in a round; subclass as a frozen dataclass and give both directions."""

    def __init_subclass__(cls) -> None:
        """Let a rule with a direction of its own inherit no claim about another's."""
        super().__init_subclass__()
        _drop_claims(cls, Peers, {"dst", "src"}, ("alike", "members"))

    def dst(self, rank: Ranks, size: int) -> Ranks:
        """Return the rank that `rank` sends to, or NOBODY."""
        raise NotImplementedError(f"{type(self).__name__} has no `dst`")

    def src(self, rank: Ranks, size: int) -> Ranks:
        """Return the rank that `rank` receives from, or NOBODY."""
        raise NotImplementedError(f"{type(self).__name__} has no `src`")

    def alike(self) -> Peers:
        """Return one representative of all rules with which the same ranks send.

        Where every rank has a node of its own, it matters for a price who sends, not to whom. What
        is derived from a rule is none of its kind, as with Chunks.
        """
        return self

    def members(self, size: int) -> npt.NDArray[np.int64]:
        """Return the ranks that send or receive, in order, where these are few; all by default.

        A price looks at these alone.
        """
        return np.arange(size, dtype=np.int64)


class Chunks:
    """Which chunks a rank sends in a round; it receives what its source sends."""

    def __init_subclass__(cls) -> None:
        """Let a rule with a span of its own stand for itself, unless it says what is alike."""
        super().__init_subclass__()
        _drop_claims(cls, Chunks, {"span"}, ("alike",))

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        """Return (first, length): chunks first, first + 1, ... modulo num_chunks."""
        raise NotImplementedError(f"{type(self).__name__} has no `span`")

    def alike(self) -> Chunks:
        """Return one representative of all rules that give every rank the same length.

        Rounds that are alike cost the same, and are priced once. A rule derived from another is
        none of that one's kind where it has a span, and no `alike`, of its own.
        """
        return self


def _drop_claims(cls: type, base: type, methods: set[str], claims: tuple[str, ...]) -> None:
    """Undo claims that a class inherits from further up than the methods that they are about.

    Those claims were made for other methods; the class gets the base's, which claim nothing. Its
    methods may come from its own body or from a class that is mixed in.
    """

    def where(names: set[str]) -> int:
        return next(at for at, kind in enumerate(cls.__mro__) if names & vars(kind).keys())

    for claim in claims:
        if where({claim}) > where(methods):
            setattr(cls, claim, getattr(base, claim))


@dataclass(frozen=True)
class Shift(Peers):
    """Send `by` ranks ahead around the ring, receive from as many behind."""

    by: int

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return (rank + self.by) % size

    def src(self, rank: Ranks, size: int) -> Ranks:
        return (rank - self.by) % size

    def alike(self) -> Peers:
        return Shift(1)


@dataclass(frozen=True)
class Reverse(Peers):
    """Swap the directions of another peers rule."""

    of: Peers

    def dst(self, rank: Ranks, size: int) -> Ranks:
        return self.of.src(rank, size)

    def src(self, rank: Ranks, size: int) -> Ranks:
        return self.of.dst(rank, size)

    def members(self, size: int) -> npt.NDArray[np.int64]:
        return self.of.members(size)


@dataclass(frozen=True)
class All(Chunks):
    """Send every chunk."""

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        zero = rank * 0
        return zero, zero + num_chunks


@dataclass(frozen=True)
class Rotated(Chunks):
    """Send the one chunk `offset` places from the rank's own number, modulo num_chunks."""

    offset: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return (rank + self.offset) % num_chunks, rank * 0 + 1

    def alike(self) -> Chunks:
        return Rotated(0)


@dataclass(frozen=True)
class AllBut(Chunks):
    """Send every chunk except the one that `Rotated(offset)` would send."""

    offset: int

    def span(self, rank: Ranks, size: int, num_chunks: int) -> tuple[Ranks, Ranks]:
        return (rank + self.offset + 1) % num_chunks, rank * 0 + num_chunks - 1

    def alike(self) -> Chunks:
        return AllBut(0)


@dataclass(frozen=True, slots=True)
class Round:
    """One exchange: every rank sends to at most one peer and receives from at most one.

    All ranks send what they hold at the start of the round; `reduce` adds what arrives to what the
    receiver holds, otherwise it replaces it. As it does so in place, a rank cannot receive a copy
    of what it sends, nor a run to be added that begins inside, and not at the beginning of, the run
    that it sends; `verify` refuses that.

    Raises: TypeError for peers and chunks that are no such rules, and for a reduce that is no bool.
    """

    peers: Peers
    chunks: Chunks
    reduce: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("peers", Peers), ("chunks", Chunks)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__} rule, got {value!r}")
        if not isinstance(self.reduce, bool | np.bool_):
            raise TypeError(f"reduce: expected a bool, got {self.reduce!r}")
        object.__setattr__(self, "reduce", bool(self.reduce))


@dataclass(frozen=True)
class Schedule:
    """A collective algorithm for `size` ranks over a buffer cut into `num_chunks` chunks.

    Construction checks the numbers only; `verify.verify` proves the rounds, and a Communicator
    proves every schedule of a user's before it runs.

    Raises: ScheduleError where size, num_chunks and root do not fit the collective, or where a
    round is no Round.
    """

    collective: Collective
    size: int
    num_chunks: int
    rounds: tuple[Round, ...]
    root: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.collective, Collective):
            raise TypeError(
                "expected a Collective, such as ringfold.comm.collective.ALLREDUCE, got"
                f" {self.collective!r}"
            )
        object.__setattr__(self, "rounds", tuple(self.rounds))
        for name in ("size", "num_chunks", "root"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise ScheduleError(f"{name} must be a whole number, got {value!r}") from None
        for index, round in enumerate(self.rounds):
            if not isinstance(round, Round):
                raise ScheduleError(f"expected a Round, got {round!r}", round=index)
        problem = self.collective.misfit(self.size, self.num_chunks, self.root)
        if problem:
            raise ScheduleError(problem)

    def __repr__(self) -> str:
        return (
            f"Schedule({self.collective!r}, size={self.size}, num_chunks={self.num_chunks}, "
            f"{len(self.rounds)} rounds)"
        )


Algorithm = str | Schedule | None
"""What a call runs: a built-in one by name, a schedule of the caller's, or None for the best."""


def require_hashable(schedule: Schedule) -> None:
    """Raise ScheduleError where a rule cannot be remembered."""
    for index, round in enumerate(schedule.rounds):
        require_hash(round.peers, index)
        require_hash(round.chunks, index)


def require_hash(rule: Peers | Chunks, index: int) -> None:
    """Raise ScheduleError, with the round's index, where a rule cannot be remembered."""
    try:
        hash(rule)
    except TypeError as error:
        raise ScheduleError(
            f"the rule {type(rule).__name__} cannot be hashed ({error}): make it a frozen "
            "dataclass of hashable fields, tuples instead of lists",
            round=index,
        ) from None
