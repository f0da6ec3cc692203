"""The text form of a whole plan: one line per stage, such as "stage 0: F0 F1 B0 B1"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .actions import Action, parse_actions
from .plan import PlanError

__all__ = ["WrittenPlan", "parse_plan", "print_plan"]

_LINE = re.compile(r"stage (\d+):(.*)\Z")


@dataclass(frozen=True)
class WrittenPlan:
    """Hold a plan that was written out for one number of stages and of micro-batches.

    A plan function, as `Pipeline` takes it. PlanError when asked for another size.
    """

    rows: tuple[tuple[Action, ...], ...]

    @property
    def num_microbatches(self) -> int:
        """Return the number of micro-batches, one beyond the last that any action names."""
        return max((action.microbatch + 1 for row in self.rows for action in row), default=0)

    def __call__(self, stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
        size = len(self.rows), self.num_microbatches
        if size != (num_stages, num_microbatches):
            raise PlanError(
                f"the plan is written for {size[0]} stages and {size[1]} micro-batches, not for "
                f"{num_stages} and {num_microbatches}"
            )
        return self.rows[stage]


def print_plan(rows: Sequence[Sequence[Action]]) -> str:
    """Print the actions of every stage; the inverse of `parse_plan`."""
    return "".join(
        f"stage {stage}: {' '.join(map(str, row))}".rstrip() + "\n"
        for stage, row in enumerate(rows)
    )


def parse_plan(text: str) -> WrittenPlan:
    """Read a plan; empty lines, and what follows a "#", are skipped.

    ValueError names the line that is no stage, or the stage that is missing or out of order.
    Whether the plan can run is for `plan.check_plan` to say.
    """
    rows: list[tuple[Action, ...]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.match(line)
        if match is None or int(match[1]) != len(rows):
            raise ValueError(f"line {number}: expected 'stage {len(rows)}: F0 ...', got {line!r}")
        rows.append(parse_actions(match[2], len(rows)))
    if not rows:
        raise ValueError("expected a line for every stage, got none")
    return WrittenPlan(tuple(rows))
