"""Wait for the first of several works."""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import require, seconds
from .errors import CommTimeout
from .progress import Progress
from .texts import few
from .waited import Waited
from .work import Work


def first_ended(works: Sequence[Work], timeout: float | None, progress: Progress) -> int:
    """Advance all works until one of `works` has ended, well or not; return its place.

    timeout: seconds; the job's own where None.
    Raises: CommTimeout when time is up; ValueError without works, or TypeError for what is none.
    """
    for place, work in enumerate(works):
        require(f"works[{place}]", work, Work)
    if not works:
        raise ValueError("works: expected one or more, got none")
    if timeout is not None:
        seconds("timeout", timeout, positive=False)
    patience = progress.timeout if timeout is None else timeout
    transport = works[0].transport
    progress.require_own(transport.rank)
    progress.require_uninterrupted()
    waited, spins = Waited(), 0
    while True:
        progress.poll(works)
        for place, work in enumerate(works):
            if work.ended:
                return place
        if waited.look() >= patience:
            raise CommTimeout(
                f"rank {transport.rank} waited {waited.seconds:.1f} s in vain for any of: "
                f"{few([*map(str, works)], '; ')}"
            )
        spins += 1
        transport.pause(spins)
