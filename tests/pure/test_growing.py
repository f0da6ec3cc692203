"""What starts processes in place of dead ranks asks before whether that can help."""

from typing import Any

import pytest

from ringfold.comm.errors import CommError, PeerLost
from ringfold.comm.growing import Growth


class FakeSurvivors:
    """One rank that lives, of two; `others` is what those that it agrees with give."""

    def __init__(self, others: int = -1) -> None:
        self.size, self.others, self.started = 2, others, 0

    def agree(self, flags: int) -> int:
        return flags & self.others

    def grow(self, missing: int, *_: Any) -> None:
        self.started += missing


def growth(survivors: Any, attempts: int = 2) -> Growth:
    made = Growth(survivors, ["program"], attempts, 1.0)
    survivors.size = 1
    return made


def test_those_that_die_again_in_one_recovery_are_not_started_for_ever() -> None:
    """What had been done before it counted as progress each time."""
    survivors = FakeSurvivors()
    grows = growth(survivors)
    grows.grow(7)
    grows.grow(7)
    with pytest.raises(CommError, match=r"died 2 times in a row, and .* \(7 steps are\)"):
        grows.grow(7)
    grows.grow(8)
    assert survivors.started == 3 and grows.starts == 1


def test_one_that_is_joining_gives_up_with_the_others() -> None:
    """It has counted none of their starts; where they raised, it would start others alone."""
    survivors = FakeSurvivors(others=~4)  # of whom one has started others too often
    with pytest.raises(CommError, match="nothing was done in between: see"):
        growth(survivors).grow(-1)
    assert survivors.started == 0


def test_nothing_is_started_where_one_more_has_died() -> None:
    survivors = FakeSurvivors(0)
    with pytest.raises(PeerLost):
        growth(survivors).grow(7)
    assert survivors.started == 0


def test_nothing_is_started_where_none_is_missing_or_nothing_is_to_be() -> None:
    survivors: Any = FakeSurvivors()
    whole, shrinking = Growth(survivors, ["program"], 2, 1.0), Growth(survivors, None, 2, 1.0)
    whole.grow(7)
    survivors.size = 1
    shrinking.grow(7)
    assert survivors.started == 0
