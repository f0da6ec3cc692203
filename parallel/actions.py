"""What one pipeline stage does with one micro-batch.

A plan is a tuple of actions. The engine executes it, `plan_check.check_plan` simulates it
and `plan_check.draw` prints it, all from the same values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Action", "Kind", "parse_actions"]


class Kind(StrEnum):
    """Tell what is computed; the value is the letter of the text form.

    A backward may be split: INPUT computes the gradients that the stage before waits for, WEIGHT
    those of the parameters, any time later.
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"


@dataclass(frozen=True, slots=True)
class Action:
    """Name one forward or backward of one micro-batch on one stage.

    The text form leaves the stage out, since a row of a drawing mostly belongs to one stage:
    `str(Action(Kind.BACKWARD, 3, stage=1)) == "B3"`. Where a rank has several, it is `placed`.
    """

    kind: Kind
    microbatch: int
    stage: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", Kind(self.kind))  # of a user's it may be the letter

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}"

    @property
    def placed(self) -> str:
        """Return the text form with the stage: "B3@1"."""
        return f"{self}@{self.stage}"

    @property
    def gives(self) -> Action:
        """Return the action that others wait for: with INPUT they have what a backward sends."""
        if self.kind is Kind.INPUT:
            return Action(Kind.BACKWARD, self.microbatch, self.stage)
        return self

    def needs(self, num_stages: int) -> Iterable[Action]:
        """Yield the actions that must have ended before this one may start.

        A forward needs the forward of the stage before; a backward needs its own forward and
        the backward of the stage after; the gradients of weights need those of inputs.
        """
        if self.kind is Kind.FORWARD:
            if self.stage > 0:
                yield Action(Kind.FORWARD, self.microbatch, self.stage - 1)
            return
        if self.kind is Kind.WEIGHT:
            yield Action(Kind.BACKWARD, self.microbatch, self.stage)
            return
        yield Action(Kind.FORWARD, self.microbatch, self.stage)
        if self.stage < num_stages - 1:
            yield Action(Kind.BACKWARD, self.microbatch, self.stage + 1)


_WORD = re.compile(r"([FBIW])(\d+)(?:@(\d+))?\Z")


def parse_actions(text: str, stage: int) -> tuple[Action, ...]:
    """Read the actions of one rank from words such as "F0 F1 B0 B1", or "F0@0 F0@2".

    stage: of the words that name none. The inverse of `" ".join(map(str, actions))`. ValueError
    names the word that is no action.
    """
    actions = []
    for position, word in enumerate(text.split()):
        match = _WORD.match(word)
        if match is None:
            raise ValueError(
                f"stage {stage}, word {position}: expected an action such as F0, B3 or B3@1, "
                f"got {word!r}"
            )
        own = stage if match[3] is None else int(match[3])
        actions.append(Action(Kind(match[1]), int(match[2]), own))
    return tuple(actions)
