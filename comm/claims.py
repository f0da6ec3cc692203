"""What rules claim by `alike`: that rounds cost the same, so that one is priced for all of them.

`verify` proves the claims with all else, since a false one would make a price wrong by any factor.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from .answers import Integers, in_round
from .errors import ScheduleError
from .evaluation import Moves, moves
from .schedule import Chunks, Peers, Round, Schedule, require_hash

Rule = TypeVar("Rule", Peers, Chunks)

Kinds = dict[Round, Integers]
"""What was priced for all rounds of a kind: how many chunks each rank sends."""


def kind_of(rule: Rule, index: int | None = None) -> Rule:
    """Return what a rule calls alike; ScheduleError, with the round's index, for what is none."""
    base = Peers if isinstance(rule, Peers) else Chunks
    name = f"{type(rule).__name__}.alike"
    with in_round(index):
        try:
            found = rule.alike()
        except ScheduleError:
            raise
        except Exception as error:
            raise ScheduleError(f"{name} raised {type(error).__name__}: {error}") from error
        if not isinstance(found, base):
            raise ScheduleError(f"{name} returned {found!r}, expected a {base.__name__} rule")
    return found


def require_kinds(schedule: Schedule) -> None:
    """Raise ScheduleError where what a rule calls alike is no rule, or cannot be remembered."""
    for index, round in enumerate(schedule.rounds):
        require_hash(kind_of(round.peers, index), index)
        require_hash(kind_of(round.chunks, index), index)


def refuse_false_claims(
    schedule: Schedule, round: Round, step: Moves, index: int, kinds: Kinds
) -> None:
    """Refuse a round priced as one in which ranks send other numbers of chunks, on nodes or not.

    kinds: of the rounds before; this one's are added.
    Raises: ScheduleError.
    """
    peers, chunks = kind_of(round.peers, index), kind_of(round.chunks, index)
    require_hash(peers, index)
    require_hash(chunks, index)
    sent = _lengths(schedule, step)
    for rule, told, kind in (
        (round.chunks, chunks, Round(round.peers, chunks, round.reduce)),
        (round.peers, peers, Round(peers, chunks, round.reduce)),
    ):
        if kind not in kinds:
            kinds[kind] = sent if kind == round else _priced(schedule, kind, index)
        wrong = np.flatnonzero(kinds[kind] != sent)
        if wrong.size:
            rank = int(wrong[0])
            raise ScheduleError(
                f"sends {sent[rank]} chunks, and {kinds[kind][rank]} with {told!r:.200}, which "
                f"{type(rule).__name__}.alike calls alike: it would be priced as that",
                round=index,
                rank=rank,
            )


def _priced(schedule: Schedule, kind: Round, index: int) -> Integers:
    step = moves(kind, schedule.size, schedule.num_chunks, index)
    busy = np.bincount(step.dst, minlength=schedule.size)
    if (busy > 1).any() or (step.dst == step.src).any():
        raise ScheduleError(
            f"{kind.peers!r:.200}, which is called alike, is priced for this round, and is none: "
            "with it ranks send to themselves, or several to one",
            round=index,
        )
    return _lengths(schedule, step)


def _lengths(schedule: Schedule, step: Moves) -> Integers:
    lengths = np.zeros(schedule.size, dtype=np.int64)
    lengths[step.src] = step.length
    return lengths
