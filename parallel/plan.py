"""Pipeline plans as data: who computes what, in which order.

A plan function maps (stage, num_stages, num_microbatches) to the actions of that stage. All
plans here run the backwards in the order of the micro-batches, so that a stage adds its
gradients in one order whichever plan is used, and the results agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .actions import Action, Kind

__all__ = [
    "PLANS",
    "Placed",
    "PlanError",
    "PlanFunction",
    "PlanReport",
    "check_plan",
    "draw",
    "gpipe",
    "naive",
    "one_f_one_b",
    "plan_named",
    "whole_plan",
    "zero_bubble",
]

PlanFunction = Callable[[int, int, int], tuple[Action, ...]]


class PlanError(ValueError):
    """Refuse a plan that cannot run, or does not compute every gradient exactly once."""


def naive(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Take one micro-batch through all stages and back before the next: the plain layer split.

    Every stage keeps the activations of one micro-batch. Drawn for 2 stages, 2 micro-batches, a
    backward as long as a forward:

        stage 0 | F0 .  .  B0 F1 .  .  B1
        stage 1 | .  F0 B0 .  .  F1 B1 .
    """
    _check_place(stage, num_stages, num_microbatches)
    return tuple(
        Action(kind, m, stage)
        for m in range(num_microbatches)
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    )


def gpipe(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Run all forwards, then all backwards (Huang et al. 2019, GPipe, section 2.3).

    Every stage keeps the activations of all micro-batches. Drawn for 2 stages, 3 micro-batches,
    a backward as long as a forward:

        stage 0 | F0 F1 F2 .  .  B0 B1 B2
        stage 1 | .  F0 F1 F2 B0 B1 B2 .
    """
    _check_place(stage, num_stages, num_microbatches)
    forwards = (Action(Kind.FORWARD, m, stage) for m in range(num_microbatches))
    backwards = (Action(Kind.BACKWARD, m, stage) for m in range(num_microbatches))
    return (*forwards, *backwards)


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Alternate forwards and backwards after a short warmup (Narayanan et al. 2019, PipeDream,
    section 3.2, with one flush per step as in Narayanan et al. 2021, section 2.2).

    Stage s keeps the activations of at most num_stages - s micro-batches. Drawn for 2 stages,
    3 micro-batches, a backward as long as a forward:

        stage 0 | F0 F1 .  B0 F2 B1 .  B2
        stage 1 | .  F0 B0 F1 B1 F2 B2 .
    """
    _check_place(stage, num_stages, num_microbatches)
    warmup = min(num_stages - 1 - stage, num_microbatches)
    actions = [Action(Kind.FORWARD, m, stage) for m in range(warmup)]
    for steady in range(num_microbatches - warmup):
        actions.append(Action(Kind.FORWARD, warmup + steady, stage))
        actions.append(Action(Kind.BACKWARD, steady, stage))
    drained_from = num_microbatches - warmup
    actions += [Action(Kind.BACKWARD, m, stage) for m in range(drained_from, num_microbatches)]
    return tuple(actions)


def zero_bubble(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Split backwards, and fill the drain with gradients of weights (Qi et al. 2023, section 2.2,
    ZB-H1).

    The order of 1F1B, with the weights of stage s up to s micro-batches behind: every stage keeps
    the activations of at most num_stages micro-batches, as 1F1B does on its first. Drawn for 2
    stages, 3 micro-batches, all parts of one length:

        stage 0 | F0 F1 .  I0 W0 F2 I1 W1 I2 W2
        stage 1 | .  F0 I0 F1 I1 W0 F2 I2 W1 W2
    """
    actions: list[Action] = []
    behind = 0
    for action in one_f_one_b(stage, num_stages, num_microbatches):
        if action.kind is Kind.FORWARD:
            actions.append(action)
            continue
        actions.append(Action(Kind.INPUT, action.microbatch, stage))
        if action.microbatch >= stage:
            actions.append(Action(Kind.WEIGHT, behind, stage))
            behind += 1
    actions += [Action(Kind.WEIGHT, m, stage) for m in range(behind, num_microbatches)]
    return tuple(actions)


PLANS: Mapping[str, PlanFunction] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zero-bubble": zero_bubble,
}


def plan_named(name: str) -> PlanFunction:
    """Return the plan function of that name; ValueError lists the names there are."""
    try:
        return PLANS[name]
    except KeyError:
        known = ", ".join(sorted(PLANS))
        raise ValueError(f"unknown pipeline schedule {name!r}, expected one of: {known}") from None


def whole_plan(
    function: PlanFunction, num_stages: int, num_microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """Evaluate a plan function at every stage."""
    return tuple(function(stage, num_stages, num_microbatches) for stage in range(num_stages))


@dataclass(frozen=True, slots=True)
class Placed:
    """Put an action on the time axis: [start, end) in the units of the costs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class PlanReport:
    """Hold what a simulated plan costs.

    `timeline` and `peak_activations` have one entry per stage; `peak_activations` counts the
    micro-batches whose forward has started and whose backward has not ended.
    """

    timeline: tuple[tuple[Placed, ...], ...]
    peak_activations: tuple[int, ...]
    makespan: float

    @property
    def bubble(self) -> float:
        """Return the idle share of all stages' time, between 0 and 1."""
        busy = sum(placed.end - placed.start for row in self.timeline for placed in row)
        total = self.makespan * len(self.timeline)
        return 1.0 - busy / total if total else 0.0


def check_plan(
    stages: Sequence[Sequence[Action]],
    num_microbatches: int,
    *,
    forward_cost: float = 1.0,
    backward_cost: float = 1.0,
    weight_cost: float | None = None,
) -> PlanReport:
    """Simulate all stages together, messages taking no time, and report times and activations.

    `stages[s]` lists the actions of stage s in order. weight_cost: the part of backward_cost that a
    split backward spends on weights, by default half. PlanError names the stage and the action
    that is missing, doubled or foreign; on a deadlock it names the stuck action of every stage
    and what that action waits for.
    """
    for stage, actions in enumerate(stages):
        _check_complete(stage, actions, num_microbatches)
    weights = backward_cost / 2 if weight_cost is None else weight_cost
    cost = {
        Kind.FORWARD: forward_cost,
        Kind.BACKWARD: backward_cost,
        Kind.INPUT: backward_cost - weights,
        Kind.WEIGHT: weights,
    }
    ended: dict[Action, float] = {}
    rows: list[list[Placed]] = [[] for _ in stages]
    moved = True
    while moved:
        moved = False
        for row, actions in zip(rows, stages, strict=True):
            while len(row) < len(actions):
                action = actions[len(row)]
                needs = tuple(action.needs(len(stages)))
                if not all(need in ended for need in needs):
                    break
                free = row[-1].end if row else 0.0
                start = max([free, *(ended[need] for need in needs)])
                end = ended[action.gives] = start + cost[action.kind]
                row.append(Placed(action, start, end))
                moved = True
    if any(len(row) < len(actions) for row, actions in zip(rows, stages, strict=True)):
        raise PlanError(_describe_deadlock(stages, rows, ended))
    return PlanReport(
        timeline=tuple(tuple(row) for row in rows),
        peak_activations=tuple(_peak(actions) for actions in stages),
        makespan=max((row[-1].end for row in rows if row), default=0.0),
    )


def draw(report: PlanReport) -> str:
    """Print one row per stage on a time axis of whole units.

    An action stands where it starts and "-" where it goes on; "." is idle. The costs given to
    `check_plan` must be whole numbers, else ValueError.
    """
    labels = [str(placed.action) for row in report.timeline for placed in row]
    width = max((len(label) for label in labels), default=1)
    lines = []
    for stage, row in enumerate(report.timeline):
        cells = ["."] * _whole(report.makespan)
        for placed in row:
            start, end = _whole(placed.start), _whole(placed.end)
            cells[start:end] = [str(placed.action), *["-"] * (end - start - 1)][: end - start]
        text = " ".join(cell.ljust(width) for cell in cells).rstrip()
        lines.append(f"stage {stage} | {text}")
    return "\n".join(lines)


def _check_place(stage: int, num_stages: int, num_microbatches: int) -> None:
    if num_stages < 1 or not 0 <= stage < num_stages:
        raise ValueError(f"expected 0 <= stage < num_stages, got stage {stage} of {num_stages}")
    if num_microbatches < 0:
        raise ValueError(f"expected num_microbatches >= 0, got {num_microbatches}")


def _check_complete(stage: int, actions: Sequence[Action], num_microbatches: int) -> None:
    split = {a.microbatch for a in actions if a.kind in (Kind.INPUT, Kind.WEIGHT)}
    expected = {
        Action(kind, m, stage)
        for m in range(num_microbatches)
        for kind in (_SPLIT if m in split else _WHOLE)
    }
    seen: set[Action] = set()
    for position, action in enumerate(actions):
        where = f"stage {stage}, position {position}"
        if action.stage != stage:
            raise PlanError(f"{where}: {action} belongs to stage {action.stage}")
        if action not in expected:
            if action.microbatch < num_microbatches:
                raise PlanError(f"{where}: {action} doubles a backward that is split")
            raise PlanError(f"{where}: {action} is beyond the {num_microbatches} micro-batches")
        if action in seen:
            raise PlanError(f"{where}: {action} is doubled")
        seen.add(action)
    if missing := sorted(expected - seen, key=lambda action: (action.kind, action.microbatch)):
        raise PlanError(f"stage {stage}: missing {' '.join(map(str, missing))}")


def _describe_deadlock(
    stages: Sequence[Sequence[Action]],
    rows: Sequence[Sequence[Placed]],
    ended: Mapping[Action, float],
) -> str:
    stuck = []
    for stage, (row, actions) in enumerate(zip(rows, stages, strict=True)):
        if len(row) == len(actions):
            stuck.append(f"stage {stage} has ended")
            continue
        action = actions[len(row)]
        waits = next(need for need in action.needs(len(stages)) if need not in ended)
        stuck.append(
            f"stage {stage} is stuck at {action}, waiting for {waits} of stage {waits.stage}"
        )
    return "deadlock: " + "; ".join(stuck)


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
