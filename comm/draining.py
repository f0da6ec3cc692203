"""Finish what is in flight before a rank closes a group, or ends."""

from __future__ import annotations

import time

from ..kernels.say import say
from .errors import PeerLost
from .patience import CHECK, Doubts
from .progress import Picks, Progress
from .work import Work

_LOOK = 100e-6
"""Seconds between two looks."""

_TELL, _SHOWN = 5.0, 4
"""Seconds after which the rank says what it waits for, and of how many works."""


def drain(progress: Progress, timeout: float, picks: Picks, before: str) -> None:
    """Advance until no work that `picks` picks is in flight, the works' own errors aside.

    A work that somebody has waited for in vain is not waited for again; one that waits for a
    rank that is gone ends. Where it takes long, say so.  before: what the rank does then.
    """
    start = checked = time.monotonic()
    told = False
    doubts = Doubts(progress.deaths)
    while True:
        progress.advance()
        now = time.monotonic()
        waited = now - start
        works = [work for work in progress.works if picks(work) and not work.overdue]
        if not works or waited >= timeout:
            return
        if waited > _TELL and not told:
            told = True
            say(
                f"rank {works[0].transport.rank} waits, before it {before}, for what is in "
                f"flight: {'; '.join(map(str, works[:_SHOWN]))}"
            )
        if now - checked >= CHECK:
            checked = now
            _mourn(progress, works, doubts)
        time.sleep(_LOOK)


def _mourn(progress: Progress, works: list[Work], doubts: Doubts) -> None:
    """End works that wait for ranks that are gone."""
    for work in works:
        try:
            doubts.arise(work, whole=False)
        except PeerLost as error:
            progress.lose(work, error)
