"""Simulate a whole plan: refuse what cannot run, and tell times and activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..comm.texts import few
from .actions import Action, Kind

__all__ = [
    "Placed",
    "PlanError",
    "PlanReport",
    "check_plan",
    "draw",
    "num_stages_of",
    "stage_peaks",
]


class PlanError(ValueError):
    """Refuse a plan that cannot run, or does not compute every gradient exactly once."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Put an action on the time axis: [start, end) in the units of the costs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class PlanReport:
    """Hold what a simulated plan costs.

    `timeline` and `peak_activations` have one entry per rank; `peak_activations` counts the
    micro-batches whose forward has started and whose backward has not ended, on each of its stages.
    """

    timeline: tuple[tuple[Placed, ...], ...]
    peak_activations: tuple[int, ...]
    makespan: float

    @property
    def bubble(self) -> float:
        """Return the idle share of all ranks' time, between 0 and 1."""
        busy = sum(placed.end - placed.start for row in self.timeline for placed in row)
        total = self.makespan * len(self.timeline)
        return 1.0 - busy / total if total else 0.0


def num_stages_of(rows: Sequence[Sequence[Action]]) -> int:
    """Return the number of stages of a whole plan: as many for every rank, at least one."""
    last = max((action.stage for row in rows for action in row), default=0)
    return len(rows) * (last // len(rows) + 1)


def stage_peaks(rows: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    """Return for every stage the most micro-batches whose activations it keeps at once."""
    return tuple(
        _peak([action for action in rows[stage % len(rows)] if action.stage == stage])
        for stage in range(num_stages_of(rows))
    )


def check_plan(
    rows: Sequence[Sequence[Action]],
    num_microbatches: int,
    *,
    forward_cost: float = 1.0,
    backward_cost: float = 1.0,
    weight_cost: float | None = None,
) -> PlanReport:
    """Simulate all ranks together, messages taking no time, and report times and activations.

    `rows[r]` lists the actions of rank r in order; stage s is on rank s modulo the ranks. The costs
    are of one stage. weight_cost: the part of backward_cost that a split backward spends on
    weights, by default half. PlanError names the rank and the action that is missing, doubled or
    foreign; on a deadlock it names the stuck action of every rank and what that waits for.
    TypeError for what is no Action.
    """
    _require_actions(rows)
    names = _Names(len(rows), num_stages_of(rows))
    for rank, actions in enumerate(rows):
        _check_complete(names, rank, actions, num_microbatches)
    weights = backward_cost / 2 if weight_cost is None else weight_cost
    cost = {
        Kind.FORWARD: forward_cost,
        Kind.BACKWARD: backward_cost,
        Kind.INPUT: backward_cost - weights,
        Kind.WEIGHT: weights,
    }
    ended: dict[Action, float] = {}
    done: list[list[Placed]] = [[] for _ in rows]
    moved = True
    while moved:
        moved = False
        for row, actions in zip(done, rows, strict=True):
            while len(row) < len(actions):
                action = actions[len(row)]
                needs = tuple(action.needs(names.num_stages))
                if not all(need in ended for need in needs):
                    break
                free = row[-1].end if row else 0.0
                start = max([free, *(ended[need] for need in needs)])
                end = ended[action.gives] = start + cost[action.kind]
                row.append(Placed(action, start, end))
                moved = True
    if any(len(row) < len(actions) for row, actions in zip(done, rows, strict=True)):
        raise PlanError(_describe_deadlock(names, rows, done, ended))
    return PlanReport(
        timeline=tuple(tuple(row) for row in done),
        peak_activations=tuple(_peak(actions) for actions in rows),
        makespan=max((row[-1].end for row in done if row), default=0.0),
    )


@dataclass(frozen=True)
class _Names:
    """Say rank and action where a rank has several stages, else stage and plain action."""

    num_ranks: int
    num_stages: int

    def row(self, rank: int) -> str:
        return f"{'stage' if self.num_stages == self.num_ranks else 'rank'} {rank}"

    def action(self, action: Action) -> str:
        return str(action) if self.num_stages == self.num_ranks else action.placed


def draw(report: PlanReport) -> str:
    """Print one row per rank on a time axis of whole units.

    An action stands where it starts and "-" where it goes on; "." is idle. The costs given to
    `check_plan` must be whole numbers, else ValueError.
    """
    actions = [[placed.action for placed in row] for row in report.timeline]
    names = _Names(len(actions), num_stages_of(actions))
    labels = [names.action(action) for row in actions for action in row]
    width = max((len(label) for label in labels), default=1)
    lines = []
    for rank, row in enumerate(report.timeline):
        cells = ["."] * _whole(report.makespan)
        for placed in row:
            start, end = _whole(placed.start), _whole(placed.end)
            label = names.action(placed.action)
            cells[start:end] = [label, *["-"] * (end - start - 1)][: end - start]
        text = " ".join(cell.ljust(width) for cell in cells).rstrip()
        lines.append(f"{names.row(rank)} | {text}")
    return "\n".join(lines)


def _require_actions(rows: Sequence[Sequence[Action]]) -> None:
    """Refuse what only a plan function of a user's tells, before stages are counted by it."""
    for rank, actions in enumerate(rows):
        for position, action in enumerate(actions):
            where = f"rank {rank}, position {position}"
            if not isinstance(action, Action):
                raise TypeError(f"{where}: expected an Action, got {action!r:.80}")
            if min(action.microbatch, action.stage) < 0:
                raise PlanError(f"{where}: {action.placed} has a number below 0")


def _check_complete(
    names: _Names, rank: int, actions: Sequence[Action], num_microbatches: int
) -> None:
    own = range(rank, names.num_stages, names.num_ranks)
    split = {(a.microbatch, a.stage) for a in actions if a.kind in (Kind.INPUT, Kind.WEIGHT)}
    expected = {
        Action(kind, m, stage)
        for stage in own
        for m in range(num_microbatches)
        for kind in (_SPLIT if (m, stage) in split else _WHOLE)
    }
    seen: set[Action] = set()
    for position, action in enumerate(actions):
        where, what = f"{names.row(rank)}, position {position}", names.action(action)
        if action.stage not in own:
            holder = names.row(action.stage % names.num_ranks)
            raise PlanError(f"{where}: {what} belongs to {holder}")
        if action not in expected:
            if action.microbatch < num_microbatches:
                raise PlanError(f"{where}: {what} doubles a backward that is split")
            raise PlanError(f"{where}: {what} is beyond the {num_microbatches} micro-batches")
        if action in seen:
            raise PlanError(f"{where}: {what} is doubled")
        seen.add(action)
    if missing := sorted(expected - seen, key=lambda a: (a.stage, a.kind, a.microbatch)):
        raise PlanError(f"{names.row(rank)}: missing {' '.join(map(names.action, missing))}")


def _describe_deadlock(
    names: _Names,
    rows: Sequence[Sequence[Action]],
    done: Sequence[Sequence[Placed]],
    ended: Mapping[Action, float],
) -> str:
    stuck = []
    for rank, (row, actions) in enumerate(zip(done, rows, strict=True)):
        if len(row) == len(actions):
            stuck.append(f"{names.row(rank)} has ended")
            continue
        action = actions[len(row)]
        waits = next(need for need in action.needs(names.num_stages) if need not in ended)
        stuck.append(
            f"{names.row(rank)} is stuck at {names.action(action)}, "
            f"waiting for {waits} of stage {waits.stage}"
        )
    return "deadlock: " + few(stuck, "; ")


_WHOLE = (Kind.FORWARD, Kind.BACKWARD)
_SPLIT = (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT)
# What an action does to the number of micro-batches whose activations are kept.
_LIVE = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.INPUT: 0, Kind.WEIGHT: -1}


def _peak(actions: Sequence[Action]) -> int:
    live = peak = 0
    for action in actions:
        live += _LIVE[action.kind]
        peak = max(peak, live)
    return peak


def _whole(time: float) -> int:
    if time != int(time):
        raise ValueError(f"expected times in whole units to draw, got {time}")
    return int(time)
