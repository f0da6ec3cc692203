"""The text form of a whole plan: one line per stage, such as "stage 0: F0 F1 B0 B1".

Where a rank has several stages, one line per rank, and the actions name theirs: "rank 0: F0@0 ...".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .actions import Action, parse_actions
from .plan_check import PlanError, num_stages_of

__all__ = ["WrittenPlan", "parse_plan", "print_plan"]

_LINE = re.compile(r"(?:stage|rank) (\d+):(.*)\Z")


@dataclass(frozen=True)
class WrittenPlan:
    """Hold a plan that was written out for one number of ranks and of micro-batches, a row a rank.

    A plan function, as `Pipeline` takes it. PlanError when asked for another size.
    """

    rows: tuple[tuple[Action, ...], ...]

    @property
    def num_microbatches(self) -> int:
        """Return the number of micro-batches, one beyond the last that any action names."""
        return max((action.microbatch + 1 for row in self.rows for action in row), default=0)

    def __call__(self, rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
        size = len(self.rows), self.num_microbatches
        if size != (num_ranks, num_microbatches):
            rows = "stages" if num_stages_of(self.rows) == len(self.rows) else "ranks"
            raise PlanError(
                f"the plan is written for {size[0]} {rows} and {size[1]} micro-batches, not for "
                f"{num_ranks} and {num_microbatches}"
            )
        return self.rows[rank]


def print_plan(rows: Sequence[Sequence[Action]]) -> str:
    """Print the actions of every rank; the inverse of `parse_plan`."""
    if num_stages_of(rows) == len(rows):
        lines = [f"stage {stage}: {' '.join(map(str, row))}" for stage, row in enumerate(rows)]
    else:
        lines = [f"rank {r}: {' '.join(a.placed for a in row)}" for r, row in enumerate(rows)]
    return "".join(line.rstrip() + "\n" for line in lines)


def parse_plan(text: str) -> WrittenPlan:
    """Read a plan; empty lines, and what follows a "#", are skipped.

    ValueError names the line that is no stage or rank, or that is missing or out of order.
    Whether the plan can run is for `plan_check.check_plan` to say.
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
