"""Wait for the first of several works."""

from __future__ import annotations

from collections.abc import Sequence

from .arguments import require, seconds
from .errors import CommTimeout
from .patience import ANSWERS, ASKS
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
    if len(works) == 1:
        return _wait(works[0], timeout, progress)
    waited, spins = Waited(), 0
    while True:
        progress.poll(works)
        for place, work in enumerate(works):
            if work.ended:
                return place
        if waited.look() >= patience:
            around = ""
            if timeout is None or timeout >= ASKS:  # as wait() does
                for work in works:
                    work.overdue = True
                if progress.inquiry is not None:
                    around = "; " + progress.inquiry.around(works[0], ANSWERS)
            raise CommTimeout(
                f"rank {transport.rank} waited {waited.seconds:.1f} s in vain for any of: "
                f"{few([*map(str, works)], '; ')}{around}"
            )
        spins += 1
        transport.pause(spins)


def _wait(work: Work, timeout: float | None, progress: Progress) -> int:
    """Wait for the only one, as its wait() does, which learns more; what ended it is not raised."""
    if not work.ended:
        try:
            progress.wait(work, timeout)
        except Exception:
            if not work.ended:
                raise
    return 0
